"""From a matrix to small numbers and scales, and back: NumPy alone, a few rows at a time.

Scales are rounded to the dtype in which they are stored first, and the numbers by the scales so
rounded: `dequantize` gives the same values as the file does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from puna.backend.memory import aligned_empty, numpy_dtype
from puna.backend.packed import Packed
from puna.errors import ConfigError
from puna.quantization.scheme import Scheme

_BLOCK = 1 << 17  # weights at a time: half a megabyte of float32, so that the cache holds them

# What a group's weight of largest magnitude becomes, in symmetric 4 bits; its sign is the scale's,
# so that the eight numbers below zero, of which there is one more, are on its side. The first is
# Q4_0's choice; of all, the one of least squared error is taken.
_EXTREMES_4_BIT = (-8.0, -8.6, -7.2)

# float8's largest number; what is rounded beyond 464 is none.
_MOST_FLOAT8 = np.float32(448)

# For 4 bits with minima: by how much the range between minimum and maximum is narrowed.
_NARROWED = (1.0, 0.93, 0.86)


class _Rounded(NamedTuple):
    """Groups, rounded: `q` [rows, groups, group], the others [rows, groups, 1], all in float32."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | float


def quantize(
    matrix: np.ndarray, scheme: Scheme, *, name: str = "the matrix", dtype: str | None = None
) -> Packed:
    """Round a matrix.

    Args:
        matrix: `(out, in)`, of any float dtype; it is read in blocks of rows.
        scheme: its group is made smaller where it does not fit; see `Scheme.fit`.
        name: for messages.
        dtype: of the model's weights, by which the scales' goes; None means the matrix's own.

    Returns:
        Arrays of NumPy, aligned as backends want them. Without minima, `low` is None.

    Raises:
        ConfigError: it is no matrix, or holds NaN or infinite numbers; or the scheme has free
            minima, to which nothing is rounded.
    """
    if scheme.free_minima:
        raise ConfigError(
            f"{name} cannot be rounded to {scheme}, which is for matrices of GGUF files alone; "
            "leave out free_minima"
        )
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ConfigError(f"{name} has shape {matrix.shape}; expected a matrix (out, in)")
    out, in_features = matrix.shape
    scheme = scheme.fit(in_features, dtype or matrix.dtype.name)
    group = scheme.group_size or in_features
    stored = numpy_dtype(scheme.scale_dtype or "float32")
    held = numpy_dtype(scheme.held_scale_dtype)
    width = in_features if scheme.bits == 8 else -(-in_features // 2)
    data = aligned_empty((out, width), numpy_dtype(scheme.number_dtype))
    scale = aligned_empty((out, in_features // group), held)
    low = None if scheme.symmetric else aligned_empty(scale.shape, held)
    rows = max(1, _BLOCK // in_features)
    for start in range(0, out, rows):
        block = slice(start, start + rows)
        weights = matrix[block].astype(np.float32)
        if not np.isfinite(weights).all():
            raise ConfigError(
                f"{name} holds NaN or infinite numbers, which no scheme can store; leave it out of "
                "the quantization, or fetch the checkpoint again"
            )
        with np.errstate(over="ignore"):  # errors of weights near float32's limit are infinite
            rounded = _ROUNDING[scheme.name, scheme.symmetric](
                weights.reshape(len(weights), -1, group), stored
            )
        scale[block] = rounded.scale[..., 0]
        if low is not None:
            low[block] = (-rounded.zero * rounded.scale)[..., 0]
        _store(rounded.q.reshape(weights.shape), data[block])
    return Packed(data, scale, low, in_features, group)


def dequantize(packed: Packed) -> np.ndarray:
    """The matrix `(out, in)` in float32 that a packed one of NumPy's arrays stands for."""
    matrix = aligned_empty(packed.shape, np.dtype(np.float32))
    rows = max(1, _BLOCK // packed.in_features)
    for start in range(0, len(matrix), rows):
        block = slice(start, start + rows)
        low = None if packed.low is None else packed.low[block]
        some = packed._replace(data=packed.data[block], scale=packed.scale[block], low=low)
        matrix[block] = _dequantized(some)
    return matrix


def _dequantized(packed: Packed) -> np.ndarray:
    q = unpacked(packed).astype(np.float32)
    scale = packed.scale.astype(np.float32).repeat(packed.group, axis=1)
    if packed.low is None:
        return (q - np.float32(8)) * scale if packed.is_4_bit else q * scale
    return q * scale + packed.low.astype(np.float32).repeat(packed.group, axis=1)


def unpacked(packed: Packed) -> np.ndarray:
    """The numbers `(out, in)`: int8, float8, or from 0 to 15 in uint8."""
    if not packed.is_4_bit:
        return packed.data
    both = np.stack((packed.data & 15, packed.data >> 4), axis=-1)
    return both.reshape(len(packed.data), -1)[:, : packed.in_features]


def _store(q: np.ndarray, data: np.ndarray) -> None:
    """Write numbers in float32 `[rows, in]` as int8 or float8, or two to a byte."""
    if data.dtype != np.uint8:
        data[:] = q
        return
    small = q.astype(np.uint8)
    data[:] = small[:, ::2]
    data[:, : q.shape[1] // 2] |= small[:, 1::2] << 4


def _symmetric_8(weights: np.ndarray, stored: np.dtype) -> _Rounded:
    scale = _rounded(np.abs(weights).max(axis=-1, keepdims=True) / np.float32(127), stored)
    return _Rounded(np.clip(np.rint(weights / scale), -127, 127), scale, 0.0)


def _float_8(weights: np.ndarray, stored: np.dtype) -> _Rounded:
    scale = _rounded(np.abs(weights).max(axis=-1, keepdims=True) / _MOST_FLOAT8, stored)
    # `_store` rounds to float8. A scale that was rounded down leaves more than its largest number.
    return _Rounded(np.clip(weights / scale, -_MOST_FLOAT8, _MOST_FLOAT8), scale, 0.0)


def _symmetric_4(weights: np.ndarray, stored: np.dtype) -> _Rounded:
    where = np.abs(weights).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(weights, where, axis=-1)
    best = _Best(weights)
    for number in _EXTREMES_4_BIT:
        best.consider(_rounded(extreme / np.float32(number), stored), 0.0, -8, 7)
    # For the numbers that were found, this scale has the least error.
    q = best.found.q
    squares = np.einsum("rgi,rgi->rg", q, q)[..., None]
    products = np.einsum("rgi,rgi->rg", weights, q)[..., None]
    best.consider(_rounded(products / np.maximum(squares, 1), stored), 0.0, -8, 7)
    return best.found._replace(q=best.found.q + np.float32(8))


def _with_minima(bits: int) -> Callable[[np.ndarray, np.dtype], _Rounded]:
    least, most = (0, 15) if bits == 4 else (-128, 127)

    def round_groups(weights: np.ndarray, stored: np.dtype) -> _Rounded:
        # Zero is always within, as it must be one of the numbers.
        lowest = np.minimum(weights.min(axis=-1, keepdims=True), 0)
        highest = np.maximum(weights.max(axis=-1, keepdims=True), 0)
        best = _Best(weights)
        for share in _NARROWED if bits == 4 else (1.0,):
            narrow = np.float32(share / (most - least))
            scale = _shortened(_rounded(highest * narrow - lowest * narrow, stored))
            zero = np.clip(np.rint(least - lowest * np.float32(share) / scale), least, most)
            best.consider(scale, zero, least, most)
        return best.found

    return round_groups


_ROUNDING: dict[tuple[str, bool], Callable[[np.ndarray, np.dtype], _Rounded]] = {
    ("int8", True): _symmetric_8,
    ("int4", True): _symmetric_4,
    ("int8", False): _with_minima(8),
    ("int4", False): _with_minima(4),
    ("float8", True): _float_8,
}


def _rounded(scale: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Scales as they are stored, in float32; 1 where that is nothing, since all numbers are 0."""
    scale = scale.astype(stored).astype(np.float32)
    scale[scale == 0] = 1
    return np.clip(scale, -_largest(stored), _largest(stored))


def _shortened(scale: np.ndarray) -> np.ndarray:
    """Scales of 16 binary digits: times a zero of 8, they are exact in float32."""
    return (scale.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)


def _largest(stored: np.dtype) -> np.float32:
    return np.float32(ml_dtypes.finfo(stored).max)


class _Best:
    """Of several scales, for each group that of least squared error."""

    def __init__(self, weights: np.ndarray):
        self._weights = weights
        self._error: np.ndarray | None = None
        self._found: _Rounded | None = None

    @property
    def found(self) -> _Rounded:
        """What was considered and had the least error."""
        assert self._found is not None
        return self._found

    def consider(self, scale: np.ndarray, zero: np.ndarray | float, least: int, most: int) -> None:
        """Round by a scale and a zero [rows, groups, 1]; keep it where that is better."""
        q = np.rint(self._weights / scale)
        q += zero
        np.clip(q, least, most, out=q)
        off = (q - zero) * scale
        off -= self._weights
        error = np.einsum("rgi,rgi->rg", off, off)[..., None]
        if self._found is None or self._error is None:
            self._found, self._error = _Rounded(q, scale, zero), error
            return
        better = error < self._error
        self._error = np.minimum(error, self._error)
        old = self._found
        self._found = _Rounded(
            np.where(better, q, old.q),
            np.where(better, scale, old.scale),
            np.where(better, zero, old.zero),
        )
