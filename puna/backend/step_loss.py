"""The loss of the last step, beside the mean of the epoch that Keras tells.

A mean of many steps in float32 does not give back the last of them, and on JAX a callback sees
nothing of the model but what `fit` tells it, unless all of its state is copied.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.utils.tracking import DotNotTrackScope

STEP_LOSS = "step_loss"


class _WithLast(keras.metrics.Mean):
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
    tracker = _WithLast("loss")
    with DotNotTrackScope():  # as Keras's own `compile` does it
        model._loss_tracker = tracker
