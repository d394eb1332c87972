"""The keys and values of the tokens so far: a value that is passed in and returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from keras import ops

from puna import backend
from puna.backend.protocol import Place, Tensor
from puna.config import LlamaConfig


class LayerCache(NamedTuple):
    """The keys and values of one layer, each `[B, K, S, H]`, heads not repeated."""

    key_BKSH: Tensor
    value_BKSH: Tensor

    def write(self, key_BKTH: Tensor, value_BKTH: Tensor, place: Place) -> LayerCache:
        """With T tokens more; the old cache must not be used."""
        return LayerCache(
            backend.ops.cache_write(self.key_BKSH, key_BKTH, place.write),
            backend.ops.cache_write(self.value_BKSH, value_BKTH, place.write),
        )

    def read(self, live: int, dtype: str) -> tuple[Tensor, Tensor]:
        """Keys and values of the first places, for queries of a dtype."""
        arrays = (array if array.shape[2] == live else array[:, :, :live] for array in self)
        key_BKSH, value_BKSH = (backend.ops.cache_read(array, dtype) for array in arrays)
        return key_BKSH, value_BKSH

    def replace_keys(self, key_BKSH: Tensor) -> LayerCache:
        """The same values with other keys."""
        start_B = ops.zeros(key_BKSH.shape[0], "int32")
        place = backend.ops.place(start_B, key_BKSH.shape[2], key_BKSH.shape[2])
        return LayerCache(
            backend.ops.cache_write(self.key_BKSH, key_BKSH, place.write), self.value_BKSH
        )


class Int8LayerCache(NamedTuple):
    """The same in a quarter of float32's memory: int8, with a scale for each token and head."""

    key_BKSH: Tensor  # int8
    value_BKSH: Tensor  # int8
    key_scale_BKS1: Tensor  # float32
    value_scale_BKS1: Tensor  # float32

    def write(self, key_BKTH: Tensor, value_BKTH: Tensor, place: Place) -> Int8LayerCache:
        """See `LayerCache`."""
        (key, key_scale), (value, value_scale) = _int8(key_BKTH), _int8(value_BKTH)
        new = (key, value, key_scale, value_scale)
        write = backend.ops.cache_write
        return Int8LayerCache(*(write(a, b, place.write) for a, b in zip(self, new, strict=True)))

    def read(self, live: int, dtype: str) -> tuple[Tensor, Tensor]:
        """See `LayerCache`."""
        key, value, key_scale, value_scale = (array[:, :, :live] for array in self)
        key_BKSH = ops.cast(key, "float32") * key_scale
        value_BKSH = ops.cast(value, "float32") * value_scale
        return ops.cast(key_BKSH, dtype), ops.cast(value_BKSH, dtype)

    def replace_keys(self, key_BKSH: Tensor) -> Int8LayerCache:
        """See `LayerCache`."""
        key, scale = _int8(key_BKSH)
        return Int8LayerCache(key, self.value_BKSH, scale, self.value_scale_BKS1)


def _int8(x_BKTH: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and what to multiply them by, `[B, K, T, 1]`."""
    x_BKTH = ops.cast(x_BKTH, "float32")
    largest_BKT1 = ops.max(ops.abs(x_BKTH), axis=-1, keepdims=True)
    scale_BKT1 = ops.where(largest_BKT1 > 0, largest_BKT1 / 127.0, 1.0)
    return ops.cast(ops.round(x_BKTH / scale_BKT1), "int8"), scale_BKT1


Cache = tuple[LayerCache | Int8LayerCache, ...]


def empty_cache(
    config: LlamaConfig, rows: int, capacity: int, compute_dtype: str, dtype: str | None = None
) -> Cache:
    """Room for `capacity` tokens in each of `rows` sequences, in every layer.

    Args:
        config: the model's shape.
        rows: B.
        capacity: S.
        compute_dtype: the model's.
        dtype: "int8", or a float's name; None means what is fastest.
    """
    shape = (rows, config.num_kv_heads, capacity, config.head_size)

    def layer() -> LayerCache | Int8LayerCache:
        if dtype == "int8":
            shapes = (shape, shape, (*shape[:3], 1), (*shape[:3], 1))
            dtypes = ("int8", "int8", "float32", "float32")
            return Int8LayerCache(*map(backend.ops.zeros, shapes, dtypes))
        stored = backend.ops.cache_dtype(compute_dtype, dtype)
        return LayerCache(backend.ops.zeros(shape, stored), backend.ops.zeros(shape, stored))

    return tuple(layer() for _ in range(config.num_hidden_layers))


def capacity_of(cache: Cache) -> int:
    """How many tokens a cache has room for."""
    return cache[0].key_BKSH.shape[2]


def arrange(sources: Sequence[tuple[Cache, int] | None], capacity: int) -> Cache:
    """A new cache, row for row from others: to put caches side by side, or in more room.

    Args:
        sources: for each row a cache and the row of it; None for one that is empty. One at least
            is given.
        capacity: tokens that each row has room for; what a source has beyond is left out.
    """
    like = next(source[0] for source in sources if source is not None)

    def gathered(layer: int, which: int) -> Tensor:
        found = [None if s is None else (s[0][layer][which], s[1]) for s in sources]
        _, K, _, H = like[layer][which].shape
        return backend.ops.gather_rows(found, (len(sources), K, capacity, H))

    return tuple(
        type(old)(*(gathered(layer, which) for which in range(len(old))))
        for layer, old in enumerate(like)
    )
