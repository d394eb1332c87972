"""NumPy memory that a backend can adopt without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Bytes. XLA's CPU client adopts memory that starts at a multiple of this, and copies any other.
ALIGNMENT = 64


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a Keras dtype's name; bfloat16 and float8 are ml_dtypes'."""
    return np.dtype(getattr(ml_dtypes, name, name))


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array is contiguous and starts where XLA adopts memory."""
    return array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that `is_aligned`."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros that `is_aligned`; its pages take memory when they are written."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(make: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = make(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """A copy that `is_aligned`, in another dtype if one is given."""
    dtype = np.dtype(dtype or array.dtype)
    copy = aligned_empty(array.shape, dtype)
    if array.dtype.name == "bfloat16" and dtype == np.float32:
        # A bfloat16 is the upper half of a float32: shifting is four times faster than casting.
        np.left_shift(array.view(np.uint16), 16, out=copy.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(copy, array, casting="unsafe")
    return copy
