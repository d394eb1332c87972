"""A directory that shall be published: whether it is complete, and which of its files go out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint import compressed_tensors
from puna.checkpoint.expected import expected_shapes, some, stored_names
from puna.checkpoint.json_file import read_json
from puna.checkpoint.peft import WEIGHTS as ADAPTER_WEIGHTS
from puna.checkpoint.peft import PeftAdapter
from puna.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from puna.checkpoint.preset import Preset
from puna.checkpoint.preset_files import BESIDE, CHECKPOINT, WEIGHTS, matches
from puna.checkpoint.readers import is_adapter
from puna.checkpoint.safetensors import INDEX, SINGLE
from puna.checkpoint.source import TensorSource
from puna.config import LlamaConfig
from puna.errors import PresetError
from puna.text.tokenizer import Tokenizer

_TEMPLATES = "additional_chat_templates"
# Which axis of a LoRA's factors is as long as its rank.
_RANKS = (("A", 0), ("B", 1), ("embedding_A", 0), ("embedding_B", 1))


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A complete preset.

    Args:
        directory: where it is.
        is_adapter: whether it is an adapter alone.
        files: what is published, by the names that the files have there.
        left_out: the names of what else the directory holds; hidden files are not listed.
    """

    directory: Path
    is_adapter: bool
    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def publication_of(preset: str | os.PathLike[str]) -> Publication:
    """A directory's files, once they are known to be a whole preset; no network is needed.

    Args:
        preset: a Hugging Face directory, as `save_to_preset` writes it: of a model, with its
            tokenizer, or of an adapter.

    Raises:
        PresetError: something is missing or broken, or is of another format.
        ConfigError: the configuration asks for what is not computed.
        TokenizerError: the tokenizer cannot be read.
    """
    directory = Path(preset).expanduser()
    if not directory.is_dir():
        raise PresetError(f"{directory} is no directory; expected one that save_to_preset wrote")
    alone = is_adapter(directory)
    if not alone and (directory / ADAPTER_CONFIG).is_file():
        raise PresetError(
            f"{directory} holds a whole model and an adapter, which transformers would put on top "
            f"of it; save either into a directory of its own, or remove {ADAPTER_CONFIG}"
        )
    weights = _weights_of_adapter(directory) if alone else _weights_of_model(directory)
    files, left_out = _chosen(directory, weights)
    for path in files.values():
        _check_readable(path)
    return Publication(directory=directory, is_adapter=alone, files=files, left_out=left_out)


def _weights_of_model(directory: Path) -> list[str]:
    """The weight files of a whole model, each checked against its index and configuration."""
    opened = Preset(directory)
    if opened.format != "safetensors":
        raise PresetError(
            f"{directory} is of another format ({opened.format}); expected a Hugging Face "
            "directory: write one with save_to_preset or puna convert"
        )
    hf, quantized = compressed_tensors.split(opened.config)
    config = LlamaConfig.from_hf(hf)
    is_single = (directory / SINGLE).is_file()
    if not is_single and not (directory / INDEX).is_file():
        raise PresetError(
            f"{directory} has no {SINGLE} and no {INDEX}; write the weights with save_to_preset or "
            "puna convert"
        )
    source = opened.tensors()
    try:
        if quantized is None:
            stored_names(config, source)
        else:
            _check_quantized(config, quantized, source)
        names = list(source.names())
        files = sorted({source.info(n).file.relative_to(directory).as_posix() for n in names})
    finally:
        source.close()
    if not is_single:
        _check_index(directory, names)
        files.append(INDEX)
    _check_tokenizer(directory, opened, config)
    return files


def _check_quantized(config: LlamaConfig, quantized: dict[str, Any], source: TensorSource) -> None:
    """Refuse a quantized checkpoint that lacks a tensor."""
    from puna.checkpoint import packed_files  # it imports Keras, which nothing else here needs

    shapes = expected_shapes(config)
    matrices = {n.removesuffix(".weight"): s for n, s in shapes.items() if len(s) == 2}
    layouts = compressed_tensors.layouts(quantized, matrices)
    wanted: list[str] = []
    for name in shapes:
        module = name.removesuffix(".weight")
        if (layout := layouts.get(module)) is None:
            wanted.append(name)
            continue
        matrix = packed_files.Matrix((matrices[module][0], matrices[module][1]), layout.scheme)
        wanted += [f"{module}.{end}" for end in packed_files.stored_names(matrix, layout)]
    names = set(source.names())
    if missing := [name for name in wanted if name not in names]:
        raise PresetError(f"the checkpoint lacks {some(missing)}; expected {len(wanted)} in all")


