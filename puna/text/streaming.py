"""Decoding one token at a time.

A token need not be whole characters: byte-level vocabularies cut a character's UTF-8 bytes
anywhere, SentencePiece ones spell rare characters as byte tokens. A stream decoder holds back
what is not yet a character, at a constant cost a token, and the pieces it gives joined are exactly
what `Tokenizer.detokenize` gives for all the ids at once.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection
from typing import Any, Protocol

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class StreamDecoder(Protocol):
    """What `Tokenizer.stream_decoder` returns."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is still unfinished."""
        ...

    def flush(self) -> str:
        """What is held back, unfinished bytes as U+FFFD; afterwards the decoder is new again."""
        ...


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level vocabularies write bytes with, to their bytes.

    Printable Latin-1 characters stand for themselves; the other bytes are numbered from U+0100.

    Source: GPT-2's `bytes_to_unicode` (Radford et al., 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(rest)}


_BYTES_OF = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a byte-level vocabulary's token stands for.

    An added token with a character outside the alphabet stands for its own UTF-8 text, as in the
    Rust library's decoder.

    >>> byte_level_bytes("ĠHi")
    b' Hi'
    """
    try:
        return bytes([_BYTES_OF[char] for char in token])
    except KeyError:
        return token.encode()


class Decoding:
    """How a backend's decoder turns tokens into text, read from its serialized form.

    Attributes:
        kind: "byte_level", "byte_fallback" (SentencePiece BPE with byte tokens) or "other".
        replacements: the (from, to) texts that "byte_fallback" replaces in a token.
        strip: how many leading spaces of the whole text "byte_fallback" drops.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.kind = "other"
        self.replacements: list[tuple[str, str]] = []
        self.strip = 0
        steps = _steps(backend.decoder)
        if [step["type"] for step in steps] == ["ByteLevel"]:
            self.kind = "byte_level"
        elif any(step["type"] == "ByteFallback" for step in steps):
            self._read_byte_fallback(steps)

    def _read_byte_fallback(self, steps: list[dict[str, Any]]) -> None:
        """Accept `Replace* ByteFallback Fuse Strip?`, the shape that Llama 1 and 2 have."""
        place = [step["type"] for step in steps].index("ByteFallback")
        before, after = steps[:place], steps[place + 1 :]
        replaces = all(step["type"] == "Replace" and "String" in step["pattern"] for step in before)
        if not replaces or not after or after[0]["type"] != "Fuse" or len(after) > 2:
            return
        if len(after) == 2:
            strip = after[1]
            if strip["type"] != "Strip" or strip["content"] != " " or strip["stop"] != 0:
                return
            self.strip = strip["start"]
        self.replacements = [(step["pattern"]["String"], step["content"]) for step in before]
        self.kind = "byte_fallback"

    def token_bytes(self, token: str) -> bytes:
        """The bytes that one token adds in the middle of a text."""
        if self.kind == "byte_level":
            return byte_level_bytes(token)
        for old, new in self.replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.match(token) if self.kind == "byte_fallback" else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The decoder's parts, in order; none where the backend has no decoder."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


class ByteLevelStream:
    """Byte-level vocabularies (Llama 3, SmolLM2): bytes through an incremental UTF-8 decoder."""

    def __init__(self, token_of: Callable[[int], str | None], skip: Collection[int]):
        self._token_of = token_of
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `StreamDecoder.push`."""
        token = None if token_id in self._skip else self._token_of(token_id)
        return "" if token is None else self._utf8.decode(byte_level_bytes(token))

    def flush(self) -> str:
        """See `StreamDecoder.flush`."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class ByteFallbackStream:
    """SentencePiece vocabularies with byte tokens (Llama 1 and 2).

    A run of byte tokens is held until it ends: where any of it is not UTF-8, the Rust library
    gives one U+FFFD for every byte of the run, also for those that looked well at first.
    """

    def __init__(
        self, decoding: Decoding, token_of: Callable[[int], str | None], skip: Collection[int]
    ):
        self._decoding = decoding
        self._token_of = token_of
        self._skip = skip
        self._run = bytearray()
        self._to_strip = decoding.strip

    def push(self, token_id: int) -> str:
        """See `StreamDecoder.push`."""
        token = None if token_id in self._skip else self._token_of(token_id)
        if token is None:
            return ""
        for old, new in self._decoding.replacements:
            token = token.replace(old, new)
        if byte := _BYTE_TOKEN.match(token):
            self._run.append(int(byte[1], 16))
            return ""
        return self._strip(self._end_of_run() + token)

    def flush(self) -> str:
        """See `StreamDecoder.flush`."""
        rest = self._strip(self._end_of_run())
        self._to_strip = self._decoding.strip
        return rest

    def _end_of_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        """Drop the spaces at the very start of the whole text that the decoder drops."""
        while text and self._to_strip:
            if text[0] != " ":
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class WindowStream:
    """Any other decoder: decodes a few last tokens and gives what is new.

    Best effort, for decoders that no Llama has: exact where a token's text depends on no more than
    the tokens since the last complete character and the piece before them.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._given = 0  # of self._ids, how many are already given out
        self._given_text = ""

    def push(self, token_id: int) -> str:
        """See `StreamDecoder.push`."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._given_text) :]
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        self._given_text = self._decode(self._ids)
        return piece

    def flush(self) -> str:
        """See `StreamDecoder.flush`."""
        rest = self._decode(self._ids)[len(self._given_text) :]
        self._reset()
        return rest
