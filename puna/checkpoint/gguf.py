"""GGUF, read: llama.cpp's files, as tensors under Hugging Face's names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from puna.checkpoint import gguf_config, gguf_packed
from puna.checkpoint.gguf_header import STORAGE, GGUFHeader, GGUFTensor, read_header
from puna.checkpoint.names import GGUF, QUERY_ROWS, SAME, Heads, Transform
from puna.checkpoint.source import EntrySource, MappedFile, TensorInfo
from puna.errors import PresetError
from puna.quantization.arrays import LOW, WEIGHT, variables
from puna.quantization.scheme import Scheme

if TYPE_CHECKING:  # of a package that imports Keras
    from puna.backend.packed import Packed

_NATIVE: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FLOAT32 = np.dtype(np.float32)
_ROPE_FREQS = "rope_freqs.weight"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHUNK = 1 << 19  # elements dequantized at a time: 2 MB of float32, within a core's cache
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class _Entry:
    file: MappedFile
    tensor: GGUFTensor
    transform: Transform
    info: TensorInfo


class GGUFSource(EntrySource[_Entry, MappedFile]):
    """The tensors of a GGUF model of architecture "llama", in Hugging Face's names and layout.

    Rows of q and k are put back from rotary pairs to halves. Float tensors are views of the mapped
    file where no such change is needed; quantized ones become new float32 arrays, or are read
    packed.

    Args:
        path: the file; any `-00001-of-0000N.gguf` stands for all parts beside it.

    Attributes:
        metadata: all key-value pairs, in plain Python.
        rope_freqs: `rope_freqs.weight`, `(head_dim / 2,)`, if the file has it: the divisors of
            llama3 rope scaling, which belong to the config and not to the weights.

    Raises:
        PresetError: the file is missing, malformed, of another architecture, or holds tensors that
            a Llama has not.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        self._files: list[MappedFile] = []
        self._pool = ThreadPoolExecutor(_THREADS, "puna-dequantize")  # starts no thread yet
        self.metadata: dict[str, Any] = {}
        self.rope_freqs: np.ndarray | None = None
        try:
            headers = self._open(_parts(self.path))
            self.metadata = headers[0].metadata
            meta = gguf_config.Metadata(self.metadata, self.path)
            query = meta.integer("attention.head_count")
            self._heads = Heads(query, meta.integer("attention.head_count_kv", query))
            self._add(headers)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout: a view of the mapped file, or a new array.

        Raises:
            PresetError: there is no tensor of that name, the source is closed, or the installed
                `gguf` package cannot dequantize its type.
        """
        entry = self._entry(name)
        tensor, shape = entry.tensor, entry.info.shape
        native = _NATIVE.get(entry.info.stored)
        if native is not None:
            array = entry.file.array(tensor.offset, tensor.nbytes, native, shape)
            return entry.transform.to_ours(array, self._heads)
        array = self._dequantize(self._blocks(entry), tensor).reshape(shape)
        return array if len(shape) > 1 else entry.transform.to_ours(array, self._heads)

    def schemes(self) -> dict[str, Scheme]:
        """How the matrices that `read_packed` reads are held, under names such as `lm_head`."""
        return {
            name.removesuffix(f".{WEIGHT}"): gguf_packed.SCHEMES[entry.info.stored]
            for name, entry in self._entries.items()
            if entry.info.stored in gguf_packed.SCHEMES and len(entry.info.shape) == 2
        }

    def dequantized(self) -> dict[str, str]:
        """The types of the matrices that are quantized and can be read as floats alone."""
        return {
            name.removesuffix(f".{WEIGHT}"): entry.info.stored
            for name, entry in self._entries.items()
            if entry.info.stored not in (*_NATIVE, *gguf_packed.SCHEMES)
            and len(entry.info.shape) == 2
        }

    def read_packed(self, name: str) -> Packed:
        """A matrix as whole numbers and scales: new arrays, which stand for what `read` returns.

        Args:
            name: of one of `schemes`.

        Raises:
            PresetError: there is no such matrix, or the source is closed.
        """
        from puna.backend.memory import aligned_empty
        from puna.backend.packed import Packed

        entry, scheme = self._entry(f"{name}.{WEIGHT}"), self.schemes().get(name)
        if scheme is None:
            raise PresetError(
                f"{self.path}: {name} is {entry.info.stored} of shape {entry.info.shape}; expected "
                f"a matrix in one of {', '.join(gguf_packed.SCHEMES)}"
            )
        shape = (entry.info.shape[0], entry.info.shape[1])
        arrays = {
            key: aligned_empty(size, np.dtype(dtype))
            for key, (size, dtype) in variables(shape, scheme).items()
        }
        blocks = self._blocks(entry)
        # A block's contents are together in each array.
        rows = [array.reshape(len(blocks), -1) for array in arrays.values()]

        def chunk(some: slice) -> None:
            gguf_packed.repack(entry.info.stored, blocks[some], *(array[some] for array in rows))

        self._in_chunks(blocks, STORAGE[entry.tensor.type].block, chunk)
        data, scale = (arrays[key] for key in list(arrays)[:2])
        return Packed(data, scale, arrays.get(LOW), shape[1], scheme.group_size or shape[1])

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages; a view still held reads them anew.

        Raises:
            PresetError: there is no tensor of that name.
        """
        entry = self._entry(name)
        entry.file.release(entry.tensor.offset, entry.tensor.nbytes)

    def close(self) -> None:
        """Close the files. Views that are still held stay valid."""
        self._pool.shutdown()
        super().close()

    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json` as transformers 4 would have written it.

        `torch_dtype` is that of the matrices if they are all float16 or bfloat16, else float32.
        llama3 rope scaling is recovered from `rope_freqs`.

        Raises:
            PresetError: a field is missing, or asks for what is not computed here.
        """
        return gguf_config.hf_config(self.metadata, self, self.rope_freqs, self.path)

    def _where(self) -> str:
        return str(self.path)

    def _open(self, paths: list[Path]) -> list[GGUFHeader]:
        headers: list[GGUFHeader] = []
        for number, path in enumerate(paths):
            self._files.append(MappedFile(path))
            headers.append(read_header(self._files[-1]))
            metadata = headers[-1].metadata
            count, here = metadata.get("split.count", 1), metadata.get("split.no", 0)
            if count not in (0, len(paths)) or here != number:
                raise PresetError(
                    f"{path} says that it is part {here} (from 0) of {count}, expected part "
                    f"{number} of {len(paths)}; keep the parts together under their names"
                )
        return headers

    def _add(self, headers: list[GGUFHeader]) -> None:
        unknown: list[str] = []
        for file, header in zip(self._files, headers, strict=True):
            for tensor in header.tensors:
                stored = STORAGE[tensor.type].name
                found = GGUF.to_ours(tensor.name)
                if tensor.name == _ROPE_FREQS and stored == "F32":
                    raw = file.view(tensor.offset, tensor.nbytes)
                    self.rope_freqs = raw.copy().view(np.float32).reshape(tensor.shape)
                elif found is None:
                    unknown.append(tensor.name)
                else:
                    name, transform = found
                    dtype = _NATIVE.get(stored, _FLOAT32)
                    info = TensorInfo(tensor.shape, dtype, tensor.nbytes, file.path, stored)
                    self._check(tensor, name, transform)
                    self._entries[name] = _Entry(file, tensor, transform, info)
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            some = [n if n.isprintable() else repr(n) for n in unknown[:5]]
            raise PresetError(
                f"{self.path}: tensors that a Llama has not: {', '.join(some)}{more}; "
                "expected those of the plain Llama architecture: this model cannot be loaded"
            )

    def _check(self, tensor: GGUFTensor, name: str, transform: Transform) -> None:
        if name in self._entries:
            raise PresetError(
                f"{self.path}: tensor {tensor.name!r} is in two parts; fetch the model again"
            )
        if transform is SAME:
            return
        heads = self._heads.query if transform is QUERY_ROWS else self._heads.key_value
        if not tensor.shape or 0 in tensor.shape or tensor.shape[0] % (2 * heads):
            raise PresetError(
                f"{self.path}: tensor {tensor.name!r} has shape {tensor.shape}, expected an even "
                f"number of rows for each of {heads} heads; the file is damaged: fetch it again"
            )

    def _blocks(self, entry: _Entry) -> np.ndarray:
        """The blocks of a quantized tensor as bytes `(blocks, bytes)`, a matrix's in our order."""
        tensor, shape = entry.tensor, entry.info.shape
        raw = entry.file.view(tensor.offset, tensor.nbytes)
        if len(shape) > 1 and entry.transform is not SAME:
            # A row's blocks stay together, so the rows are moved while they are still small.
            raw = entry.transform.to_ours(raw.reshape(shape[0], -1), self._heads)
        return raw.reshape(-1, STORAGE[tensor.type].nbytes)

    def _dequantize(self, blocks: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
        """Blocks as float32 `(blocks, elements)`."""
        storage = STORAGE[tensor.type]
        out = np.empty((len(blocks), storage.block), np.float32)
        expand = _EXPAND.get(storage.name) or _expand_by_package(tensor, self.path)
        self._in_chunks(blocks, storage.block, lambda some: expand(blocks[some], out[some]))
        return out

    def _in_chunks(
        self, blocks: np.ndarray, elements: int, work: Callable[[slice], object]
    ) -> None:
        """Work on some blocks after the others, so that temporaries stay small."""
        step = _CHUNK // elements

        def chunk(start: int) -> None:
            # A scale may be infinite: then so is what it scales, with no warning from each thread.
            with np.errstate(all="ignore"):
                work(slice(start, start + step))

        starts = range(0, len(blocks), step)
        if len(starts) < 2:
            for start in starts:
                chunk(start)
            return
        # NumPy works outside the interpreter's lock on pieces this large: 1.4 times as fast on two
        # cores. Draining the results brings up any exception.
        for _ in self._pool.map(chunk, starts):
            pass


def _parts(path: Path) -> list[Path]:
    """All parts of a model that is split over several files, in order; else the file alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    if path not in paths:
        raise PresetError(f"{path} is no part of {count} by its name; rename it as it was made")
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise PresetError(
            f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}; "
            "fetch them into the same directory"
        )
    return paths


# The three most common types, expanded three times as fast as the gguf package does it, and to the
# same bits: the products and sums are the same, without its groups of sixteen rows. Source of the
# layouts: ggml's ggml-common.h. `blocks` are bytes, `out` is float32 with one row a block.


def _scales(blocks: np.ndarray, count: int) -> np.ndarray:
    """The float16 numbers that each block begins with, as float32."""
    return blocks[:, : 2 * count].copy().view(np.float16).astype(np.float32)


def _expand_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _scales(blocks, 1), out=out)


def _expand_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    scale, packed = _scales(blocks, 1), blocks[:, 2:]
    np.multiply((packed & 15).view(np.int8) - np.int8(8), scale, out=out[:, :16])
    np.multiply((packed >> 4).view(np.int8) - np.int8(8), scale, out=out[:, 16:])


def _expand_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, packed = _scales(blocks, 2), blocks[:, 4:]
    np.multiply(packed & 15, scales[:, :1], out=out[:, :16])
    np.multiply(packed >> 4, scales[:, :1], out=out[:, 16:])
    out += scales[:, 1:]


_EXPAND: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q8_0": _expand_q8_0,
    "Q4_0": _expand_q4_0,
    "Q4_1": _expand_q4_1,
}


def _expand_by_package(tensor: GGUFTensor, where: Path) -> Callable[[np.ndarray, np.ndarray], None]:
    """The gguf package's own dequantization, imported only now (it takes 0.25 s)."""
    from gguf import GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(tensor.type)
        quants.dequantize(np.zeros((1, STORAGE[tensor.type].nbytes), np.uint8), kind)  # a trial
    except (NotImplementedError, ValueError) as error:
        raise PresetError(
            f"{where}: tensor {tensor.name!r} is {STORAGE[tensor.type].name}, which the installed "
            f"gguf package cannot dequantize ({error}); upgrade it with pip install -U gguf"
        ) from error

    def expand(blocks: np.ndarray, out: np.ndarray) -> None:
        # One long row: it works on groups of sixteen rows, however short they are.
        out[:] = quants.dequantize(blocks.reshape(1, -1), kind).reshape(out.shape)

    return expand
