"""TensorFlow: one traced function per set of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from puna.backend.generic import (
    assign,
    attention,
    call_block,
    call_blocks,
    cond,
    dequantize,
    embed_packed,
    gathered,
    initialize_at_random,
    merge_heads,
    place,
    rms_norm,
    rotate,
    silu,
    split_heads,
    switch,
    value,
    while_loop,
    whole_logits,
)
from puna.backend.kernels import tensorflow_calls
from puna.backend.memory import aligned_copy, numpy_dtype
from puna.backend.packed import Packed
from puna.backend.protocol import Place, Tensor
from puna.backend.tensorflow_accumulate import accumulated_step
from puna.backend.tensorflow_loss import head_loss

__all__ = [
    "accumulated_step", "assign", "attend", "attention", "cache_dtype", "cache_read", "cache_write",
    "call_block", "call_blocks", "compile_step", "cond", "embed", "gated", "gathered", "head_loss",
    "initialize", "initialize_at_random", "keeps", "linear", "linears", "merge_heads", "place",
    "prepare", "rms_norm", "rotate", "silu", "split_heads", "switch", "to_numpy", "value",
    "while_loop", "whole_logits",
]  # fmt: skip


TOKENS_PER_CALL = 8
RUNS_AHEAD = False
BLOCKS_CALL_TOKENS = 0


def linear(x: Tensor, weight: Tensor | Packed, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`."""
    return linears(x, (weight,), out_dtype)[0]


def linears(x: Tensor, weights: Sequence[Tensor | Packed], out_dtype: str) -> tuple[Tensor, ...]:
    """See `BackendOps.linears`; in a compiled step on a CPU by native kernels."""
    x, weights = _alike(x, weights)
    if tensorflow_calls.usable(x, weights, out_dtype):
        return tensorflow_calls.linears(x, weights, out_dtype)
    return tuple(_linear(x, weight, out_dtype) for weight in weights)


def gated(x: Tensor, gate: Tensor | Packed, up: Tensor | Packed, out_dtype: str) -> Tensor:
    """See `BackendOps.gated`; in a compiled step on a CPU by a native kernel."""
    x, weights = _alike(x, (gate, up))
    if tensorflow_calls.usable(x, weights, out_dtype):
        return tensorflow_calls.linears(x, weights, out_dtype, gated=True)[0]
    gate_out, up_out = (_linear(x, weight, out_dtype) for weight in weights)
    return silu(gate_out) * up_out


def _alike(x: Tensor, weights: Sequence[Tensor | Packed]) -> tuple[Tensor, list[Tensor | Packed]]:
    """Tensors, with `x` in the dtype of weights that are not packed."""
    weights = [w if isinstance(w, Packed) else tf.convert_to_tensor(w) for w in weights]
    x = tf.convert_to_tensor(x)
    return (x if isinstance(weights[0], Packed) else tf.cast(x, weights[0].dtype)), weights


def _linear(x: Tensor, weight: Tensor | Packed, out_dtype: str) -> Tensor:
    """`linear` as TensorFlow computes it."""
    if isinstance(weight, Packed):
        weight = dequantize(weight, x.dtype.name)
    y = tf.linalg.matmul(tf.reshape(x, (-1, weight.shape[1])), weight, transpose_b=True)
    y = tf.reshape(y, tf.concat((tf.shape(x)[:-1], weight.shape[:1]), 0))
    return tf.cast(tf.ensure_shape(y, (*x.shape[:-1], weight.shape[0])), out_dtype)


def embed(weight: Tensor | Packed, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    if isinstance(weight, Packed):
        return embed_packed(weight, token_ids)
    return tf.gather(_with_dense_gradient(tf.convert_to_tensor(weight)), token_ids)


@tf.custom_gradient
def _with_dense_gradient(weight: Tensor):
    """The same, whose gradient has one number for each of its own.

    TensorFlow's of `gather` has a row for each token, and a token that occurs twice has two of
    them: Keras's optimizers would square and clip these before they are summed.
    """
    return tf.identity(weight), lambda d: tf.convert_to_tensor(d)


def attend(
    projected: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Place,
) -> None:
    """See `BackendOps.attend`; a call through Python cannot write to a tensor."""
    del projected, rotary, cache, place


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


def keeps(prepared: np.ndarray, array: np.ndarray) -> bool:
    """See `BackendOps.keeps`; TensorFlow always copies."""
    del prepared, array
    return False


def prepare(variable: Any, array: np.ndarray) -> np.ndarray:
    """See `BackendOps.prepare`."""
    dtype = numpy_dtype(variable._dtype)
    return array if array.dtype == dtype else aligned_copy(array, dtype)


def initialize(variable: Any, prepared: np.ndarray) -> None:
    """See `BackendOps.initialize`."""
    variable._initialize(prepared)


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
            compiled[key] = tf.function(tensorflow_calls.allowed()(function), autograph=False)
        return compiled[key](*args)

    return step
