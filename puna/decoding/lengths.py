"""How long a prompt may be, and how many tokens may follow it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from puna.config import LlamaConfig
from puna.decoding.loop import Prompt
from puna.errors import ConfigError, ContextLengthError, TokenizerError

# Tokens that a window has at the least beside the sinks: half of them are forgotten at a time.
LEAST_WINDOW = 2


class Bounds(Protocol):
    """The part of a call's settings that is of lengths; see `Llama3CausalLM.generate`."""

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion."""
        ...

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of the completion."""
        ...

    @property
    def sliding_window(self) -> int | None:
        """Tokens that are kept."""
        ...


def prompt_of(
    place: int,
    token_ids: np.ndarray,
    config: LlamaConfig,
    sequence_length: int | None,
    bounds: Bounds,
) -> Prompt:
    """A prompt with its bound.

    Args:
        place: which prompt of the call it is, for messages.
        token_ids: int32 [length].
        config: the model's shape.
        sequence_length: the preprocessor's, if there is one.
        bounds: the call's settings.

    Raises:
        TokenizerError: it is empty, or holds ids that the model does not have.
        ContextLengthError: it is too long, or what shall follow it.
        ConfigError: a sliding window has no end.
    """
    length = len(token_ids)
    if length == 0:
        raise TokenizerError(
            f"prompt {place} has no tokens; expected at least one (this tokenizer puts no start "
            "token before a text)"
        )
    if token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        raise TokenizerError(
            f"prompt {place} has token ids from {token_ids.min()} to {token_ids.max()}; expected "
            f"0 to {config.vocab_size - 1}"
        )
    if bounds.sliding_window is not None:
        return _sliding(place, token_ids, config.context_length, bounds.sliding_window, bounds)
    limit, whose = config.context_length, "the model's context"
    if bounds.max_length is not None:
        if bounds.max_length > limit:
            raise ContextLengthError(
                f"max_length is {bounds.max_length}; the model's context is {limit} tokens (with a "
                "sliding_window it may be more)"
            )
        limit, whose = bounds.max_length, "max_length (which counts the prompt)"
    elif bounds.max_new_tokens is None and sequence_length is not None and sequence_length < limit:
        limit, whose = sequence_length, "the preprocessor's sequence_length"
    if length > limit:
        raise ContextLengthError(
            f"prompt {place} has {length} tokens, and {whose} is {limit}; shorten the prompt, or "
            f"pass max_new_tokens or a max_length up to {config.context_length}"
        )
    left, wanted = limit - length, bounds.max_new_tokens
    if wanted is not None:
        if wanted > left and bounds.max_length is None:
            raise ContextLengthError(
                f"prompt {place} has {length} tokens and max_new_tokens is {wanted}; together they "
                f"pass {whose} of {limit} tokens"
            )
        left = min(left, wanted)
    return Prompt(token_ids, left)


def _sliding(
    place: int, token_ids: np.ndarray, context: int, window: int, bounds: Bounds
) -> Prompt:
    """A prompt whose completion may go on beyond the context."""
    if window > context:
        raise ContextLengthError(
            f"sliding_window is {window}; the model's context is {context} tokens"
        )
    if len(token_ids) > window:
        raise ContextLengthError(
            f"prompt {place} has {len(token_ids)} tokens, and sliding_window is {window}; a prompt "
            "must fit in it"
        )
    ends = [bounds.max_new_tokens]
    if bounds.max_length is not None:
        ends.append(max(0, bounds.max_length - len(token_ids)))
    given = [end for end in ends if end is not None]
    if not given:
        raise ConfigError("with a sliding_window, pass max_new_tokens or max_length: it has no end")
    return Prompt(token_ids, min(given))
