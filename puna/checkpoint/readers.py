"""The kinds of presets: where each has its configuration, tensors and tokenizer.

Nothing is opened before it is asked for, so that a tokenizer is had without the weights.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from puna.checkpoint import keras_hub, meta
from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.json_file import read_json, read_optional_json
from puna.checkpoint.meta_config import Params
from puna.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from puna.checkpoint.safetensors import INDEX, SINGLE, SafetensorsSource
from puna.checkpoint.source import TensorSource
from puna.errors import PresetError
from puna.text.gguf_tokenizer import settings_from_gguf
from puna.text.hf_files import settings_from_directory

SETTINGS_FILE = "puna.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ORIGINAL = "original"  # where Hugging Face's mirrors keep Meta's own files

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")


class Reader(Protocol):
    """One kind of preset.

    Attributes:
        format: its name: "safetensors", "gguf", "meta" or "keras_hub".
    """

    format: str

    def hf_config(self) -> dict[str, Any]:
        """The configuration, as a `config.json` of Hugging Face has it."""
        ...

    def tensors(self) -> TensorSource:
        """The tensors, in Hugging Face's names."""
        ...

    def tokenizer_settings(self) -> dict[str, Any]:
        """The arguments of `puna.text.tokenizer.Tokenizer`."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a `puna.json` says, or what says the same."""
        ...

    def generation_config(self) -> dict[str, Any]:
        """What a `generation_config.json` says."""
        ...


class HuggingFaceReader:
    """A Hugging Face directory, or one safetensors file with `config.json` beside it.

    Args:
        directory: where the files are.
        weights: the safetensors file or index to read, if not the directory's.
    """

    format = "safetensors"

    def __init__(self, directory: Path, weights: Path | None = None):
        self.directory, self.weights = directory, weights

    def hf_config(self) -> dict[str, Any]:
        return read_json(self.directory / CONFIG)

    def tensors(self) -> TensorSource:
        original = self.directory / ORIGINAL
        has_none = self.weights is None and not any(self.directory.glob("*.safetensors"))
        if (
            has_none
            and not (self.directory / INDEX).exists()
            and (original / meta.PARAMS).is_file()
        ):
            return meta.MetaSource(original)
        return SafetensorsSource(self.weights or self.directory)

    def tokenizer_settings(self) -> dict[str, Any]:
        return settings_from_directory(self.directory)

    def settings(self) -> dict[str, Any]:
        return read_optional_json(self.directory / SETTINGS_FILE)

    def generation_config(self) -> dict[str, Any]:
        return read_optional_json(self.directory / GENERATION_CONFIG)


class GGUFReader:
    """A GGUF file. Of the files beside it those are read that a directory was given with.

    Args:
        file: the file, or the first of its parts.
        directory: the directory that was given instead.
    """

    format = "gguf"

    def __init__(self, file: Path, directory: Path | None = None):
        self.file, self.directory = file, directory

    @cached_property
    def source(self) -> GGUFSource:
        """The opened file."""
        return GGUFSource(self.file)

    def hf_config(self) -> dict[str, Any]:
        return self.source.hf_config()

    def tensors(self) -> TensorSource:
        return self.source

    def tokenizer_settings(self) -> dict[str, Any]:
        return settings_from_gguf(self.source.metadata)

    def settings(self) -> dict[str, Any]:
        return read_optional_json(self.directory / SETTINGS_FILE) if self.directory else {}

    def generation_config(self) -> dict[str, Any]:
        return read_optional_json(self.directory / GENERATION_CONFIG) if self.directory else {}


class MetaReader:
    """Meta's layout: `params.json`, `consolidated.NN.pth` and `tokenizer.model`.

    Args:
        directory: where the files are.
    """

    format = "meta"

    def __init__(self, directory: Path):
        self.directory = directory

    @cached_property
    def source(self) -> meta.MetaSource:
        """The opened files."""
        return meta.MetaSource(self.directory)

    def hf_config(self) -> dict[str, Any]:
        if any(self.directory.glob("consolidated.*.pth")):
            return self.source.hf_config()
        # Where the weights were not fetched, the file must say what they otherwise do.
        params = Params.read(self.directory / meta.PARAMS)
        if params.vocab_size < 1:
            raise PresetError(
                f"{params.path} has no vocab_size, which only the weights tell, and there are no "
                "consolidated.*.pth: fetch them"
            )
        return params.hf_config(vocab_size=params.vocab_size, dtype="bfloat16", is_tied=False)

    def tensors(self) -> TensorSource:
        return self.source

    def tokenizer_settings(self) -> dict[str, Any]:
        return settings_from_directory(self.directory)

    def settings(self) -> dict[str, Any]:
        return read_optional_json(self.directory / SETTINGS_FILE)

    def generation_config(self) -> dict[str, Any]:
        return {}


