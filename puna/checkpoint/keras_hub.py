"""keras-hub's presets, read: `config.json` with `registered_name`, and weights in HDF5.

Sources: keras-hub 0.32's `utils/preset_utils.py` (the files) and `models/llama/` (what is in them).
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.h5_file import H5File
from puna.checkpoint.json_file import read_json, read_optional_json
from puna.checkpoint.names import HEADS_FIRST, KERAS_HUB, SAME, Heads, Transform
from puna.checkpoint.source import EntrySource, TensorInfo
from puna.config import LlamaConfig
from puna.errors import PresetError
from puna.text.keras_hub_tokenizer import VOCABULARY
from puna.text.tiktoken import BEGIN_OF_TEXT, END_OF_TEXT

WEIGHTS = "model.weights.h5"
SHARDED = "model.weights.json"

# LlamaBackbone is the same architecture, and the class of Llama 1 and 2.
_BACKBONES = ("Llama3Backbone", "LlamaBackbone")
_PACKAGES = ("keras_hub", "keras_nlp")
_POLICIES = ("float32", "float16", "bfloat16", "float64", "mixed_bfloat16", "mixed_float16")
_SHARD = re.compile(r"[^/\\\0]+\.weights\.h5")
_DECODER = re.compile(r"llama_transformer_decoder(?:_(\d+))?(?=\.)")
_POSITION_SCALING = "rope_position_scaling_factor"
_BASE = ("name", "trainable", "dtype")


@dataclass(frozen=True, slots=True)
class _Entry:
    file: H5File
    theirs: str
    transform: Transform
    info: TensorInfo


class KerasHubSource(EntrySource[_Entry, H5File]):
    """The tensors of a keras-hub preset of a Llama, in Hugging Face's names and layout.

    Kernels, which have their inputs first and heads as an axis of their own, are transposed while
    they are read, one at a time.

    Args:
        directory: it holds `config.json`, and `model.weights.h5` or `model.weights.json` with its
            shards.

    Raises:
        PresetError: the preset is of another model or quantized, a file is missing or malformed,
            or it holds tensors that a Llama has not.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory)
        self.config = backbone_config(self.path)
        self._entries: dict[str, _Entry] = {}
        self._files: list[H5File] = []
        try:
            files, self._shard_of = _weight_files(self.path)
            for file in files:
                self._files.append(H5File(file))
                self._add(self._files[-1])
        except BaseException:
            self.close()
            raise

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, which only the weights say."""
        return "lm_head.weight" not in self._entries

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout: a view of the mapped file, or a new array.

        Raises:
            PresetError: there is no tensor of that name, or the source is closed.
        """
        entry = self._entry(name)
        heads = Heads(self.config.num_attention_heads, self.config.num_kv_heads)
        return np.ascontiguousarray(entry.transform.to_ours(entry.file.read(entry.theirs), heads))

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages; a view still held reads them anew.

        Raises:
            PresetError: there is no tensor of that name.
        """
        entry = self._entry(name)
        entry.file.release(entry.theirs)

    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json` as transformers has it; keras-hub knows no context length.

        Raises:
            PresetError: there is no embedding.
        """
        dtype = self.info("model.embed_tokens.weight").dtype.name
        saved = {"tie_word_embeddings": self.is_tied, "dtype": dtype, "torch_dtype": dtype}
        return self.config.to_hf() | saved | _token_ids(self.path)

    def _where(self) -> str:
        return str(self.path)

    def _add(self, file: H5File) -> None:
        for theirs in file.names():
            dotted = theirs.replace("/", ".")
            # Keras numbers what has one class: "", "_1", "_2".
            dotted = _DECODER.sub(lambda m: f"llama_transformer_decoder.{m[1] or 0}", dotted, 1)
            found = KERAS_HUB.to_ours(dotted)
            if found is None:
                raise PresetError(
                    f"{file.path}: {theirs!r:.200} is no tensor of a Llama; expected those of "
                    "keras-hub's Llama3Backbone: this preset cannot be loaded"
                )
            name, transform = found
            if name in self._entries:
                raise PresetError(
                    f"{file.path}: {theirs!r} is in two files; fetch the preset again"
                )
            shards = self._shard_of.get(f"/{theirs.rpartition('/')[0]}", [])
            if self._shard_of and file.path.name not in shards:
                raise PresetError(
                    f"{self.path / SHARDED}: {theirs!r} should be in {shards or 'no file'} and is "
                    f"in {file.path.name}; fetch the preset again"
                )
            self._entries[name] = _Entry(file, theirs, transform, self._info(file, theirs, found))

    def _info(self, file: H5File, theirs: str, found: tuple[str, Transform]) -> TensorInfo:
        """What a tensor is once it is in our layout."""
        (name, transform), info, shape = found, file.info(theirs), file.info(theirs).shape
        if transform is SAME:
            return info
        heads = self.config.num_attention_heads
        if ".self_attn." in name and not name.endswith(("q_proj.weight", "o_proj.weight")):
            heads = self.config.num_kv_heads
        is_output = transform is HEADS_FIRST
        axes = 3 if ".self_attn." in name else 2
        if len(shape) != axes or (axes == 3 and shape[0 if is_output else 1] != heads):
            wanted = f"3 axes with {heads} heads" if axes == 3 else "2 axes"
            raise PresetError(
                f"{file.path}: {theirs!r} has shape {shape}, expected {wanted}; config.json is of "
                "another model, or the file is damaged"
            )
        size = info.nbytes // info.dtype.itemsize
        inner = shape[-1] if is_output else size // max(1, shape[0])
        ours = (inner, size // max(1, inner))
        return TensorInfo(ours, info.dtype, info.nbytes, info.file, info.stored)


def is_keras_hub(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is Keras's, not Hugging Face's."""
    return "registered_name" in config and "class_name" in config


def backbone_config(directory: Path) -> LlamaConfig:
    """The configuration of a preset's backbone, without its weights.

    Args:
        directory: it holds keras-hub's `config.json`.

    Raises:
        PresetError: it is of another class, quantized, or has arguments that we do not know.
        ConfigError: the numbers do not fit each other.
    """
    path = directory / "config.json"
    config = read_json(path)
    package, _, name = str(config.get("registered_name")).partition(">")
    arguments = config.get("config")
    if package not in _PACKAGES or name not in _BACKBONES or not isinstance(arguments, dict):
        raise PresetError(
            f"{path} is of {config.get('registered_name')!r:.80}, expected "
            f"{' or '.join(f'keras_hub>{backbone}' for backbone in _BACKBONES)}; other "
            "models are not read"
        )
    _check_policy(arguments.get("dtype"), path)
    kwargs = {key: value for key, value in arguments.items() if key not in _BASE}
    # keras-hub 0.32 takes it, and its Llamas compute without it: what they were trained with.
    if (factor := kwargs.pop(_POSITION_SCALING, 1.0)) != 1.0:
        warnings.warn(
            f"{path} has {_POSITION_SCALING}={factor!r:.80}, which keras-hub 0.32 does not compute "
            "for a Llama; neither does Puna: say rope_scaling in a config.json where you want it",
            stacklevel=2,
        )
    try:
        return LlamaConfig.from_keras_hub(**kwargs)
    except TypeError as error:
        raise PresetError(
            f"{path} does not hold the arguments of keras-hub 0.32's {name}: {error}; save the "
            "preset again with that version"
        ) from error


def _token_ids(directory: Path) -> dict[str, int | None]:
    """The ids that begin and end a text, which only the vocabulary says; Llama 2's without one."""
    vocabulary = read_optional_json(directory / VOCABULARY)
    if not vocabulary:
        return {}
    tokens = {"bos_token_id": BEGIN_OF_TEXT, "eos_token_id": END_OF_TEXT}
    return {name: vocabulary.get(token) for name, token in tokens.items()}


def _check_policy(policy: Any, path: Path) -> None:
    """Refuse weights that are not plain numbers."""
    if isinstance(policy, dict):
        inner = policy.get("config")
        name = inner.get("name") if isinstance(inner, dict) else None
        if policy.get("class_name") != "DTypePolicy":
            name = f"a {policy.get('class_name')}"
    else:
        name = policy
    if name is not None and name not in _POLICIES:
        raise PresetError(
            f"{path} has the dtype {name!r:.80}, expected one of {', '.join(_POLICIES)}; quantized "
            "presets are not read: get the model unquantized and quantize it here"
        )


def preprocessor_settings(directory: Path) -> dict[str, Any]:
    """The preprocessor's arguments that a preset says, of those that ours takes too.

    Raises:
        PresetError: a file is malformed.
    """
    names = ("sequence_length", "add_start_token", "add_end_token")
    saved: Any = read_optional_json(directory / "preprocessor.json").get("config")
    if saved is None:
        task: Any = read_optional_json(directory / "task.json").get("config")
        inner = task.get("preprocessor") if isinstance(task, dict) else None
        saved = inner.get("config") if isinstance(inner, dict) else None
    if not isinstance(saved, dict):
        return {}
    return {name: saved[name] for name in names if saved.get(name) is not None}


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The files with weights; where there are several, in which ones each group is."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS], {}
    index = directory / SHARDED
    if not index.is_file():
        raise PresetError(
            f"{directory} has neither {WEIGHTS} nor {SHARDED}; fetch the preset's weights"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PresetError(f"{index}: expected a non-empty object 'weight_map'; fetch it again")
    shard_of = {
        group: files if isinstance(files, list) else [files] for group, files in weight_map.items()
    }
    names: set[str] = set()
    for group, files in shard_of.items():
        for file in files:
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                raise PresetError(
                    f"{index}: {group!r:.200} is said to be in {file!r:.200}; expected a "
                    "*.weights.h5 file beside it: do not use this preset unless you know why"
                )
            names.add(file)
    if missing := sorted(name for name in names if not os.path.isfile(directory / name)):
        raise PresetError(
            f"{directory}: {len(missing)} of {len(names)} shards are missing: "
            f"{', '.join(missing[:3])!s:.300}; fetch the preset again"
        )
    return [directory / name for name in sorted(names)], shard_of
