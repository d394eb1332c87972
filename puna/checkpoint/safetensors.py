"""Safetensors, read: single files, and shards with an index. What writes them is offered too.

The format: https://github.com/huggingface/safetensors#format; the index and the shards' names are
those of transformers.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np

from puna.checkpoint.safetensors_writer import (
    DTYPES,
    INDEX,
    MAX_HEADER,
    MAX_SHARD_SIZE,
    SINGLE,
    TensorSpec,
    plan_shards,
    write_safetensors,
    write_sharded,
)
from puna.checkpoint.source import EntrySource, MappedFile, TensorInfo
from puna.errors import PresetError

_MAX_NDIM = 64  # NumPy's limit

__all__ = [
    "DTYPES",
    "INDEX",
    "MAX_SHARD_SIZE",
    "SINGLE",
    "SafetensorsSource",
    "TensorSpec",
    "plan_shards",
    "write_safetensors",
    "write_sharded",
]


@dataclass(frozen=True, slots=True)
class _Entry:
    file: MappedFile
    offset: int
    info: TensorInfo


class SafetensorsSource(EntrySource[_Entry, MappedFile]):
    """The tensors of a safetensors checkpoint, as views of the mapped files.

    Every header is checked in full when the source is made, before any tensor is touched. Tensors
    that a shard holds beyond its index are listed too: it is for the loader to refuse them.

    Args:
        path: a directory (its `model.safetensors`, else its index and shards, else its only
            `*.safetensors`), a file, or the files of one checkpoint.

    Raises:
        PresetError: a file is missing or malformed, or the files contradict each other.

    Source: https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
        files, index = _resolve(path)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._files: list[MappedFile] = []
        try:
            for file in files:
                self._add(file)
            if index is not None:
                self._check_index(*index)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a writable view of the mapped file (a copy only where misaligned).

        Raises:
            PresetError: there is no tensor of that name, or the source is closed.
        """
        entry = self._entry(name)
        info = entry.info
        return entry.file.array(entry.offset, info.nbytes, info.dtype, info.shape)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages; a view still held reads them anew.

        Raises:
            PresetError: there is no tensor of that name.
        """
        entry = self._entry(name)
        entry.file.release(entry.offset, entry.info.nbytes)

    def _where(self) -> str:
        return ", ".join(file.path.name for file in self._files[:3])

    def _add(self, path: Path) -> None:
        file = MappedFile(path)
        self._files.append(file)
        entries, metadata = _read_header(file)
        self.metadata |= metadata
        for name, entry in entries.items():
            if name in self._entries:
                raise PresetError(
                    f"{path}: tensor {name!r} is also in {self._entries[name].info.file}; expected "
                    "each tensor once: remove the shards of the other checkpoint"
                )
            self._entries[name] = entry

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            entry = self._entries.get(name)
            if entry is None or entry.info.file != index.parent / shard:
                found = "nowhere" if entry is None else entry.info.file.name
                raise PresetError(
                    f"{index}: tensor {name!r} should be in {shard} and is {found}; index and "
                    "shards are of different checkpoints: fetch them together again"
                )


def _resolve(path: Any) -> tuple[list[Path], tuple[Path, dict[str, str]] | None]:
    """The files to read, and the index that they must agree with."""
    if not isinstance(path, (str, os.PathLike)):
        files = [Path(item) for item in path]
        if not files:
            raise PresetError("no safetensors files were given; expected at least one")
        return files, None
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _shards(path)
    if not path.is_dir():
        return [path], None
    if (path / SINGLE).is_file():
        return [path / SINGLE], None
    if (path / INDEX).is_file():
        return _shards(path / INDEX)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    what = f"{len(found)} files ({found[0].name}, …) and no index" if found else "none"
    raise PresetError(
        f"{path}: expected {SINGLE}, {INDEX} or a single *.safetensors, found {what}; fetch the "
        "missing file, or convert other weights (.bin, .pth) with transformers' save_pretrained"
    )


