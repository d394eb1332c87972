"""What a model has made of the beginning of a prompt, kept for others that begin alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.checkpoint.fingerprint import fingerprint
from puna.checkpoint.safetensors import SafetensorsSource, TensorSpec, write_safetensors
from puna.decoding import ladder
from puna.decoding.programs import StepModel
from puna.errors import ConfigError, PresetError
from puna.layers.cache import Cache, LayerCache

_FORMAT, _VERSION = "puna prompt cache", "1"


@dataclass(frozen=True, eq=False)
class PromptCache:
    """Keys and values of the tokens of one row.

    It is right for the weights that made it: after training it must be made anew.

    Args:
        token_ids: int32 [length].
        cache: of one row, with room for them at the least.
        model: what made it.

    Example:
        cache = model.prompt_cache("A long text.")
        model.generate("A long text. A question?", prompt_cache=cache)
        cache.save("text.safetensors")
        cache = PromptCache.load("text.safetensors", model)
    """

    token_ids: np.ndarray
    cache: Cache
    model: StepModel
    _adapters: tuple[str, ...] = field(init=False)  # in use when it was made

    def __post_init__(self) -> None:
        object.__setattr__(self, "_adapters", tuple(self.model.adapter_tensors()))

    def common(self, token_ids: np.ndarray) -> int:
        """How many tokens, from the first on, are the same and may be reused.

        Args:
            token_ids: int32 [length], those of a prompt before its last.
        """
        config = self.model.config
        longest = max(len(self.token_ids), len(token_ids)) + 1
        if config.rope.rope_type == "dynamic" and longest > config.max_position_embeddings:
            return 0  # all keys depend on the prompt's length there
        shorter = min(len(self.token_ids), len(token_ids))
        differs = self.token_ids[:shorter] != token_ids[:shorter]
        return int(np.argmax(differs)) if differs.any() else shorter

    def check_fits(self, model: StepModel) -> None:
        """Refuse what another model has made.

        Raises:
            ConfigError: the weights, the adapters in use or the dtype are others.
        """
        if (*self.model.adapter_tensors(),) != self._adapters:
            raise ConfigError(
                "the prompt cache was made with other adapters than those in use now; use those "
                "again, or make one anew with the model's prompt_cache"
            )
        if model is self.model:
            return
        if model.compute_dtype != self.model.compute_dtype:
            raise ConfigError(
                f"the prompt cache was made in {self.model.compute_dtype}, and the model runs in "
                f"{model.compute_dtype}; make one with this model's prompt_cache"
            )
        if _fingerprint(model) != _fingerprint(self.model):
            raise ConfigError(
                "the prompt cache was made by a model with other weights; make one with this "
                "model's prompt_cache"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a safetensors file, which `load` reads on any backend.

        Args:
            path: the file; one that is there is replaced, once all is written.

        Raises:
            ConfigError: other adapters are in use now than when it was made.
        """
        self.check_fits(self.model)
        length = len(self.token_ids)
        dtype = _dtype(self.model.compute_dtype)

        def live(array_BKSH: Tensor) -> Callable[[], np.ndarray]:
            return lambda: backend.ops.gathered(array_BKSH[:, :, :length]).astype(dtype)

        tensors = [TensorSpec("token_ids", (length,), np.int32, lambda: self.token_ids)]
        for name, array_BKSH in _named(self.cache).items():
            _, K, _, H = array_BKSH.shape
            tensors.append(TensorSpec(name, (1, int(K), length, int(H)), dtype, live(array_BKSH)))
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "dtype": self.model.compute_dtype,
            "fingerprint": _fingerprint(self.model),
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> PromptCache:
        """Read what `save` has written.

        Args:
            path: the file.
            model: the causal LM that it shall be used with.

        Raises:
            PresetError: the file is not there, is damaged, is no prompt cache, or was made by
                other weights or in another dtype.
        """
        try:
            source = SafetensorsSource([path])
        except PresetError as error:
            raise PresetError(f"this is no prompt cache to be read: {error}") from error
        with contextlib.closing(source):
            _check(source, path, model)
            token_ids = source.read("token_ids").copy()
            room = ladder.capacity(len(token_ids))
            dtype = backend.ops.cache_dtype(model.compute_dtype)

            def padded(name: str) -> Tensor:
                array_BKSH = source.read(name).astype(np.float32)
                more = room - array_BKSH.shape[2]
                array_BKSH = np.pad(array_BKSH, ((0, 0), (0, 0), (0, more), (0, 0)))
                return ops.convert_to_tensor(array_BKSH, dtype)

            layers = range(model.config.num_hidden_layers)
            cache = tuple(LayerCache(*(padded(name) for name in _names(i))) for i in layers)
        return cls(token_ids, cache, model)


def _check(source: SafetensorsSource, path: Any, model: StepModel) -> None:
    """Refuse a file that is not what this model wrote, or would write."""

    def refuse(what: str) -> NoReturn:
        raise PresetError(f"{path}: {what}; make it anew with model.prompt_cache(...).save(...)")

    said, config = source.metadata, model.config
    if said.get("format") != _FORMAT:
        refuse("this is not a prompt cache")
    if said.get("version") != _VERSION:
        refuse(f"its format is version {said.get('version')!r}, expected {_VERSION!r}")
    if said.get("dtype") != model.compute_dtype:
        refuse(f"it was made in {said.get('dtype')}, and the model runs in {model.compute_dtype}")
    if said.get("fingerprint") != _fingerprint(model):
        refuse("it was made by a model with other weights")
    names = {name for i in range(config.num_hidden_layers) for name in _names(i)}
    if set(source.names()) != names | {"token_ids"}:
        refuse("its tensors are not those of the model's layers")
    length = source.info("token_ids").shape
    shape = (1, config.num_kv_heads, *length, config.head_size)
    found = {(source.info(name).shape, source.info(name).dtype) for name in names}
    whole = source.info("token_ids").dtype == np.int32 and len(length) == 1
    if not whole or found != {(shape, _dtype(model.compute_dtype))}:
        refuse("its tensors have other shapes or dtypes than the model's")
    if not 0 < length[0] <= config.context_length:
        refuse(f"it has {length[0]} tokens, expected 1 to {config.context_length}")


def _names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.key", f"layers.{layer}.value"


def _named(cache: Cache) -> dict[str, Tensor]:
    return {
        name: array_BKSH
        for i, layer in enumerate(cache)
        for name, array_BKSH in zip(_names(i), layer, strict=True)
    }


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _fingerprint(model: StepModel) -> str:
    return fingerprint(model.config, model.tensors() | model.adapter_tensors())
