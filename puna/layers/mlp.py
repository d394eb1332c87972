"""The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.config import LlamaConfig
from puna.layers.linear import Linear, are_alike, are_plain, linears

# Every name of `puna.config.ACTIVATIONS`.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": backend.ops.silu,
    "swish": backend.ops.silu,
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_python": lambda x: ops.gelu(x, approximate=False),
    "gelu_new": lambda x: ops.gelu(x, approximate=True),
    "gelu_fast": lambda x: ops.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: ops.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),
    "relu": ops.relu,
    "relu2": lambda x: ops.square(ops.relu(x)),
    "relu6": ops.relu6,
    "leaky_relu": lambda x: ops.leaky_relu(x, negative_slope=0.01),
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "linear": lambda x: x,
}


class MLP(keras.layers.Layer):
    """`down(activation(gate(x)) · up(x))`.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: LlamaConfig, **kwargs):
        super().__init__(**kwargs)
        D, F = config.hidden_size, config.intermediate_size
        shared = {
            "use_bias": config.mlp_bias,
            "initializer_range": config.initializer_range,
            "dtype": self.dtype_policy,
        }
        self.gate_proj = Linear(D, F, name="gate_proj", **shared)
        self.up_proj = Linear(D, F, name="up_proj", **shared)
        self.down_proj = Linear(F, D, name="down_proj", **shared)
        self.activation = _FUNCTIONS[config.hidden_act]

    def build(self, input_shape=None):
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.build(input_shape)

    def call(self, x_BTD: Tensor, training: bool = False) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        gate, up = self.gate_proj, self.up_proj
        is_gated = self.activation is backend.ops.silu and are_alike(gate, up)
        if is_gated and are_plain(gate, up):
            dtype = self.compute_dtype
            gated_BTF = backend.ops.gated(x_BTD, gate.matrix(dtype), up.matrix(dtype), dtype)
            return self.down_proj.call(gated_BTF, training)
        gate_BTF, up_BTF = linears(x_BTD, gate, up, training=training)
        return self.down_proj.call(self.activation(gate_BTF) * up_BTF, training)
