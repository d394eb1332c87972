"""The two compiled programs of decoding: taking a prompt in, and making tokens.

There is one of each for every size of `ladder`: what a sampler, a penalty or a stop token asks for
are values, and each choice between ways of computing is a branch inside the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.config import LlamaConfig
from puna.decoding.choose import Changes, Settings, change, choose
from puna.layers.cache import Cache, LayerCache
from puna.samplers import CANDIDATES


class StepModel(Protocol):
    """What decoding asks of a model."""

    config: LlamaConfig
    compute_dtype: str
    variables: Sequence[Any]

    def tensors(self) -> dict[str, Any]:
        """The variables under the checkpoint's names."""
        ...

    def adapter_tensors(self) -> dict[str, Any]:
        """The variables that compute beside these, under names that say how."""
        ...

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

    def shift(self, cache: Cache, drop_B: Tensor, keep: Tensor) -> Cache:
        """Forget tokens; see `Llama3Backbone.shift`."""
        ...

    def step_all(
        self, token_ids_BT: Tensor, start_B: Tensor, cache: Cache, length_B: Tensor
    ) -> tuple[Tensor, Cache]:
        """Take T tokens more; logits `[B, T, V]` after each."""
        ...


class Rows(NamedTuple):
    """The rows of a batch, as they go from one call to the next."""

    history_BS: Tensor  # int32, the tokens so far
    length_B: Tensor  # int32, how many; the last of them has not been through the model
    left_B: Tensor  # int32, how many may still come; 0 once a row has ended


class Made(NamedTuple):
    """What a call has made, at most C tokens of each row."""

    tokens_CB: Tensor  # int32; -1 where the row had ended
    logprobs_CB: Tensor  # float32, of the tokens
    best_CBN: Tensor  # int32, the likeliest tokens in the place of each
    best_logprobs_CBN: Tensor  # float32


class Wanted(NamedTuple):
    """What is asked for, the same for all calls of a generation but the first two."""

    count: Any  # int32 [], how many tokens; at most C
    uniform_CB: Any  # float32
    prompt_B: Any  # int32, tokens of the prompt
    stops_N: Any  # int32, -1 for none
    logprobs: Any  # bool [], whether they are asked for; zeros otherwise
    settings: Settings
    changes: Changes


