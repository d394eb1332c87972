"""Tokens in, tokens out: prefill, decode, stop.

`Decoder` knows tokens, rows and caches; it knows no text and no requests.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from keras import ops

from puna import backend
from puna.backend import hosts
from puna.decoding import ladder
from puna.decoding.choose import Changes, Settings, UniformNumbers
from puna.decoding.programs import Made, Programs, Rows, StepModel, Wanted
from puna.decoding.prompt_cache import PromptCache
from puna.layers.cache import Cache, arrange, capacity_of, empty_cache
from puna.samplers import GreedySampler, Sampler

# Seconds that one call to the device may take before anything of it is seen.
_PATIENCE = 0.1

_LEAST_STOPS = 16  # places for stop tokens in the compiled step


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    Args:
        token_ids: int32 [length], at least one.
        max_new_tokens: how many tokens may follow.
    """

    token_ids: np.ndarray
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a batch is continued.

    Args:
        sampler: how tokens are chosen.
        stop_token_ids: a row ends after any of these.
        bad_words: the sampler's, as ids.
        logprobs: whether log-probabilities are told.
        reuse: what of the prompts has been through the model before.
        cache_dtype: how keys and values are kept; see `puna.layers.cache.empty_cache`.
        window: how many tokens of a row are kept, where older ones shall be forgotten.
        sinks: how many of the first tokens are never forgotten.
    """

    sampler: Sampler
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    logprobs: bool = False
    reuse: PromptCache | None = None
    cache_dtype: str | None = None
    window: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class Step:
    """A token of each row.

    Args:
        tokens_B: int32.
        active_B: bool: whether the row still ran, so that its token counts.
        logprobs_B: float32, of the tokens; zeros where not asked for.
        best_BN: int32, the likeliest tokens, the first first.
        best_logprobs_BN: float32.
    """

    tokens_B: np.ndarray
    active_B: np.ndarray
    logprobs_B: np.ndarray
    best_BN: np.ndarray
    best_logprobs_BN: np.ndarray


class Decoder:
    """The compiled steps of a model, and the loop over them.

    Args:
        model: anything with a `step`.
    """

    def __init__(self, model: StepModel):
        self.model = model
        self.programs = Programs(model)

    def start(self, prompts: Sequence[Prompt], request: Request) -> Decoding:
        """What follows each prompt, a token of each row at a time, its stop token included.

        Each row gets the tokens that it would get alone. The prompts are taken in when it is
        iterated.
        """
        return Decoding(self.model, self.programs, prompts, request)

    def warm_up(self, max_length: int, batch_size: int) -> None:
        """Compile all that batches up to these sizes need.

        Args:
            max_length: tokens of prompt and completion together.
            batch_size: rows.
        """
        room, model = 0, self.model
        self.programs.refresh()
        while room < max_length:
            room = ladder.capacity(room + 1)
            for size in ladder.CHUNKS:
                if size <= room:
                    tokens = np.zeros(size, np.int32)
                    fill(model, self.programs, tokens, None, room)
            rows = 1
            while rows <= ladder.rows(batch_size):
                # Prompts whose completions may have no token: nothing is made.
                prompts = [Prompt(np.zeros(2, np.int32), 0)] * rows
                Decoding(model, self.programs, prompts, Request(sampler=GreedySampler())).compile(
                    room
                )
                rows *= 2

    def prefix(self, token_ids: np.ndarray) -> PromptCache:
        """What the model makes of the beginning of a prompt, kept for many."""
        self.programs.refresh()
        cache, _ = fill(self.model, self.programs, token_ids, None, len(token_ids))
        return PromptCache(token_ids, cache, self.model)


class Decoding(Iterator[Step]):
    """A batch that is being continued.

    Attributes:
        prefilled: tokens of the prompts that went through the model.
        reused: tokens of the prompts that did not have to.
    """

    def __init__(
        self, model: StepModel, programs: Programs, prompts: Sequence[Prompt], request: Request
    ):
        self._model, self._programs = model, programs
        self._prompts, self._request = prompts, request
        self._made: list[list[int]] = [[] for _ in prompts]
        self._left_B = np.array([prompt.max_new_tokens for prompt in prompts], np.int32)
        self._ended_B = np.zeros(len(prompts), bool)
        self._steps: deque[Step] = deque()
        self._calls: deque[tuple[Made, int]] = deque()
        self._state: tuple[Rows, Cache] | None = None
        self._forgotten = False
        self.prefilled = self.reused = 0

    def __next__(self) -> Step:
        while not self._steps:
            if not ((self._left_B > 0) & ~self._ended_B).any():
                raise StopIteration
            if self._state is None:
                self._begin()
            self._read()
        if self._ended_B.all():
            raise StopIteration
        step = self._steps.popleft()
        step = dataclasses.replace(step, active_B=step.active_B & ~self._ended_B)
        for completion, token, active in zip(self._made, step.tokens_B, step.active_B, strict=True):
            if active:
                completion.append(int(token))
        return step

    @property
    def completions(self) -> list[np.ndarray]:
        """What has been made of each row, int32 [new]."""
        return [np.array(completion, np.int32) for completion in self._made]

    def end(self, row: int) -> None:
        """No more of this row, whatever the device makes of it."""
        self._ended_B[row] = True

    def release(self, row: int = 0) -> PromptCache | None:
        """End here, and give what the model has made of a row; None if that is nothing whole.

        The batch's memory is let go of, so it may be called once.
        """
        self._ended_B[:] = True
        self._calls.clear()
        if self._state is None or self._forgotten:
            return None
        cache, self._state = self._state[1], None
        token_ids = np.concatenate([self._prompts[row].token_ids, self._made[row]])
        if len(self._prompts) > 1:
            cache = arrange([(cache, row)], ladder.capacity(len(token_ids)))
        # The last token has not been through the model.
        return PromptCache(token_ids[:-1].astype(np.int32), cache, self._model)

    def compile(self, room: int) -> None:
        """Compile the step for these prompts in a cache for `room` tokens; nothing is made."""
        self._begin(room)
        self._pace = 0
        self._call()

    def _begin(self, room: int = 0) -> None:
        """Take the prompts in, each alone, and put their caches side by side.

        Args:
            room: tokens that the cache shall hold at the least.
        """
        prompts, request = self._prompts, self._request
        B = ladder.rows(len(prompts))
        lengths_B = np.ones(B, np.int32)
        left_B = np.zeros(B, np.int32)
        lengths_B[: len(prompts)] = [len(prompt.token_ids) for prompt in prompts]
        left_B[: len(prompts)] = self._left_B
        self._most = int((lengths_B + left_B).max())
        if request.window is not None:
            self._most = min(self._most, request.window)
        room = max(room, ladder.first_capacity(int(lengths_B.max()), self._most))
        cache = self._fill(room, B)
        history_BS = self._history(B, capacity_of(cache))
        self._request = dataclasses.replace(request, reuse=None)  # its memory is the caller's
        self._state = Rows(*map(backend.ops.to_device, (history_BS, lengths_B, left_B))), cache

        self._uniform = UniformNumbers(request.sampler.seed, len(prompts))
        self._longest = int(lengths_B.max())  # no row is longer, counting what is under way
        self._to_come = int(left_B.max())
        self._pace, self._read_at = 1, time.perf_counter()
        vocabulary = self._model.config.vocab_size
        put = backend.ops.to_device
        self._wanted = Wanted(
            put(np.array(0, np.int32)),
            put(np.zeros((backend.ops.TOKENS_PER_CALL, B), np.float32)),
            put(lengths_B),
            put(stop_table(request.stop_token_ids)),
            put(np.array(request.logprobs)),
            Settings(*map(put, Settings.of(request.sampler, B))),
            Changes(*map(put, Changes.of(request.sampler, request.bad_words, B, vocabulary))),
        )

    def _fill(self, room: int, B: int) -> Cache:
        """The prompts' caches as one of B rows, all but each prompt's last token in it."""
        self._programs.refresh()
        sources: list[tuple[Cache, int] | None] = []
        known: dict[bytes, Cache] = {}
        dtype = self._request.cache_dtype
        for prompt in self._prompts:
            key = prompt.token_ids.tobytes()
            if key not in known:
                before = prompt.token_ids[:-1]
                known[key], new = fill(
                    self._model, self._programs, before, self._request.reuse, room, dtype
                )
                self.prefilled += new
                self.reused += len(before) - new
            sources.append((known[key], 0))
        if B == 1:
            return next(iter(known.values()))
        sources += [None] * (B - len(sources))
        return arrange(sources, max(capacity_of(cache) for cache in known.values()))

    def _history(self, B: int, S: int) -> np.ndarray:
        """The prompts' tokens, int32 [B, S]; zeros behind them, and in rows without one."""
        history_BS = np.zeros((B, S), np.int32)
        for row, prompt in zip(history_BS, self._prompts, strict=False):
            row[: len(prompt.token_ids)] = prompt.token_ids
        return history_BS

    def _call(self) -> None:
        """Have the device make the next tokens; what it makes is read later."""
        assert self._state is not None
        count = min(self._pace, self._to_come)
        if (window := self._request.window) is not None:
            if self._longest >= window:
                self._forget(window)
            # Each row forgets when it is full itself, whatever else is in the batch.
            count = min(count, window - self._longest)
        rows, cache = self._state
        room = ladder.capacity(min(self._longest + count, self._most))
        if room > capacity_of(cache):
            B, S = rows.history_BS.shape
            history_BS = np.pad(ops.convert_to_numpy(rows.history_BS), ((0, 0), (0, room - S)))
            rows = rows._replace(history_BS=backend.ops.to_device(history_BS))
            cache = arrange([(cache, row) for row in range(B)], room)
        uniform_CB = np.zeros(self._wanted.uniform_CB.shape, np.float32)
        for row in uniform_CB[:count]:
            row[: len(self._prompts)] = self._uniform.next()
        wanted = self._wanted._replace(
            count=backend.ops.to_device(np.array(count, np.int32)),
            uniform_CB=backend.ops.to_device(uniform_CB),
        )
        # What goes in is consumed: an interrupt here leaves no state rather than a dead one.
        self._state = None
        rows, cache, made = self._programs.make(rows, cache, wanted)
        self._state = rows, cache
        self._calls.append((made, count))
        self._longest += count
        self._to_come -= count

    def _forget(self, window: int) -> None:
        """Drop the older half, after the sinks, of each row that is full and goes on."""
        assert self._state is not None
        rows, cache = self._state
        length_B = ops.convert_to_numpy(rows.length_B)
        runs_B = ops.convert_to_numpy(rows.left_B) > 0
        sinks = self._request.sinks
        full_B = runs_B & (length_B >= window)
        drop_B = np.where(full_B, (window - sinks) // 2, 0).astype(np.int32)
        self._state = None
        self._state = self._programs.shift(
            rows,
            cache,
            backend.ops.to_device(drop_B),
            backend.ops.to_device(np.array(sinks, np.int32)),
        )
        self._longest = int(np.where(runs_B, length_B - drop_B, 0).max())
        prompt_B = ops.convert_to_numpy(self._wanted.prompt_B)
        prompt_B = np.maximum(prompt_B - drop_B, np.minimum(prompt_B, sinks)).astype(np.int32)
        self._wanted = self._wanted._replace(prompt_B=backend.ops.to_device(prompt_B))
        self._forgotten = True

    def _read(self) -> None:
        """Read what the oldest call has made, with the next one under way where that helps."""
        while self._to_come and len(self._calls) < (2 if backend.ops.RUNS_AHEAD else 1):
            self._call()
        made, count = self._calls.popleft()
        real = len(self._prompts)
        arrays = [ops.convert_to_numpy(array)[:count, :real] for array in made]
        for tokens_B, logprobs_B, best_BN, best_logprobs_BN in zip(*arrays, strict=True):
            active_B = tokens_B >= 0
            if not active_B.any():
                break
            ended_B = np.isin(tokens_B, self._request.stop_token_ids)
            self._left_B = np.where(active_B & ~ended_B, self._left_B - 1, 0)
            self._steps.append(Step(tokens_B, active_B, logprobs_B, best_BN, best_logprobs_BN))
        now = time.perf_counter()
        each = (now - self._read_at) / count
        most = backend.ops.TOKENS_PER_CALL
        # Several processes have to go the same pace, whatever time it takes each of them.
        is_alone = hosts.count() == 1
        self._pace = int(np.clip(_PATIENCE / max(each, 1e-6), 1, most)) if is_alone else most
        self._read_at = now


def fill(
    model: StepModel,
    programs: Programs,
    token_ids: np.ndarray,
    reuse: PromptCache | None,
    room: int,
    dtype: str | None = None,
) -> tuple[Cache, int]:
    """A cache of one row with these tokens in it, and how many of them were computed.

    Args:
        model: the model.
        programs: its compiled steps.
        token_ids: int32 [length]; none gives an empty cache.
        reuse: tokens that have been through the model before; what begins alike is taken over.
        room: tokens that the cache shall hold at the least.
        dtype: how it is kept.
    """
    start = 0 if reuse is None else reuse.common(token_ids)
    chunks = ladder.chunks(start, len(token_ids))
    room = ladder.capacity(max(room, sum(chunks[-1]) if chunks else 0))
    if reuse is not None and start:
        cache = arrange([(reuse.cache, 0)], room)
    else:
        cache = empty_cache(model.config, 1, room, model.compute_dtype, dtype)
    for begin, size in chunks:
        chunk_1T = np.zeros((1, size), np.int32)
        taken = token_ids[begin : begin + size]
        chunk_1T[0, : len(taken)] = taken
        # Dynamic rotary scaling goes by the whole prompt, whose last token is yet to come.
        cache = programs.fill(chunk_1T, begin, cache, len(token_ids) + 1)
    return cache, len(token_ids) - start


def stop_table(token_ids: Sequence[int]) -> np.ndarray:
    """The stop tokens as a compiled step takes them: int32, in one of few sizes, -1 at the end."""
    stops = np.full(ladder.power_of_two(len(token_ids), _LEAST_STOPS), -1, np.int32)
    stops[: len(token_ids)] = token_ids
    return stops
