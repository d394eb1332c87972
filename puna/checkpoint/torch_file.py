"""torch's `.pth` and `.bin` files, as views of the mapped file, without torch.

Such a file is a zip archive: `data.pkl` describes the tensors, `data/0`, `data/1`, … are their
bytes, stored as they are.

Source: `torch.serialization`.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from puna.checkpoint.pickle_reader import PickledTensor, read_state_dict
from puna.checkpoint.source import MappedFile, TensorInfo
from puna.errors import PresetError

MAX_PICKLE = 1 << 20  # bytes; 0.2 MB describe the 1,100 tensors of Llama 3.1 405B


class TorchFile:
    """The tensors of a file that `torch.save` wrote, as views of the mapped file.

    Everything is checked when it is made: the archive's entries, the pickle's instructions, and
    that every tensor lies within its storage. Then nothing is left to allocate but views.

    Args:
        path: a file that holds one dict from names to tensors.

    Raises:
        PresetError: the file is malformed, in the format of before PyTorch 1.6, holds anything
            but tensors, or its pickle names what no dict of tensors needs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        try:
            pickled, self._spans = _read_archive(self._file)
            self._tensors = read_state_dict(pickled, self.path)
            self._infos = {name: self._check(name, t) for name, t in self._tensors.items()}
        except BaseException:
            self._file.close()
            raise

    def names(self) -> Collection[str]:
        """The names of all tensors, in the file's order."""
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor.

        Raises:
            PresetError: there is no tensor of that name.
        """
        self._tensor(name)
        return self._infos[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of the file with the strides that it was saved with.

        Raises:
            PresetError: there is no tensor of that name, or the file is closed.
        """
        tensor = self._tensor(name)
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.dtype)
        start, nbytes = self._spans[tensor.storage.key]
        size = tensor.dtype.itemsize
        raw = self._file.array(start, nbytes, tensor.dtype, (nbytes // size,))
        strides = [stride * size for stride in tensor.strides]
        offset = tensor.offset * size
        return np.ndarray(tensor.shape, tensor.dtype, raw.view(np.uint8), offset, strides)

    def release(self, name: str) -> None:
        """Give back the memory of the file pages that hold a tensor's storage."""
        self._file.release(*self._spans[self._tensor(name).storage.key])

    def is_same(self, name: str, other: str) -> bool:
        """Whether two tensors are one, as tied weights are."""
        return self._tensor(name) == self._tensor(other)

    def close(self) -> None:
        """Close the file. Views that are still held stay valid."""
        self._file.close()

    def _tensor(self, name: str) -> PickledTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise PresetError(
                f"no tensor {name!r} in {self.path}; the {len(self._tensors)} there are begin with "
                f"{sorted(self._tensors)[:3]}"
            ) from None

    def _check(self, name: str, tensor: PickledTensor) -> TensorInfo:
        """Refuse a tensor that its storage cannot hold."""

        def fail(what: str) -> PresetError:
            return PresetError(
                f"{self.path}: tensor {name!r} {what}; the file is damaged: fetch it again"
            )

        storage, size = tensor.storage, tensor.dtype.itemsize
        unit = 1 if storage.dtype is None else storage.dtype.itemsize
        if storage.key not in self._spans:
            raise fail(f"is in storage {storage.key!r:.80}, which the archive has not")
        nbytes = self._spans[storage.key][1]
        if storage.numel * unit != nbytes or nbytes % size:
            raise fail(
                f"is in a storage of {storage.numel} elements of {unit} bytes, and the archive "
                f"has {nbytes} bytes of it"
            )
        numel, total = math.prod(tensor.shape), nbytes // size
        last = tensor.offset + sum(
            (extent - 1) * stride
            for extent, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if numel and (last >= total or numel > total):
            raise fail(
                f"of shape {tensor.shape!r:.80}, strides {tensor.strides!r:.80} and offset "
                f"{tensor.offset} does not fit in the {total} elements of its storage"
            )
        if not numel and math.prod(extent for extent in tensor.shape if extent) >= 2**63 // size:
            raise fail(f"of shape {tensor.shape!r:.80} is larger than any memory")
        word = str(tensor.dtype)
        return TensorInfo(tensor.shape, tensor.dtype, numel * size, self.path, word)


def _read_archive(file: MappedFile) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and where each storage's bytes are: (offset, length) by its key."""
    path = file.path
    if bytes(file.view(0, 4)) != b"PK\x03\x04":
        if bytes(file.view(0, 14)).startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
            raise PresetError(
                f"{path} is in torch's format of before PyTorch 1.6, which is not read; open and "
                "save it once with a newer torch: torch.save(torch.load(path), path)"
            )
        raise PresetError(
            f"{path} begins with {bytes(file.view(0, 8))!r}, expected a file of torch.save; it is "
            "damaged or of another kind: fetch it again"
        )
    spans: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # Every entry is in one folder, whose name is the saved file's.
                key = entry.filename.partition("/")[2]
                if key in spans:
                    raise _damaged(path, f"its archive holds {entry.filename!r:.200} twice")
                spans[key] = _span(file, entry)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError, ValueError, OSError) as error:
        if isinstance(error, PresetError):
            raise
        raise _damaged(path, f"its archive cannot be read ({error})") from error
    end = 0
    for key, (start, length) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:
            raise _damaged(path, f"the archive's entry {key!r:.200} overlaps the one before")
        end = start + length
    if "data.pkl" not in spans:
        raise _damaged(path, "its archive has no data.pkl, so it is not of torch.save")
    order = bytes(file.view(*spans["byteorder"])) if "byteorder" in spans else b"little"
    if order != b"little":
        raise PresetError(
            f"{path} has byte order {order!r:.20}, expected b'little'; save it again on a "
            "little-endian machine"
        )
    start, length = spans["data.pkl"]
    if length > MAX_PICKLE:
        raise _damaged(path, f"its pickle takes {length} bytes, at most {MAX_PICKLE} are read")
    storages = {key[5:]: span for key, span in spans.items() if key.startswith("data/")}
    return bytes(file.view(start, length)), storages


def _damaged(path: Path, what: str) -> PresetError:
    return PresetError(f"{path}: {what}; the file is damaged: fetch it again")


def _span(file: MappedFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes are, by its own header, which the directory's may not match."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise PresetError(
            f"{file.path}: entry {entry.filename!r:.200} is compressed or encrypted, and torch "
            "stores plain bytes; save the file again with torch.save"
        )
    header = bytes(file.view(entry.header_offset, 30))
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _damaged(file.path, f"entry {entry.filename!r:.200} has no header")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    start = entry.header_offset + 30 + name_length + extra_length
    if entry.file_size != entry.compress_size or start + entry.file_size > file.size:
        raise _damaged(
            file.path,
            f"entry {entry.filename!r:.200} claims {entry.file_size} bytes at {start}, and the "
            f"file has {file.size}",
        )
    return start, entry.file_size
