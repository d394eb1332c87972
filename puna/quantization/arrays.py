"""The arrays of a quantized matrix under the names of the variables that hold them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from puna.quantization.scheme import Scheme

if TYPE_CHECKING:  # of a package that imports Keras
    from puna.backend.packed import Packed

# The first two hold the numbers: two to a byte, or one. The others hold scales and minima.
PACKED, WEIGHT, SCALE, LOW = "weight_packed", "weight", "weight_scale", "weight_low"


def variables(shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array.

    Args:
        shape: of the matrix, `(out, in)`.
        scheme: one that was made to fit; see `Scheme.fit`.
    """
    out, in_features = shape
    scales = (out, in_features // (scheme.group_size or in_features)), scheme.held_scale_dtype
    if scheme.bits == 4:
        numbers = {PACKED: ((out, -(-in_features // 2)), scheme.number_dtype)}
    else:
        numbers = {WEIGHT: (shape, scheme.number_dtype)}
    arrays: dict[str, Any] = {**numbers, SCALE: scales}
    return arrays if scheme.symmetric else arrays | {LOW: scales}


def held_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Bytes of all arrays of a matrix; see `variables`."""
    return sum(
        math.prod(sizes) * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
        for sizes, dtype in variables(shape, scheme).values()
    )


def arrays_of(packed: Packed) -> dict[str, Any]:
    """A packed matrix's arrays."""
    arrays = {PACKED if packed.is_4_bit else WEIGHT: packed.data, SCALE: packed.scale}
    return arrays if packed.low is None else arrays | {LOW: packed.low}
