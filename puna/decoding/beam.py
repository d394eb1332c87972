"""Beam search, as transformers has it: the likeliest sequence found by following several.

The device gives the likeliest next tokens of every beam, and the host decides which are followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from puna import backend
from puna.decoding import ladder
from puna.decoding.choose import Changes
from puna.decoding.loop import Decoder, Decoding, Prompt, Request, Step, stop_table
from puna.errors import ConfigError
from puna.layers.cache import arrange, capacity_of
from puna.samplers import CANDIDATES, BeamSampler

_NONE = np.float32(-1e9)  # the score of a beam that is not there


def check_beams(sampler: BeamSampler, returned: int, more: bool) -> None:
    """Refuse what a beam search does not do.

    Args:
        sampler: the search's.
        returned: how many beams are wanted.
        more: whether stop texts or log-probabilities are wanted.

    Raises:
        ConfigError: one of them is.
    """
    if returned > sampler.num_beams:
        raise ConfigError(
            f"num_return_sequences is {returned}; expected at most num_beams, which is "
            f"{sampler.num_beams}"
        )
    if more:
        raise ConfigError(
            "a beam search takes no stop texts and tells no logprobs; end it with stop_token_ids, "
            "or use another sampler"
        )


class BeamDecoding(Decoding):
    """A batch of searches, each as if it were alone. There is no step to see: it ends at once.

    Args:
        decoder: the model's.
        prompts: each as often in succession as beams of it are returned.
        request: how they are continued; its sampler is a `BeamSampler`.
        returned: how many beams of each prompt are returned.

    Raises:
        ConfigError: there are more stop tokens than the search can step over.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], request: Request, returned: int
    ):
        sampler = request.sampler
        assert isinstance(sampler, BeamSampler)
        K, stops = sampler.num_beams, set(request.stop_token_ids)
        if len(stops) > CANDIDATES - K:
            raise ConfigError(
                f"there are {len(stops)} stop tokens; expected at most {CANDIDATES - K} with "
                f"{K} beams"
            )
        rows = [prompt for prompt in prompts[::returned] for _ in range(K)]
        super().__init__(decoder.model, decoder.programs, rows, request)
        self._searches = [Search(sampler, row.max_new_tokens, stops) for row in rows[::K]]
        self._returned = returned

    def __next__(self) -> Step:
        if any(search.open for search in self._searches):
            self._search()
        raise StopIteration

    @property
    def completions(self) -> list[np.ndarray]:
        """The best beams of each prompt, the best first, int32 [new]."""
        return [beam for search in self._searches for beam in search.ended[: self._returned]]

    def _search(self) -> None:
        searches, request, rows = self._searches, self._request, self._prompts
        put = backend.ops.to_device
        B, K = ladder.rows(len(rows)), len(rows) // len(searches)
        length_B = np.ones(B, np.int32)
        length_B[: len(rows)] = [len(row.token_ids) for row in rows]
        most = max(len(row.token_ids) + row.max_new_tokens for row in rows)
        cache = self._fill(ladder.first_capacity(int(length_B.max()), most), B)
        history_BS = self._history(B, capacity_of(cache))
        vocabulary = self._model.config.vocab_size
        changes = Changes.of(request.sampler, request.bad_words, B, vocabulary)
        prompt_B, stops_N = length_B.copy(), stop_table(request.stop_token_ids)
        given = (*map(put, (prompt_B, stops_N)), Changes(*map(put, changes)))
        parent_B = np.arange(B, dtype=np.int32)
        while any(search.open for search in searches):
            room = ladder.capacity(min(int(length_B.max()) + 1, most))
            if room > capacity_of(cache):
                cache = arrange([(cache, int(parent)) for parent in parent_B], room)
                history_BS = np.pad(history_BS, ((0, 0), (0, room - history_BS.shape[1])))
                parent_B = np.arange(B, dtype=np.int32)
            # The device may keep the memory of what it is given.
            now = map(put, (history_BS.copy(), length_B.copy(), parent_B))
            ids_BN, logprobs_BN, cache = self._programs.follow(*now, cache, *given)
            ids_BN, logprobs_BN = map(ops.convert_to_numpy, (ids_BN, logprobs_BN))
            parent_B = np.arange(B, dtype=np.int32)
            for first, search in zip(range(0, len(rows), K), searches, strict=True):
                beams = slice(first, first + K)
                if not search.open:
                    continue
                parent_K, token_K = search.advance(ids_BN[beams], logprobs_BN[beams])
                if search.open:
                    parent_B[beams] = first + parent_K
                    history_BS[beams] = history_BS[parent_B[beams]]
                    history_BS[beams, length_B[first]] = token_K
                    length_B[beams] += 1


