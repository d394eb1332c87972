"""A quantized matrix as compressed-tensors has it in files, and as we hold it: arrays, no Keras.

Four bits are held byte for byte as `pack-quantized` stores them: eight numbers to an int32, the
first in the lowest bits, each 8 more than the signed number that is meant. Zeros are stored as
whole numbers and held as `low = -zero * scale`, exact in float32. Eight bits are held as they are.

Sources: compressed-tensors 0.20, `compressors/pack_quantized/{base,helpers}.py` and
`compressors/naive_quantized/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from puna.backend.memory import aligned_copy, numpy_dtype
from puna.backend.packed import Packed
from puna.checkpoint.compressed_tensors import PACK, Layout
from puna.checkpoint.safetensors import TensorSpec
from puna.errors import PresetError
from puna.quantization.arrays import LOW, PACKED, SCALE, WEIGHT
from puna.quantization.scheme import Scheme

SHAPE, ZERO = "weight_shape", "weight_zero_point"


class Matrix(NamedTuple):
    """A matrix that is quantized: its shape `(out, in)`, and a scheme that was made to fit."""

    shape: tuple[int, int]
    scheme: Scheme

    @property
    def scales(self) -> tuple[int, int]:
        """The shape of its scales, `(out, groups)`."""
        return self.shape[0], self.shape[1] // (self.scheme.group_size or self.shape[1])


# Writing


def to_write(
    name: str, matrix: Matrix, read: Mapping[str, Callable[[], np.ndarray]]
) -> Iterator[TensorSpec]:
    """The tensors of a matrix in a file.

    Args:
        name: of the matrix, such as `lm_head`.
        matrix: what it is.
        read: for each of `puna.quantization.arrays.variables`, what gives the array.

    Raises:
        PresetError: the format cannot store it without loss.
    """
    (out, in_features), scheme = matrix
    if scheme.free_minima:
        raise PresetError(
            f"{name} is held as a GGUF file has it, with minima that the compressed-tensors format "
            'cannot store; load the file with quantization="none" and save that, which can be '
            "quantized anew"
        )
    if scheme.bits == 4:
        words = -(-in_features // 8)
        yield TensorSpec(
            f"{name}.{PACKED}", (out, words), np.int32, lambda: _words(read[PACKED](), words)
        )
    else:
        numbers = numpy_dtype(scheme.number_dtype)
        yield TensorSpec(f"{name}.{WEIGHT}", matrix.shape, numbers, read[WEIGHT])
    stored = numpy_dtype(scheme.scale_dtype or "float32")
    yield TensorSpec(f"{name}.{SCALE}", matrix.scales, stored, lambda: read[SCALE]().astype(stored))
    if not scheme.symmetric:
        zeros = matrix.scales if scheme.bits == 8 else (-(-out // 8), matrix.scales[1])
        dtype = np.int8 if scheme.bits == 8 else np.int32
        yield TensorSpec(
            f"{name}.{ZERO}", zeros, dtype, lambda: _zeros(name, read[SCALE](), read[LOW](), scheme)
        )
    if scheme.bits == 4:
        shape = np.array(matrix.shape, np.int64)
        yield TensorSpec(f"{name}.{SHAPE}", (2,), np.int64, lambda: shape)


def _words(data: np.ndarray, words: int) -> np.ndarray:
    """Bytes `[rows, n]` as int32 `[rows, words]`, filled up with zero bits."""
    if data.shape[1] != 4 * words:
        data = np.pad(data, ((0, 0), (0, 4 * words - data.shape[1])))
    return np.ascontiguousarray(data).view("<i4")


def _zeros(name: str, scale: np.ndarray, low: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The whole numbers that minima are made of, as they are stored."""
    zero = np.rint(-low / scale)
    if not np.array_equal(-zero * scale, low):
        raise PresetError(
            f"{name} has minima that are no whole multiples of its scales, which the format cannot "
            "store; quantize the full-precision model instead"
        )
    if scheme.bits == 8:
        return zero.astype(np.int8)
    out, groups = zero.shape
    nibbles = np.zeros((groups, -(-out // 8) * 8), np.uint8)
    nibbles[:, :out] = zero.T
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return np.ascontiguousarray(packed.view("<i4").T)


# Reading


def stored_names(matrix: Matrix, layout: Layout) -> list[str]:
    """The ends of the names of a matrix's tensors in a file."""
    names = [PACKED, SCALE, SHAPE] if layout.format == PACK else [WEIGHT, SCALE]
    return names if matrix.scheme.symmetric else [*names, ZERO]


def from_file(
    name: str, matrix: Matrix, layout: Layout, stored: Mapping[str, np.ndarray]
) -> Packed:
    """A matrix as we hold it.

    Args:
        name: for messages.
        matrix: what it is.
        layout: how it is stored.
        stored: its tensors, under the ends of their names; `ZERO` may be there for symmetric ones.

    Returns:
        Views of what was given, where the numbers are stored as we hold them.

    Raises:
        PresetError: a tensor is not what the configuration says.
    """
    (out, in_features), scheme = matrix
    bits = scheme.bits
    if layout.format == PACK:
        if stored[SHAPE].tolist() != [out, in_features]:
            raise _differs(name, SHAPE, stored[SHAPE].tolist(), [out, in_features])
        words = (out, -(-in_features * bits // 32))
        raw = _checked(name, PACKED, stored, words, np.int32).view(np.uint8)
        if bits == 4:
            data = raw[:, : -(-in_features // 2)]
        else:
            data = (raw[:, :in_features] ^ 0x80).view(np.int8)
    else:
        numbers = numpy_dtype(scheme.number_dtype) if bits == 8 else np.int8
        data = _checked(name, WEIGHT, stored, matrix.shape, numbers)
        data = _two_to_a_byte(name, data) if bits == 4 else data
        # Kernels know no such number.
        if scheme.kind == "float" and np.any(data.view(np.uint8) & 127 == 127):
            raise PresetError(f"{name}.{WEIGHT} holds NaN; fetch the checkpoint again")
    scale = stored[SCALE]
    if scale.size in (1, out) and scale.shape != matrix.scales and matrix.scales[1] == 1:
        scale = np.broadcast_to(scale.reshape(-1, 1), matrix.scales)
    if scale.shape != matrix.scales:
        raise _differs(name, SCALE, scale.shape, matrix.scales)
    zero = None
    if ZERO in stored:
        zero = _whole_zeros(name, matrix, layout, stored)
        if scheme.symmetric and np.any(zero != (8 if bits == 4 else 0)):
            raise _differs(name, ZERO, "not zero", "a symmetric scheme, as config.json says")
    low = None
    if not scheme.symmetric and zero is not None:
        scale = scale.astype(np.float32)
        low = aligned_copy(-zero.astype(np.float32) * scale)
    return Packed(data, scale, low, in_features, scheme.group_size or in_features)


def _two_to_a_byte(name: str, data: np.ndarray) -> np.ndarray:
    """Signed numbers of 4 bits in int8, as we hold them."""
    if data.min() < -8 or data.max() > 7:
        raise _differs(name, WEIGHT, f"{data.min()} to {data.max()}", "-8 to 7")
    moved = (data + 8).astype(np.uint8)
    packed = moved[:, ::2].copy()
    packed[:, : data.shape[1] // 2] |= moved[:, 1::2] << 4
    return packed


def _whole_zeros(
    name: str, matrix: Matrix, layout: Layout, stored: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Zeros `(out, groups)` on the scale of the numbers that we hold."""
    bits, (out, groups) = matrix.scheme.bits, matrix.scales
    if layout.format != PACK:
        zero = stored[ZERO]
        if matrix.scheme.kind == "float" and zero.dtype.name == matrix.scheme.number_dtype:
            zero = (zero.astype(np.float32) != 0).astype(np.int16)  # which is refused
        if zero.size == out * groups or zero.size == 1:
            zero = np.broadcast_to(zero.reshape(-1, groups if zero.size > 1 else 1), (out, groups))
        if zero.shape != (out, groups) or zero.dtype.kind not in "iu":
            raise _differs(name, ZERO, f"{zero.dtype} {zero.shape}", (out, groups))
        return zero.astype(np.int16) + (8 if bits == 4 else 0)
    words = (-(-out * bits // 32), groups)
    packed = np.ascontiguousarray(_checked(name, ZERO, stored, words, np.int32).T).view(np.uint8)
    if bits == 8:
        return packed[:, :out].T.astype(np.int16) - 128
    both = np.stack((packed & 15, packed >> 4), axis=-1).reshape(groups, -1)
    return both[:, :out].T.astype(np.int16)


def _checked(
    name: str, end: str, stored: Mapping[str, np.ndarray], shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    array = stored[end]
    if array.shape != shape or array.dtype != dtype:
        found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
        raise _differs(name, end, found, wanted)
    return np.ascontiguousarray(array)


def _differs(name: str, end: str, found: Any, wanted: Any) -> PresetError:
    return PresetError(
        f"{name}.{end} is {found}, expected {wanted}; config.json and the weights are of different "
        "checkpoints: fetch them together again"
    )
