"""What a run tells when it is done: `run.json`, and a few lines for people."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from puna import machine
from puna.checkpoint.model_card import ModelCard
from puna.runs.callbacks import RunState
from puna.runs.folder import RunFolder
from puna.runs.progress import duration
from puna.runs.settings import FinetuneSettings

if TYPE_CHECKING:
    from puna.runs.run import Finished


def report(
    settings: FinetuneSettings,
    folder: RunFolder,
    parts: Any,
    state: RunState,
    lines: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What `run.json` says.

    Args:
        settings: the run's.
        folder: its directory.
        parts: its model and batches.
        state: how far it came.
        lines: of `metrics.jsonl`.
    """
    model = parts.model
    base, revision = model.preset or (settings.preset, None)
    losses = [line["loss"] for line in lines if "loss" in line]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    peaks = [line["peak_memory"] for line in lines if line.get("peak_memory") is not None]
    used = state.best_step if settings.early_stopping else state.step
    trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    backend = keras.backend.backend()
    return {
        "result": folder.result.name,
        "base": {"preset": base, "revision": revision},
        "settings": settings.to_dict(),
        "learning_rate": settings.rate,
        "data": parts.rows,
        "steps": {"planned": parts.total, "done": state.step, "saved": used},
        "epochs": round(state.step / len(parts.batches), 4),
        "losses": {
            "first": losses[0],
            "last": losses[-1],
            "eval_first": measured[0] if measured else None,
            "eval_last": measured[-1] if measured else None,
            "eval_best": state.best_loss,
        },
        "parameters_trained": trained,
        "dtype": model.dtype_policy.name,
        "has_chat_template": bool(model.tokenizer.chat_templates),
        "tokens": state.tokens,
        "seconds": round(state.seconds, 2),
        "peak_memory": max(peaks, default=None),
        "curve": folder.curve.name if folder.curve.exists() else None,
        "samples": folder.samples.read()[-len(settings.sample_prompts) :]
        if settings.sample_prompts
        else [],
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": backend,
        "machine": machine.describe(),
        "versions": machine.versions(backend),
    }


def card_of(card: ModelCard, told: Mapping[str, Any]) -> ModelCard:
    """The model's card with what a report tells of its training."""
    settings, losses = told["settings"], told["losses"]
    measured = {
        "loss of the first step": losses["first"],
        "loss of the last step": losses["last"],
        "held-out loss before": losses["eval_first"],
        "held-out loss after": losses["eval_best"]
        if settings["early_stopping"]
        else losses["eval_last"],
    }
    names = ("method", "rank", "alpha", "dropout", "rslora", "quantization", "batch_size")
    names += ("sequence_length", "packing", "loss_on", "schedule", "warmup", "weight_decay")
    names += ("clip_norm", "seed")
    if settings["method"] == "full":
        names = tuple(n for n in names if n not in ("rank", "alpha", "dropout", "rslora"))
    own = {n.replace("_", " "): settings[n] for n in names if settings[n] is not None}
    steps = {"steps": told["steps"]["saved"], "learning rate": told["learning_rate"]}
    return dataclasses.replace(
        card,
        data={Path(name).name: rows for name, rows in told["data"]["files"].items()},
        hyperparameters=own | steps,
        metrics={name: number for name, number in measured.items() if number is not None},
        curve=told["curve"],
    )


def summary(finished: Finished) -> list[str]:
    """A run in a few lines, and what to do next."""
    told, directory = finished.report, finished.directory
    losses, steps = told["losses"], told["steps"]
    lines = [
        f"{steps['done']:,} steps, {told['tokens']:,} tokens in {duration(told['seconds'])}; "
        f"loss {losses['first']:.4f} at first, {losses['last']:.4f} at last"
    ]
    if losses["eval_first"] is not None:
        lines.append(
            f"held-out loss {losses['eval_first']:.4f} at first, {losses['eval_last']:.4f} at "
            f"last, {losses['eval_best']:.4f} at best; saved is step {steps['saved']:,}"
        )
    lines.append(f"written to {directory}. Next:")
    prompt = "" if told["has_chat_template"] else ' "Once upon a time"'
    lines.append(f"  puna {'generate' if prompt else 'chat'} {directory}{prompt}")
    if directory.name == "adapter" and told["settings"]["quantization"] is None:
        base = told["settings"]["preset"]
        lines.append(f"  puna fuse {base} --adapter {directory} --out ./merged")
    return lines
