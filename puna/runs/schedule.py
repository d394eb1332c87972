"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Any, Literal

import keras
from keras import ops
from keras.optimizers import schedules

from puna.runs.settings import FinetuneSettings


@keras.saving.register_keras_serializable(package="puna")
class Schedule(schedules.LearningRateSchedule):
    """It rises from 0 in a straight line, and stays or falls to 0.

    Args:
        kind: "constant", "linear" or "cosine": how it goes on after the rise.
        peak: the highest learning rate.
        warmup: steps of the rise.
        total: steps of all.

    >>> schedule = Schedule("linear", peak=1.0, warmup=2, total=6)
    >>> [schedule.at(step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self, kind: Literal["constant", "linear", "cosine"], peak: float, warmup: int, total: int
    ):
        self.kind = kind
        self.peak = peak
        self.warmup = warmup
        self.total = total

    @classmethod
    def of(cls, settings: FinetuneSettings, total: int) -> Schedule:
        """What settings ask for, where the weights change so many times."""
        warmup = settings.warmup
        rise = math.ceil(warmup * total) if warmup < 1 else int(warmup)
        return cls(settings.schedule, settings.rate, rise, total)

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step, from 0 on."""
        step = ops.cast(step, "float32")
        rising = (step + 1.0) / max(self.warmup, 1)
        gone = ops.clip((step - self.warmup) / max(self.total - self.warmup, 1), 0.0, 1.0)
        if self.kind == "linear":
            falling = 1.0 - gone
        elif self.kind == "cosine":
            falling = 0.5 * (1.0 + ops.cos(math.pi * gone))
        else:
            falling = ops.ones_like(gone)
        return self.peak * ops.where(step < self.warmup, rising, falling)

    def at(self, step: int) -> float:
        """The same as a number."""
        return float(ops.convert_to_numpy(self(step)))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            "kind": self.kind,
            "peak": self.peak,
            "warmup": self.warmup,
            "total": self.total,
        }
