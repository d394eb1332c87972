"""Rows of training data as they come in the field, each brought to one of three forms.

A row is known by its keys alone, so rows of several kinds may stand in one data set:

| row | becomes |
|---|---|
| `"..."`, `{"text"}` | `Text` |
| `{"prompt", "completion"}`, both texts | `Completion` |
| `{"prompt", "completion"}`, both lists of messages | `Chat` |
| `{"messages": [{"role", "content"}, ...]}` | `Chat` |
| ShareGPT: `{"conversations": [{"from", "value"}, ...]}` | `Chat` |
| Alpaca: `{"instruction", "input", "output"}` | `Chat`, or `Completion` without a chat template |

Keys that mean nothing here are ignored: data sets have ids, sources and scores.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.errors import DataError

Message = dict[str, Any]

# How many bad rows one error names.
SHOWN = 5


@dataclass(frozen=True)
class Text:
    """A text, all of which is learned."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A text to go on from, and how it goes on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: the turns, for a chat template.
        tools: JSON schemas of the functions that the model may call.
        start: the first message of the completion, where the row itself says which it is.
        muted: the messages that are not to be learned (their `weight` is 0).
        plain: the same as a text and a completion, for tokenizers without a chat template.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    start: int | None = None
    muted: frozenset[int] = field(default=frozenset())
    plain: Completion | None = None


Form = Text | Completion | Chat


class RowError(ValueError):
    """What is wrong with one row; whoever knows where it stands reports it as a `DataError`."""


