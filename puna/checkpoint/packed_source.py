"""A checkpoint's tensors with its matrices quantized: by us while they are read, or already."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from puna.backend.memory import numpy_dtype
from puna.backend.packed import Packed
from puna.checkpoint import packed_files
from puna.checkpoint.compressed_tensors import Layout
from puna.checkpoint.expected import EMBEDDING, HEAD, check_tied
from puna.checkpoint.packed_files import Matrix
from puna.checkpoint.source import TensorInfo, TensorSource
from puna.errors import ConfigError, PresetError
from puna.quantization.arrays import SCALE, WEIGHT, arrays_of, variables
from puna.quantization.rounding import dequantize, quantize
from puna.quantization.scheme import Scheme


class PackedSource:
    """A source in which quantized matrices have the tensors that a model holds of them.

    A matrix is made when the first of its arrays is read, and let go with the last. Closing it
    closes the base.

    Args:
        base: the checkpoint.
        matrices: what shall be quantized, under names such as `model.layers.0.mlp.up_proj`.
        layouts: how it is stored, where the checkpoint is quantized as compressed-tensors are;
            None where it is not.
        packed: reads a matrix under its name, where the checkpoint has it packed in another way;
            None where we quantize it.
        is_tied: whether the head is the embedding; a head that is stored all the same is compared
            with it, and left out.

    Raises:
        PresetError: the checkpoint lacks a matrix, or has one of another shape, or a head that
            differs from the embedding.
    """

    def __init__(
        self,
        base: TensorSource,
        matrices: Mapping[str, Matrix],
        layouts: Mapping[str, Layout] | None = None,
        *,
        packed: Callable[[str], Packed] | None = None,
        is_tied: bool = False,
    ):
        self.base = base
        self._layouts = layouts
        self._packed = packed
        # A checkpoint of a bare backbone lacks the "model.".
        bare = not any(name.startswith("model.") for name in base.names())
        self._stored = {n: n.removeprefix("model.") if bare else n for n in matrices}
        self._matrices = {self._stored[name]: (name, m) for name, m in matrices.items()}
        self._infos: dict[str, tuple[str, str, TensorInfo]] = {}
        self._locks = {stored: threading.Lock() for stored in self._matrices}
        self._ready: dict[str, dict[str, Any]] = {}
        consumed: set[str] = set()
        for stored, (_, matrix) in self._matrices.items():
            consumed.update(self._consumed(stored))
            self._describe(stored, matrix)
        if is_tied and layouts is None and EMBEDDING in consumed and HEAD in base.names():
            check_tied(base)
            consumed.add(HEAD)
        self._names = [name for name in base.names() if name not in consumed]

    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return [*self._names, *self._infos]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor.

        Raises:
            PresetError: there is no tensor of that name.
        """
        return self._infos[name][2] if name in self._infos else self.base.info(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor; see `TensorSource.read`.

        Raises:
            PresetError: there is no tensor of that name, or it is not what it should be.
        """
        if name not in self._infos:
            return self.base.read(name)
        stored, key, _ = self._infos[name]
        with self._locks[stored]:
            if key not in self._ready.get(stored, {}):
                self._ready[stored] = arrays_of(self._make(stored))
            array = self._ready[stored].pop(key)
            if not self._ready[stored]:
                del self._ready[stored]
        return array

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages."""
        if name not in self._infos or (self._layouts is not None and name in self.base.names()):
            self.base.release(name)

    def close(self) -> None:
        """Close the base."""
        self.base.close()

    def _make(self, stored: str) -> Packed:
        name, matrix = self._matrices[stored]
        if self._layouts is not None:
            ends = {n.removeprefix(f"{stored}."): n for n in self._consumed(stored)}
            tensors = {end: self.base.read(theirs) for end, theirs in ends.items()}
            return packed_files.from_file(name, matrix, self._layouts[name], tensors)
        try:
            if self._packed is not None:
                return self._packed(stored)
            array = self.base.read(f"{stored}.{WEIGHT}")
            return quantize(array, matrix.scheme, name=f"{name}.{WEIGHT}")
        except ConfigError as error:
            raise PresetError(str(error)) from error
        finally:
            self.base.release(f"{stored}.{WEIGHT}")

    def _consumed(self, stored: str) -> list[str]:
        """The base's tensors that a matrix is made of; all of them must be there."""
        if self._layouts is None:
            ends = [WEIGHT]
        else:
            name, matrix = self._matrices[stored]
            ends = packed_files.stored_names(matrix, self._layouts[name])
            # Some write the zeros of symmetric schemes too.
            if f"{stored}.{packed_files.ZERO}" in self.base.names():
                ends = list(dict.fromkeys([*ends, packed_files.ZERO]))
        wanted = [f"{stored}.{end}" for end in ends]
        if missing := [name for name in wanted if name not in self.base.names()]:
            raise PresetError(
                f"the checkpoint lacks {', '.join(missing)}; expected it by config.json: fetch "
                "the files together again"
            )
        return wanted

    def _describe(self, stored: str, matrix: Matrix) -> None:
        """What is known of a matrix's arrays before it is made."""
        first = self.base.info(self._consumed(stored)[0])
        if self._layouts is None and first.shape != matrix.shape:
            raise PresetError(
                f"{stored}.{WEIGHT} has shape {first.shape}, and config.json asks for "
                f"{matrix.shape}; they are of different checkpoints: fetch them together again"
            )
        for key, (shape, dtype) in variables(matrix.shape, matrix.scheme).items():
            size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
            info = TensorInfo(shape, numpy_dtype(dtype), size, first.file, matrix.scheme.name)
            self._infos[f"{stored}.{key}"] = (stored, key, info)


class DequantizedSource(PackedSource):
    """A quantized checkpoint's matrices in float32; see `PackedSource`, which needs `layouts`."""

    def read(self, name: str) -> np.ndarray:
        """The tensor; see `TensorSource.read`.

        Raises:
            PresetError: there is no tensor of that name, or it is not what it should be.
        """
        if name not in self._infos:
            return self.base.read(name)
        return dequantize(self._make(self._infos[name][0]))

    def release(self, name: str) -> None:
        """Give back the memory of the file pages that a tensor was made of."""
        made_of = self._consumed(self._infos[name][0]) if name in self._infos else [name]
        for theirs in made_of:
            self.base.release(theirs)

    def _describe(self, stored: str, matrix: Matrix) -> None:
        file = self.base.info(self._consumed(stored)[0]).file
        dtype = np.dtype(np.float32)
        size = dtype.itemsize * matrix.shape[0] * matrix.shape[1]
        info = TensorInfo(matrix.shape, dtype, size, file, "F32")
        self._infos[f"{stored}.{WEIGHT}"] = (stored, WEIGHT, info)


def with_scale_dtypes(
    layouts: Mapping[str, Layout], source: TensorSource | None
) -> dict[str, Scheme]:
    """The schemes of stored matrices, with the dtypes that their scales have in the files.

    Raises:
        PresetError: a matrix has no scales, or they are no floating-point numbers.
    """
    schemes = {}
    for name, layout in layouts.items():
        scheme = layout.scheme
        if source is not None:
            bare = not any(n.startswith("model.") for n in source.names())
            stored = name.removeprefix("model.") if bare else name
            dtype = source.info(f"{stored}.{SCALE}").dtype.name
            if dtype not in ("bfloat16", "float16", "float32"):
                raise PresetError(f"{name}.{SCALE} is {dtype}; expected a floating-point number")
            scheme = Scheme.parse(scheme, scale_dtype=dtype)
        schemes[name] = scheme
    return schemes
