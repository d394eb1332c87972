"""TensorFlow: one traced function per set of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from puna.backend.generic import attention
from puna.backend.memory import aligned_copy
from puna.backend.protocol import Tensor

__all__ = [
    "aliases", "attention", "cache_dtype", "cache_write", "compile_step", "embed", "initialize",
    "linear",
    "prepare", "to_numpy",
]  # fmt: skip


def linear(x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`."""
    weight = tf.convert_to_tensor(weight)
    y = tf.linalg.matmul(tf.reshape(x, (-1, weight.shape[1])), weight, transpose_b=True)
    y = tf.reshape(y, tf.concat((tf.shape(x)[:-1], weight.shape[:1]), 0))
    return tf.cast(tf.ensure_shape(y, (*x.shape[:-1], weight.shape[0])), out_dtype)


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    return tf.gather(weight, token_ids)


def cache_dtype(compute_dtype: str) -> str:
    """See `BackendOps.cache_dtype`."""
    return compute_dtype


def cache_write(cache_BKSH: Tensor, new_BKTH: Tensor, start_B: Tensor) -> Tensor:
    """See `BackendOps.cache_write`."""
    B, K, T, _ = new_BKTH.shape
    positions_BT = start_B[:, None] + tf.range(T, dtype=start_B.dtype)
    index_BKT = tf.meshgrid(tf.range(B), tf.range(K), tf.range(T), indexing="ij")
    index_BKT[2] = tf.broadcast_to(positions_BT[:, None], (B, K, T))
    new_BKTH = tf.cast(new_BKTH, cache_BKSH.dtype)
    return tf.tensor_scatter_nd_update(cache_BKSH, tf.stack(index_BKT, -1), new_BKTH)


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
    """See `BackendOps.compile_step`; variables are captured, and read at each call."""
    del variables, donate
    return tf.function(function, autograph=False)
