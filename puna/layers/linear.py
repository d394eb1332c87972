"""The product with a weight matrix, as the checkpoint stores it: `(out, in)`."""

from __future__ import annotations

from puna import backend
from puna.backend.protocol import Tensor
from puna.layers.lora import AdaptedMatrix


class Linear(AdaptedMatrix):
    """Multiply by a weight `(out, in)` and add a bias; adapters may stand beside the weight.

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
        super().__init__(initializer_range=initializer_range, **kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.use_bias = use_bias
        self.out_dtype = out_dtype

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.output_dim, self.input_dim

    def build(self, input_shape=None):
        del input_shape
        self.add_matrix()
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.output_dim,), initializer="zeros")

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """`[..., in]` to `[..., out]`; in training, adapters may drop inputs."""
        return linears(x, self, training=training)[0]


def linears(x: Tensor, *layers: Linear, training: bool = False) -> list[Tensor]:
    """What several layers of one dtype make of the same `x`; those of one scheme together."""
    dtype = layers[0].compute_dtype
    out_dtype = layers[0].out_dtype or dtype
    weights = [layer.matrix(dtype) for layer in layers]
    if are_alike(*layers):
        results = backend.ops.linears(x, weights, out_dtype)
    else:
        results = [backend.ops.linears(x, [weight], out_dtype)[0] for weight in weights]
    results = [
        layer.with_adapters(x, y, out_dtype, training) if layer.is_adapted else y
        for layer, y in zip(layers, results, strict=True)
    ]
    return [
        y + backend.ops.value(layer.bias, out_dtype) if layer.use_bias else y
        for layer, y in zip(layers, results, strict=True)
    ]


def are_alike(*layers: Linear) -> bool:
    """Whether the layers' matrices are of one kind, so that one product takes them all."""
    return all(layer.scheme == layers[0].scheme for layer in layers[1:])


def are_plain(*layers: Linear) -> bool:
    """Whether the layers do no more than multiply by their matrices."""
    return not any(layer.use_bias or layer.is_adapted for layer in layers)
