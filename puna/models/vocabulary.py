"""Growing and shrinking a model's vocabulary: rows of the embedding and of the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from puna import backend
from puna.backend import build
from puna.errors import ConfigError

if TYPE_CHECKING:
    from puna.models.causal_lm import Llama3CausalLM


class ResizableVocabulary:
    """The part of `Llama3CausalLM` that changes how many tokens it knows."""

    def add_tokens(
        self, tokens: str | Iterable[str], *, special: bool = False, multiple_of: int = 1
    ) -> int:
        """Add tokens to the tokenizer, and rows for them to the model where it lacks them.

        A model whose vocabulary is padded beyond the tokenizer's may have the rows already; they
        stay as they are. See `resize_token_embeddings` for what new rows start from, and for what
        has to be done before the next `fit`.

        Args:
            tokens: their texts; those that the tokenizer knows are skipped.
            special: whether they are control tokens, left out of generated text.
            multiple_of: the model's vocabulary is padded to a multiple of this.

        Returns:
            How many were new.

        Raises:
            TokenizerError: the model has no tokenizer, or it cannot take the tokens.
            ConfigError: `multiple_of` is not a positive whole number.

        >>> from puna.testing import tiny_model
        >>> model = tiny_model()
        >>> model.add_tokens(["<|pirate|>", "Hello"])
        1
        >>> model.config.vocab_size == model.tokenizer.vocabulary_size()
        True
        """
        model = cast("Llama3CausalLM", self)
        _check_positive("multiple_of", multiple_of)
        added = model.tokenizer.add_tokens(tokens, special=special)
        if model.tokenizer.vocabulary_size() > model.config.vocab_size:
            self.resize_token_embeddings(multiple_of=multiple_of)
        return added

    def resize_token_embeddings(
        self, vocabulary_size: int | None = None, multiple_of: int = 1
    ) -> int:
        """Grow or shrink the embedding, and the head where it is not the embedding.

        New rows are the mean of the old ones. A row near zero would not do: its logit is about 0
        where those of trained tokens are often far below, so that the new token would at once be
        the likeliest. The mean row's probability is at most about that of an average token, so
        that the model says what it said before (Hewitt, 2021, "Initializing new word embeddings
        for pretrained language models").

        An optimizer that has already trained the model knows the old rows only: call `compile`
        again, with a new optimizer, before the next `fit` (which raises otherwise). Compiled
        steps of `generate` are renewed by themselves.

        Args:
            vocabulary_size: rows, V; None means what the tokenizer has.
            multiple_of: V is rounded up to a multiple of this, such as 64 for fast products.

        Returns:
            The new V.

        Raises:
            ConfigError: a number is not a positive whole one, V is smaller than the tokenizer's
                vocabulary, or the embedding or head is quantized or the head has adapters.
            TokenizerError: `vocabulary_size` is None and the model has no tokenizer.
        """
        model = cast("Llama3CausalLM", self)
        if vocabulary_size is None:
            vocabulary_size = model.tokenizer.vocabulary_size()
        _check_positive("vocabulary_size", vocabulary_size)
        _check_positive("multiple_of", multiple_of)
        V = -(-vocabulary_size // multiple_of) * multiple_of
        if model.preprocessor is not None and model.tokenizer.vocabulary_size() > V:
            raise ConfigError(
                f"the vocabulary shall have {V} rows, and the tokenizer has "
                f"{model.tokenizer.vocabulary_size()} tokens; expected at least as many rows"
            )
        if model.config.vocab_size == V:
            return V
        if quantized := {"model.embed_tokens", "lm_head"} & set(model.quantization()):
            raise ConfigError(
                f"the vocabulary shall change from {model.config.vocab_size} to {V} rows, and "
                f"{', '.join(sorted(quantized))} is quantized; change it before quantizing"
            )
        if model.lm_head is not None and model.lm_head.adapters:
            raise ConfigError(
                f"the vocabulary shall change from {model.config.vocab_size} to {V} rows, and "
                f"lm_head has adapters ({', '.join(model.lm_head.adapters)}) for as many as now; "
                "change it before enable_lora"
            )
        config = dataclasses.replace(model.config, vocab_size=V)  # raises before anything changes
        embedding = model.backbone.embed_tokens
        _resize_rows(embedding, V)
        embedding.vocabulary_size = V
        if model.lm_head is not None:
            _resize_rows(model.lm_head, V)
            model.lm_head.output_dim = V
        model.backbone.config = config
        # Keras's own compiled steps hold on to the variables that they were traced with.
        model.train_function = model.test_function = model.predict_function = None
        return V

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that was built for other variables, with which nothing would train.

        Raises:
            ConfigError: the optimizer does not know the model's variables.
        """
        model = cast("Llama3CausalLM", self)
        optimizer = getattr(model, "optimizer", None)
        if not build.is_built_for(optimizer, model.trainable_variables):
            raise ConfigError(
                "the optimizer was built before the model's variables changed (tokens were added, "
                "or something was frozen or made trainable); call compile again with a new "
                "optimizer"
            )


def _resize_rows(layer: Any, rows: int) -> None:
    """Give a layer's `weight`, and `bias` if it has one, this many rows."""
    for attribute in ("weight", "bias"):
        if getattr(layer, attribute, None) is not None:
            old = backend.ops.to_numpy(getattr(layer, attribute))
            with layer.added():
                build.replace_weight(layer, attribute, _with_rows(old, rows))


def _with_rows(old: np.ndarray, rows: int) -> np.ndarray:
    """The first rows of an array, and after them its mean row as often as needed."""
    if rows <= len(old):
        return old[:rows].copy()
    # A sum of 128,000 rows in bfloat16 or float32 would lose what it adds.
    mean = old.mean(axis=0, dtype=np.float64).astype(old.dtype)
    return np.concatenate([old, np.broadcast_to(mean, (rows - len(old), *old.shape[1:]))])


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number, 1 or more")
