"""Tool calls in a model's answer, in the formats that Llama 3 was trained to write.

Source: Meta's prompt formats for Llama 3.1 and 3.2.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

PYTHON_TAG = "<|python_tag|>"

_BUILT_IN = re.compile(r"^(brave_search|wolfram_alpha)\.call\(\s*query\s*=\s*(.+)\)$", re.S)
_TAGGED = re.compile(r"<function=([\w.-]+)>(.*?)</function>", re.S)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

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

    Args:
        answer: the model's text, with or without its special tokens.

    >>> parse_tool_calls('{"name": "weather", "parameters": {"city": "Puno"}}')
    [ToolCall(name='weather', arguments={'city': 'Puno'})]
    >>> parse_tool_calls('[weather(city="Puno"), clock()]')[1]
    ToolCall(name='clock', arguments={})
    >>> parse_tool_calls("It is [rather] cold.")
    []
    """
    text = re.sub(r"<\|(?:eom_id|eot_id|end_of_text)\|>", "", answer).strip()
    tagged = text.startswith(PYTHON_TAG)
    text = text.removeprefix(PYTHON_TAG).strip()
    for read in (_json_calls, _tagged_calls, _pythonic_calls, _built_in_calls):
        if calls := read(text):
            return calls
    return [ToolCall("python", {"code": text})] if tagged and text else []


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
        while place < len(text) and (text[place].isspace() or text[place] in ";,"):
            place += 1
    return calls


def _json_call(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments", {}))
    if isinstance(arguments, str):  # OpenAI's form: JSON within JSON
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None


def _tagged_calls(text: str) -> list[ToolCall]:
    calls = []
    for name, body in _TAGGED.findall(text):
        try:
            arguments = json.loads(body or "{}")
        except ValueError:
            return []
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(name, arguments))
    return calls


def _pythonic_calls(text: str) -> list[ToolCall]:
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        tree = ast.parse(text, mode="eval").body
        elements = tree.elts if isinstance(tree, ast.List) else []
        return [_python_call(element) for element in elements]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a starred argument has no name")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(ast.unparse(node.func), arguments)


def _built_in_calls(text: str) -> list[ToolCall]:
    match = _BUILT_IN.match(text)
    if match is None:
        return []
    try:
        query = ast.literal_eval(match[2].strip())
    except (SyntaxError, ValueError):
        return []
    return [ToolCall(match[1], {"query": query})]
