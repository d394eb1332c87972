"""Which files of a repository a preset needs, by their names alone.

Repositories also hold copies of the same weights, in `original/*.pth`, ONNX and other formats;
those are left where they are.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from puna.errors import PresetError

# What is read of every kind of preset beside its weights: a few megabytes.
SMALL: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "puna.json",
    "params.json",  # Meta's
    "adapter_config.json",  # PEFT's
    "preprocessor.json",  # keras-hub's, to the last
    "task.json",
    "assets/tokenizer/*",
)
# Every file of any kind, for a cache that cannot be asked what the repository holds.
WEIGHTS: tuple[str, ...] = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.*",
    "model.weights.json",
    "model*.weights.h5",
    "consolidated.*.pth",
)

# The kinds in order of preference: what a repository of the kind has, and what of it is weights.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.safetensors", ("model.safetensors",)),
    ("model.safetensors.index.json", ("model-*-of-*.safetensors", "model.safetensors.index.json")),
    ("adapter_model.safetensors", ("adapter_model.safetensors",)),
    ("adapter_model.bin", ("adapter_model.bin",)),
    ("model.weights.h5", ("model.weights.h5",)),
    ("model.weights.json", ("model.weights.json", "model_*.weights.h5")),
    ("consolidated.00.pth", ("consolidated.*.pth",)),
)
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.(gguf|safetensors)")


def needed(
    names: Collection[str], *, weights: bool, file: str | None = None, where: str = ""
) -> list[str]:
    """The files to fetch, of those that a repository has.

    Args:
        names: all its files.
        weights: whether the weights are needed.
        file: the weight file that was asked for, if one was.
        where: the repository's address, for messages.

    Raises:
        PresetError: the file is not there, or there are several GGUF files to choose from.
    """
    if file is not None:
        return _with_file(names, file, weights=weights, where=where)
    small = _matching(names, SMALL)
    described = {"config.json", "params.json", "adapter_config.json"} & set(small)
    if not weights and described and (_has_tokenizer(small) or not _is_gguf(names)):
        return small
    for mark, patterns in _KINDS:
        if weights and mark in names:
            return small + _matching(names, patterns)
    # A GGUF file is its own tokenizer and configuration.
    chosen = small + _gguf(names, where)
    if not chosen:
        raise PresetError(
            f"{where} has no config.json and no weights of a kind that is read; expected a "
            f"checkpoint, found: {', '.join(sorted(names)[:8]) or 'nothing'}"
        )
    return chosen


def _with_file(names: Collection[str], file: str, *, weights: bool, where: str) -> list[str]:
    if file not in names:
        same = [name for name in sorted(names) if name.endswith(f".{file.rpartition('.')[2]}")]
        raise PresetError(
            f"{where} has no file {file!r}; its files of that kind: {', '.join(same[:8]) or 'none'}"
        )
    if file.endswith(".gguf"):
        return _parts(names, file)
    folder = file.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    small = _matching(names, [prefix + pattern for pattern in SMALL])
    if not weights:
        return small
    index = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", ".safetensors.index.json", file)
    return small + _parts(names, file) + [name for name in names if name == index != file]


def _has_tokenizer(names: Collection[str]) -> bool:
    return any(name.rpartition("/")[2].startswith("tokenizer.") for name in names)


def _is_gguf(names: Collection[str]) -> bool:
    """Whether a repository's weights are GGUF, whatever else describes them."""
    has_other = any(mark in names for mark, _ in _KINDS)
    return not has_other and any("/" not in name and name.endswith(".gguf") for name in names)


def _gguf(names: Collection[str], where: str) -> list[str]:
    files = sorted(name for name in names if "/" not in name and name.endswith(".gguf"))
    if files and sorted(_parts(names, files[0])) != files:
        raise PresetError(
            f"{where} has several GGUF files; name one as {where.partition('@')[0]}/FILE: "
            f"{', '.join(files[:8])}{', …' if len(files) > 8 else ''}"
        )
    return files


def _parts(names: Collection[str], file: str) -> list[str]:
    """A file, and those that it is one part of a model with."""
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    stem, count, suffix = match.groups()
    pattern = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-{count}\.{suffix}")
    return sorted(name for name in names if pattern.fullmatch(name))


def _matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """Names that match, of files as deep as the pattern says ("*" alone would match a "/" too)."""
    return [
        name
        for name in names
        if any(
            fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
            for pattern in patterns
        )
    ]
