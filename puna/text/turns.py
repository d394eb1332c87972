"""Which tokens of a conversation the assistant says, for any chat template.

Templates seldom mark what the assistant writes, so it is found by marks of our own. The messages
are rendered a second time with an unguessable mark around the assistant's words, set inside the
white space at their ends so that a template that trims them still does. Without the marks the text
must be the ordinary one. Where a mark is lost, because a template drops a part of a message, or
writes a call of a tool in words of its own, the conversation is rendered up to the message and up
to its end instead.

To the words belongs what the model has to say besides: the white space that the template puts
after its generation prompt, and the token that ends the turn. Text before and after them is
tokenized apart from them, as it is when the model is asked: the prompt first, then the answer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from puna.errors import TemplateError
from puna.text.tokenizer import Tokenizer

Span = tuple[int, int]  # in characters of the rendered text

# A message with other keys may be written in words that are not in its content.
_PLAIN_KEYS = {"role", "content", "name"}


class TurnTokenizer:
    """Turns conversations into ids, and says of each id which of the assistant's turns it is in.

    Args:
        tokenizer: a tokenizer with a chat template.
        variables: what the template reads besides, as in `Tokenizer.apply_chat_template`.
    """

    def __init__(self, tokenizer: Tokenizer, **variables: Any):
        self._tokenizer = tokenizer
        self._variables = variables
        secret = secrets.randbits(128)
        self._mark = f"\ue002{secret}:%d%s\ue003"
        self._pattern = re.compile(f"\ue002{secret}:([0-9]+)([<>])\ue003")

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Tokenize a conversation.

        Args:
            messages: the turns. What they say is plain text: it makes no special tokens.
            tools: JSON schemas of functions that the model may call.

        Returns:
            The ids, and for each the place in `messages` of the assistant's message that it
            belongs to, its end-of-turn token included, or -1.

        Raises:
            TemplateError: the template refuses the conversation, or does not show where the
                assistant's words stand.
        """
        segments = self._tokenizer.chat_segments(messages, tools=tools, **self._variables)
        spans = self._spans(messages, tools, segments)
        pieces, owners = _cut(segments, spans)
        ids: list[int] = []
        turns: list[int] = []
        for piece, owner in zip(self._tokenizer.encode_pieces(pieces), owners, strict=True):
            ids += piece
            turns += [owner] * len(piece)
        started = self._tokenizer.with_start(ids)
        return started, [-1] * (len(started) - len(ids)) + turns

    def _spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        segments: list[tuple[str, bool]],
    ) -> dict[int, Span]:
        """Where each message of the assistant's stands, its end-of-turn token included."""
        text = "".join(part for part, _ in segments)
        specials = _specials(segments)
        marked = self._marked_spans(messages, tools, text)
        spans: dict[int, Span] = {}
        reached = 0
        for place, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if place in marked:
                span = self._widened(text, marked[place], message, specials)
            else:
                span = self._span_between(messages, place, tools, text, specials)
            if span is None or span[0] < reached:
                raise TemplateError(
                    f"The chat template does not show where message {place}, the assistant's, "
                    "stands in the text, so what is to be learned cannot be told from the rest. "
                    "Learn everything (loss_on='all'), or use another template."
                )
            spans[place] = span
            reached = span[1]
        return spans

    # By marks

    def _marked_spans(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, text: str
    ) -> dict[int, Span]:
        """Where the marks stand that came through; none if they changed anything else."""
        marked = [self._with_marks(place, message) for place, message in enumerate(messages)]
        parts = self._pattern.split(self._text(marked, tools) or "")
        if "".join(parts[::3]) != text:
            return {}
        found: dict[tuple[int, str], list[int]] = {}
        offset = 0
        for place in range(1, len(parts), 3):
            offset += len(parts[place - 1])
            found.setdefault((int(parts[place]), parts[place + 1]), []).append(offset)
        once = {key: offsets[0] for key, offsets in found.items() if len(offsets) == 1}
        return {
            place: (once[place, "<"], once[place, ">"])
            for place in range(len(messages))
            if (place, "<") in once and (place, ">") in once
        }

    def _with_marks(self, place: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
        given = {key for key, value in message.items() if value is not None}
        if message.get("role") != "assistant" or not given <= _PLAIN_KEYS:
            return message
        content = message.get("content")
        first, last = self._mark % (place, "<"), self._mark % (place, ">")
        if isinstance(content, str):
            before, words, after = _stripped(content)
            return {**message, "content": f"{before}{first}{words}{last}{after}"}
        if isinstance(content, list | tuple) and len(content) == 1:
            (part,) = content
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                before, words, after = _stripped(part["text"])
                return {
                    **message,
                    "content": [{**part, "text": f"{before}{first}{words}{last}{after}"}],
                }
        return message

    def _widened(
        self, text: str, span: Span, message: Mapping[str, Any], specials: dict[int, str]
    ) -> Span:
        """The span with the white space around the words, and with the end of the turn."""
        start, end = span
        before, header = text[:start], self._generation_prompt
        found = before.rfind(header) + len(header)
        if not header:
            start = len(before.rstrip())
        elif found >= len(header) and not before[found:].strip():
            start = found
        content = message.get("content")
        after = _stripped(content)[2] if isinstance(content, str) else ""
        if text.startswith(after, end):
            end += len(after)
        following = end + len(text[end:]) - len(text[end:].lstrip())
        token = specials.get(following)
        if token is not None and (following == end or token in self._stops):
            end = following + len(token)
        return start, end

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes before an answer."""
        question = [{"role": "user", "content": "x"}]
        asked, asking = self._text(question), self._text(question, add_generation_prompt=True)
        if asked is None or asking is None or not asking.startswith(asked):
            return ""
        return asking[len(asked) :]

    @cached_property
    def _stops(self) -> set[str]:
        return {self._tokenizer.id_to_token(stop) for stop in self._tokenizer.stop_token_ids}

    # By rendering up to a message

    def _span_between(
        self,
        messages: Sequence[Mapping[str, Any]],
        place: int,
        tools: Sequence[Any] | None,
        text: str,
        specials: dict[int, str],
    ) -> Span | None:
        before = self._text(messages[:place], tools, add_generation_prompt=True)
        until = self._text(messages[: place + 1], tools)
        if before is None or until is None or len(until) < len(before):
            return None
        if not text.startswith(before) or not text.startswith(until):
            return None
        ends = [at + len(token) for at, token in specials.items() if len(before) <= at < len(until)]
        return len(before), max(ends, default=len(until))

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str | None:
        """The conversation as text; None where the template refuses it."""
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt, tools, **self._variables
            )
        except TemplateError:
            return None


def _stripped(text: str) -> tuple[str, str, str]:
    """White space, words, white space."""
    words = text.strip()
    start = text.find(words) if words else len(text)
    return text[:start], words, text[start + len(words) :]


def _specials(segments: list[tuple[str, bool]]) -> dict[int, str]:
    """The special tokens by where they stand in the text."""
    found, offset = {}, 0
    for part, special in segments:
        if special:
            found[offset] = part
        offset += len(part)
    return found


def _cut(
    segments: list[tuple[str, bool]], spans: dict[int, Span]
) -> tuple[list[tuple[str, bool]], list[int]]:
    """The segments cut where a span begins or ends, and the message that each piece is of, or -1.

    >>> _cut([("ab", False), ("<s>", True)], {7: (1, 5)})
    ([('a', False), ('b', False), ('<s>', True)], [-1, 7, 7])
    """
    borders = sorted(border for span in spans.values() for border in span)
    starts = {start: place for place, (start, end) in spans.items() if end > start}
    ends = {end for start, end in spans.values() if end > start}
    pieces: list[tuple[str, bool]] = []
    owners: list[int] = []
    owner, offset = -1, 0
    for text, special in segments:
        cuts = [b - offset for b in borders if offset < b < offset + len(text)]
        for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if special and cuts:
                raise TemplateError(
                    f"The chat template writes {text!r} across the border of a turn, so what is "
                    "to be learned cannot be told from the rest. Learn everything "
                    "(loss_on='all'), or use another template."
                )
            if offset + first in ends:
                owner = -1
            owner = starts.get(offset + first, owner)
            if last > first:
                pieces.append((text[first:last], special))
                owners.append(owner)
        offset += len(text)
    return pieces, owners
