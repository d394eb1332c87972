"""The public preprocessor: `puna.text.preprocessor` that can be loaded from a preset."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from puna.text.preprocessor import CausalLMPreprocessor


@keras.saving.register_keras_serializable(package="puna")
class Llama3CausalLMPreprocessor(CausalLMPreprocessor):
    """Text to padded ids, mask and labels; see `puna.text.preprocessor.CausalLMPreprocessor`."""

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
    ) -> Llama3CausalLMPreprocessor:
        """A preset's preprocessor, without its weights.

        Args:
            preset: as in `Llama3CausalLM.from_preset`.
            revision: a branch, tag or commit of the Hub, where the address names none.
            **kwargs: arguments of the constructor, such as `sequence_length`.

        Raises:
            PresetError: the preset is not there.
            TokenizerError: it has no tokenizer, or a broken one.
        """
        from puna.models.presets import load_preprocessor

        return load_preprocessor(cls, preset, revision, kwargs)

    def get_config(self) -> dict[str, Any]:
        """Everything that the constructor needs, as JSON."""
        tokenizer = keras.saving.serialize_keras_object(self.tokenizer)
        return super().get_config() | {"tokenizer": tokenizer}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llama3CausalLMPreprocessor:
        """The inverse of `get_config`."""
        tokenizer = keras.saving.deserialize_keras_object(config["tokenizer"])
        return cls(**{**config, "tokenizer": tokenizer})
