"""The native library: found, loaded and called; its interface is `src/kernels.h`."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from puna.errors import BackendError

# Which instructions the kernels use, by the names in `src/dispatch.cpp`; "off" means no kernels.
VARIABLE = "PUNA_KERNELS"

# The numbers of `src/kernels.h` for how numbers are stored.
KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "uint8": 4, "float8_e4m3fn": 5}

FLOATS = ("float32", "bfloat16", "float16")

# Up to so many tokens in all go through blocks in one call; `kFewRows` in `src/dispatch.h`.
FEW_TOKENS = 8


class Matrix(ctypes.Structure):
    """`PunaMatrix`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
    )


class Attention(ctypes.Structure):
    """`PunaAttention`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "cos", "sin", "starts")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "query_heads", "key_heads")),
        *((name, ctypes.c_int64) for name in ("head_size", "capacity")),
        ("scale", ctypes.c_float),
        ("kind", ctypes.c_int32),
        ("cache_kind", ctypes.c_int32),
    )


class FullAttention(ctypes.Structure):
    """`PunaFullAttention`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "firsts", "lasts", "out")),
        *((name, ctypes.c_void_p) for name in ("log_sums", "out_change", "query_change")),
        *((name, ctypes.c_void_p) for name in ("key_change", "value_change")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "query_heads", "key_heads")),
        *((name, ctypes.c_int64) for name in ("head_size", "places")),
        ("scale", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """`PunaBlock`."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, Matrix) for name in ("query", "key", "value", "out", "gate", "up", "down")),
    )


class Blocks(ctypes.Structure):
    """`PunaBlocks`."""

    _fields_ = (
        ("blocks", ctypes.POINTER(Block)),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "x", "cos", "sin", "starts")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "tokens", "width")),
        *((name, ctypes.c_int64) for name in ("query_heads", "key_heads", "head_size", "capacity")),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("kind", ctypes.c_int32),
        ("norm_kind", ctypes.c_int32),
        ("cache_kind", ctypes.c_int32),
    )


def matrix_of(arrays: Sequence[np.ndarray], in_features: int, group: int) -> Matrix:
    """A weight [out, in], or a packed one's data, scale and perhaps low; they must stay alive."""
    data = arrays[0]
    scale = arrays[1] if len(arrays) > 1 else None
    return Matrix(
        data.ctypes.data,
        None if scale is None else scale.ctypes.data,
        arrays[2].ctypes.data if len(arrays) > 2 else None,
        data.shape[0],
        in_features,
        group,
        KINDS[data.dtype.name],
        0 if scale is None else KINDS[scale.dtype.name],
    )


class Threads(ctypes.Structure):
    """`PunaThreads`; without `run`, threads of the library's own."""

    _fields_ = (
        ("run", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    )


class KernelsMissingWarning(UserWarning):
    """The kernels were not built, so products on the CPU are slow."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is none or the user wants none.

    Raises:
        BackendError: `PUNA_KERNELS` asks for what this machine does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    path = _path()
    if path is None:
        warnings.warn(
            "Puna was installed without its native kernels (no C++ compiler was found), so "
            "half-precision and quantized models are slow on a CPU; to have them, install a C++17 "
            f"compiler and reinstall. {VARIABLE}=off silences this",
            KernelsMissingWarning,
            stacklevel=2,
        )
        return None
    loaded = ctypes.CDLL(str(path))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.puna_linear.argtypes = [
        pointer, pointer, number, integer, pointer, number, pointer, number, number,
    ]  # fmt: skip
    loaded.puna_linear.restype = ctypes.c_char_p
    loaded.puna_linear_transposed.argtypes = [
        pointer, pointer, number, integer, pointer, pointer, number,
    ]  # fmt: skip
    loaded.puna_linear_transposed.restype = ctypes.c_char_p
    loaded.puna_attention.argtypes = [pointer, pointer]
    loaded.puna_attention.restype = ctypes.c_char_p
    for function in (loaded.puna_full_attention, loaded.puna_full_attention_back):
        function.argtypes, function.restype = [pointer, pointer], ctypes.c_char_p
    loaded.puna_blocks.argtypes = [pointer, pointer]
    loaded.puna_blocks.restype = ctypes.c_char_p
    norm = [pointer, pointer, number, pointer, number, ctypes.c_float, integer, integer, pointer]
    loaded.puna_rms_norm.argtypes, loaded.puna_rms_norm.restype = norm, None
    loaded.puna_rms_norm_back.argtypes, loaded.puna_rms_norm_back.restype = [*norm, pointer], None
    loaded.puna_gate_back.argtypes = [
        pointer, pointer, pointer, pointer, number, integer, pointer, pointer,
    ]  # fmt: skip
    loaded.puna_gate_back.restype = ctypes.c_char_p
    loaded.puna_cross_entropy.argtypes = [
        pointer, pointer, integer, integer, pointer, pointer, number, pointer, pointer,
    ]  # fmt: skip
    loaded.puna_cross_entropy.restype = ctypes.c_char_p
    loaded.puna_read.argtypes = [pointer, pointer, integer]
    loaded.puna_read.restype = ctypes.c_uint64
    loaded.puna_instructions.restype = ctypes.c_char_p
    loaded.puna_use_instructions.argtypes = [ctypes.c_char_p]
    if wanted and not loaded.puna_use_instructions(wanted.encode()):
        raise BackendError(
            f"{VARIABLE}={wanted!r} is not to be had here; expected avx512bf16, avx512, avx2, "
            "portable or off, and a processor that has it"
        )
    return loaded


def _path() -> Path | None:
    """Where the library lies: beside this file, in an editable install too."""
    found = Path(__file__).with_name("puna_kernels.native")
    return found if found.is_file() else None
