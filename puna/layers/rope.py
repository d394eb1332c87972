"""Turning queries and keys by their positions; `puna/rope.py` has the settings."""

from __future__ import annotations

import numpy as np
from keras import ops

from puna.backend.protocol import Tensor
from puna.rope import RopeConfig


class RotaryEmbedding:
    """The cosines and sines of a Llama's positions. It has no weights, so it is no layer.

    Args:
        rope: the settings.
        head_dim: head size, H.
        max_position_embeddings: the model's own context, in tokens; dynamic scaling begins there.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_position_embeddings: int):
        self.rope = rope
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.frequencies = rope.inverse_frequencies(head_dim).astype(np.float32)

    def __call__(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32, each `[B, 1, T, H / 2]`."""
        positions_BT1 = ops.cast(positions_BT, "float32")[:, :, None]
        if self.rope.rope_type == "dynamic":
            angles_BTh = positions_BT1 * self._dynamic_frequencies(positions_BT)
        else:
            angles_BTh = positions_BT1 * self.frequencies
        scaling = self.rope.attention_scaling
        cos, sin = ops.cos(angles_BTh) * scaling, ops.sin(angles_BTh) * scaling
        return cos[:, None], sin[:, None]

    def _dynamic_frequencies(self, positions_BT: Tensor) -> Tensor:
        """Frequencies `[B, 1, H / 2]` whose base grows with each row's own length."""
        H, context = self.head_dim, self.max_position_embeddings
        factor = self.rope.factor or 1.0
        length_B = ops.cast(ops.max(positions_BT, axis=1) + 1, "float32")
        length_B = ops.maximum(length_B, float(context))
        growth_B = factor * length_B / context - (factor - 1)
        log_base_B = np.log(self.rope.rope_theta) + ops.log(growth_B) * (H / (H - 2))
        exponents = np.arange(0, H, 2, dtype=np.float32) / H
        return ops.exp(-log_base_B[:, None, None] * exponents)


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature i of each head together with feature i + H / 2, as Hugging Face stores them.

    The products are in float32; the result has the dtype of `x_BNTH`.
    """
    first, second = ops.split(ops.cast(x_BNTH, "float32"), 2, axis=-1)
    turned = ops.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return ops.cast(turned, x_BNTH.dtype)