class Programs:
    """The compiled steps of one model.

    Args:
        model: anything with a `step`.
    """

    def __init__(self, model: StepModel):
        self._model = model
        self._variables: list[Any] = []
        self._adapters: list[str] = []
        self._compiled: dict[str, Callable[..., Any]] = {}

    def fill(self, token_ids_1T: Any, start: int, cache: Cache, length: int) -> Cache:
        """Take in a chunk of a prompt of `length` tokens; the cache is consumed."""
        one = np.ones(1, np.int32)
        return self._program("fill", self._fill)(
            *(backend.ops.to_device(a) for a in (token_ids_1T, one * start)),
            cache,
            backend.ops.to_device(one * length),
        )

    def score(
        self, token_ids_1T: Any, targets_1T: Any, start: int, cache: Cache, length: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Cache]:
        """How likely each token is followed by its target; the cache is consumed.

        Returns:
            Log-probabilities [1, T] of the targets, and the likeliest tokens and theirs [1, T, N];
            the cache.
        """
        one = np.ones(1, np.int32)
        numbers = (backend.ops.to_device(a) for a in (token_ids_1T, one * start, one * length))
        token_ids_1T, start_1, length_1 = numbers
        return self._program("score", self._score)(
            token_ids_1T, start_1, cache, length_1, backend.ops.to_device(targets_1T)
        )

    def shift(self, rows: Rows, cache: Cache, drop_B: Any, keep: Any) -> tuple[Rows, Cache]:
        """Forget `drop_B` tokens of each row after its first `keep`; rows and cache are consumed.

        Args:
            rows: the rows.
            cache: their keys and values.
            drop_B: int32 [B]; 0 leaves a row as it is.
            keep: int32 [].
        """
        return self._program("shift", self._shift)(rows, cache, drop_B, keep)

    def make(self, rows: Rows, cache: Cache, wanted: Wanted) -> tuple[Rows, Cache, Made]:
        """Make up to `wanted.count` tokens of each row; rows and cache are consumed."""
        return self._program("make", self._make)(rows, cache, wanted)

    def follow(
        self,
        history_BS: Tensor,
        length_B: Tensor,
        parent_B: Tensor,
        cache: Cache,
        prompt_B: Tensor,
        stops_N: Tensor,
        changes: Changes,
    ) -> tuple[Tensor, Tensor, Cache]:
        """The likeliest next tokens of each beam; the cache is consumed.

        Args:
            history_BS: int32, each beam's tokens so far.
            length_B: int32, how many; the last of them has not been through the model.
            parent_B: int32, the row of the cache that has what comes before it.
            cache: of the rows as they were.
            prompt_B: int32, how many of the tokens are the prompt's.
            stops_N: int32, -1 for none.
            changes: made to the log-probabilities, as transformers does.

        Returns:
            int32 [B, N] and their float32 log-probabilities, and the cache of the rows as they are.
        """
        return self._program("follow", self._follow)(
            history_BS, length_B, cache, parent_B, prompt_B, stops_N, changes
        )

    def refresh(self) -> None:
        """Forget what was compiled for variables or adapters that the model no longer has.

        To be called once for a generation: Keras gathers the variables anew each time, which takes
        as long as some layers do.
        """
        variables, adapters = list(self._model.variables), [*self._model.adapter_tensors()]
        is_same = [id(v) for v in variables] == [id(v) for v in self._variables]
        if not is_same or adapters != self._adapters:
            self._variables, self._adapters, self._compiled = variables, adapters, {}

    def _program(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self._variables:
            self.refresh()
        if name not in self._compiled:
            donate = (0, 1) if name in ("make", "shift") else (2,)
            self._compiled[name] = backend.ops.compile_step(function, self._variables, donate)
        return self._compiled[name]

    def _fill(self, token_ids_BT: Tensor, start_B: Tensor, cache: Cache, length_B: Tensor) -> Cache:
        return self._model.step(token_ids_BT, start_B, cache, None, length_B)[1]

    def _score(
        self,
        token_ids_BT: Tensor,
        start_B: Tensor,
        cache: Cache,
        length_B: Tensor,
        targets_BT: Tensor,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Cache]:
        logits_BTV, cache = self._model.step_all(token_ids_BT, start_B, cache, length_B)
        B, T, V = logits_BTV.shape
        told = _told(ops.reshape(logits_BTV, (B * T, V)), ops.reshape(targets_BT, (B * T,)))
        own, ids, best = (ops.reshape(a, (B, T, *a.shape[1:])) for a in told)
        return (own, ids, best), cache

    def _follow(
        self,
        history_BS: Tensor,
        length_B: Tensor,
        cache: Cache,
        parent_B: Tensor,
        prompt_B: Tensor,
        stops_N: Tensor,
        changes: Changes,
    ) -> tuple[Tensor, Tensor, Cache]:
        cache = tuple(
            LayerCache(*(ops.take(array, parent_B, axis=0) for array in layer)) for layer in cache
        )
        last_B = length_B - 1
        token_ids_B1 = ops.take_along_axis(history_BS, last_B[:, None], axis=1)
        raw_BV, cache = self._model.step(
            token_ids_B1, last_B, cache, ops.zeros_like(last_B), length_B
        )
        logprobs_BV = ops.log_softmax(raw_BV, axis=-1)
        logprobs_BV = change(logprobs_BV, history_BS, length_B, prompt_B, stops_N, changes)
        best_BN, ids_BN = ops.top_k(logprobs_BV, min(CANDIDATES, logprobs_BV.shape[-1]))
        return ops.cast(ids_BN, "int32"), best_BN, cache

    def _shift(self, rows: Rows, cache: Cache, drop_B: Tensor, keep: Tensor) -> tuple[Rows, Cache]:
        S = rows.history_BS.shape[1]
        place_S = ops.arange(S, dtype="int32")
        source_BS = ops.where(place_S >= keep, place_S + drop_B[:, None], place_S)
        history_BS = ops.take_along_axis(rows.history_BS, ops.minimum(source_BS, S - 1), axis=1)
        rows = Rows(history_BS, rows.length_B - drop_B, rows.left_B)
        return rows, self._model.shift(cache, drop_B, keep)

    def _make(self, rows: Rows, cache: Cache, wanted: Wanted) -> tuple[Rows, Cache, Made]:
        C, B = wanted.uniform_CB.shape
        if C == 1:  # torch: no loop, and nothing to collect; rows that have ended are left alone
            rows, cache, now = self._one(0, rows, cache, wanted)
            return rows, cache, Made(*(array[None] for array in now))
        made = Made(
            ops.full((C, B), -1, "int32"),
            ops.zeros((C, B), "float32"),
            ops.zeros((C, B, CANDIDATES), "int32"),
            ops.zeros((C, B, CANDIDATES), "float32"),
        )

        def goes_on(i: Tensor, rows: Rows, cache: Cache, made: Made) -> Tensor:
            del cache, made
            return ops.logical_and(i < wanted.count, ops.any(rows.left_B > 0))

        def one_more(i: Tensor, rows: Rows, cache: Cache, made: Made) -> tuple[Any, ...]:
            rows, cache, now = self._one(i, rows, cache, wanted)
            here_C = ops.arange(C, dtype="int32") == i
            made = Made(
                *(
                    ops.where(ops.reshape(here_C, (C, *[1] * len(new.shape))), new[None], old)
                    for old, new in zip(made, now, strict=True)
                )
            )
            return i + 1, rows, cache, made

        first = ops.convert_to_tensor(0, "int32")
        loop = backend.ops.while_loop(goes_on, one_more, (first, rows, cache, made))
        return loop[1], loop[2], loop[3]

    def _one(self, i: Tensor, rows: Rows, cache: Cache, wanted: Wanted) -> tuple[Rows, Cache, Made]:
        """One token more of each row. A row that has ended repeats its last step, for nobody."""
        last_B = rows.length_B - 1
        token_ids_B1 = ops.take_along_axis(rows.history_BS, last_B[:, None], axis=1)
        raw_BV, cache = self._model.step(
            token_ids_B1, last_B, cache, ops.zeros_like(last_B), rows.length_B
        )
        assert raw_BV is not None
        logits_BV = change(
            raw_BV, rows.history_BS, rows.length_B, wanted.prompt_B, wanted.stops_N, wanted.changes
        )
        token_B = choose(logits_BV, ops.take(wanted.uniform_CB, i, axis=0), wanted.settings)
        active_B = rows.left_B > 0
        ended_B = ops.any(token_B[:, None] == wanted.stops_N, axis=1)
        left_B = ops.where(active_B & ~ended_B, rows.left_B - 1, 0)
        place_S = ops.arange(rows.history_BS.shape[1], dtype="int32")
        here_BS = active_B[:, None] & (place_S == rows.length_B[:, None])
        rows = Rows(
            ops.where(here_BS, token_B[:, None], rows.history_BS),
            rows.length_B + ops.cast(active_B, "int32"),
            left_B,
        )
        told = _logprobs(raw_BV, token_B, wanted.logprobs)
        return rows, cache, Made(ops.where(active_B, token_B, -1), *told)


def _logprobs(logits_BV: Tensor, token_B: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own log-probabilities, before temperature and penalties; zeros if not asked."""
    B = token_B.shape[0]

    def untold() -> tuple[Tensor, Tensor, Tensor]:
        shape = (B, CANDIDATES)
        return ops.zeros(B, "float32"), ops.zeros(shape, "int32"), ops.zeros(shape, "float32")

    return backend.ops.cond(asked, lambda: _told(logits_BV, token_B), untold)


def _told(logits_BV: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens [B], and the likeliest tokens and theirs [B, CANDIDATES]."""
    N = min(CANDIDATES, logits_BV.shape[-1])
    logprobs_BV = ops.log_softmax(logits_BV, axis=-1)
    best_BN, ids_BN = ops.top_k(logprobs_BV, N)
    own_B = ops.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    more = ((0, 0), (0, CANDIDATES - N))
    return (
        own_B,
        ops.pad(ops.cast(ids_BN, "int32"), more, constant_values=-1),
        ops.pad(best_BN, more, constant_values=-np.inf),
    )
