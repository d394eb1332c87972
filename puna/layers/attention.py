"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with RoPE."""

from __future__ import annotations

import keras

from puna import backend
from puna.backend.protocol import Place, Tensor
from puna.config import LlamaConfig
from puna.layers.cache import Int8LayerCache, LayerCache
from puna.layers.linear import Linear, linears
from puna.layers.rope import rotate


class Attention(keras.layers.Layer):
    """Attention of N query heads over K key and value heads.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: LlamaConfig, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        D, H = config.hidden_size, config.head_size
        N, K = config.num_attention_heads, config.num_kv_heads
        shared = {
            "use_bias": config.attention_bias,
            "initializer_range": config.initializer_range,
            "dtype": self.dtype_policy,
        }
        self.q_proj = Linear(D, N * H, name="q_proj", **shared)
        self.k_proj = Linear(D, K * H, name="k_proj", **shared)
        self.v_proj = Linear(D, K * H, name="v_proj", **shared)
        self.o_proj = Linear(N * H, D, name="o_proj", **shared)
        self.dropout = None
        if config.attention_dropout:
            self.dropout = keras.layers.Dropout(config.attention_dropout, dtype="float32")

    def build(self, input_shape=None):
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.build(input_shape)

    def call(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TS: Tensor | None,
        cache: LayerCache | Int8LayerCache | None = None,
        place: Place | None = None,
        training: bool = False,
    ) -> tuple[Tensor, LayerCache | Int8LayerCache | None]:
        """Attend within `x_BTD`, or with a cache to all that it holds and `x_BTD`.

        Returns:
            The result `[B, T, D]`, and the cache with the new keys and values in it.
        """
        projected = linears(x_BTD, self.q_proj, self.k_proj, self.v_proj, training=training)
        if isinstance(cache, LayerCache) and place is not None:
            attended = backend.ops.attend(projected, rotary, cache, place)
            if attended is not None:
                return self.o_proj.call(attended[0]), LayerCache(*attended[1])
        query, key, value = map(self._heads, projected)
        query_BNTH, key_BKSH, value_BKSH = rotate(query, *rotary), rotate(key, *rotary), value
        if cache is not None and place is not None:
            cache = cache.write(key_BKSH, value_BKSH, place)
            key_BKSH, value_BKSH = cache.read(place.live, self.compute_dtype)
        scale = self.config.head_size**-0.5
        dropout = self._drop if training and self.dropout is not None else None
        out_BNTH = backend.ops.attention(
            query_BNTH, key_BKSH, value_BKSH, mask_B1TS, scale, dropout
        )
        return self.o_proj.call(backend.ops.merge_heads(out_BNTH), training), cache

    def _heads(self, x_BTF: Tensor) -> Tensor:
        return backend.ops.split_heads(x_BTF, self.config.head_size)

    def _drop(self, weights: Tensor) -> Tensor:
        assert self.dropout is not None
        return self.dropout.call(weights, training=True)
