"""GGUF's blocks as matrices that stay packed: the same whole numbers and scales, in our order.

A block holds a scale or several, perhaps minima, and the numbers of 32 or 256 inputs. We hold the
numbers of a row beside each other, those of 4 bits with neighbours in a byte, and scales apart.

Nothing is rounded. Numbers and float16 scales are copied. Where a group's scale is itself a float16
number times a whole one, the product has 17 or 19 binary digits and is exact in float32, and so is
that of a minimum; hence a weight comes to the same bits as the `gguf` package gives it.

Sources of the layouts: ggml's ggml-common.h, and gguf-py's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from puna.quantization.scheme import SMALL_GROUP, Scheme

# The types that stay packed, and how we hold them.
SCHEMES: dict[str, Scheme] = {
    "Q8_0": Scheme(bits=8, group_size=32, scale_dtype="float16"),
    "Q4_0": Scheme(bits=4, group_size=32, scale_dtype="float16"),
    "Q4_1": Scheme(bits=4, group_size=32, symmetric=False, free_minima=True, scale_dtype="float16"),
    "Q4_K": Scheme(bits=4, group_size=32, symmetric=False, free_minima=True, scale_dtype="float32"),
    "Q6_K": Scheme(bits=8, group_size=SMALL_GROUP, scale_dtype="float32"),
}


class DequantizedWarning(UserWarning):
    """Matrices of a GGUF file are of types that cannot be held packed, and take more memory."""


def repack(
    stored: str,
    blocks: np.ndarray,
    data: np.ndarray,
    scale: np.ndarray,
    low: np.ndarray | None = None,
) -> None:
    """Write what blocks hold where we hold it; each array has a row for each block.

    Args:
        stored: the type, one of `SCHEMES`.
        blocks: uint8 `[blocks, bytes]`.
        data: int8 `[blocks, inputs]`, or uint8 `[blocks, inputs / 2]`.
        scale: `[blocks, groups]`, of the scheme's dtype.
        low: like `scale`, where there are minima.
    """
    _REPACK[stored](blocks, data, scale, low)


Target = np.ndarray | None


def _q8_0(blocks: np.ndarray, data: np.ndarray, scale: np.ndarray, low: Target) -> None:
    del low
    scale[:] = _halves(blocks[:, :2])
    data[:] = blocks[:, 2:].view(np.int8)


def _q4_0(blocks: np.ndarray, data: np.ndarray, scale: np.ndarray, low: Target) -> None:
    del low
    scale[:] = _halves(blocks[:, :2])
    _pair_neighbours(blocks[:, 2:], data.reshape(-1, 2, 8))


def _q4_1(blocks: np.ndarray, data: np.ndarray, scale: np.ndarray, low: Target) -> None:
    assert low is not None
    scale[:] = _halves(blocks[:, :2])
    low[:] = _halves(blocks[:, 2:4])
    _pair_neighbours(blocks[:, 4:], data.reshape(-1, 2, 8))


def _q4_k(blocks: np.ndarray, data: np.ndarray, scale: np.ndarray, low: Target) -> None:
    assert low is not None
    # Eight scales and eight minima of 6 bits: of the first four each has a byte, whose upper two
    # bits are those of the last four.
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = np.concatenate((first & 63, (rest & 15) | (first >> 2 & 48)), axis=1)
    minima = np.concatenate((second & 63, (rest >> 4) | (second >> 2 & 48)), axis=1)
    halves = _halves(blocks[:, :4]).astype(np.float32)
    np.multiply(halves[:, :1], factors, out=scale)
    np.multiply(-halves[:, 1:], minima, out=low)
    _pair_neighbours(blocks[:, 16:].reshape(-1, 4, 32), data.reshape(-1, 4, 2, 16))


def _q6_k(blocks: np.ndarray, data: np.ndarray, scale: np.ndarray, low: Target) -> None:
    del low
    np.multiply(
        _halves(blocks[:, 208:]).astype(np.float32), blocks[:, 192:208].view(np.int8), out=scale
    )
    lower = blocks[:, :128].reshape(-1, 2, 2, 32)  # four bits of each number
    upper = blocks[:, 128:192].reshape(-1, 2, 32)  # and two
    numbers = data.view(np.uint8).reshape(-1, 2, 4, 32)
    for quarter in range(4):
        four = lower[:, :, quarter % 2]
        four = four & 15 if quarter < 2 else four >> 4
        two = upper >> 2 * quarter & 3
        # Beyond 0, uint8 goes on as the int8 that is meant.
        np.subtract(four | two << 4, 32, out=numbers[:, :, quarter])


_REPACK: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Target], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _halves(raw: np.ndarray) -> np.ndarray:
    """Bytes as float16 numbers."""
    return raw.copy().view(np.float16)


def _pair_neighbours(packed: np.ndarray, out: np.ndarray) -> None:
    """From numbers i and i + n in a byte to neighbours in a byte.

    Args:
        packed: uint8 `[..., n]`: n numbers in the lower halves, and the n after them in the upper.
        out: uint8 `[..., 2, n / 2]`.
    """
    both = packed.view("<u2")  # bytes 2k and 2k + 1
    out[..., 0, :] = both & 15 | both >> 4 & 240
    out[..., 1, :] = both >> 4 & 15 | both >> 8 & 240
