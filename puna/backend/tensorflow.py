"""TensorFlow: one traced function per set of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from puna.backend.generic import (
    attention,
    merge_heads,
    place,
    rms_norm,
    rotate,
    silu,
    split_heads,
    value,
    while_loop,
)
from puna.backend.memory import aligned_copy
from puna.backend.protocol import Tensor

__all__ = [
    "aliases", "attention", "cache_dtype", "cache_read", "cache_write", "compile_step", "embed",
    "gated", "initialize", "linear", "linears", "merge_heads", "place", "prepare", "rms_norm", "rotate", "silu",
    "split_heads", "to_numpy", "value", "while_loop",
]  # fmt: skip


TOKENS_PER_CALL = 8
RUNS_AHEAD = False


def linear(x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`."""
    weight = tf.convert_to_tensor(weight)
    x = tf.cast(x, weight.dtype)
    y = tf.linalg.matmul(tf.reshape(x, (-1, weight.shape[1])), weight, transpose_b=True)
    y = tf.reshape(y, tf.concat((tf.shape(x)[:-1], weight.shape[:1]), 0))
    return tf.cast(tf.ensure_shape(y, (*x.shape[:-1], weight.shape[0])), out_dtype)


def linears(x: Tensor, weights: Sequence[Tensor], out_dtype: str) -> tuple[Tensor, ...]:
    """See `BackendOps.linears`."""
    return tuple(linear(x, weight, out_dtype) for weight in weights)


def gated(x: Tensor, gate: Tensor, up: Tensor, out_dtype: str) -> Tensor:
    """See `BackendOps.gated`."""
    return silu(linear(x, gate, out_dtype)) * linear(x, up, out_dtype)


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    return tf.gather(weight, token_ids)


def cache_dtype(compute_dtype: str, wanted: str | None = None) -> str:
    """See `BackendOps.cache_dtype`."""
    return wanted or compute_dtype


def cache_read(cache_BKSH: Tensor, dtype: str) -> Tensor:
    """See `BackendOps.cache_read`."""
    return tf.cast(cache_BKSH, dtype)


def cache_write(cache_BKSH: Tensor, new_BKTH: Tensor, write: Tensor) -> Tensor:
    """See `BackendOps.cache_write`."""
    B, K, T, _ = new_BKTH.shape
    positions_BT = write[:, None] + tf.range(T, dtype=write.dtype)
    index_BKT = tf.meshgrid(tf.range(B), tf.range(K), tf.range(T), indexing="ij")
    index_BKT[2] = tf.broadcast_to(positions_BT[:, None], (B, K, T))
    new_BKTH = tf.cast(new_BKTH, cache_BKSH.dtype)
    return tf.tensor_scatter_nd_update(cache_BKSH, tf.stack(index_BKT, -1), new_BKTH)


def to_device(array: np.ndarray) -> Tensor:
    """See `BackendOps.to_device`."""
    return tf.convert_to_tensor(array)


def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """See `BackendOps.zeros`."""
    return tf.zeros(shape, dtype)


def gather_rows(
    sources: Sequence[tuple[Tensor, int] | None], shape: tuple[int, int, int, int]
) -> Tensor:
    """See `BackendOps.gather_rows`."""
    S = shape[2]
    dtype = next(source[0].dtype for source in sources if source is not None)
    gathered = []
    for source in sources:
        row = tf.zeros((shape[1], 0, shape[3]), dtype)
        if source is not None:
            row = source[0][source[1], :, :S]
        gathered.append(tf.pad(row, ((0, 0), (0, S - int(row.shape[1] or 0)), (0, 0))))
    return tf.stack(gathered)


def aliases(array: np.ndarray) -> bool:
    """See `BackendOps.aliases`; TensorFlow always copies."""
    del array
    return False


def prepare(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """See `BackendOps.prepare`."""
    return array if array.dtype == dtype else aligned_copy(array, dtype)


def initialize(variable: Any, array: np.ndarray) -> None:
    """See `BackendOps.initialize`."""
    variable._initialize(array)


def to_numpy(variable: Any) -> np.ndarray:
    """See `BackendOps.to_numpy`."""
    return variable.value.numpy()


def compile_step(
    function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    """See `BackendOps.compile_step`; variables are captured, and read at each call.

    TensorFlow warns of a function that is traced for many shapes, so each has a function.
    """
    del variables, donate
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def step(*args: Any) -> Any:
        leaves = tf.nest.flatten(args)
        key = tuple(leaf if leaf is None else (*leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in compiled:
            compiled[key] = tf.function(function, autograph=False)
        return compiled[key](*args)

    return step
