"""An opened preset: what kind of checkpoint it is, its configuration and its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.json_file import read_json
from puna.checkpoint.model_card import ModelCard, card_from_base
from puna.checkpoint.peft import MergedSource, PeftAdapter
from puna.checkpoint.readers import SETTINGS_FILE, GGUFReader, reader_of
from puna.checkpoint.source import TensorSource
from puna.errors import PresetError
from puna.text.hf_files import settings_from_directory

__all__ = ["SETTINGS_FILE", "Preset", "read_json"]

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")

# A checkpoint in one of these is run in the dtype beside it, where none is asked for.
_RUN_AS = {"float64": "float32", "float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16"}


class Preset:
    """The files of a preset on this machine.

    Args:
        path: a directory (Hugging Face's, Meta's, keras-hub's, or with one GGUF file), or a
            `.gguf` or `.safetensors` file.
        adapters: directories of PEFT adapters, merged into the weights in this order.
        weights: False leaves the adapters unmerged; only their tokenizers are looked for.

    Raises:
        PresetError: the files are missing or broken.
    """

    def __init__(self, path: Path, adapters: Sequence[Path] = (), *, weights: bool = True):
        self.path = path
        self.adapters = tuple(adapters)
        self._to_merge = self.adapters if weights else ()
        self._reader = reader_of(path)
        self.settings = _checked(self._reader.settings(), path)
        self.generation_config = self._reader.generation_config()

    @property
    def format(self) -> str:
        """The kind of its files: "safetensors", "gguf", "meta" or "keras_hub"."""
        return self._reader.format

    @property
    def gguf(self) -> GGUFSource | None:
        """The GGUF file, if it is one."""
        return self._reader.source if isinstance(self._reader, GGUFReader) else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, as a `config.json` of Hugging Face has it, the adapters' changes in.

        Raises:
            PresetError: the files are missing or broken.
        """
        config = self._reader.hf_config()
        for merged in self._merged:
            config = config | merged.config
        return config

    def tensors(self) -> TensorSource:
        """The checkpoint's tensors, the adapters merged in.

        Raises:
            PresetError: the files are missing or broken.
        """
        source = self._merged[-1] if self._merged else self._reader.tensors()
        try:
            self._check_size(source)
        except BaseException:
            source.close()
            raise
        return source

    def _check_size(self, source: TensorSource) -> None:
        """Refuse sizes beyond all that the tensors have: a model is built before it is compared."""
        names = source.names()
        largest = max((math.prod(source.info(name).shape) for name in names), default=0)
        sizes = dict.fromkeys(_SIZES, largest) | {"num_hidden_layers": len(names)}
        for name, most in sizes.items():
            value = self.config.get(name)
            if type(value) is int and value > most:
                raise PresetError(
                    f"{self.path}: {name} is {value:.6g}, and the largest of {len(names)} tensors "
                    f"has {largest} numbers; they are of different checkpoints: fetch them again"
                )

    def tokenizer_settings(self) -> dict[str, Any]:
        """The arguments of `puna.text.tokenizer.Tokenizer`: of the last adapter that has one.

        Raises:
            TokenizerError: there is no tokenizer, or a broken one.
        """
        for adapter in reversed(self.adapters):
            if (adapter / "tokenizer.json").is_file():
                return settings_from_directory(adapter)
        return self._reader.tokenizer_settings()

    @cached_property
    def _merged(self) -> list[MergedSource]:
        """The sources with one adapter more each."""
        merged: list[MergedSource] = []
        for path in self._to_merge:
            source = merged[-1] if merged else self._reader.tensors()
            try:
                adapter = PeftAdapter(path)
                try:
                    merged.append(MergedSource(source, adapter))
                except BaseException:
                    adapter.close()
                    raise
            except BaseException:
                source.close()
                raise
        return merged

    def card(self) -> ModelCard:
        """What a model card can tell of what is made from this preset."""
        adapters = tuple(_repository(path) or "" for path in self.adapters)
        return card_from_base(_repository(self.path), self.path, adapters)

    def default_dtype(self, source: TensorSource | None) -> str:
        """The dtype to run in where none is asked for: the one that the checkpoint is in.

        Args:
            source: the tensors, which say it where the configuration does not; None where there
                are none, and then it is float32.
        """
        dtype = self.config.get("dtype") or self.config.get("torch_dtype")
        if dtype in (None, "auto"):
            dtype = "float32" if source is None else _widest(source)
        dtype = str(dtype).removeprefix("torch.")
        return _RUN_AS.get(dtype, dtype)


def _repository(path: Path) -> str | None:
    """The Hub's id of what lies in the cache of its client.

    >>> _repository(Path("hub/models--org--name/snapshots/0a1b/model.gguf"))
    'org/name'
    """
    parts = path.parts
    for place, part in enumerate(parts[:-1]):
        if part.startswith("models--") and parts[place + 1] == "snapshots":
            return part.removeprefix("models--").replace("--", "/")
    return None


def _checked(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings, refused where they are not what was saved: others take them as arguments."""
    preprocessor, policy = settings.get("preprocessor", {}), settings.get("dtype_policy", "")
    kinds = {"sequence_length": int, "add_start_token": bool, "add_end_token": bool}
    fits = isinstance(preprocessor, dict) and all(
        type(value) is kinds.get(name) or (value is None and name in kinds)
        for name, value in preprocessor.items()
    )
    if not fits or not isinstance(policy, str | dict):
        raise PresetError(
            f"{path}: the preprocessor's settings are {preprocessor!r:.200} and the dtype policy "
            f"{policy!r:.80}; expected {', '.join(kinds)}, and a policy: correct {SETTINGS_FILE}"
        )
    return settings


def _widest(source: TensorSource) -> str:
    """The dtype of the checkpoint's matrices; the widest, where they differ."""
    dtypes = {source.info(n).dtype for n in source.names() if len(source.info(n).shape) > 1}
    floats = [d for d in dtypes if d.kind == "f" or d.name in ("bfloat16", *_RUN_AS)]
    if not floats:
        raise PresetError("the checkpoint holds no matrix of floating-point numbers")
    return max(floats, key=lambda dtype: (np.dtype(dtype).itemsize, dtype.name)).name
