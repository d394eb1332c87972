"""What a run tells when it is done: `run.json`, and a few lines for people."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from puna import machine
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
        lines.append(f"  puna convert {base} --adapter {directory} --out ./merged")
    return lines
