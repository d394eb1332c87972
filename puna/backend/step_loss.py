"""The loss that `fit` tells: Keras's mean over an epoch, and beside it that of the last step.

A mean of many steps in float32 does not give back the last of them, and on JAX a callback sees
nothing of the model but what `fit` tells it, unless all of its state is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.utils.tracking import DotNotTrackScope

STEP_LOSS = "step_loss"


class _ByRows(keras.metrics.Mean):
    """Keras's mean over batches, each weighted by its rows.

    Attributes:
        rows: how many the batch under way has, where that is not the length of its arrays.
    """

    rows: Any = None

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        super().update_state(values, sample_weight if self.rows is None else self.rows)


class _WithLast(_ByRows):
    """A mean that tells its last value too."""

    def __init__(self, name: str):
        super().__init__(name=name)
        self._last = self.add_variable((), keras.initializers.Zeros(), name="last")

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        super().update_state(values, sample_weight)
        self._last.assign(keras.ops.cast(keras.ops.mean(values), self._last.dtype))

    def result(self) -> dict[str, Any]:
        return {self.name: super().result(), STEP_LOSS: self._last.value}


def tell_step_loss(model: keras.Model) -> None:
    """Make `fit` and `evaluate` tell the loss of the last step, as `step_loss`.

    Args:
        model: a compiled model; to be called again when it is compiled again.
    """
    _track(model, _WithLast("loss"))


def weigh_by_rows(model: keras.Model) -> None:
    """Let `counting_rows` say what the batches of a compiled model weigh in its mean loss."""
    _track(model, _ByRows(name="loss"))


def _track(model: Any, tracker: _ByRows) -> None:
    with DotNotTrackScope():  # as Keras's own `compile` does it
        model._loss_tracker = tracker


@contextlib.contextmanager
def counting_rows(model: Any, rows: Any) -> Iterator[None]:
    """In this scope, a step's batch has so many rows; None means as its arrays have."""
    tracker = model._loss_tracker
    tracker.rows = rows
    try:
        yield
    finally:
        tracker.rows = None
