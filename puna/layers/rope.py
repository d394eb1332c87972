"""Turning queries and keys by their positions; `puna/rope.py` has the settings."""

from __future__ import annotations

import numpy as np
from keras import ops

from puna import backend
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
        """What `rotate` takes: cosines and sines in float32, each `[B, 1, T, H]`.

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
        cos_BTh, sin_BTh = ops.cos(angles_BTh) * scaling, ops.sin(angles_BTh) * scaling
        # Feature i of a head turns together with feature i + H / 2, as Hugging Face stores them:
        # x[i] · cos - x[i + H / 2] · sin, and x[i + H / 2] · cos + x[i] · sin.
        cos_BTH = ops.concatenate((cos_BTh, cos_BTh), axis=-1)
        sin_BTH = ops.concatenate((-sin_BTh, sin_BTh), axis=-1)
        return cos_BTH[:, None], sin_BTH[:, None]

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


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Turn the features of each head by `RotaryEmbedding`'s tables, in the dtype of `x_BNTH`."""
    return backend.ops.rotate(x_BNTH, cos_B1TH, sin_B1TH)