class KerasHubReader:
    """A keras-hub preset.

    Args:
        directory: where the files are.
    """

    format = "keras_hub"

    def __init__(self, directory: Path):
        self.directory = directory

    @cached_property
    def source(self) -> keras_hub.KerasHubSource:
        """The opened files."""
        return keras_hub.KerasHubSource(self.directory)

    def hf_config(self) -> dict[str, Any]:
        weights = (keras_hub.WEIGHTS, keras_hub.SHARDED)
        if any((self.directory / name).is_file() for name in weights):
            return self.source.hf_config()
        return keras_hub.backbone_config(self.directory).to_hf()

    def tensors(self) -> TensorSource:
        return self.source

    def tokenizer_settings(self) -> dict[str, Any]:
        return settings_from_directory(self.directory)

    def settings(self) -> dict[str, Any]:
        preprocessor = keras_hub.preprocessor_settings(self.directory)
        return {"preprocessor": preprocessor} if preprocessor else {}

    def generation_config(self) -> dict[str, Any]:
        return {}


def reader_of(path: Path) -> Reader:
    """The reader for what is at a path.

    Args:
        path: a directory of any kind, or a `.gguf`, `.safetensors` or `consolidated.NN.pth` file.

    Raises:
        PresetError: it is of no kind that is read.
    """
    if not path.is_dir():
        return _reader_of_file(path)
    if (path / CONFIG).is_file() and not _holds_gguf_alone(path):
        is_keras = keras_hub.is_keras_hub(read_json(path / CONFIG))
        return KerasHubReader(path) if is_keras else HuggingFaceReader(path)
    if (path / meta.PARAMS).is_file():
        return MetaReader(path)
    if is_adapter(path):
        raise PresetError(
            f"{path} is an adapter; expected a model: give the base, and this as adapter="
        )
    if files := sorted(path.glob("*.gguf")):
        if len(files) > 1 and "-of-" not in files[0].stem:
            names = ", ".join(file.name for file in files)
            raise PresetError(f"{path} holds several GGUF files ({names}); name one of them")
        return GGUFReader(files[0], path)
    if (path / ORIGINAL / meta.PARAMS).is_file():
        return MetaReader(path / ORIGINAL)
    return HuggingFaceReader(path)  # it says what is missing


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    whole = (SINGLE, INDEX, keras_hub.WEIGHTS, keras_hub.SHARDED)
    return (path / ADAPTER_CONFIG).is_file() and not any((path / n).is_file() for n in whole)


def _holds_gguf_alone(path: Path) -> bool:
    """Whether a directory's weights are GGUF, whatever else describes them.

    Many repositories of GGUF files hold a `config.json` too, often with little in it.
    """
    own = (INDEX, keras_hub.WEIGHTS, keras_hub.SHARDED, f"{ORIGINAL}/{meta.PARAMS}")
    is_other = any(path.glob("*.safetensors")) or any((path / name).is_file() for name in own)
    return not is_other and any(path.glob("*.gguf"))


def _reader_of_file(path: Path) -> Reader:
    if path.suffix == ".gguf":
        return GGUFReader(path)
    if path.name.startswith("adapter_model."):
        raise PresetError(f"{path} is an adapter's weights; give its directory, {path.parent}")
    if path.suffix == ".safetensors":
        if match := _SHARD.fullmatch(path.name):
            return HuggingFaceReader(
                path.parent, path.with_name(f"{match[1]}.safetensors.index.json")
            )
        return HuggingFaceReader(path.parent, path)
    if path.name.startswith("consolidated.") and path.suffix == ".pth":
        return MetaReader(path.parent)
    raise PresetError(f"{path} is a file; expected a directory, or a .gguf or .safetensors file")
