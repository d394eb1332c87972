"""A tiny preset and rows for it, on disk, for tests of whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from puna.runs import FinetuneSettings
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
