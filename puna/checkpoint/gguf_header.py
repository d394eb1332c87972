"""The header of a GGUF file: metadata as plain Python, tensors as shapes and places.

Our own parser, because the `gguf` package's reader makes an array of every token and takes
seconds. Everything is checked against the file's size before anything is allocated.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from puna.checkpoint.source import MappedFile
from puna.errors import PresetError

_MAX_STRING = 1 << 26  # bytes; a chat template has some thousands
_MAX_ARRAY = 1 << 24  # elements; the largest vocabularies have some hundred thousand
_MAX_NESTING = 4


class Storage(NamedTuple):
    """How a tensor type is stored: its name, elements a block, bytes a block."""

    name: str
    block: int
    nbytes: int


STORAGE: dict[int, Storage] = {
    0: Storage("F32", 1, 4),
    1: Storage("F16", 1, 2),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    6: Storage("Q5_0", 32, 22),
    7: Storage("Q5_1", 32, 24),
    8: Storage("Q8_0", 32, 34),
    10: Storage("Q2_K", 256, 84),
    11: Storage("Q3_K", 256, 110),
    12: Storage("Q4_K", 256, 144),
    13: Storage("Q5_K", 256, 176),
    14: Storage("Q6_K", 256, 210),
    16: Storage("IQ2_XXS", 256, 66),
    17: Storage("IQ2_XS", 256, 74),
    18: Storage("IQ3_XXS", 256, 98),
    19: Storage("IQ1_S", 256, 50),
    20: Storage("IQ4_NL", 32, 18),
    21: Storage("IQ3_S", 256, 110),
    22: Storage("IQ2_S", 256, 82),
    23: Storage("IQ4_XS", 256, 136),
    28: Storage("F64", 1, 8),
    29: Storage("IQ1_M", 256, 56),
    30: Storage("BF16", 1, 2),
    34: Storage("TQ1_0", 256, 54),
    35: Storage("TQ2_0", 256, 66),
    39: Storage("MXFP4", 32, 17),
}

_NUMBERS: dict[int, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 6
_BOOL = 7


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor as the file describes it.

    Args:
        name: its GGUF name.
        shape: its dimensions in NumPy's order (the file has them reversed).
        type: its code in `STORAGE`.
        offset: where its data begin, in bytes from the start of the file.
        nbytes: how long they are.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says before its data."""

    version: int
    metadata: dict[str, Any]
    tensors: list[GGUFTensor]


def read_header(file: MappedFile) -> GGUFHeader:
    """Parse and check the header of a mapped GGUF file, versions 2 and 3.

    Floats come as the shortest decimals that round to what the file holds: 1e-05, and not
    9.999999747378752e-06.

    Raises:
        PresetError: the file is no GGUF, of another version, big-endian, or malformed.
    """
    cursor = _Cursor(file)
    magic = file.buffer[:4]
    if magic != b"GGUF":
        raise cursor.fail(f"it begins with {magic!r}, expected b'GGUF'")
    cursor.position = 4
    version = cursor.number("<I")
    if version & 0xFFFF == 0 and version:
        raise PresetError(
            f"{file.path} is a big-endian GGUF, and only little-endian ones are read; convert it "
            "with llama.cpp's gguf_convert_endian.py"
        )
    if version not in (2, 3):
        raise PresetError(
            f"{file.path} is GGUF version {version}, and versions 2 and 3 are read; convert the "
            "model again with a current llama.cpp"
        )
    tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
    cursor.check_count(pair_count, 13, "metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r:.200} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"), key)
    cursor.check_count(tensor_count, 24, "tensors")
    tensors = [cursor.tensor() for _ in range(tensor_count)]
    return GGUFHeader(version, metadata, _place(tensors, metadata, cursor))


