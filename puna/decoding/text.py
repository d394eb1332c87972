"""Tokens as they come, to text as it may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.text.streaming import StreamDecoder

# Why a completion ended: a stop token or a stop text; the bound on its length or the context; or
# nobody wanted more of it.
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely the model itself found it, before temperature and penalties.

    Args:
        token_id: the token.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens in its place, `(token_id, logprob)`, the best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RowText:
    """The text of one completion, which ends before the first stop text.

    Args:
        decoder: makes text of tokens.
        stops: texts that end it; they are not part of it.

    The stop text that is complete first counts, and of several that end together the longest: so
    it does not matter where tokens begin and end.

    Attributes:
        text: all that `push` and `flush` have given.
        stopped: whether a stop text has come.
        left_out: characters from the stop text on, itself among them.
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = ()):
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""  # what may be the beginning of a stop text
        self.text = ""
        self.stopped = False
        self.left_out = 0

    def push(self, token_id: int) -> str:
        """The text that is certain after one token more; "" where none is."""
        return self._give(self._decoder.push(token_id), last=False)

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._give(self._decoder.flush(), last=True)

    def _give(self, new: str, last: bool) -> str:
        if self.stopped:
            self.left_out += len(new)
            return ""
        text = self._held + new
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(place + length, place) for place, length in found if place >= 0]
        if ends:
            _, place = min(ends)
            self.stopped, self.left_out = True, len(text) - place
            text, self._held = text[:place], ""
        else:
            kept = 0 if last else self._begun(text)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += text
        return text

    def _begun(self, text: str) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = min(len(text), max(map(len, self._stops), default=0))
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[len(text) - size :]) for stop in self._stops):
                return size
        return 0
