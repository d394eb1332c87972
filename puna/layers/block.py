"""One block of a Llama: attention and feed-forward, each normalised and added."""

from __future__ import annotations

from typing import Any

import keras

from puna import backend
from puna.backend.protocol import BlockWeights, Place, Tensor
from puna.config import LlamaConfig
from puna.layers.attention import Attention
from puna.layers.cache import Int8LayerCache, LayerCache
from puna.layers.linear import Linear, are_alike, are_plain
from puna.layers.mlp import MLP
from puna.layers.rms_norm import RMSNorm


class Block(keras.layers.Layer):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Inside a block, layers call each other's `call`: Keras's `__call__` costs 77 µs on torch, which
    over a whole model is more than a token's arithmetic. The backbone has entered it once.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: LlamaConfig, **kwargs):
        super().__init__(**kwargs)
        D, epsilon, dtype = config.hidden_size, config.rms_norm_eps, self.dtype_policy
        self.input_layernorm = RMSNorm(D, epsilon=epsilon, name="input_layernorm", dtype=dtype)
        self.self_attn = Attention(config, name="self_attn", dtype=dtype)
        self.post_attention_layernorm = RMSNorm(
            D, epsilon=epsilon, name="post_attention_layernorm", dtype=dtype
        )
        self.mlp = MLP(config, name="mlp", dtype=dtype)

    def build(self, input_shape=None):
        for layer in (
            self.input_layernorm,
            self.self_attn,
            self.post_attention_layernorm,
            self.mlp,
        ):
            layer.build(input_shape)

    def plain_weights(self) -> BlockWeights | None:
        """What the block computes with, if it does no more than most Llamas' do.

        Else, for instance with biases, adapters or another activation than SiLU, None.
        """
        mlp, layers = self.mlp, self._linears()
        heads, gated = layers[:3], layers[4:6]
        norms = (self.input_layernorm, self.post_attention_layernorm)
        if (
            not (are_alike(*heads) and are_alike(*gated) and mlp.activation is backend.ops.silu)
            or any(type(layer) is not Linear for layer in layers)
            or not are_plain(*layers)
            or any(type(norm) is not RMSNorm for norm in norms)
        ):
            return None
        return BlockWeights(
            *(backend.ops.value(norm.weight) for norm in norms),
            *(layer.matrix(self.compute_dtype) for layer in layers),
        )

    def constants(self) -> tuple[Any, ...]:
        """What a compiled call depends on, beside variables and the configuration."""
        return tuple(layer.constants() for layer in self._linears())

    def _linears(self) -> tuple[Linear, ...]:
        attention, mlp = self.self_attn, self.mlp
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        return (*heads, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def call(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TS: Tensor | None,
        cache: LayerCache | Int8LayerCache | None = None,
        place: Place | None = None,
        training: bool = False,
    ) -> tuple[Tensor, LayerCache | Int8LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with the new keys and values in it."""
        attended_BTD, cache = self.self_attn.call(
            self.input_layernorm.call(x_BTD), rotary, mask_B1TS, cache, place, training
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = self.post_attention_layernorm.call(x_BTD)
        return x_BTD + self.mlp.call(normed_BTD, training), cache