def _check_index(directory: Path, names: Collection[str]) -> None:
    """Refuse an index that leaves out a tensor: other readers go by it alone."""
    index = read_json(directory / INDEX)["weight_map"]
    if missing := [name for name in names if name not in index]:
        raise PresetError(
            f"{directory / INDEX} leaves out {some(missing)}, which the shards hold; save the "
            "model again"
        )


def _check_tokenizer(directory: Path, opened: Preset, config: LlamaConfig) -> None:
    if not (directory / "tokenizer.json").is_file():
        raise PresetError(
            f"{directory} has no tokenizer.json, without which nobody can use the model; save it "
            "with its preprocessor, or put the base's tokenizer files there"
        )
    size = Tokenizer(**opened.tokenizer_settings()).vocabulary_size()
    if size > config.vocab_size:
        raise PresetError(
            f"{directory}: the tokenizer has {size} tokens and the model {config.vocab_size}; they "
            "are of different models: save them together"
        )


def _weights_of_adapter(directory: Path) -> list[str]:
    """The weight file of an adapter, checked against its configuration."""
    if not (directory / ADAPTER_WEIGHTS[0]).is_file():
        raise PresetError(
            f"{directory} has no {ADAPTER_WEIGHTS[0]}; save the adapter with save_adapter, or with "
            "PEFT as safetensors"
        )
    adapter = PeftAdapter(directory)
    try:
        for module, roles in adapter.modules.items():
            pairs = [{"A", "B"}, {"embedding_A", "embedding_B"}]
            halves = [pair - roles.keys() for pair in pairs if pair & roles.keys()]
            if adapter.config.use_dora and halves:
                halves.append({"magnitude"} - roles.keys())
            if missing := sorted(set().union(*halves)):
                raise PresetError(f"{directory}: {module} lacks its {' and '.join(missing)}")
            ranks = {adapter.info(roles[r]).shape[axis] for r, axis in _RANKS if r in roles}
            rank = adapter.config.rank(module)
            if others := ranks - {rank}:
                raise PresetError(
                    f"{directory}: {module} is of rank {others.pop()}, and {ADAPTER_CONFIG} says "
                    f"{rank}; the files are of different adapters: save it again"
                )
        if not adapter.modules:
            raise PresetError(f"{directory / ADAPTER_WEIGHTS[0]} holds no tensors; save it again")
        _warn_of_base(directory, adapter.config.base_model_name_or_path)
    finally:
        adapter.close()
    return [ADAPTER_WEIGHTS[0]]


def _warn_of_base(directory: Path, base: str | None) -> None:
    """Tell of a base that nobody else can find."""
    is_local = base is None or Path(base).expanduser().exists() or base.startswith((".", "/", "~"))
    if is_local:
        what = f"names {base!r} as its base, which is on this machine" if base else "names no base"
        warnings.warn(
            f"{directory / ADAPTER_CONFIG} {what}; others find it where "
            "save_adapter(base='org/name') has named it as the Hub does",
            UserWarning,
            stacklevel=4,
        )


def _chosen(directory: Path, weights: list[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What goes out, the small files first, and what else is there."""
    small: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.name in weights or path.name.startswith("."):
            continue
        if path.name == _TEMPLATES and path.is_dir():
            inner = (f for f in sorted(path.glob("[!.]*.jinja")) if f.is_file())
            small |= {f"{_TEMPLATES}/{file.name}": file for file in inner}
        elif path.is_file() and _belongs(path.name):
            small[path.name] = path
        else:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    return small | {name: directory / name for name in weights}, tuple(left_out)


def _belongs(name: str) -> bool:
    """Whether a file beside the weights is published; weights that are not read are not."""
    is_weights = matches(name, (*WEIGHTS, *ADAPTER_WEIGHTS))
    return matches(name, (*CHECKPOINT, *BESIDE)) and not is_weights


def _check_readable(path: Path) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise PresetError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions"
        ) from error
