"""A completion as text, piece by piece."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from puna.decoding.prompt_cache import PromptCache
from puna.decoding.prompts import read_one
from puna.decoding.requests import Batch, Generation, Served
from puna.decoding.text import FinishReason, TokenLogprob
from puna.errors import TokenizerError


class Piece(str):
    """A piece of text that knows the tokens it was made of.

    Attributes:
        token_ids: the tokens since the piece before, the last of which completed this one.
        logprobs: of these tokens, where they were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]

    def __new__(
        cls, text: str, token_ids: Sequence[int] = (), logprobs: Sequence[TokenLogprob] = ()
    ):
        """A string with its tokens."""
        piece = super().__new__(cls, text)
        piece.token_ids, piece.logprobs = tuple(token_ids), tuple(logprobs)
        return piece


class TextStream(Iterator[Piece]):
    """The completion of one prompt; a `for` and an `async for` give its pieces as they are made.

    Closing it, leaving its `with` block or an interrupt stops the work; the model stays usable.
    It may be closed from any thread; the token under way is then made, for nobody.
    """

    def __init__(
        self,
        served: Served,
        prompt: Any,
        generation: Generation,
        keep_special_tokens: Sequence[str] = (),
    ):
        if served.preprocessor is None:
            raise TokenizerError("stream gives text, and the model has no preprocessor")
        row = read_one(prompt, served.preprocessor)
        make_decoder = partial(
            served.preprocessor.tokenizer.stream_decoder,
            skip_special_tokens=True,
            keep=keep_special_tokens,
        )
        self._batch = Batch(served, [row], generation, make_decoder)
        self._tokens: list[int] = []
        self._told = 0  # tokens that pieces have told of
        self._finished: FinishReason | None = None
        self._kept: PromptCache | None = None
        self._busy = threading.Lock()
        self._closing = False

    def __next__(self) -> Piece:
        try:
            with self._busy:
                piece = self._next_piece()
        finally:
            if self._closing:
                self.close()  # it was closed while a piece was made
        if piece is None:
            raise StopIteration
        return piece

    def _next_piece(self) -> Piece | None:
        text = self._batch.text(0)
        while self._finished is None and not self._closing:
            shown = len(text.text)
            try:
                step = self._batch.advance()
            except BaseException:
                self._end("cancelled")
                raise
            if step is None:
                text.flush()
                self._end(self._batch.reason(0))
            else:
                self._tokens.append(int(step.tokens_B[0]))
            if len(text.text) > shown:
                return self._piece(text.text[shown:])
        return None

    def _piece(self, text: str) -> Piece:
        before, self._told = self._told, len(self._tokens)
        return Piece(text, self._tokens[before:], self._batch.logprobs(0)[before:])

    @property
    def token_ids(self) -> np.ndarray:
        """All tokens so far, int32, those without text among them."""
        return np.array(self._tokens, np.int32)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of all tokens so far, where they were asked for."""
        return tuple(self._batch.logprobs(0))

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._finished

    @property
    def prefilled(self) -> int:
        """Tokens of the prompt that went through the model; 0 before the first piece.

        The last one is not counted: it goes through with the first token that is made.
        """
        return self._batch.decoding.prefilled

    @property
    def reused(self) -> int:
        """Tokens of the prompt that did not have to, since the prompt cache had them."""
        return self._batch.decoding.reused

    @property
    def prompt_cache(self) -> PromptCache | None:
        """Once it has ended: what the model has made of prompt and completion, for what follows.

        It takes memory for as long as the stream or the cache is kept.
        """
        return self._kept

    def close(self) -> None:
        """Stop, if it has not ended."""
        self._closing = True
        # Whoever makes a piece just now closes afterwards.
        if self._busy.acquire(blocking=False):
            try:
                self._end("cancelled")
            finally:
                self._busy.release()

    def _end(self, reason: FinishReason) -> None:
        if self._finished is None:
            self._finished = reason
            self._kept = self._batch.decoding.release()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, each made in a thread, so that the event loop goes on meanwhile."""
        try:
            while (piece := await asyncio.to_thread(next, self, None)) is not None:
                yield piece
        finally:
            self.close()
