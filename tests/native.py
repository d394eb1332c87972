"""What tests of the native library share: its instruction sets, and weights as it takes them."""

import ml_dtypes
import numpy as np

from puna.backend.kernels import library as kernels

LIBRARY = kernels.library()
FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def instructions():
    """Those that this machine has; the one in use comes first."""
    if LIBRARY is None:
        return []
    names, before = ["avx512bf16", "avx512", "avx2", "portable"], LIBRARY.puna_instructions()
    found = [name for name in names if LIBRARY.puna_use_instructions(name.encode())]
    LIBRARY.puna_use_instructions(before)
    return found


def weight(rng, kind, out, in_features, group=0, low=False, scale_dtype="float32"):
    """A weight's arrays, with the first one not aligned, and its values in float64."""
    if kind in FLOATS:
        array = unaligned(rng.standard_normal((out, in_features)).astype(FLOATS[kind]))
        return (array,), array.astype(np.float64)
    group = group or in_features
    groups = -(-in_features // group)
    scale = (rng.random((out, groups)) * 0.1 + 0.01).astype(FLOATS[scale_dtype])
    lows = rng.standard_normal((out, groups)).astype(FLOATS[scale_dtype])

    def spread(a):
        return np.repeat(a.astype(np.float64), group, 1)[:, :in_features]

    if kind == "float8":
        data = rng.integers(0, 256, (out, in_features)).astype(np.uint8)
        data[data & 127 == 127] = 0  # what is no number is refused before
        numbers = data = data.view(ml_dtypes.float8_e4m3fn)
    elif kind == "int8":
        numbers = data = rng.integers(-128, 128, (out, in_features)).astype(np.int8)
    else:
        numbers = rng.integers(0, 16, (out, in_features)).astype(np.uint8)
        even = np.pad(numbers, ((0, 0), (0, in_features % 2)))
        data = even[:, ::2] | even[:, 1::2] << 4
    centre = 8 if kind == "int4" and not low else 0
    values = spread(scale) * (numbers.astype(np.float64) - centre)
    arrays = (unaligned(data), scale, lows) if low else (unaligned(data), scale)
    return arrays, values + spread(lows) if low else values


def unaligned(array):
    """The same in memory that starts where no vector would."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64 + array.dtype.itemsize
    view = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view
