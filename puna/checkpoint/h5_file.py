"""Keras's `.weights.h5` files, as views of the mapped file.

They are read here and not by the HDF5 library, which a damaged file can make loop forever; and what
Keras writes is a small part of HDF5: groups of the first format, and arrays that lie in the file
in one piece. All else (links to other files, pieces, filters, shared types) is refused by name.

Source: the HDF5 File Format Specification, version 3; Keras's `saving/saving_lib.py`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from puna.checkpoint.source import MappedFile, TensorInfo
from puna.errors import PresetError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# A model has 6 levels, and some 25 objects with 8 messages each a block.
_MAX_DEPTH, _MAX_OBJECTS, _MAX_MESSAGES = 16, 20_000, 400_000

# Types of messages of an object's header.
_NIL, _SPACE, _LINK_INFO, _TYPE, _LINK, _EXTERNAL = 0, 1, 2, 3, 6, 7
_LAYOUT, _FILTERS, _CONTINUATION, _SYMBOLS = 8, 11, 16, 17
_REFUSED = {
    _LINK_INFO: "a group of a newer format",
    _LINK: "a group of a newer format",
    _EXTERNAL: "an array in another file",
    _FILTERS: "a compressed array",
}
_SHARED = 2  # a message's flag: what it says is elsewhere


def _float(size: int, sign: int, exponent: int, mantissa: int) -> bytes:
    """The description of an IEEE number, little-endian, its sign in bit `sign`."""
    bits, bias = bytes([0x11, 0x20, sign, 0]), 2 ** (exponent - 1) - 1
    fields = (size, 0, 8 * size, mantissa, exponent, 0, mantissa, bias)
    return bits + struct.pack("<IHHBBBBI", *fields)


_TYPES = {
    _float(2, 15, 5, 10): np.dtype(np.float16),
    _float(4, 31, 8, 23): np.dtype(np.float32),
    _float(8, 63, 11, 52): np.dtype(np.float64),
}


class H5File:
    """The arrays of an HDF5 file that Keras wrote, by their paths.

    Args:
        path: the file.

    Raises:
        PresetError: it is malformed, or holds what Keras does not write into weights files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        self._entries: dict[str, tuple[int, TensorInfo]] = {}
        self._objects = self._messages = 0
        try:
            self._read_group(self._root(), "")
            self._check_overlap()
        except BaseException:
            self._file.close()
            raise

    def names(self) -> Collection[str]:
        """The paths of all arrays, such as `layers/llama_layer_norm/vars/0`."""
        return self._entries.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of an array."""
        return self._entries[name][1]

    def read(self, name: str) -> np.ndarray:
        """An array as a view of the file; a copy only where its start is misaligned.

        Raises:
            PresetError: the file is closed.
        """
        offset, info = self._entries[name]
        return self._file.array(offset, info.nbytes, info.dtype, info.shape)

    def release(self, name: str) -> None:
        """Give back the memory of an array's file pages."""
        offset, info = self._entries[name]
        self._file.release(offset, info.nbytes)

    def close(self) -> None:
        """Close the file. Views that are still held stay valid."""
        self._file.close()

    # Bytes

    def _fail(self, what: str) -> PresetError:
        return PresetError(
            f"{self.path}: {what}; expected what Keras's save_weights writes: the file is damaged, "
            "or was written otherwise: fetch it again"
        )

    def _bytes(self, offset: int, length: int) -> bytes:
        if offset + length > self._file.size:
            raise self._fail(
                f"it points to bytes {offset} to {offset + length}, and it has {self._file.size}"
            )
        return bytes(self._file.view(offset, length))

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(offset, struct.calcsize(layout)))

    def _expect(self, offset: int, signature: bytes, what: str) -> None:
        if self._bytes(offset, len(signature)) != signature:
            raise self._fail(f"byte {offset} is no {what}")

    # Groups

    def _root(self) -> int:
        """The root group's header, which the file's first block names."""
        self._expect(0, _SIGNATURE, "HDF5 file")
        version, _, _, _, _, offsets, lengths = self._unpack("<7B", 8)
        if version != 0 or (offsets, lengths) != (8, 8):
            raise self._fail(f"it is of HDF5's format {version} with {offsets}-byte addresses")
        if self._unpack("<Q", 24) != (0,):
            raise self._fail("it begins with something else than HDF5")
        return self._unpack("<Q", 64)[0]

    def _read_group(self, header: int, prefix: str) -> None:
        """Add all arrays below a group."""
        pending = [(header, prefix)]
        while pending:
            header, name = pending.pop()
            messages = dict(self._header(header, name))
            if _SYMBOLS in messages:
                tree, heap = struct.unpack("<QQ", self._sized(messages[_SYMBOLS], 16, name))
                if name.count("/") >= _MAX_DEPTH:
                    raise self._fail(f"it has more than {_MAX_DEPTH} levels of groups")
                inner = f"{name}/" if name else ""
                pending += [(at, inner + link) for link, at in self._links(tree, heap)]
            elif name in self._entries:
                raise self._fail(f"{name!r:.200} is there twice")
            else:
                self._entries[name] = self._array(messages, name)

    def _links(self, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """The names in a group, and the headers of what they stand for."""
        self._expect(heap, b"HEAP\0", "heap of names")
        size, _, names = self._unpack("<QQQ", heap + 8)
        nodes, level = [tree], None
        while nodes:
            node = nodes.pop()
            self._count_object()
            self._expect(node, b"TREE\0", "tree of a group")
            here, used = self._unpack("<BH", node + 5)
            # Each level is one below that of the node before it, so there is an end.
            if here and (level is not None and here >= level):
                raise self._fail("the tree of a group goes in a circle")
            children = [self._unpack("<Q", node + 32 + 16 * place)[0] for place in range(used)]
            if here:
                level, nodes = here, nodes + children
                continue
            for child in children:
                yield from self._symbols(child, names, size)

    def _symbols(self, node: int, names: int, size: int) -> Iterator[tuple[str, int]]:
        self._expect(node, b"SNOD\x01", "list of a group")
        (count,) = self._unpack("<H", node + 6)
        for place in range(count):
            self._count_object()
            offset, header, kind = self._unpack("<QQI", node + 8 + 40 * place)
            if kind not in (0, 1):
                raise self._fail("it has a link, not an object")
            if offset >= size:
                raise self._fail("a name is outside the heap of names")
            raw = self._bytes(names + offset, min(size - offset, 256))
            name, end, _ = raw.partition(b"\0")
            try:
                text = name.decode()
            except UnicodeDecodeError:
                text = ""
            if not end or not text or "/" in text:
                raise self._fail(f"an object has the name {name[:80]!r}")
            yield text, header

    def _count_object(self) -> None:
        self._objects += 1
        if self._objects > _MAX_OBJECTS:
            raise self._fail(f"it has more than {_MAX_OBJECTS} objects")

    # Objects

    def _header(self, header: int, name: str) -> Iterator[tuple[int, bytes]]:
        """The messages of an object, by their types."""
        version, _, count = self._unpack("<BBH", header)
        if version != 1:
            raise self._fail(f"{name!r:.200} has a header of version {version}")
        blocks = [(header + 16, self._unpack("<I", header + 8)[0])]
        while blocks:
            at, length = blocks.pop(0)
            end = at + length
            while at + 8 <= end and count > 0:
                self._messages, count = self._messages + 1, count - 1
                if self._messages > _MAX_MESSAGES:
                    raise self._fail(f"it has more than {_MAX_MESSAGES} messages")
                kind, size, flags = self._unpack("<HHB", at)
                if kind in _REFUSED:
                    raise self._fail(f"{name!r:.200} is {_REFUSED[kind]}")
                if kind in (_SPACE, _TYPE, _LAYOUT, _SYMBOLS, _CONTINUATION):
                    if flags & _SHARED:
                        raise self._fail(f"{name!r:.200} shares its description")
                    body = self._bytes(at + 8, size)
                    if kind == _CONTINUATION:
                        start, more = struct.unpack("<QQ", self._sized(body, 16, name))
                        blocks.append((start, more))
                    else:
                        yield kind, body
                at += 8 + size

    def _sized(self, body: bytes, size: int, name: str) -> bytes:
        """The beginning of a message, which must be as long as what it says."""
        if len(body) < size:
            raise self._fail(
                f"the description of {name!r:.200} is {len(body)} bytes short of {size}"
            )
        return body[:size]

    def _array(self, messages: dict[int, bytes], name: str) -> tuple[int, TensorInfo]:
        """Where an array is, and what it is."""
        if not messages.keys() >= {_SPACE, _TYPE, _LAYOUT}:
            raise self._fail(f"{name!r:.200} is neither a group nor an array")
        shape, dtype = self._shape(messages[_SPACE], name), self._dtype(messages[_TYPE], name)
        version, kind, offset, stored = struct.unpack(
            "<BBQQ", self._sized(messages[_LAYOUT], 18, name)
        )
        if (version, kind) != (3, 1):
            raise self._fail(f"{name!r:.200} is an array in pieces")
        nbytes = math.prod(shape) * dtype.itemsize
        if stored != nbytes or offset + nbytes > self._file.size or not nbytes:
            raise self._fail(
                f"{name!r:.200} of {dtype} {shape!r:.200} should be in {stored} bytes at {offset}, "
                f"and the file has {self._file.size}"
            )
        return offset, TensorInfo(shape, dtype, nbytes, self.path, dtype.name)

    def _shape(self, body: bytes, name: str) -> tuple[int, ...]:
        version, rank = self._sized(body, 2, name)
        start = {1: 8, 2: 4}.get(version)
        if start is None or rank > 32:
            raise self._fail(f"{name!r:.200} has {rank} dimensions, in version {version}")
        return struct.unpack_from(f"<{rank}Q", self._sized(body, start + 8 * rank, name), start)

    def _dtype(self, body: bytes, name: str) -> np.dtype:
        body = body.ljust(20, b"\0")
        kind, size = body[0] & 15, int.from_bytes(body[4:8], "little")
        # HDF5 knows no bfloat16: Keras writes two bytes without a meaning, and nothing else so.
        if kind == 5 and size == 2:
            return np.dtype(ml_dtypes.bfloat16)
        dtype = _TYPES.get(body[:20])
        if dtype is None:
            raise self._fail(
                f"{name!r:.200} is of class {kind} with {size} bytes an element, and only "
                "little-endian floating-point numbers are read (quantized presets are not)"
            )
        return dtype

    def _check_overlap(self) -> None:
        end = 0
        for name, (offset, info) in sorted(self._entries.items(), key=lambda item: item[1][0]):
            if offset < end:
                raise self._fail(f"{name!r:.200} overlaps another array")
            end = offset + info.nbytes
