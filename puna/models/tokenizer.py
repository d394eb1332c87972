"""The public tokenizer: `puna.text.tokenizer` that can be loaded from a preset."""

from __future__ import annotations

import os
from typing import Any

import keras

from puna.text.tokenizer import Tokenizer


@keras.saving.register_keras_serializable(package="puna")
class Llama3Tokenizer(Tokenizer):
    """The tokenizer of a checkpoint; see `puna.text.tokenizer.Tokenizer`."""

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
    ) -> Llama3Tokenizer:
        """A preset's tokenizer, without its weights.

        Args:
            preset: as in `Llama3CausalLM.from_preset`.
            revision: a branch, tag or commit of the Hub, where the address names none.
            **kwargs: arguments of the constructor that win over the files.

        Raises:
            PresetError: the preset is not there.
            TokenizerError: it has no tokenizer, or a broken one.
        """
        from puna.models.presets import load_tokenizer

        return load_tokenizer(cls, preset, revision, kwargs)
