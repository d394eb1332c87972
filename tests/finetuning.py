"""A tiny preset and rows for it, on disk, for tests of whole runs."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from puna.runs import FinetuneSettings
from puna.runs.lines import JsonLines
from puna.testing import WORDS, write_tiny_preset


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Chats of a few words, in JSON lines."""
    numbers = random.Random(seed)

    def said(most: int) -> str:
        return " ".join(numbers.choices(WORDS, k=numbers.randint(1, most)))

    rows = [
        {
            "messages": [
                {"role": "user", "content": said(4)},
                {"role": "assistant", "content": f"Hello {said(6)}"},
            ]
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_run(directory: Path, *, rows: int = 20, **changes: Any) -> FinetuneSettings:
    """Settings of a run of some steps on a tiny preset, which is written if it is not there."""
    preset, data = directory / "preset", directory / "train.jsonl"
    if not preset.exists():
        write_tiny_preset(preset, num_hidden_layers=1)
        write_rows(data, rows)
    settings: dict[str, Any] = {
        "preset": str(preset),
        "data": (str(data),),
        "out": str(directory / "out"),
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 0.01,
        "dropout": 0.1,
        "save_every": 3,
        "packing": True,  # all batches are of one shape
        "sequence_length": 64,
    }
    return FinetuneSettings(**(settings | changes))


class At(keras.callbacks.Callback):
    """Does something once a step is taken down."""

    def __init__(self, step: int, action: Callable[[], Any]):
        super().__init__()
        self.step = step
        self.action = action

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if logs["step"] == self.step:
            self.action()


class CrashError(Exception):
    """What a test ends a run with."""


def crash() -> None:
    raise CrashError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def lines_of(settings: FinetuneSettings) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return JsonLines(Path(settings.out) / "metrics.jsonl").read()


def losses_of(settings: FinetuneSettings) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in lines_of(settings) if "loss" in line]


def held_out_losses_of(settings: FinetuneSettings) -> dict[int, float]:
    """The held-out losses by the steps after which they were measured."""
    return {line["step"]: line["eval_loss"] for line in lines_of(settings) if "eval_loss" in line}
