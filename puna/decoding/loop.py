"""Tokens in, tokens out: prefill, decode, stop.

`Decoder` holds the compiled steps of one model. It knows tokens, rows and caches; it knows no text
and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.config import LlamaConfig
from puna.decoding import ladder
from puna.decoding.choose import choose
from puna.layers.cache import Cache, empty_cache, grow_cache
from puna.samplers import Form, Sampler, SamplingValues, UniformNumbers


class StepModel(Protocol):
    """What a decoder asks of a model."""

    config: LlamaConfig
    compute_dtype: str
    variables: Sequence[Any]

    def step(
        self,
        token_ids_BT: Tensor,
        start_B: Tensor,
        cache: Cache,
        last_B: Tensor | None,
        length_B: Tensor | None = None,
    ) -> tuple[Tensor | None, Cache]:
        """Take T tokens more; logits `[B, V]` after token `last_B` of each row, if asked for."""
        ...


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    Args:
        token_ids: int32 [length], at least one.
        max_new_tokens: how many tokens may follow.
    """

    token_ids: np.ndarray
    max_new_tokens: int


class Decoder:
    """The compiled steps of a model, and the loop over them.

    Args:
        model: anything with a `step`.
    """

    def __init__(self, model: StepModel):
        self._model = model
        self._steps: dict[Form | None, Callable[..., Any]] = {}
        self._variables: list[Any] = []

    def generate(
        self, prompts: Sequence[Prompt], *, sampler: Sampler, stop_token_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, the one that stopped it included.

        Args:
            prompts: the rows; each gets the tokens that it would get alone.
            sampler: how tokens are chosen.
            stop_token_ids: a row ends after any of these.

        Returns:
            For each row int32 [new tokens].
        """
        completions: list[list[int]] = [[] for _ in prompts]
        for tokens_B, active_B in self.stream(
            prompts, sampler=sampler, stop_token_ids=stop_token_ids
        ):
            for completion, token, active in zip(completions, tokens_B, active_B, strict=True):
                if active:
                    completion.append(int(token))
        return [np.array(completion, np.int32) for completion in completions]

    def stream(
        self, prompts: Sequence[Prompt], *, sampler: Sampler, stop_token_ids: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same, a token of each row at a time.

        Yields:
            Tokens int32 [B], and bool [B]: whether the row still runs, so that its token counts.
        """
        if not prompts or not any(prompt.max_new_tokens > 0 for prompt in prompts):
            return
        B = len(prompts)
        lengths_B = np.array([len(prompt.token_ids) for prompt in prompts], np.int32)
        left_B = np.array([prompt.max_new_tokens for prompt in prompts], np.int32)
        values, uniform = sampler.values(B), UniformNumbers(sampler.seed, B)
        tokens_B, cache = self._prefill(prompts, lengths_B, sampler.form, values, uniform.next())
        step = self._step(sampler.form)
        active_B = left_B > 0
        while True:
            yield tokens_B, active_B
            left_B = left_B - active_B
            active_B = active_B & (left_B > 0) & ~np.isin(tokens_B, stop_token_ids)
            if not active_B.any():
                return
            if lengths_B.max() >= (capacity := cache[0].key_BKSH.shape[2]):
                cache = grow_cache(cache, ladder.capacity(capacity + 1))
            # A row that has ended repeats its last step, whose result nobody reads.
            chosen_B, cache = step(
                *_tensors(tokens_B[:, None], lengths_B),
                cache,
                *_tensors(lengths_B + 1, np.zeros(B, np.int32), uniform.next(), *values),
            )
            tokens_B = ops.convert_to_numpy(chosen_B)
            lengths_B = lengths_B + active_B

    def _prefill(
        self,
        prompts: Sequence[Prompt],
        lengths_B: np.ndarray,
        form: Form,
        values: SamplingValues,
        uniform_B: np.ndarray,
    ) -> tuple[np.ndarray, Cache]:
        """Take the prompts in chunks; the first token of each row, and the filled cache.

        Logits are computed in the chunks where a row ends, for one position of each row.
        """
        B, longest = len(prompts), int(lengths_B.max())
        chunks: list[tuple[int, int]] = []
        end = 0
        while end < longest:
            size = ladder.chunk_size(longest - end)
            chunks.append((end, size))
            end += size
        most = max(len(p.token_ids) + p.max_new_tokens for p in prompts)
        room = max(ladder.first_capacity(longest, most), ladder.capacity(end))
        cache = empty_cache(self._model.config, B, room, self._model.compute_dtype)
        padded_BT = np.zeros((B, end), np.int32)
        for row, prompt in zip(padded_BT, prompts, strict=True):
            row[: len(prompt.token_ids)] = prompt.token_ids
        tokens_B = np.zeros(B, np.int32)
        for start, size in chunks:
            ends_here_B = (lengths_B > start) & (lengths_B <= start + size)
            last_B = np.clip(lengths_B - 1 - start, 0, size - 1).astype(np.int32)
            inputs = _tensors(padded_BT[:, start : start + size], np.full(B, start, np.int32))
            if ends_here_B.any():
                rest = _tensors(lengths_B, last_B, uniform_B, *values)
                chosen_B, cache = self._step(form)(*inputs, cache, *rest)
                tokens_B = np.where(ends_here_B, ops.convert_to_numpy(chosen_B), tokens_B)
            else:
                _, cache = self._step(None)(*inputs, cache, *_tensors(lengths_B))
        return tokens_B, cache

    def _step(self, form: Form | None) -> Callable[..., Any]:
        """The compiled step that chooses tokens in this way; None chooses none."""
        variables = list(self._model.variables)
        if [id(v) for v in variables] != [id(v) for v in self._variables]:
            self._variables, self._steps = variables, {}
        if form not in self._steps:
            function = self._fill if form is None else self._chooser(form)
            self._steps[form] = backend.ops.compile_step(function, variables, donate=(2,))
        return self._steps[form]

    def _fill(
        self, token_ids_BT: Tensor, start_B: Tensor, cache: Cache, length_B: Tensor
    ) -> tuple[None, Cache]:
        _, cache = self._model.step(token_ids_BT, start_B, cache, None, length_B)
        return None, cache

    def _chooser(self, form: Form) -> Callable[..., Any]:
        def step(
            token_ids_BT: Tensor,
            start_B: Tensor,
            cache: Cache,
            length_B: Tensor,
            last_B: Tensor,
            uniform_B: Tensor,
            *values: Tensor,
        ) -> tuple[Tensor, Cache]:
            logits_BV, cache = self._model.step(token_ids_BT, start_B, cache, last_B, length_B)
            return choose(form, logits_BV, uniform_B, SamplingValues(*values)), cache

        return step


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [ops.convert_to_tensor(array) for array in arrays]
