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
        self.frequencies = rope.inverse_frequencies(head_dim)

    def __call__(
        self, positions_BT: Tensor, length_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32, each `[B, 1, T, H / 2]`.

        `length_B` is how many tokens each row has, where padding takes positions too; dynamic
        scaling goes by it.
        """
        positions_BT1 = ops.cast(positions_BT, "float32")[:, :, None]
        if self.rope.rope_type == "dynamic":
            frequencies = self._dynamic_frequencies(positions_BT, length_B)
        else:
            frequencies = self.frequencies
        angles_BTh = ops.multiply(positions_BT1, frequencies)
        scaling = self.rope.attention_scaling
        cos, sin = ops.cos(angles_BTh) * scaling, ops.sin(angles_BTh) * scaling
        return cos[:, None], sin[:, None]

    def _dynamic_frequencies(self, positions_BT: Tensor, length_B: Tensor | None) -> Tensor:
        """Frequencies `[B, 1, H / 2]` whose base grows with each row's own length."""
        H, context = self.head_dim, self.max_position_embeddings
        factor = self.rope.factor or 1.0
        if length_B is None:
            length_B = ops.max(positions_BT, axis=1) + 1
        served_B: Tensor = ops.maximum(ops.cast(length_B, "float32"), float(context))
        growth_B = factor * served_B / context - (factor - 1)
        base_B = self.rope.rope_theta * growth_B ** (H / (H - 2))
        exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
        return 1.0 / ops.power(base_B[:, None, None], exponents)


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature i of each head together with feature i + H / 2, as Hugging Face stores them.

    The products are in float32; the result has the dtype of `x_BNTH`.
    """
    first, second = ops.split(ops.cast(x_BNTH, "float32"), 2, axis=-1)
    turned = ops.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return ops.cast(turned, x_BNTH.dtype)
