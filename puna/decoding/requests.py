"""What `generate` takes and gives, around the loop that knows tokens only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from puna.config import LlamaConfig
from puna.decoding.beam import BeamDecoding, check_beams
from puna.decoding.lengths import LEAST_WINDOW, prompt_of
from puna.decoding.loop import Decoder, Request, Step
from puna.decoding.prompt_cache import PromptCache
from puna.decoding.prompts import AsText, read, read_one
from puna.decoding.text import FinishReason, RowText, TokenLogprob
from puna.errors import ConfigError, TokenizerError
from puna.samplers import CANDIDATES, BeamSampler, GreedySampler, Sampler
from puna.text.preprocessor import CausalLMPreprocessor
from puna.text.streaming import StreamDecoder

# How keys and values may be kept.
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The settings of one call of `generate`; see `Llama3CausalLM.generate`."""

    sampler: Sampler
    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: Sequence[int] | str | None = "auto"
    stop: str | Sequence[str] | None = ()
    strip_prompt: bool = False
    num_return_sequences: int = 1
    logprobs: int | None = None
    prompt_cache: PromptCache | None = None
    cache_dtype: str | None = None
    sliding_window: int | None = None
    attention_sinks: int = 4

    def __post_init__(self):
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ConfigError(
                f"cache_dtype is {self.cache_dtype!r}; expected None or one of "
                f"{', '.join(CACHE_DTYPES)}"
            )
        if self.cache_dtype is not None and self.prompt_cache is not None:
            raise ConfigError(
                "prompt_cache and cache_dtype do not go together: a prompt cache is kept in the "
                "model's own way; leave one of them out"
            )
        window, sinks = self.sliding_window, self.attention_sinks
        if window is not None and not (sinks >= 0 and window >= sinks + LEAST_WINDOW):
            raise ConfigError(
                f"sliding_window is {window} and attention_sinks {sinks}; expected sinks ≥ 0 and a "
                f"window of at least {LEAST_WINDOW} tokens more"
            )
        for name in ("max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; expected a number of tokens ≥ 0, or None")
        if self.num_return_sequences < 1:
            raise ConfigError(
                f"num_return_sequences is {self.num_return_sequences}; expected a number ≥ 1"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= CANDIDATES:
            raise ConfigError(f"logprobs is {self.logprobs}; expected 0 to {CANDIDATES}, or None")
        listed = isinstance(self.stop, str | Sequence | None)
        if not listed or any(not isinstance(text, str) or not text for text in self.stops):
            raise ConfigError(f"stop is {self.stop!r}; expected texts that are not empty")
        if isinstance(self.sampler, BeamSampler):
            more = bool(self.stops) or self.logprobs is not None
            check_beams(self.sampler, self.num_return_sequences, more)

    @property
    def sequences(self) -> int:
        """How many completions of each prompt are made."""
        if isinstance(self.sampler, BeamSampler) and self.sampler.return_all_beams:
            return self.sampler.num_beams
        return self.num_return_sequences

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a completion."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What `generate` gives for a prompt where `logprobs` are asked for.

    Args:
        text: as `generate` gives it to a string; None without a tokenizer.
        token_ids: int32, the new tokens, also those that are not in the text.
        logprobs: one for each new token.
        finish_reason: "stop" for a stop token or text, "length" for a bound.
    """

    text: str | None
    token_ids: np.ndarray
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Served:
    """The parts of a model that requests need.

    Args:
        decoder: the model's loop.
        config: the model's shape.
        preprocessor: the model's; None where inputs are ids.
    """

    decoder: Decoder
    config: LlamaConfig
    preprocessor: CausalLMPreprocessor | None

    @property
    def sequence_length(self) -> int | None:
        """The preprocessor's."""
        return None if self.preprocessor is None else self.preprocessor.sequence_length


def answer(served: Served, inputs: Any, generation: Generation) -> Any:
    """Continue what came in, and give it back in the same kind.

    Args:
        served: the model.
        inputs: see `Llama3CausalLM.generate`.
        generation: the call's settings.

    Raises:
        ContextLengthError: a prompt is too long.
        TokenizerError: a prompt is empty, or no prompt at all.
        ConfigError: the settings ask for what the model does not have.
    """
    found = read(inputs, served.preprocessor)
    again = generation.sequences
    rows = [row for row in found.rows for _ in range(again)]
    batch = Batch(served, rows, generation)
    while batch.advance() is not None:
        pass
    sampler = generation.sampler
    listed = again > 1 or (isinstance(sampler, BeamSampler) and sampler.return_all_beams)
    wants_text = not found.holds_ids or generation.logprobs is not None
    results = batch.results(found.as_text if wants_text else None)
    as_dict = found.is_dict and generation.logprobs is None
    return found.give_back(results, again, listed=listed, as_dict=as_dict)


def prefix(served: Served, prompt: Any) -> PromptCache:
    """What the model makes of the beginning of a prompt; see `Llama3CausalLM.prompt_cache`.

    Raises:
        ContextLengthError: it is longer than the model's context.
        TokenizerError: there is not one prompt, or it is empty.
    """
    row = read_one(prompt, served.preprocessor)
    nothing = Generation(sampler=GreedySampler(), max_new_tokens=0)
    prompt_of(0, row, served.config, served.sequence_length, nothing)
    return served.decoder.prefix(row)


class Batch:
    """Prompts that are being continued, as tokens and, where it is asked for, as text.

    Args:
        served: the model.
        rows: each prompt's tokens, int32.
        generation: the call's settings.
        make_decoder: makes what turns a row's tokens into text; None where only stop texts need
            text.
    """

    def __init__(
        self,
        served: Served,
        rows: Sequence[np.ndarray],
        generation: Generation,
        make_decoder: Callable[[], StreamDecoder] | None = None,
    ):
        config, preprocessor = served.config, served.preprocessor
        sampler, stops = generation.sampler, generation.stops
        self._rows = rows
        # The cache's memory is the caller's to keep or let go.
        self._generation = dataclasses.replace(generation, prompt_cache=None)
        prompts = [
            prompt_of(i, row, config, served.sequence_length, generation)
            for i, row in enumerate(rows)
        ]
        if stops and preprocessor is None:
            raise TokenizerError("stop texts need a tokenizer, and the model has no preprocessor")
        decoders = make_decoder
        if stops and decoders is None and preprocessor is not None:
            tokenizer = preprocessor.tokenizer
            decoders = partial(tokenizer.stream_decoder, skip_special_tokens=True)
        self._texts = decoders and [RowText(decoders(), stops) for _ in rows]
        if generation.prompt_cache is not None:
            generation.prompt_cache.check_fits(served.decoder.model)
        self._stop_ids = _stop_token_ids(config, preprocessor, generation.stop_token_ids)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in rows]
        request = Request(
            sampler=sampler,
            stop_token_ids=self._stop_ids,
            bad_words=_bad_words(sampler, preprocessor),
            logprobs=generation.logprobs is not None,
            reuse=generation.prompt_cache,
            cache_dtype=generation.cache_dtype,
            window=generation.sliding_window,
            sinks=generation.attention_sinks,
        )
        if not isinstance(sampler, BeamSampler):
            self.decoding = served.decoder.start(prompts, request)
        elif make_decoder is None:
            self.decoding = BeamDecoding(served.decoder, prompts, request, generation.sequences)
        else:
            raise ConfigError(
                "a beam search has no text to stream before its end; use generate, or a sampler "
                "that is no beam search"
            )

    def advance(self) -> Step | None:
        """One token more of each row that still runs; None at the end."""
        step = next(self.decoding, None)
        if step is None:
            return None
        for row in np.flatnonzero(step.active_B):
            if self._generation.logprobs is not None:
                self._logprobs[row].append(_logprob(step, int(row), self._generation.logprobs))
            if self._texts is not None:
                text = self._texts[row]
                text.push(int(step.tokens_B[row]))
                if text.stopped:
                    self.decoding.end(int(row))
        return step

    def text(self, row: int) -> RowText:
        """A row's text so far."""
        assert self._texts is not None
        return self._texts[row]

    def logprobs(self, row: int) -> list[TokenLogprob]:
        """Of a row's tokens so far."""
        return self._logprobs[row]

    def reason(self, row: int) -> FinishReason:
        """Why a row has ended."""
        made = self.decoding.completions[row]
        stopped = self._texts is not None and self._texts[row].stopped
        return "stop" if stopped or (len(made) and made[-1] in self._stop_ids) else "length"

    def results(self, as_text: AsText | None) -> list[Any]:
        """Every row as `generate` gives it.

        Args:
            as_text: makes texts of rows of ids; None leaves ids as they are.
        """
        made, generation = self.decoding.completions, self._generation
        whole = made
        if not generation.strip_prompt:
            whole = [np.concatenate(pair) for pair in zip(self._rows, made, strict=True)]
        texts = None if as_text is None else as_text(whole)
        for row, text in enumerate(self._texts or ()):
            text.flush()
            if texts is not None:
                texts[row] = texts[row][: len(texts[row]) - text.left_out]
        if generation.logprobs is None:
            return whole if texts is None else texts
        return [
            Completion(
                text=None if texts is None else texts[row],
                token_ids=token_ids,
                logprobs=tuple(self._logprobs[row]),
                finish_reason=self.reason(row),
            )
            for row, token_ids in enumerate(made)
        ]


def _logprob(step: Step, row: int, top: int) -> TokenLogprob:
    best = zip(step.best_BN[row, :top], step.best_logprobs_BN[row, :top], strict=True)
    return TokenLogprob(
        int(step.tokens_B[row]),
        float(step.logprobs_B[row]),
        tuple((int(token), float(logprob)) for token, logprob in best if token >= 0),
    )


def _bad_words(sampler: Sampler, preprocessor: CausalLMPreprocessor | None) -> list[list[int]]:
    """The sampler's bad words as ids."""
    words = []
    for word in sampler.bad_words:
        if isinstance(word, str):
            if preprocessor is None:
                raise TokenizerError(
                    f"bad_words holds the text {word!r}, and the model has no preprocessor; give "
                    "token ids"
                )
            words.append(preprocessor.tokenizer.tokenize(word, parse_special=False).tolist())
        else:
            words.append([int(token) for token in word])
    return words


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