def _shards(index: Path) -> tuple[list[Path], tuple[Path, dict[str, str]]]:
    """The shards that an index names, each a file inside its directory."""
    try:
        content = _parse_json(index.read_bytes(), str(index))
    except OSError as error:
        raise PresetError(
            f"{index} cannot be read ({error.strerror or error}); check the path"
        ) from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PresetError(
            f"{index}: expected a non-empty object 'weight_map' from tensor to file; fetch it again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise PresetError(
                f"{index}: tensor {name!r} is said to be in {shard!r:.200}; expected a file inside "
                "the index's directory: do not use this checkpoint unless you know why"
            )
    names = sorted(set(weight_map.values()))
    # os.path and not pathlib, which raises for names that are too long or no Unicode.
    missing = [
        (n if n.isprintable() else repr(n))[:200]
        for n in names
        if not os.path.isfile(index.parent / n)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PresetError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: "
            f"{', '.join(missing[:3])}{more}; fetch the checkpoint again"
        )
    return [index.parent / name for name in names], (index, weight_map)


def _is_inside(name: str) -> bool:
    """Whether a file name from an index stays inside the directory, on any system.

    The words decide, not the resolved path: in a Hugging Face cache every file is a link out.
    """
    pure, windows = PurePosixPath(name), PureWindowsPath(name)
    absolute = pure.is_absolute() or windows.is_absolute() or windows.drive or windows.root
    return bool(pure.parts) and not absolute and ".." not in windows.parts and "\0" not in name


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object with every key once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise PresetError(f"{where}: the key {twice!r:.200} is there twice; fetch it again")
        return result

    try:
        value = json.loads(raw.decode(), object_pairs_hook=once)
    except (RecursionError, ValueError) as error:
        if isinstance(error, PresetError):  # itself a ValueError
            raise
        raise PresetError(f"{where}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise PresetError(f"{where}: expected a JSON object, got {value!r:.80}; fetch it again")
    return value


def _read_header(file: MappedFile) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Parse and check a file's header: entries in the order of their data, and the metadata."""
    path = file.path

    def fail(what: str) -> PresetError:
        return PresetError(
            f"{path}: {what}; the file is damaged or not safetensors: fetch it again"
        )

    if file.size < 8:
        raise fail(f"it has {file.size} bytes, where 8 hold the header's length alone")
    (length,) = struct.unpack_from("<Q", file.buffer)
    if length > min(MAX_HEADER, file.size - 8):
        raise fail(f"its header claims {length} bytes, and it has {file.size} (at most 100 MB)")
    raw = file.buffer[8 : 8 + length]
    if raw[:1] != b"{":
        raise fail(f"its header begins with {raw[:8]!r}, expected '{{'")
    header = _parse_json(raw, f"{path} (header)")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("its __metadata__ is not an object of strings")

    start = 8 + length
    spans = {name: _check_entry(name, entry, path, fail) for name, entry in header.items()}
    entries: dict[str, _Entry] = {}
    end = 0
    # Empty tensors come before the one that begins where they do.
    for name, (begin, info) in sorted(spans.items(), key=lambda s: (s[1][0], s[1][1].nbytes)):
        if begin != end:
            kind = "overlaps the one before" if begin < end else "leaves a hole before it"
            raise fail(f"tensor {name!r} begins at {begin} and {kind}, which ends at {end}")
        entries[name] = _Entry(file, start + begin, info)
        end = begin + info.nbytes
    if start + end != file.size:
        raise fail(f"its tensors end at byte {start + end}, and it has {file.size}")
    return entries, metadata


def _check_entry(
    name: str, entry: Any, path: Path, fail: Callable[[str], PresetError]
) -> tuple[int, TensorInfo]:
    """Where a tensor begins in the data, and what it is; or an error that says what is off."""
    if not isinstance(entry, dict):
        raise fail(f"the entry of {name!r} is {entry!r:.80}, expected an object")
    word, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(word) if isinstance(word, str) else None
    if word is None or dtype is None:
        raise fail(f"tensor {name!r} has dtype {word!r:.80}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_NDIM:
        raise fail(f"tensor {name!r} has shape {shape!r:.80}, expected at most 64 integers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise fail(f"tensor {name!r} has data_offsets {offsets!r:.80}, expected [begin, end]")
    # An empty tensor may still have dimensions whose product no machine can hold.
    if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise fail(f"tensor {name!r} of shape {shape!r:.80} is larger than any memory")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise fail(
            f"tensor {name!r} of {word} {shape} takes {nbytes} bytes, and its data_offsets "
            f"{offsets!r:.80} span {offsets[1] - offsets[0]}"
        )
    return offsets[0], TensorInfo(tuple(shape), dtype, nbytes, path, word)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of integers from 0 (a bool is not one)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
