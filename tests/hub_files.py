"""A directory's files as the Hub lists them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

# The Hub keeps files of at least this size, and all weights, in its large-file storage.
LFS_SIZE = 10_000_000
LFS_SUFFIXES = (".safetensors", ".gguf", ".pth", ".bin", ".onnx", ".h5")


def is_large(file: str, size: int) -> bool:
    """Whether a file is kept in the large-file storage."""
    return size >= LFS_SIZE or file.endswith(LFS_SUFFIXES)


def files_of(directory: Path) -> dict[str, Path]:
    """The files of a directory by their paths in it."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in found}


def tree_entry(file: str, path: Path) -> dict:
    """A file as `/tree` lists it."""
    size = path.stat().st_size
    entry = {"type": "file", "path": file, "size": size, "oid": digest(path, "sha1")}
    if is_large(file, size):
        entry["lfs"] = {"oid": digest(path, "sha256"), "size": size, "pointerSize": 134}
    return entry


def sibling(item: tuple[str, Path]) -> tuple[str, int, str, dict]:
    """A file as `?blobs=True` lists it: its name, size and id, and where it is large its digest."""
    entry = tree_entry(*item)
    lfs = entry.get("lfs")
    more = {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
    return item[0], entry["size"], entry["oid"], more


def commit_of(directory: Path) -> str:
    """An id like a commit's, made from all that the directory holds."""
    state = "\n".join(
        f"{name} {digest(path, 'sha1')}" for name, path in files_of(directory).items()
    )
    return hashlib.sha1(state.encode()).hexdigest()


def digest(path: Path, algorithm: str) -> str:
    return _of(path, algorithm, path.stat().st_mtime_ns)


@functools.lru_cache
def _of(path: Path, algorithm: str, changed: int) -> str:
    del changed  # a file that was written since has another digest
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
