"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import keras

from puna import backend
from puna.backend.protocol import Tensor


class RMSNorm(keras.layers.Layer):
    """Divide by the root mean square of the last axis and multiply by a weight, in float32.

    Args:
        width: features, D.
        epsilon: added to the mean square.
    """

    def __init__(self, width: int, *, epsilon: float, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.epsilon = epsilon

    def build(self, input_shape=None):
        del input_shape
        self.weight = self.add_weight(name="weight", shape=(self.width,), initializer="ones")

    def call(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`, in the dtype of `x`."""
        return backend.ops.rms_norm(x, backend.ops.value(self.weight), self.epsilon)
