"""The native kernels inside the functions that TensorFlow traces for decoding.

TensorFlow calls them through Python, which neither XLA nor a saved graph can take over: so they
are used only while `compile_step` traces, where neither will see them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from puna.backend.kernels.library import FLOATS, KINDS, Matrix, Threads, library, matrix_of
from puna.backend.memory import numpy_dtype
from puna.backend.packed import Packed
from puna.backend.protocol import Tensor
from puna.errors import BackendError
from puna.machine import usable_cores

_tracing = threading.local()


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """What is traced in this scope may call the kernels."""
    before = getattr(_tracing, "allowed", False)
    _tracing.allowed = True
    try:
        yield
    finally:
        _tracing.allowed = before


def usable(x: Tensor, weights: Sequence[Tensor | Packed], out_dtype: str) -> bool:
    """Whether the kernels take this product."""
    kinds = {_kind(weight) for weight in weights}
    return (
        getattr(_tracing, "allowed", False)
        and len(kinds) == 1
        and None not in kinds
        and x.dtype.name in FLOATS
        and out_dtype in FLOATS
        and x.shape.is_fully_defined()
        and not tf.config.list_logical_devices("GPU")
        and library() is not None
    )


def _kind(weight: Tensor | Packed) -> tuple[str, int, bool] | None:
    """What weights of one call have in common; None for what no kernel takes."""
    if isinstance(weight, Packed):
        return (tf.as_dtype(weight.data.dtype).name, weight.group, weight.low is None)
    return (weight.dtype.name, 0, True) if weight.dtype.name in FLOATS else None


def linears(
    x: Tensor, weights: Sequence[Tensor | Packed], out_dtype: str, gated: bool = False
) -> tuple[Tensor, ...]:
    """`x` [..., in] times the transpose of each weight [out, in]; gated: see `BackendOps`."""
    outs = [int(w.shape[0]) for w in (weights[:1] if gated else weights)]
    shapes = [(*x.shape[:-1], out) for out in outs]
    dtype = numpy_dtype(out_dtype)
    first, width = weights[0], int(x.shape[-1])
    group = first.group if isinstance(first, Packed) else width
    arrays = [a for w in weights for a in (w.arrays if isinstance(w, Packed) else (w,))]
    parts = len(arrays) // len(weights)

    def call(x: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
        results = [np.empty(shape, dtype) for shape in shapes]
        each = [arrays[i : i + parts] for i in range(0, len(arrays), parts)]
        _run(x, [matrix_of(array, width, group) for array in each], results, gated)
        return results

    results = tf.numpy_function(call, [x, *arrays], [tf.as_dtype(out_dtype)] * len(shapes))
    return tuple(tf.ensure_shape(y, shape) for y, shape in zip(results, shapes, strict=True))


def _run(
    x: np.ndarray, matrices: Sequence[Matrix], results: Sequence[np.ndarray], gated: bool
) -> None:
    loaded = library()
    assert loaded is not None
    pointers = (ctypes.c_void_p * len(results))(*(y.ctypes.data for y in results))
    threads = tf.config.threading.get_intra_op_parallelism_threads() or usable_cores()
    why = loaded.puna_linear(
        ctypes.byref(Threads(None, None, threads)), x.ctypes.data, KINDS[x.dtype.name],
        x.size // x.shape[-1], (Matrix * len(matrices))(*matrices), len(matrices), pointers,
        KINDS[results[0].dtype.name], int(gated),
    )  # fmt: skip
    if why is not None:
        raise BackendError(why.decode())
