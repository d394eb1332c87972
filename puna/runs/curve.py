"""The curve of the loss, as a picture."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SMOOTH = 0.9  # the share of what came before in the thick line


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss by step: each step's thin, a running mean thick, and the held-out loss.

    Args:
        lines: of `metrics.jsonl`.
        path: the PNG file to write, all of it or nothing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if steps:
        places, losses = zip(*steps, strict=True)
        axes.plot(places, losses, color="#9ecae1", linewidth=0.8)
        axes.plot(places, smoothed(losses), color="#08519c", linewidth=1.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#d94801", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if steps or held_out:
        axes.legend(frameon=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean in which the past counts less and less, from the first value on.

    >>> smoothed([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    >>> smoothed([1.0, 0.0])[1] < 0.5
    True
    """
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTH * total + value
        weight = _SMOOTH * weight + 1.0
        found.append(total / weight)
    return found