def read_row(row: Any) -> Form:
    """Bring a row to its form.

    Args:
        row: a string, UTF-8 bytes, or a mapping with the keys of one of the kinds above.

    Raises:
        RowError: it is of no known kind, or a value is not what its key promises.

    >>> read_row({"prompt": "2 + 2 =", "completion": " 4"})
    Completion(prompt='2 + 2 =', completion=' 4')
    >>> read_row({"conversations": [{"from": "human", "value": "Hi"}]}).messages
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(row, Mapping):
        return Text(_text(row, "a row"))
    given = {key: value for key, value in row.items() if value is not None}
    for keys, read in _KINDS:
        if all(key in given for key in keys):
            return read(given)
    if "role" in given and "content" in given:
        raise RowError(
            'it is a single message; expected a whole chat, {"messages": [{"role", "content"}, '
            "...]}"
        )
    raise RowError(
        f"it has the keys {sorted(map(str, given))}; expected text; messages; prompt and "
        "completion; instruction and output; or conversations"
    )


def is_row(value: Any) -> bool:
    """Whether a value is one row rather than a batch of them or something else."""
    if isinstance(value, str | bytes):
        return True
    if not isinstance(value, Mapping):
        return getattr(value, "shape", None) == () and _kind(value) in "USO"
    return any(_is_cell(key, value[key]) for key in _FIRST_KEYS if key in value)


def check_rows(rows: Iterable[Any], where: Callable[[int], str]) -> None:
    """See that each of many rows is of a known kind.

    Args:
        rows: the rows; in the place of one that could not be read, its `RowError`.
        where: called with a row's place, says where it stands, for an error.

    Raises:
        DataError: rows are bad; it names the first of them and counts the others.
    """
    bad: list[tuple[str, str]] = []
    for place, row in enumerate(rows):
        try:
            if isinstance(row, RowError):
                raise row
            read_row(row)
        except RowError as error:
            bad.append((where(place), str(error)))
    refuse(bad)


def refuse(bad: list[tuple[str, str]]) -> None:
    """Raise a `DataError` that lists (where, what is wrong), a few of them; nothing for none."""
    if not bad:
        return
    lines = [f"  {where}: {what}" for where, what in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN:,} more")
    count = "1 row cannot be used" if len(bad) == 1 else f"{len(bad):,} rows cannot be used"
    raise DataError("\n".join([f"{count}; correct or remove what is named here:", *lines]))


def _text_row(row: Mapping[str, Any]) -> Text:
    return Text(_text(row["text"], "text"))


def _prompt_row(row: Mapping[str, Any]) -> Form:
    prompt, completion = row["prompt"], row["completion"]
    if _is_list(prompt) and _is_list(completion):
        before, muted = _messages(prompt, "prompt")
        after, muted_after = _messages(completion, "completion", len(before))
        return Chat([*before, *after], _tools(row), len(before), muted | muted_after)
    return Completion(_text(prompt, "prompt"), _text(completion, "completion"))


def _messages_row(row: Mapping[str, Any]) -> Chat:
    messages, muted = _messages(row["messages"], "messages")
    return Chat(messages, _tools(row), None, muted)


# Who speaks, in the words of ShareGPT and of the programs that write it.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt_row(row: Mapping[str, Any]) -> Chat:
    turns = _list(row["conversations"], "conversations")
    messages: list[Message] = []
    for place, turn in enumerate(turns):
        if isinstance(turn, Mapping) and "role" in turn and "content" in turn:
            return _messages_row({**row, "messages": turns})
        if not (isinstance(turn, Mapping) and "from" in turn and "value" in turn):
            raise RowError(f"turn {place} of conversations is not {{from, value}}: {_show(turn)}")
        speaker = _SPEAKERS.get(str(turn["from"]).lower())
        if speaker is None:
            raise RowError(
                f"turn {place} of conversations is from {_show(turn['from'])}; expected one of "
                f"{', '.join(_SPEAKERS)}"
            )
        messages.append({"role": speaker, "content": _text(turn["value"], f"turn {place}")})
    return Chat([*_system(row, messages), *messages], _tools(row))


# How Stanford's Alpaca writes its rows, in words of our own and with its headings.
_ALPACA = "Below is an instruction. Write a response that does what it asks.\n\n"


def _alpaca_row(row: Mapping[str, Any]) -> Chat:
    instruction = _text(row["instruction"], "instruction")
    more = _text(row.get("input", ""), "input")
    output = _text(row["output"], "output")
    request = f"{instruction}\n\n{more}" if more.strip() else instruction
    written = f"{_ALPACA}### Instruction:\n{instruction}\n\n"
    written += f"### Input:\n{more}\n\n" if more.strip() else ""
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": output}]
    return Chat(
        [*_system(row, messages), *messages],
        plain=Completion(f"{written}### Response:\n", output),
    )


# The kinds by their keys; where several would do, the first is meant. (Alpaca's own file has a
# "text" beside its instruction, which says the same again.)
_KINDS = (
    (("messages",), _messages_row),
    (("conversations",), _sharegpt_row),
    (("instruction", "output"), _alpaca_row),
    (("prompt", "completion"), _prompt_row),
    (("text",), _text_row),
)
_FIRST_KEYS = tuple(key for keys, _ in _KINDS for key in keys)
# A mapping with one of these is rows; what only goes with them may be anything's name.
TELLING_KEYS = frozenset(keys[0] for keys, _ in _KINDS)


def _is_cell(key: str, value: Any) -> bool:
    """Whether a value is that of one row; a batch has a list or an array of such values."""
    if isinstance(value, str | bytes) or getattr(value, "shape", None) == ():
        return True
    return key in ("messages", "conversations", "prompt", "completion") and (
        _is_list(value) and len(value) > 0 and isinstance(value[0], Mapping)
    )


def _messages(value: Any, key: str, first: int = 0) -> tuple[list[Message], frozenset[int]]:
    """Messages for a template, and the places (counted from `first`) that have a weight of 0."""
    messages: list[Message] = []
    muted = set()
    for place, given in enumerate(_list(value, key)):
        if not (isinstance(given, Mapping) and isinstance(given.get("role"), str)):
            raise RowError(f"message {place} of {key} has no role: {_show(given)}")
        message = {name: part for name, part in given.items() if part is not None}
        if "content" not in message and "tool_calls" not in message:
            raise RowError(f"message {place} of {key} has no content: {_show(given)}")
        if message.pop("weight", 1) == 0:
            muted.add(first + place)
        messages.append(message)
    return messages, frozenset(muted)


def _system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The system message that some data sets keep in a column of its own."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[:1] == []:
        return []
    return [] if messages[0]["role"] == "system" else [{"role": "system", "content": system}]


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    return None if tools is None or tools == "" else (_list(tools, "tools") or None)


def _list(value: Any, key: str) -> list[Any]:
    """A list, which in a CSV file is written as JSON."""
    if isinstance(value, str | bytes):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not _is_list(value) or (len(value) == 0 and key != "tools"):
        raise RowError(f"{key} is {_show(value)}; expected a list that is not empty")
    return list(value)


def _text(value: Any, name: str) -> str:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowError(f"{name} is bytes that are not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise RowError(f"{name} is {_show(value)}; expected text")
    return str(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _kind(value: Any) -> str:
    return getattr(getattr(value, "dtype", None), "kind", "-")


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
