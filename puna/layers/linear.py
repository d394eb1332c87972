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
        return linears(x, self)[0]


def linears(x: Tensor, *layers: Linear) -> list[Tensor]:
    """What several layers of one dtype make of the same `x`, computed together."""
    dtype = layers[0].compute_dtype
    out_dtype = layers[0].out_dtype or dtype
    weights = [backend.ops.value(layer.weight, dtype) for layer in layers]
    results = backend.ops.linears(x, weights, out_dtype)
    return [
        y + backend.ops.value(layer.bias, out_dtype) if layer.use_bias else y
        for layer, y in zip(layers, results, strict=True)
    ]