class Search:
    """The beams of one prompt.

    Args:
        sampler: its settings.
        limit: how many tokens may follow the prompt.
        stops: the tokens that end a beam.

    Attributes:
        open: whether it goes on.
        ended: int32 [new] each, the beams that have ended, the best first; empty ones stand for
            those that are yet to come.
    """

    def __init__(self, sampler: BeamSampler, limit: int, stops: set[int]):
        K = sampler.num_beams
        self._sampler, self._limit, self._stops = sampler, limit, list(stops)
        # At first all beams are the prompt itself: but one they do not count.
        self._sums_K = np.full(K, _NONE)
        self._sums_K[0] = 0
        self._running_KT = np.zeros((K, 0), np.int32)
        self._scores_K = np.full(K, _NONE)
        self._is_ended_K = np.zeros(K, bool)
        self.ended = [np.zeros(0, np.int32) for _ in range(K)]
        self.open = limit > 0

    def advance(self, ids_KN: np.ndarray, logprobs_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a token more.

        Args:
            ids_KN: int32, the likeliest next tokens of each beam.
            logprobs_KN: float32, their log-probabilities.

        Returns:
            For each beam that is followed from here the one that it continues and its token, the
            likeliest first. What they are does not matter where the search has ended.
        """
        K, N = ids_KN.shape
        sums_M = (self._sums_K[:, None] + logprobs_KN).reshape(-1)
        order_M = np.argsort(-sums_M, kind="stable")
        sums_M = sums_M[order_M]
        token_M, parent_M = ids_KN.reshape(-1)[order_M], (order_M // N).astype(np.int32)
        made = self._running_KT.shape[1] + 1
        stops_M = np.isin(token_M, self._stops)
        # Only what is among the best K may be set aside.
        for place in np.flatnonzero(stops_M[:K] | (made == self._limit)):
            beam = np.append(self._running_KT[parent_M[place]], token_M[place])
            self._set_aside(beam, sums_M[place] / made**self._sampler.length_penalty)
        on_K = np.flatnonzero(~stops_M)[:K]
        parent_K, token_K = parent_M[on_K], token_M[on_K]
        self._running_KT = np.append(self._running_KT[parent_K], token_K[:, None], axis=1)
        self._sums_K = sums_M[on_K]
        self.open = made < self._limit and len(on_K) == K and self._may_improve(made)
        return parent_K, token_K

    def _set_aside(self, beam: np.ndarray, score: np.float32) -> None:
        K = len(self.ended)
        scores = np.append(self._scores_K, score).astype(np.float32)
        best = np.argsort(-scores, kind="stable")[:K]
        beams = [*self.ended, beam]
        self._scores_K = scores[best]
        self._is_ended_K = np.append(self._is_ended_K, True)[best]
        self.ended = [beams[place] for place in best]

    def _may_improve(self, made: int) -> bool:
        """Whether the search is to go on, by transformers' rules of thumb."""
        early, penalty = self._sampler.early_stopping, self._sampler.length_penalty
        if not self._is_ended_K.all():
            return bool(self._sums_K[0] > _NONE)
        if early is True:
            return False
        length = self._limit if early == "never" and penalty > 0 else made
        return bool(self._sums_K[0] / length**penalty > self._scores_K.min())
