"""The product with a weight matrix, as the checkpoint stores it: `(out, in)`."""

from __future__ import annotations

import keras

from puna import backend
from puna.backend.protocol import Tensor


class Linear(keras.layers.Layer):
    """Multiply by a weight `(out, in)` and add a bias.

    Args:
        input_dim: features in.
        output_dim: features out.
        use_bias: whether there is a bias `(out,)`.
        initializer_range: standard deviation of a freshly made weight.
        out_dtype: dtype of the result; None means the compute dtype.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        use_bias: bool = False,
        initializer_range: float = 0.02,
        out_dtype: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.use_bias = use_bias
        self.initializer_range = initializer_range
        self.out_dtype = out_dtype

    def build(self, input_shape=None):
        del input_shape
        self.weight = self.add_weight(
            name="weight",
            shape=(self.output_dim, self.input_dim),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
        )
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.output_dim,), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        dtype = self.compute_dtype
        out_dtype = self.out_dtype or dtype
        y = backend.ops.linear(x, backend.ops.value(self.weight, dtype), out_dtype)
        return y + backend.ops.value(self.bias, out_dtype) if self.use_bias else y
