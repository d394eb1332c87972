"""What every checkpoint reader offers, and the memory-mapped file that they read from."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from puna.errors import PresetError

_MADV_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
# Linux's value on every architecture that NumPy has wheels for; Python names it only from 3.13 on.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before any of it is read.

    Args:
        shape: its dimensions, in NumPy's order.
        dtype: the dtype of the array that `read` returns (ml_dtypes' for bfloat16 and float8).
        nbytes: bytes that it takes in the file.
        file: the file that holds it.
        stored: the file's own word for its type, such as "BF16" or "Q4_1".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    file: Path
    stored: str


class TensorSource(Protocol):
    """A checkpoint's tensors under Hugging Face's names, read one at a time."""

    def names(self) -> Collection[str]:
        """The names of all tensors, in the order in which the files hold them."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor, without reading it.

        Raises:
            PresetError: there is no tensor of that name.
        """
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of the mapped file where its storage allows it, else a new array.

        A view may be written to: that changes a private copy of the page, never the file.

        Raises:
            PresetError: there is no tensor of that name, or the source is closed.
        """
        ...

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages; a view still held reads them anew.

        What was written into a view of this tensor is lost. Does nothing where unsupported.
        """
        ...

    def close(self) -> None:
        """Close the files. Views that are still held stay valid, and keep their file mapped."""
        ...


class Closable(Protocol):
    """An opened file."""

    def close(self) -> None:
        """Close it."""
        ...


class Described(Protocol):
    """What a source keeps of a tensor."""

    @property
    def info(self) -> TensorInfo:
        """What is known of it before it is read."""
        ...


Entry = TypeVar("Entry", bound=Described)
File = TypeVar("File", bound=Closable)


class EntrySource(Generic[Entry, File]):
    """The half of a `TensorSource` that is the same whatever the files are.

    A subclass fills `_entries` and `_files`, and says how an entry is read and released.
    """

    _entries: dict[str, Entry]
    _files: list[File]

    def names(self) -> Collection[str]:
        """The names of all tensors, in the order in which the files hold them."""
        return self._entries.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor, without reading it.

        Raises:
            PresetError: there is no tensor of that name.
        """
        return self._entry(name).info

    def close(self) -> None:
        """Close the files. Views that are still held stay valid."""
        for file in self._files:
            file.close()

    def _where(self) -> str:
        """What is read, for messages."""
        raise NotImplementedError

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise PresetError(
                f"no tensor {name!r} in {self._where()}; the {len(self._entries)} there are begin "
                f"with {sorted(self._entries)[:3]}"
            ) from None


class MappedFile:
    """A file mapped privately: its views may be written to, and the file never changes.

    No `madvise` hint is given for reading, as none gained anything: with a warm page cache 8.3 GB/s
    plain and 7.6 to 9.1 with SEQUENTIAL, WILLNEED or POPULATE_READ; from the disk they were slower.

    Args:
        path: the file.

    Raises:
        PresetError: it is missing, not a file, empty or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if sys.byteorder != "little":
            raise PresetError(
                f"{path}: checkpoints are little-endian and this machine is not; "
                "read it on a little-endian machine"
            )
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise PresetError(f"{path} is empty; fetch it again")
                self._map = _map_private(file.fileno())
        except OSError as error:
            raise PresetError(
                f"{path} cannot be read ({error.strerror or error}); expected a readable file: "
                "check the path and its permissions"
            ) from error
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping itself, for parsers of headers."""
        return self._map

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """The bytes `[offset, offset + nbytes)` as uint8, without a copy.

        Raises:
            PresetError: the file was closed.
        """
        if self._bytes is None:
            raise PresetError(f"{self.path} was closed; open the checkpoint again to read from it")
        return self._bytes[offset : offset + nbytes]

    def array(
        self, offset: int, nbytes: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> np.ndarray:
        """A stretch of the file as an array; a copy only where its start is misaligned."""
        raw = self.view(offset, nbytes)
        # Anonymous maps start on a page, so the offset alone tells the alignment in memory.
        if offset % dtype.alignment:
            raw = raw.copy()
        return raw.view(dtype).reshape(shape)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the whole pages inside `[offset, offset + nbytes)` from this process's memory."""
        if _MADV_DONTNEED is None or self._bytes is None:
            return
        page = mmap.PAGESIZE
        start = -(-offset // page) * page
        length = (offset + nbytes) // page * page - start
        if length > 0:
            with contextlib.suppress(OSError):
                self._map.madvise(_MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file, now or when the last view of it goes."""
        self._bytes = None
        with contextlib.suppress(BufferError):  # views are out: they own the mapping now
            self._map.close()


def _map_private(fd: int) -> mmap.mmap:
    """Map a whole file copy-on-write."""
    if sys.platform == "linux":
        # A private writable mapping counts against the commit limit, which would refuse a file
        # larger than the machine's memory although nothing is ever written; NORESERVE says so.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
