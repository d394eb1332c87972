"""Counting the tokens of an answer while it is streamed as text."""

from __future__ import annotations

import time
from typing import Any

from puna.text.streaming import StreamDecoder


class Tally:
    """The tokens that a model's streams are made of, and when they came.

    `model.stream` gives text, whose pieces are not tokens. What it decodes them with is made by the
    model's tokenizer, so that is where they are counted.

    Args:
        model: a causal LM with a tokenizer.

    Attributes:
        ids: the tokens of the stream in progress, or of the last one.
        first_seconds: from `start` to the first token; None before it.
        seconds: from `start` to the last token so far.
    """

    def __init__(self, model: Any):
        tokenizer = model.tokenizer
        self._stops = frozenset(tokenizer.stop_token_ids)
        make_decoder = tokenizer.stream_decoder

        def counted(**options: Any) -> StreamDecoder:
            return _Counted(make_decoder(**options), self)

        tokenizer.stream_decoder = counted
        self.start()

    def start(self) -> None:
        """Begin anew, from now on."""
        self.ids: list[int] = []
        self.first_seconds: float | None = None
        self.seconds = 0.0
        self._started = time.perf_counter()

    def add(self, token_id: int) -> None:
        """One token more."""
        self.ids.append(token_id)
        self.seconds = time.perf_counter() - self._started
        if self.first_seconds is None:
            self.first_seconds = self.seconds

    @property
    def stopped(self) -> bool:
        """Whether the model itself ended the answer."""
        return bool(self.ids) and self.ids[-1] in self._stops

    @property
    def tokens_per_second(self) -> float | None:
        """The pace after the first token; None where there was no second one."""
        if self.first_seconds is None or len(self.ids) < 2:
            return None
        return (len(self.ids) - 1) / max(self.seconds - self.first_seconds, 1e-9)


class _Counted:
    """A stream decoder that tells of every token."""

    def __init__(self, decoder: StreamDecoder, tally: Tally):
        self._decoder = decoder
        self._tally = tally

    def push(self, token_id: int) -> str:
        self._tally.add(token_id)
        return self._decoder.push(token_id)

    def flush(self) -> str:
        return self._decoder.flush()
