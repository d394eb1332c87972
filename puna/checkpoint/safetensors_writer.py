"""Safetensors, written: one tensor at a time, aligned, in shards named as transformers does.

The format: https://github.com/huggingface/safetensors#format. Its words, which the reader shares,
are at the top.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from puna.errors import PresetError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ALIGNMENT = 64  # JAX aliases host memory only from here on
MAX_SHARD_SIZE = 5_000_000_000  # bytes, as transformers has it
MAX_HEADER = 100_000_000  # the official reader's limit, in bytes

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class TensorSpec(NamedTuple):
    """A tensor to write: `data` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes that it will take."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


# A `TensorSpec`, or the plain tuple of the same four.
TensorToWrite: TypeAlias = tuple[str, tuple[int, ...], DTypeLike, Callable[[], np.ndarray]]


def write_safetensors(
    path: str | os.PathLike[str] | None,
    tensors: Iterable[TensorToWrite],
    metadata: Mapping[str, str] = _METADATA,
) -> None:
    """Write one safetensors file, holding one tensor at a time; the path changes only at the end.

    The bytes depend on the arguments alone. The data, and every tensor but a few of odd size,
    begin at a multiple of 64 bytes.

    Args:
        path: the file; one that is there is replaced, and its mappings stay valid. None writes
            nothing, and asks for the arrays in the same order: where several processes make them
            together, and one of them writes.
        tensors: name, shape, dtype and a function that gives the array, for each tensor.
        metadata: strings for the header; transformers wants `{"format": "pt"}`.

    Raises:
        PresetError: a name comes twice, a dtype is not in the format, or an array is not of the
            shape and dtype announced.

    Source: https://github.com/huggingface/safetensors#format
    """
    specs = [TensorSpec(*tensor) for tensor in tensors]
    if path is None:
        _make([specs])
        return
    with _replacing([Path(path)]) as [temporary]:
        _write(temporary, specs, metadata)


def plan_shards(
    tensors: Iterable[TensorToWrite],
    max_shard_bytes: int,
) -> list[list[TensorSpec]]:
    """Split tensors, in their order, into shards of at most so many bytes of data.

    A tensor larger than that has a shard to itself.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in (TensorSpec(*tensor) for tensor in tensors):
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_sharded(
    directory: str | os.PathLike[str] | None,
    tensors: Iterable[TensorToWrite],
    max_shard_bytes: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] = _METADATA,
) -> list[Path]:
    """Write a checkpoint's weights as transformers names them, in one file or in shards.

    Everything is written beside and renamed at the end; weight files of an earlier checkpoint in
    the directory go then, since a reader would prefer or mix them.

    Args:
        directory: where to; made if it is not there. None is as for `write_safetensors`.
        tensors: as for `write_safetensors`.
        max_shard_bytes: bytes of data at most in one file.
        metadata: strings for each header.

    Returns:
        The files written, the index last if there is one.

    Raises:
        PresetError: as `write_safetensors` raises.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    if directory is None:
        _make(shards)
        return []
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    specs = [spec for shard in shards for spec in shard]
    _check_specs(specs)
    if len(shards) == 1:
        files = [directory / SINGLE]
    else:
        count = len(shards)
        files = [
            directory / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        files.append(directory / INDEX)
    with _replacing(files) as temporaries:
        # Not strict: the index has no shard.
        for temporary, shard in zip(temporaries, shards, strict=False):
            _write(temporary, shard, metadata)
        if len(shards) > 1:
            _write_index(temporaries[-1], shards, files)
    for stale in directory.iterdir():
        if _OURS.fullmatch(stale.name) and stale not in files:
            stale.unlink()
    return files


def _write_index(path: Path, shards: Sequence[Sequence[TensorSpec]], files: list[Path]) -> None:
    specs = [spec for shard in shards for spec in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {
            spec.name: file.name
            for file, shard in zip(files, shards, strict=False)
            for spec in shard
        },
    }
    with open(path, "wb") as file:
        file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        _sync(file)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    """Refuse what a safetensors header cannot say."""
    names: set[str] = set()
    for spec in specs:
        if spec.name in names or spec.name == "__metadata__":
            raise PresetError(f"tensor {spec.name!r} cannot be written: the name is taken")
        names.add(spec.name)
        if np.dtype(spec.dtype) not in _WORDS:
            raise PresetError(
                f"tensor {spec.name!r} has dtype {np.dtype(spec.dtype)}, which safetensors has no "
                f"word for; cast it to one of {', '.join(map(str, _WORDS))}"
            )


def _write(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    """Write one file under its temporary name."""
    _check_specs(specs)
    specs = _ordered(specs)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        word = _WORDS[np.dtype(spec.dtype)]
        offsets = [end, end + spec.nbytes]
        header[spec.name] = {"dtype": word, "shape": list(spec.shape), "data_offsets": offsets}
        end += spec.nbytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER:
        raise PresetError(f"{len(specs)} tensors need a header of {len(raw)} bytes, over 100 MB")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for spec in specs:
            file.write(_raw_bytes(spec).data)
        _sync(file)


def _ordered(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Tensors as they come in a file.

    The format allows no holes, so order makes the alignment: first what is a multiple of 64 long,
    then of 32, and so on. Each tensor then starts at least as aligned as it is long.
    """
    return sorted(specs, key=lambda spec: -min(spec.nbytes & -spec.nbytes or 64, ALIGNMENT))


def _make(shards: Sequence[Sequence[TensorSpec]]) -> None:
    """Ask for all arrays as `_write` does, and keep none."""
    for shard in shards:
        for spec in _ordered(shard):
            spec.data()


def _raw_bytes(spec: TensorSpec) -> np.ndarray:
    """A tensor's bytes in row-major order, computed now."""
    array = np.asarray(spec.data())
    if array.shape != tuple(spec.shape) or array.dtype != np.dtype(spec.dtype):
        raise PresetError(
            f"tensor {spec.name!r} came as {array.dtype} {array.shape}, announced as "
            f"{np.dtype(spec.dtype)} {tuple(spec.shape)}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _replacing(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names beside `files`, which take their places if all goes well, else vanish."""
    temporaries = [file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in files]
    try:
        yield temporaries
        for temporary, file in zip(temporaries, files, strict=True):
            os.replace(temporary, file)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
