"""The keys and values of the tokens so far: a value that is passed in and returned."""

from __future__ import annotations

from typing import NamedTuple

from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.config import LlamaConfig


class LayerCache(NamedTuple):
    """The keys and values of one layer, each `[B, K, S, H]`, heads not repeated."""

    key_BKSH: Tensor
    value_BKSH: Tensor


Cache = tuple[LayerCache, ...]


def empty_cache(config: LlamaConfig, rows: int, capacity: int, compute_dtype: str) -> Cache:
    """Room for `capacity` tokens in each of `rows` sequences, in every layer."""
    shape = (rows, config.num_kv_heads, capacity, config.head_size)
    dtype = backend.ops.cache_dtype(compute_dtype)
    return tuple(
        LayerCache(ops.zeros(shape, dtype), ops.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )


def grow_cache(cache: Cache, capacity: int) -> Cache:
    """The same keys and values with room for `capacity` tokens; the old cache is consumed."""

    def grow(array_BKSH: Tensor) -> Tensor:
        more = capacity - array_BKSH.shape[2]
        return ops.pad(array_BKSH, ((0, 0), (0, 0), (0, more), (0, 0)))

    return tuple(LayerCache(grow(layer.key_BKSH), grow(layer.value_BKSH)) for layer in cache)
