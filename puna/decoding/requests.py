"""What `generate` takes and gives, around the loop that knows tokens only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.config import LlamaConfig
from puna.decoding.loop import Decoder, Prompt
from puna.errors import ConfigError, ContextLengthError, TokenizerError
from puna.samplers import Sampler
from puna.text.inputs import as_ids, holds_ids
from puna.text.preprocessor import CausalLMPreprocessor, unpadded


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The settings of one call of `generate`; see `Llama3CausalLM.generate`."""

    max_length: int | None
    max_new_tokens: int | None
    stop_token_ids: Sequence[int] | str | None
    strip_prompt: bool
    sampler: Sampler

    def __post_init__(self):
        for name in ("max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; expected a number of tokens ≥ 0, or None")


def answer(
    decoder: Decoder,
    config: LlamaConfig,
    preprocessor: CausalLMPreprocessor | None,
    inputs: Any,
    generation: Generation,
) -> Any:
    """Continue what came in, and give it back in the same kind.

    Args:
        decoder: the model's loop.
        config: the model's shape.
        preprocessor: the model's; None where inputs are ids.
        inputs: see `Llama3CausalLM.generate`.
        generation: the call's settings.

    Raises:
        ContextLengthError: a prompt is too long.
        TokenizerError: a prompt is empty, or no prompt at all.
    """
    rows, give_back = _read(inputs, preprocessor)
    prompts = [_prompt(i, row, config, preprocessor, generation) for i, row in enumerate(rows)]
    stops = _stop_token_ids(config, preprocessor, generation.stop_token_ids)
    completions = decoder.generate(prompts, sampler=generation.sampler, stop_token_ids=stops)
    if generation.strip_prompt:
        return give_back(completions)
    return give_back([np.concatenate(pair) for pair in zip(rows, completions, strict=True)])


def stream(
    decoder: Decoder,
    config: LlamaConfig,
    preprocessor: CausalLMPreprocessor,
    inputs: Any,
    generation: Generation,
    keep_special_tokens: Sequence[str] = (),
) -> Generator[str, None, None]:
    """The completion of one prompt in pieces of text, as it is made; see `answer`.

    Of special tokens only `keep_special_tokens` show in it.

    Raises:
        TokenizerError: there is not one prompt, and as `answer` raises.
    """
    rows, _ = _read(inputs, preprocessor)
    if len(rows) != 1:
        raise TokenizerError(f"stream was given {len(rows)} prompts; expected one")
    prompt = _prompt(0, rows[0], config, preprocessor, generation)
    stops = _stop_token_ids(config, preprocessor, generation.stop_token_ids)
    text = preprocessor.tokenizer.stream_decoder(skip_special_tokens=True, keep=keep_special_tokens)
    for tokens_B, _ in decoder.stream([prompt], sampler=generation.sampler, stop_token_ids=stops):
        if piece := text.push(int(tokens_B[0])):
            yield piece
    if piece := text.flush():
        yield piece


_Rows = list[np.ndarray]


def _read(
    inputs: Any, preprocessor: CausalLMPreprocessor | None
) -> tuple[_Rows, Callable[[_Rows], Any]]:
    """The prompts' ids, and the way from finished ids back to the kind of `inputs`."""
    if preprocessor is not None:
        found, batched = preprocessor.prompt_ids(inputs)
    elif isinstance(inputs, Mapping):
        found, batched = unpadded(inputs)
    elif holds_ids(inputs):
        found, batched = as_ids(inputs)
    else:
        raise TokenizerError(
            "the model has no preprocessor, so it cannot read text; pass token ids, or load it "
            "with its tokenizer"
        )

    def one_or_all(finished: list[Any]) -> Any:
        return finished if batched else finished[0]

    def as_text(finished: _Rows) -> Any:
        assert preprocessor is not None
        if not finished:
            return []
        rows = [row.tolist() for row in finished]
        return one_or_all(preprocessor.tokenizer.detokenize(rows, skip_special_tokens=True))

    rows = [np.array(row, np.int32) for row in found]
    if isinstance(inputs, Mapping):
        return rows, _as_dict if batched else lambda finished: _one_row(_as_dict(finished))
    return rows, one_or_all if holds_ids(inputs) else as_text


def _prompt(
    place: int,
    token_ids: np.ndarray,
    config: LlamaConfig,
    preprocessor: CausalLMPreprocessor | None,
    generation: Generation,
) -> Prompt:
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
    limit, whose = config.context_length, "the model's context"
    if generation.max_length is not None:
        if generation.max_length > limit:
            raise ContextLengthError(
                f"max_length is {generation.max_length}; the model's context is {limit} tokens"
            )
        limit, whose = generation.max_length, "max_length (which counts the prompt)"
    elif (
        generation.max_new_tokens is None
        and preprocessor is not None
        and preprocessor.sequence_length < limit
    ):
        limit, whose = preprocessor.sequence_length, "the preprocessor's sequence_length"
    if length > limit:
        raise ContextLengthError(
            f"prompt {place} has {length} tokens, and {whose} is {limit}; shorten the prompt, or "
            f"pass max_new_tokens or a max_length up to {config.context_length}"
        )
    left = limit - length
    wanted = generation.max_new_tokens
    if wanted is not None:
        if wanted > left and generation.max_length is None:
            raise ContextLengthError(
                f"prompt {place} has {length} tokens and max_new_tokens is {wanted}; together they "
                f"pass {whose} of {limit} tokens"
            )
        left = min(left, wanted)
    return Prompt(token_ids, left)


def _stop_token_ids(
    config: LlamaConfig,
    preprocessor: CausalLMPreprocessor | None,
    wanted: Sequence[int] | str | None,
) -> list[int]:
    if wanted is None:
        return []
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ValueError(f"stop_token_ids is {wanted!r}; expected ids, 'auto' or None")
        return list(
            config.eos_token_ids if preprocessor is None else preprocessor.tokenizer.stop_token_ids
        )
    return [int(token) for token in wanted]


def _one_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in batch.items()}


def _as_dict(finished: _Rows) -> dict[str, np.ndarray]:
    longest = max((len(row) for row in finished), default=0)
    token_ids = np.zeros((len(finished), longest), np.int32)
    mask = np.zeros((len(finished), longest), bool)
    for i, row in enumerate(finished):
        token_ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return {"token_ids": token_ids, "padding_mask": mask}
