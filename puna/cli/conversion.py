"""A checkpoint streamed into a Hugging Face directory: no model, and no Keras but to quantize."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from puna.checkpoint import compressed_tensors, hub
from puna.checkpoint.expected import expected_shapes, stored_names
from puna.checkpoint.model_card import write_card
from puna.checkpoint.preset import SETTINGS_FILE, Preset
from puna.checkpoint.safetensors import MAX_SHARD_SIZE, TensorSpec, write_sharded
from puna.checkpoint.source import TensorSource
from puna.cli import terminal
from puna.cli.opened import tokenizer_of
from puna.config import LlamaConfig
from puna.errors import ConfigError, PresetError, TokenizerError
from puna.quantization.scheme import Recipe, Scheme
from puna.text.tokenizer import Tokenizer


def convert_preset(
    preset: str,
    directory: Path,
    dtype: str | None,
    *,
    adapter: str | None,
    revision: str | None,
    recipe: Recipe | None = None,
    max_shard_size: int | None = None,
) -> None:
    """What `puna convert`, `quantize` and `fuse` do: fetch, write, and tell what was written."""
    path = hub.locate(preset, revision=revision)
    adapters = [] if adapter is None else [hub.locate(adapter)]
    with terminal.waiting(f"Writing {directory}"):
        opened, shard = Preset(path, adapters), max_shard_size or MAX_SHARD_SIZE
        files, size = write_hf(opened, directory, dtype, recipe, shard)
    plural = "s" if files > 1 else ""
    terminal.note(f"wrote {files} weight file{plural}, {size:,} bytes, to {directory}")
    print(directory)


def write_hf(
    opened: Preset,
    directory: Path,
    dtype: str | None,
    recipe: Recipe | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> tuple[int, int]:
    """Write an opened preset as a Hugging Face directory, all of it or nothing.

    Args:
        opened: the preset.
        directory: where to: empty, or not there.
        dtype: of all tensors; None means the one that the preset would be run in.
        recipe: how to quantize the matrices; None leaves them as they are.
        max_shard_size: bytes of a weights file at the most.

    Returns:
        How many weight files were written, and their bytes.

    Raises:
        PresetError: the tensors are not those of the configuration, or the directory cannot be
            written.
        ConfigError: the configuration asks for what is not computed.
    """
    hf, quantized = compressed_tensors.split(opened.config)
    if quantized is not None:
        raise PresetError(
            f"{opened.path} is quantized already; expected a full-precision checkpoint"
        )
    config = LlamaConfig.from_hf(hf)
    source = opened.tensors()
    try:
        dtype = dtype or opened.default_dtype(source)
        target = np.dtype(getattr(ml_dtypes, dtype, dtype))
        stored = stored_names(config, source)
        tokenizer = _tokenizer(opened)
        stream = _Stream(source, target)
        names = [n.removesuffix(".weight") for n, s in expected_shapes(config).items() if s[1:]]
        chosen = {} if recipe is None else recipe.schemes(dict.fromkeys(names))
        schemes = {
            n: scheme.fit(source.info(stored[f"{n}.weight"]).shape[1], dtype)
            for n, scheme in chosen.items()
        }
        specs: list[TensorSpec] = []
        for name, theirs in stored.items():
            shape = source.info(theirs).shape
            if scheme := schemes.get(name.removesuffix(".weight")):
                specs += _quantized(stream, name, theirs, scheme)
            else:
                specs.append(
                    TensorSpec(name, shape, target, functools.partial(stream.read, theirs))
                )
        with _appearing(directory) as work:
            files = write_sharded(work, specs, max_shard_size)
            if tokenizer is not None:
                tokenizer.save(work)
            said = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
            if schemes:
                said[compressed_tensors.KEY] = compressed_tensors.to_config(schemes, names)
            _write_json(work / "config.json", said)
            _write_json(work / "generation_config.json", _generation(opened, config, tokenizer))
            if opened.settings:
                _write_json(work / SETTINGS_FILE, opened.settings)
            write_card(work, opened.card().of_files(tokenizer, schemes), directory)
            weights = [file for file in files if file.suffix == ".safetensors"]
            return len(weights), sum(file.stat().st_size for file in weights)
    finally:
        source.close()


def parameter_count(config: LlamaConfig) -> int:
    """How many parameters a Llama of this shape has, however they are stored."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


class _Stream:
    """A checkpoint's tensors, one at a time: the pages of one are let go when the next is read."""

    def __init__(self, source: TensorSource, dtype: np.dtype):
        self._source = source
        self._dtype = dtype
        self._last: str | None = None
        self._packed: tuple[str, dict[str, np.ndarray]] | None = None

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype to write."""
        if self._last is not None:
            self._source.release(self._last)
        self._last = name
        array = self._source.read(name)
        if array.dtype == self._dtype:
            return array
        with np.errstate(over="ignore"):  # beyond float16's range is infinite, as everywhere
            return array.astype(self._dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._source.info(name).shape

    def quantized(self, name: str, theirs: str, scheme: Scheme) -> dict[str, np.ndarray]:
        """The arrays of a matrix once quantized; kept until another is asked for."""
        from puna.quantization.arrays import arrays_of
        from puna.quantization.rounding import quantize

        if self._packed is None or self._packed[0] != name:
            self._packed = None
            array = self._source.read(theirs)
            try:
                self._packed = (name, arrays_of(quantize(array, scheme, name=name)))
            except ConfigError as error:
                raise PresetError(str(error)) from error
            finally:
                del array
                self._source.release(theirs)
        return self._packed[1]


def _quantized(stream: _Stream, name: str, theirs: str, scheme: Scheme) -> list[TensorSpec]:
    """The tensors of a quantized matrix, which is quantized when the first of them is written."""
    # These import Keras, which nothing else here needs.
    from puna.checkpoint import packed_files
    from puna.quantization.arrays import variables

    shape = stream.shape(theirs)

    def read(key: str) -> np.ndarray:
        return stream.quantized(name, theirs, scheme)[key]

    matrix = packed_files.Matrix((shape[0], shape[1]), scheme)
    keys = variables(matrix.shape, scheme)
    readers = {key: functools.partial(read, key) for key in keys}
    return list(packed_files.to_write(name.removesuffix(".weight"), matrix, readers))


def _tokenizer(opened: Preset) -> Tokenizer | None:
    try:
        return tokenizer_of(opened)
    except TokenizerError as error:
        terminal.note(f"no tokenizer is written: {error}")
        return None


def _generation(opened: Preset, config: LlamaConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    stops = list(config.eos_token_ids if tokenizer is None else tokenizer.stop_token_ids)
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    said = ids | opened.generation_config
    said["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    return {name: value for name, value in said.items() if value is not None}


@contextlib.contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A scratch directory beside `directory`, which it becomes if the scope ends well."""
    directory = directory.expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PresetError(
            f"{directory} is there and is not an empty directory; give another --out, or empty it"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent)
    except OSError as error:
        raise PresetError(f"{directory} cannot be written: {error.strerror or error}") from error
    try:
        work = Path(scratch) / directory.name  # made inside, so that it has ordinary permissions
        work.mkdir()
        yield work
        if directory.exists():
            directory.rmdir()
        work.rename(directory)
    except OSError as error:
        raise PresetError(
            f"writing {directory} failed ({error.strerror or error}); nothing was left there"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
