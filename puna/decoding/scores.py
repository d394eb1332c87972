"""How likely a model finds texts that are given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from keras import ops

from puna.decoding import ladder
from puna.decoding.programs import Programs, StepModel
from puna.decoding.text import TokenLogprob
from puna.errors import ConfigError, ContextLengthError
from puna.layers.cache import empty_cache

# Tokens whose logits are computed at once: 64 rows of 128k numbers are 33 MB.
_CHUNK = 64


def token_logprobs(
    model: StepModel, programs: Programs, token_ids: np.ndarray, top: int
) -> tuple[TokenLogprob, ...]:
    """The log-probability of each token but the first, given those before it.

    Args:
        model: the model.
        programs: its compiled steps.
        token_ids: int32 [length].
        top: how many of the likeliest tokens to tell of in each place.

    Raises:
        ContextLengthError: the text is longer than the context.
    """
    length, context = len(token_ids), model.config.context_length
    if length > context:
        raise ContextLengthError(
            f"the text has {length} tokens and the model's context is {context}; give shorter "
            "texts, or ask for their perplexity, which takes them in pieces"
        )
    found = []
    for logprobs_T, best_TN, best_logprobs_TN in _chunks(model, programs, token_ids):
        for target, logprob, best_N, best_logprobs_N in zip(
            token_ids[len(found) + 1 :], logprobs_T, best_TN, best_logprobs_TN, strict=False
        ):
            pairs = zip(best_N[:top].tolist(), best_logprobs_N[:top].tolist(), strict=True)
            found.append(TokenLogprob(int(target), float(logprob), tuple(pairs)))
    return tuple(found)


def perplexity(
    model: StepModel,
    programs: Programs,
    texts: Sequence[np.ndarray],
    window: int | None,
    stride: int | None,
) -> float:
    """The exponential of the mean negative log-probability over all tokens of all texts.

    Args:
        model: the model.
        programs: its compiled steps.
        texts: each int32 [length]; the first token of each is not predicted.
        window: tokens that are taken at once; None means the context.
        stride: tokens by which the window moves on; None means the window.

    Raises:
        ConfigError: window or stride make no sense, or there is nothing to predict.
    """
    context = model.config.context_length
    window = context if window is None else window
    stride = window if stride is None else stride
    if not (2 <= window <= context and 1 <= stride <= window):
        raise ConfigError(
            f"max_length is {window} and stride {stride}; expected 2 ≤ max_length ≤ {context} and "
            "1 ≤ stride ≤ max_length"
        )
    total, count = 0.0, 0
    for text in texts:
        done = 1  # tokens of the text that have been predicted, or cannot be
        begin = 0
        while done < len(text):
            piece = text[begin : begin + window]
            logprobs = np.concatenate([part[0] for part in _chunks(model, programs, piece)])
            new = logprobs[done - begin - 1 : len(piece) - 1].astype(np.float64)
            total, count = total - new.sum(), count + len(new)
            done = begin + len(piece)
            # A window that moves on by all of itself leaves its first token without a past, so
            # it begins with the last one of the window before.
            begin = min(begin + stride, done - 1)
    if not count:
        raise ConfigError("there is nothing to predict: no text has more than one token")
    return math.exp(total / count)


def _chunks(
    model: StepModel, programs: Programs, token_ids: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `Programs.score` gives for the real tokens of each chunk but the last token of all."""
    programs.refresh()
    inputs, targets = token_ids[:-1], token_ids[1:]
    cache = empty_cache(model.config, 1, ladder.capacity(len(inputs) + _CHUNK), model.compute_dtype)
    for begin in range(0, len(inputs), _CHUNK):
        taken = inputs[begin : begin + _CHUNK]
        size = ladder.chunk_size(len(taken))
        chunk_2T = np.zeros((2, size), np.int32)
        chunk_2T[0, : len(taken)] = taken
        chunk_2T[1, : len(taken)] = targets[begin : begin + _CHUNK]
        told, cache = programs.score(chunk_2T[:1], chunk_2T[1:], begin, cache, len(token_ids))
        logprobs, best, best_logprobs = (ops.convert_to_numpy(a)[0, : len(taken)] for a in told)
        yield logprobs, best, best_logprobs
