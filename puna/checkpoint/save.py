"""Writing a model as a Hugging Face directory, all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puna import backend
from puna.backend import hosts
from puna.backend.memory import numpy_dtype
from puna.checkpoint import compressed_tensors, packed_files
from puna.checkpoint.model_card import ModelCard, write_card
from puna.checkpoint.packed_files import Matrix
from puna.checkpoint.preset import SETTINGS_FILE
from puna.checkpoint.preset_files import CHECKPOINT, matches
from puna.checkpoint.safetensors import MAX_SHARD_SIZE, TensorSpec, write_sharded
from puna.config import LlamaConfig
from puna.errors import PresetError
from puna.quantization.arrays import variables


def save_directory(
    directory: Path,
    *,
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    tokenizer: Any | None,
    generation_config: Mapping[str, Any],
    settings: Mapping[str, Any],
    card: ModelCard,
    quantized: Mapping[str, Matrix] | None = None,
    matrices: Collection[str] = (),
    merged: Mapping[str, Callable[[], np.ndarray]] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write weights, configuration and tokenizer, so that transformers opens them.

    Quantized matrices are written as compressed-tensors has them.

    The files are written beside and put in place together: a save that fails leaves what was there
    as it was. A directory that exists keeps the files that are not of a checkpoint, and a README.md
    that is not ours. Of several processes the first writes, and the others wait until all is there.

    Args:
        directory: where to.
        config: the model's shape.
        tensors: Keras variables under the checkpoint's names.
        tokenizer: a `puna.text.tokenizer.Tokenizer`, or None.
        generation_config: what the checkpoint's own said; the stop ids are brought up to date.
        settings: what only Puna knows, for `puna.json`; no file where empty.
        card: what the README.md shall tell.
        quantized: the matrices that are quantized, under names such as
            `model.layers.0.mlp.up_proj`.
        matrices: the names of all that could be.
        merged: for some tensors, what to write in the place of the variable's value.
        max_shard_size: bytes of a weights file at the most.

    Raises:
        PresetError: the directory cannot be written.
        HostError: another process has failed, or could not write it.
    """
    quantized = quantized or {}
    owners = _owners(quantized)
    specs = list(_specs(tensors, quantized, owners, merged or {}))
    # Numbers and scales of quantized matrices have dtypes of their own.
    dtypes = {variable._dtype for name, variable in tensors.items() if name not in owners}
    dtype = max(dtypes, key=lambda dtype: numpy_dtype(dtype).itemsize)
    stops = list(config.eos_token_ids) if tokenizer is None else list(tokenizer.stop_token_ids)
    schemes = {name: matrix.scheme for name, matrix in quantized.items()}
    with replacement(directory) as work:
        write_sharded(work, specs, max_shard_size)
        if work is None:
            return
        if tokenizer is not None:
            tokenizer.save(work)
        # The configuration's own dtype is of the files that it was read from, if any.
        said = dataclasses.replace(config, dtype=None).to_hf()
        said |= {"dtype": dtype, "torch_dtype": dtype}
        if quantized:
            said[compressed_tensors.KEY] = compressed_tensors.to_config(schemes, matrices)
        _write_json(work / "config.json", said)
        _write_json(
            work / "generation_config.json", _generation_config(generation_config, config, stops)
        )
        if settings:
            _write_json(work / SETTINGS_FILE, dict(settings))
        write_card(work, card.of_files(tokenizer, schemes), directory.expanduser())


def _specs(
    tensors: Mapping[str, Any],
    quantized: Mapping[str, Matrix],
    owners: Mapping[str, str],
    merged: Mapping[str, Callable[[], np.ndarray]],
) -> Iterator[TensorSpec]:
    """The tensors to write; those of a quantized matrix together, in the place of the first."""
    written: set[str] = set()
    for name, variable in tensors.items():
        owner = owners.get(name)
        if owner is None:
            dtype = numpy_dtype(variable._dtype)
            read = merged.get(name) or _reader(variable)
            yield TensorSpec(name, tuple(variable.shape), dtype, read)
        elif owner not in written:
            written.add(owner)
            matrix = quantized[owner]
            keys = variables(matrix.shape, matrix.scheme)
            parts = {key: _reader(tensors[f"{owner}.{key}"]) for key in keys}
            yield from packed_files.to_write(owner, matrix, parts)


def _owners(quantized: Mapping[str, Matrix]) -> dict[str, str]:
    """Of each variable of a quantized matrix, the matrix's name."""
    return {
        f"{name}.{key}": name
        for name, matrix in quantized.items()
        for key in variables(matrix.shape, matrix.scheme)
    }


def _reader(variable: Any) -> Callable[[], np.ndarray]:
    return lambda: backend.ops.to_numpy(variable)


def _generation_config(
    given: Mapping[str, Any], config: LlamaConfig, stops: list[int]
) -> dict[str, Any]:
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id} | dict(given)
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacement(directory: Path) -> Iterator[Path | None]:
    """A scratch directory that takes the place of `directory` when the scope ends well.

    Of several processes the first has it; the others get None, and leave the scope with the first.
    """
    with hosts.together():
        if hosts.is_first():
            with _replacement(directory) as work:
                yield work
        else:
            yield None


@contextlib.contextmanager
def _replacement(directory: Path) -> Iterator[Path]:
    directory = directory.expanduser().absolute()
    if directory.exists() and not directory.is_dir():
        raise PresetError(f"{directory} is a file; expected a directory to save into")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise PresetError(f"{directory} cannot be written: {error.strerror or error}") from error
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        _swap(work, directory)
    except OSError as error:
        raise PresetError(
            f"saving to {directory} failed ({error.strerror or error}); what was there is unchanged"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, directory: Path) -> None:
    """Put `work` in the place of `directory`, and keep in it what is not ours."""
    if not directory.exists():
        work.rename(directory)
        return
    for entry in directory.iterdir():
        if not matches(entry.name, CHECKPOINT) and not (work / entry.name).exists():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, work / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, work / entry.name, follow_symlinks=False)
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    directory.rename(old / "preset")
    try:
        work.rename(directory)
    except OSError:
        (old / "preset").rename(directory)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
