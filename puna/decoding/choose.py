"""The arithmetic of `puna.samplers`: logits and a random number to a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from keras import ops

from puna import backend
from puna.backend import hosts
from puna.backend.protocol import Tensor
from puna.decoding import ladder
from puna.errors import ConfigError
from puna.samplers import CANDIDATES, FORMS, Sampler


class UniformNumbers:
    """The random numbers of one call: for each row a stream of its own.

    Args:
        seed: the sampler's. One number gives row r the stream (seed, r). A sequence has one for
            each row, whose stream is that of a lone row with that seed. None draws one from NumPy's
            global generator, so that `keras.utils.set_random_seed` makes it repeatable.
        rows: how many sequences.
    """

    _KEY: ClassVar[int] = 0x70756E61  # sets our streams apart from others of the same seed

    def __init__(self, seed: int | Sequence[int] | None, rows: int):
        if seed is None:
            seed = hosts.told(int(np.random.randint(2**31)))
        if isinstance(seed, int | np.integer):
            keys = [(int(seed), row) for row in range(rows)]
        else:
            if len(seed) != rows:
                raise ConfigError(f"there are {len(seed)} seeds and {rows} rows; give one for each")
            keys = [(int(one), 0) for one in seed]
        self._streams = [
            np.random.Generator(np.random.Philox(seed=np.random.SeedSequence([self._KEY, *key])))
            for key in keys
        ]

    def next(self) -> np.ndarray:
        """The next number of each row, float32 in [0, 1)."""
        return np.array([stream.random(dtype=np.float32) for stream in self._streams], np.float32)


class Settings(NamedTuple):
    """What a compiled step takes in of a sampler: arrays, so that none of it is compiled in."""

    form: np.ndarray  # int32 [], a place in FORMS
    temperature_B: np.ndarray  # float32, this and all below
    top_k_B: np.ndarray  # int32
    top_p_B: np.ndarray
    min_p_B: np.ndarray
    typical_p_B: np.ndarray

    @classmethod
    def of(cls, sampler: Sampler, rows: int) -> Settings:
        """The numbers for `rows` sequences."""

        def each(value: float, dtype: str = "float32") -> np.ndarray:
            return np.full(rows, value, dtype)

        return cls(
            np.array(FORMS.index(sampler.form), np.int32),
            each(sampler.temperature or 1.0),
            each(sampler.top_k or np.iinfo(np.int32).max, "int32"),
            each(sampler.top_p),
            each(sampler.min_p),
            each(sampler.typical_p),
        )


def choose(logits_BV: Tensor, uniform_B: Tensor, settings: Settings) -> Tensor:
    """One token per row.

    Args:
        logits_BV: float32 [B, V].
        uniform_B: float32 [B] in [0, 1), the only randomness.
        settings: of the sampler.

    Returns:
        int32 [B].
    """
    ways = (_greedy, _among_candidates, _among_all, _among_sorted)
    return backend.ops.switch(settings.form, ways, logits_BV, uniform_B, settings)


def _greedy(logits_BV: Tensor, uniform_B: Tensor, settings: Settings) -> Tensor:
    del uniform_B, settings
    return ops.cast(ops.argmax(logits_BV, axis=-1), "int32")


def _among_all(logits_BV: Tensor, uniform_B: Tensor, settings: Settings) -> Tensor:
    weights_BV = ops.softmax(logits_BV / settings.temperature_B[:, None], axis=-1)
    best_B1 = ops.max(weights_BV, axis=-1, keepdims=True)
    enough_BV = weights_BV >= settings.min_p_B[:, None] * best_B1
    return _pick(ops.where(enough_BV, weights_BV, 0.0), uniform_B)


def _among_candidates(logits_BV: Tensor, uniform_B: Tensor, settings: Settings) -> Tensor:
    scaled_BV = logits_BV / settings.temperature_B[:, None]
    return _among_ranked(_ranked(scaled_BV, CANDIDATES), None, uniform_B, settings)


def _among_sorted(logits_BV: Tensor, uniform_B: Tensor, settings: Settings) -> Tensor:
    """Sorting all is slow (41 ms for 128k logits on a CPU), and seldom needed for a top-p."""
    scaled_BV = logits_BV / settings.temperature_B[:, None]
    total_B = ops.logsumexp(scaled_BV, axis=-1)
    candidates = _ranked(scaled_BV, CANDIDATES)
    share_B = ops.sum(ops.exp(candidates[0] - total_B[:, None]), axis=-1)
    # Where the candidates have more than top-p of all there is, they hold what it leaves.
    few_B = (settings.top_k_B >= logits_BV.shape[-1]) & (share_B > settings.top_p_B)
    few_B &= settings.typical_p_B >= 1
    return backend.ops.cond(
        ops.all(few_B),
        lambda: _among_ranked(candidates, total_B, uniform_B, settings),
        lambda: _among_ranked(_ranked(scaled_BV, scaled_BV.shape[-1]), None, uniform_B, settings),
    )


Ranked = tuple[Any, Any]  # logits divided by the temperature, largest first, and their ids


def _ranked(scaled_BV: Tensor, most: int) -> Ranked:
    sorted_BC, ids_BC = ops.top_k(scaled_BV, min(most, scaled_BV.shape[-1]))
    return sorted_BC, ops.cast(ids_BC, "int32")


def _among_ranked(
    ranked: Ranked, total_B: Tensor | None, uniform_B: Tensor, settings: Settings
) -> Tensor:
    """A token of a ranking, narrowed as the settings say.

    Args:
        ranked: the tokens in question.
        total_B: the logarithm of the weight of all tokens; None means of the first `top_k`.
        uniform_B: the random numbers.
        settings: of the sampler.
    """
    sorted_BC, ids_BC = ranked
    rank_C = ops.arange(sorted_BC.shape[-1], dtype="int32")
    sorted_BC = ops.where(rank_C < settings.top_k_B[:, None], sorted_BC, -np.inf)
    whole_B: Tensor = ops.logsumexp(sorted_BC, axis=-1) if total_B is None else total_B
    weights_BC = ops.exp(sorted_BC - whole_B[:, None])
    before_BC = ops.cumsum(weights_BC, axis=-1) - weights_BC
    # The first is always kept: nothing is before it.
    weights_BC = ops.where(before_BC < settings.top_p_B[:, None], weights_BC, 0.0)
    enough_BC = weights_BC >= settings.min_p_B[:, None] * weights_BC[:, :1]
    weights_BC = ops.where(enough_BC, weights_BC, 0.0)
    weights_BC = backend.ops.cond(
        ops.any(settings.typical_p_B < 1),
        lambda: _typical(weights_BC, settings.typical_p_B),
        lambda: weights_BC,
    )
    place_B1 = _pick(weights_BC, uniform_B)[:, None]
    return ops.take_along_axis(ids_BC, place_B1, axis=-1)[:, 0]


def _typical(weights_BC: Tensor, typical_p_B: Tensor) -> Tensor:
    """The weights of the tokens that surprise about as much as is expected; 0 for the others."""
    share_BC = weights_BC / ops.sum(weights_BC, axis=-1, keepdims=True)
    possible_BC = share_BC > 0
    surprise_BC = -ops.log(ops.where(possible_BC, share_BC, 1.0))
    expected_B1 = ops.sum(share_BC * surprise_BC, axis=-1, keepdims=True)
    distance_BC = ops.where(possible_BC, ops.abs(surprise_BC - expected_B1), np.inf)
    order_BC = ops.argsort(distance_BC, axis=-1)
    ordered_BC = ops.take_along_axis(share_BC, order_BC, axis=-1)
    before_BC = ops.cumsum(ordered_BC, axis=-1) - ordered_BC
    farthest_BC = ops.where(
        before_BC < typical_p_B[:, None],
        ops.take_along_axis(distance_BC, order_BC, axis=-1),
        -np.inf,
    )
    # What is as far as the farthest that is kept is kept too.
    kept_BC = distance_BC <= ops.max(farthest_BC, axis=-1, keepdims=True)
    return ops.where(kept_BC, weights_BC, 0.0)


def _pick(weights_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """The place where the running sum of the weights passes the uniform share of their total."""
    running_BC = ops.cumsum(weights_BC, axis=-1)
    threshold_B1 = (uniform_B * running_BC[:, -1])[:, None]
    place_B = ops.sum(ops.cast(running_BC <= threshold_B1, "int32"), axis=-1)
    # Rounding may carry the threshold to the total itself; the last place with weight is meant.
    last_B = ops.sum(ops.cast(running_BC < running_BC[:, -1:], "int32"), axis=-1)
    return ops.minimum(place_B, last_B)


class Changes(NamedTuple):
    """What a compiled step takes in of the penalties, the bias and the bans."""

    wanted: np.ndarray  # bool [], whether there are any
    repetition_B: np.ndarray  # float32
    presence_B: np.ndarray  # float32
    frequency_B: np.ndarray  # float32
    min_new_B: np.ndarray  # int32
    bias_V: np.ndarray  # float32
    bad_words_WL: np.ndarray  # int32, each row's words at its end, -1 before them

    @classmethod
    def of(
        cls, sampler: Sampler, bad_words: Sequence[Sequence[int]], rows: int, vocabulary: int
    ) -> Changes:
        """The numbers for `rows` sequences.

        Args:
            sampler: the settings.
            bad_words: the sampler's, as ids.
            rows: B.
            vocabulary: V.

        Raises:
            ConfigError: a token is none of the vocabulary's.
        """
        named = [*sampler.logit_bias, *(token for word in bad_words for token in word)]
        unknown = sorted({token for token in named if not 0 <= token < vocabulary})
        if unknown:
            raise ConfigError(
                f"logit_bias or bad_words name the token ids {unknown[:8]}; expected ids from 0 "
                f"to {vocabulary - 1}"
            )

        def each(value: float) -> np.ndarray:
            return np.full(rows, value, np.float32)

        bias_V = np.zeros(vocabulary, np.float32)
        for token, bias in sampler.logit_bias.items():
            bias_V[token] = bias
        longest = max(map(len, bad_words), default=0)
        size = (ladder.power_of_two(len(bad_words), 16), ladder.power_of_two(longest, 8))
        table_WL = np.full(size, -1, np.int32)
        for row, word in zip(table_WL, bad_words, strict=False):
            row[len(row) - len(word) :] = word
        return cls(
            np.array(sampler.changes_logits),
            each(sampler.repetition_penalty),
            each(sampler.presence_penalty),
            each(sampler.frequency_penalty),
            np.full(rows, sampler.min_new_tokens, np.int32),
            bias_V,
            table_WL,
        )


def change(
    logits_BV: Tensor,
    history_BS: Tensor,
    length_B: Tensor,
    prompt_B: Tensor,
    stops_N: Tensor,
    changes: Changes,
) -> Tensor:
    """The logits with their bias, penalties and bans.

    Args:
        logits_BV: float32 [B, V].
        history_BS: int32 [B, S], the tokens so far; what is beyond `length_B` does not matter.
        length_B: int32 [B], how many there are.
        prompt_B: int32 [B], how many of them are the prompt's.
        stops_N: int32 [N], the stop tokens; -1 for none.
        changes: the sampler's.
    """
    return backend.ops.cond(
        changes.wanted,
        lambda: _changed(logits_BV, history_BS, length_B, prompt_B, stops_N, changes),
        lambda: logits_BV,
    )


def _changed(
    logits_BV: Tensor,
    history_BS: Tensor,
    length_B: Tensor,
    prompt_B: Tensor,
    stops_N: Tensor,
    changes: Changes,
) -> Tensor:
    V = logits_BV.shape[-1]
    place_S = ops.arange(history_BS.shape[1], dtype="int32")
    seen_BS = place_S < length_B[:, None]
    new_BS = seen_BS & (place_S >= prompt_B[:, None])
    seen_BV = _count(history_BS, seen_BS, V) > 0
    new_BV = _count(history_BS, new_BS, V)
    logits_BV = logits_BV + changes.bias_V
    repetition_B1 = changes.repetition_B[:, None]
    punished_BV = ops.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
    logits_BV = ops.where(seen_BV, punished_BV, logits_BV)
    logits_BV = logits_BV - changes.presence_B[:, None] * ops.cast(new_BV > 0, "float32")
    logits_BV = logits_BV - changes.frequency_B[:, None] * new_BV

    ends_BW = _may_end(history_BS, length_B, changes.bad_words_WL)
    last_W = changes.bad_words_WL[:, -1]
    early_B = length_B - prompt_B < changes.min_new_B
    ends_BN = early_B[:, None] & (stops_N >= 0) & (stops_N < V)
    ids_BM = ops.concatenate(
        [ops.broadcast_to(last_W, ends_BW.shape), ops.broadcast_to(stops_N, ends_BN.shape)], axis=1
    )
    banned_BM = ops.concatenate([ends_BW, ends_BN], axis=1)
    return ops.where(_count(ids_BM, banned_BM, V) > 0, -np.inf, logits_BV)


def _may_end(history_BS: Tensor, length_B: Tensor, bad_words_WL: Tensor) -> Tensor:
    """Whether all of a bad word but its last token is what the row ends with, bool [B, W]."""
    L, S = bad_words_WL.shape[1], history_BS.shape[1]
    place_BP = length_B[:, None] + ops.arange(1 - L, 0, dtype="int32")
    tail_BP = ops.take_along_axis(history_BS, ops.clip(place_BP, 0, S - 1), axis=1)
    tail_BP = ops.where(place_BP >= 0, tail_BP, -2)
    begin_WP = bad_words_WL[:, :-1]
    fits_BWP = (begin_WP[None] < 0) | (begin_WP[None] == tail_BP[:, None])
    return ops.all(fits_BWP, axis=-1) & (bad_words_WL[:, -1] >= 0)


def _count(ids_BM: Tensor, counted_BM: Tensor, V: int) -> Tensor:
    """How often each id is among those that count, float32 [B, V]."""
    B, M = ids_BM.shape
    row_B1 = ops.arange(B, dtype="int32")[:, None]
    # What does not count may be any number; it counts nothing as token 0.
    place_BM = row_B1 * V + ops.where(counted_BM, ids_BM, 0)
    counts = ops.segment_sum(
        ops.reshape(ops.cast(counted_BM, "float32"), (B * M,)),
        ops.reshape(place_BM, (B * M,)),
        num_segments=B * V,
    )
    return ops.reshape(counts, (B, V))
