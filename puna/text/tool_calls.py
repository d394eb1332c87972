"""Tool calls in a model's answer, in the formats that Llama 3 was trained to write.

Source: Meta's prompt formats for Llama 3.1 and 3.2.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

PYTHON_TAG = "<|python_tag|>"

_END_TOKENS = ("<|eom_id|>", "<|eot_id|>", "<|end_of_text|>")
_BUILT_IN = ("brave_search", "wolfram_alpha")
_TAGGED = re.compile(r"<function=([\w.-]+)>")
_END_OF_TAGGED = "</function>"

# Characters of Python that are parsed. No call is near this long, and the parser takes seconds and
# hundreds of bytes a character for what is.
_LONGEST_PYTHON = 100_000
# What parsing and reading Python raises on text that is not what we read.
_NOT_PYTHON = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    What the model says is not checked against the tools' schemas: do so before you act on it.

    Args:
        name: the tool's name.
        arguments: by name, as JSON values.
    """

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(answer: str) -> list[ToolCall]:
    r"""The calls that an answer consists of; an empty list where it is prose.

    Four forms are read: JSON objects with `name` and `parameters` (or `arguments`), one or several,
    separated by `;` or white space or in a list; `<function=name>{...}</function>`; the pythonic
    list `[name(x=1), other()]` of Llama 3.2; and the built-in `brave_search.call(query=...)`.
    A `<|python_tag|>` before them and end tokens after them are skipped. Code after the tag that is
    no call is returned as a call of `python` with the argument `code`, as Llama 3.1 means it.

    Nothing is evaluated, and no text makes it raise.

    Args:
        answer: the model's text, with or without its special tokens.

    Returns:
        The calls, in order.

    >>> parse_tool_calls('{"name": "weather", "parameters": {"city": "Puno"}}')
    [ToolCall(name='weather', arguments={'city': 'Puno'})]
    >>> parse_tool_calls('[weather(city="Puno"), clock()]')[1]
    ToolCall(name='clock', arguments={})
    >>> parse_tool_calls("It is [rather] cold.")
    []
    """
    text = _without_end(answer)
    tagged = text.startswith(PYTHON_TAG)
    text = text.removeprefix(PYTHON_TAG).strip()
    for read in (_json_calls, _tagged_calls, _pythonic_calls, _built_in_calls):
        if calls := read(text):
            return calls
    return [ToolCall("python", {"code": text})] if tagged and text else []


def _without_end(answer: str) -> str:
    """The answer without the white space and the end tokens after it, and without that before."""
    end = len(answer)
    while end:
        if answer[end - 1].isspace():
            end -= 1
        elif answer.endswith(_END_TOKENS, 0, end):
            end = answer.rindex("<|", 0, end)
        else:
            break
    return answer[:end].lstrip()


def _json_calls(text: str) -> list[ToolCall]:
    decoder, place, calls = json.JSONDecoder(), 0, []
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _json_call(item)
            if call is None:
                return []
            calls.append(call)
        place = _after_separators(text, place)
    return calls


def _after_separators(text: str, place: int) -> int:
    while place < len(text) and (text[place].isspace() or text[place] in ";,"):
        place += 1
    return place


def _json_call(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments", {}))
    if isinstance(arguments, str):  # OpenAI's form: JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None


def _tagged_calls(text: str) -> list[ToolCall]:
    place, calls = 0, []
    while place < len(text):
        tag = _TAGGED.match(text, place)
        end = text.find(_END_OF_TAGGED, place)
        if tag is None or end < tag.end():
            return []
        try:
            arguments = json.loads(text[tag.end() : end].strip() or "{}")
        except (ValueError, RecursionError):
            return []
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(tag[1], arguments))
        place = _after_separators(text, end + len(_END_OF_TAGGED))
    return calls


def _pythonic_calls(text: str) -> list[ToolCall]:
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        tree = _expression(text)
        elements = tree.elts if isinstance(tree, ast.List) else []
        return [_python_call(element) for element in elements]
    except _NOT_PYTHON:
        return []


def _built_in_calls(text: str) -> list[ToolCall]:
    """`brave_search.call(query="...")`, as Llama 3.1 writes after a `<|python_tag|>`."""
    if not text.startswith(tuple(f"{name}.call(" for name in _BUILT_IN)):
        return []
    try:
        call = _python_call(_expression(text))
    except _NOT_PYTHON:
        return []
    return [ToolCall(call.name.removesuffix(".call"), call.arguments)] if call.arguments else []


def _expression(text: str) -> ast.expr:
    """Python's syntax tree of an expression; nothing is run."""
    if len(text) > _LONGEST_PYTHON:
        raise ValueError("too long to be a call")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes such as "\d", which models write
        return ast.parse(text, mode="eval").body


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a starred argument has no name")
        arguments[keyword.arg] = _json_value(ast.literal_eval(keyword.value))
    return ToolCall(_dotted_name(node.func), arguments)


def _dotted_name(node: ast.expr) -> str:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("a tool is called by its name")
    return ".".join([node.id, *reversed(names)])


def _json_value(value: Any) -> Any:
    """A literal of Python's as JSON has it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _json_value(item) for name, item in value.items()}
    raise ValueError("JSON has no such value")