def _place(
    tensors: list[GGUFTensor], metadata: dict[str, Any], cursor: _Cursor
) -> list[GGUFTensor]:
    """The tensors in the order of their data, offsets counted from the start of the file."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r:.80}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    placed: list[GGUFTensor] = []
    names: set[str] = set()
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        begin = start + tensor.offset
        if tensor.name in names:
            raise cursor.fail(f"tensor {tensor.name!r:.200} is there twice")
        if tensor.offset % alignment:
            raise cursor.fail(f"tensor {tensor.name!r} is at {tensor.offset}, not on {alignment}")
        if begin < end:
            raise cursor.fail(f"tensor {tensor.name!r} at {begin} overlaps the one before it")
        end = begin + tensor.nbytes
        if end > cursor.size:
            raise cursor.fail(
                f"tensor {tensor.name!r} ends at byte {end}, and the file has {cursor.size}"
            )
        names.add(tensor.name)
        placed.append(GGUFTensor(tensor.name, tensor.shape, tensor.type, begin, tensor.nbytes))
    return placed


class _Cursor:
    """A place in a mapped file, from which values are read one after the other."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.buffer = file.buffer
        self.size = file.size
        self.position = 0

    def fail(self, what: str) -> PresetError:
        return PresetError(f"{self.path}: {what}; the file is damaged or no GGUF: fetch it again")

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`; returns where they begin."""
        begin = self.position
        if nbytes > self.size - begin:
            raise self.fail(f"{what} at byte {begin} runs over the file's end at {self.size}")
        self.position = begin + nbytes
        return begin

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        return struct.unpack_from(kind, self.buffer, self.take(size, "a number"))[0]

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count whose items, of `least` bytes each, cannot fit in the rest of the file."""
        if count > (self.size - self.position) // least:
            raise self.fail(f"it claims {count} {what}, more than its {self.size} bytes can hold")

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings. Written flat: vocabularies and merges have hundreds of thousands."""
        buffer, size, position = self.buffer, self.size, self.position
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        result: list[str] = []
        try:
            for _ in range(count):
                (length,) = length_at(buffer, position)
                begin = position + 8
                position = begin + length
                if position > size or length > _MAX_STRING:
                    raise self.fail(f"{what} at byte {begin} claims a string of {length} bytes")
                result.append(buffer[begin:position].decode())
        except UnicodeDecodeError as error:
            raise self.fail(
                f"{what} before byte {position} is not UTF-8 ({error.reason})"
            ) from None
        except struct.error:
            raise self.fail(f"{what} at byte {position} runs over the file's end") from None
        self.position = position
        return result

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """One metadata value of the given type code, in plain Python."""
        if kind == _STRING:
            return self.string(f"{key!r:.200}")
        if kind in _NUMBERS:
            return self.numbers(kind, 1, key)[0]
        if kind != _ARRAY or depth >= _MAX_NESTING:
            raise self.fail(f"the metadata key {key!r:.200} has a value of unknown type {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if count > _MAX_ARRAY:
            raise self.fail(f"the metadata key {key!r:.200} claims {count} items")
        least = _NUMBERS[item].itemsize if item in _NUMBERS else 8
        self.check_count(count, least, f"items of {key!r:.200}")
        if item == _STRING:
            return self.strings(count, f"{key!r:.200}")
        if item in _NUMBERS:
            return self.numbers(item, count, key)
        return [self.value(item, key, depth + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = _NUMBERS[kind]
        begin = self.take(count * dtype.itemsize, f"{key!r:.200}")
        raw = self.buffer[begin : self.position]
        if kind == _BOOL:
            return [byte != 0 for byte in raw]
        array = np.frombuffer(raw, dtype)
        # Scores of a vocabulary are mostly whole numbers, which need no shortening.
        if kind == _FLOAT32 and not np.array_equal(array, np.round(array)):
            return [float(str(number)) for number in array]
        return array.tolist()

    def tensor(self) -> GGUFTensor:
        """One tensor's description, its offset still relative to the data."""
        name = self.string("a tensor's name")
        n_dims = self.number("<I")
        if n_dims > 4:
            raise self.fail(f"tensor {name!r:.200} has {n_dims} dimensions, expected at most 4")
        shape = tuple(self.number("<Q") for _ in range(n_dims))[::-1]
        code, offset = self.number("<I"), self.number("<Q")
        storage = STORAGE.get(code)
        if storage is None:
            raise PresetError(
                f"{self.path}: tensor {name!r:.200} is of type {code}, which is not read; expected "
                f"one of {', '.join(item.name for item in STORAGE.values())}: use another file "
                "of this model"
            )
        if (shape[-1] if shape else 1) % storage.block:
            raise self.fail(
                f"tensor {name!r:.200} of {storage.name} has rows of {shape[-1:]} elements, "
                f"expected a multiple of {storage.block}"
            )
        # Of an empty tensor, the other dimensions still have to be sane.
        if math.prod(size for size in shape if size) >= 2**60:
            raise self.fail(f"tensor {name!r:.200} of shape {shape} is larger than any memory")
        nbytes = math.prod(shape) // storage.block * storage.nbytes
        return GGUFTensor(name, shape, code, offset, nbytes)
