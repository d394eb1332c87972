"""The pace of an answer, from when its pieces came."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator


class Pace:
    """When the first piece of a text came, and the last.

    Attributes:
        first_seconds: until the first piece; None before it.
        seconds: until the last piece so far, or the end.
    """

    def __init__(self):
        self.first_seconds: float | None = None
        self.seconds = 0.0
        self._first_tokens = 0
        self._started = time.perf_counter()

    def watch(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces, as they come; those that are no `Piece` are not the model's."""
        for piece in pieces:
            tokens = getattr(piece, "token_ids", None)
            if tokens is not None:
                self.seconds = time.perf_counter() - self._started
                if self.first_seconds is None:
                    self.first_seconds, self._first_tokens = self.seconds, len(tokens)
            yield piece
        self.seconds = time.perf_counter() - self._started

    def tokens_per_second(self, tokens: int) -> float | None:
        """The pace after the first piece; None where nothing came after it.

        Args:
            tokens: how many came in all.
        """
        if self.first_seconds is None or tokens <= self._first_tokens:
            return None
        return (tokens - self._first_tokens) / max(self.seconds - self.first_seconds, 1e-9)
