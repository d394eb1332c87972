"""Tool calls in the formats of Llama 3, and what hostile answers do: nothing."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.text.tool_calls import ToolCall, parse_tool_calls

pytestmark = pytest.mark.backend_free

WEATHER = ToolCall("weather", {"city": "Puno"})
CLOCK = ToolCall("clock", {})


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Puno"}}', [WEATHER]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Puno"}}<|eom_id|>', [WEATHER]),
        ('\n {"type": "function", "name": "clock", "parameters": {}}<|eot_id|>\n', [CLOCK]),
        ('{"name": "weather", "arguments": {"city": "Puno"}}; {"name": "clock"}', [WEATHER, CLOCK]),
        (
            '[{"name": "weather", "parameters": {"city": "Puno"}}, {"name": "clock"}]',
            [WEATHER, CLOCK],
        ),
        ('{"name": "clock"}\n{"name": "clock"}', [CLOCK, CLOCK]),
        ('{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Puno\\"}"}}', [WEATHER]),
        ('[weather(city="Puno"), clock()]', [WEATHER, CLOCK]),
        ('<|python_tag|>[weather(city="Puno")]<|eot_id|>', [WEATHER]),
        (
            "[a.b(x=[1, -2.5, (True, None)], y={'k': 'v'})]",
            [ToolCall("a.b", {"x": [1, -2.5, [True, None]], "y": {"k": "v"}})],
        ),
        ('<function=weather>{"city": "Puno"}</function>', [WEATHER]),
        (
            '<function=weather>{"city": "Puno"}</function>\n<function=clock></function>',
            [WEATHER, CLOCK],
        ),
        (
            '<|python_tag|>brave_search.call(query="Puno")<|eom_id|>',
            [ToolCall("brave_search", {"query": "Puno"})],
        ),
        ("wolfram_alpha.call( query = 'x (1)' )", [ToolCall("wolfram_alpha", {"query": "x (1)"})]),
        (
            "<|python_tag|>import os\nprint(1)<|eom_id|>",
            [ToolCall("python", {"code": "import os\nprint(1)"})],
        ),
        (
            '{"name": "say", "parameters": {"text": "<|eot_id|>"}}',
            [ToolCall("say", {"text": "<|eot_id|>"})],
        ),
    ],
)
def test_formats(answer, calls):
    assert parse_tool_calls(answer) == calls


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Hello.",
        "It is [rather] cold.",
        "[1, 2]",
        "[]",
        "{}",
        "42",
        '{"answer": 42}',
        "[a, b]",
        'Call {"name": "clock"}.',
        '{"name": "clock"} is what I call',
        '{"name": 1}',
        '{"name": "a", "parameters": [1]}',
        '{"name": "a", "parameters": "{"}',
        "<|python_tag|>",
        "<function=a>",
        "<function=a>{</function>",
        "<function=a>[1]</function>",
        "f(x=1)",
        "I would write <function=clock></function>.",
        "brave_search.call()",
        "brave_search(query='a')",
        "[f(1)]",
        "[f(**{'a': 1})]",
        "[f(x=g())]",
        "[f(x=__import__('os'))]",
        "[(lambda: 0)()]",
        "[f(x={1, 2})]",
        "[f(x={[]: 1})]",
        "[f(x={1: 2})]",
        "[f(x=b'a')]",
        "[f(x=1j)]",
        "[f(x=...)]",
        "[f(x='\0')]",
        "[f(x='\ud800')]",
        "[f(x=9**9**9)]",
        "[f(x=" + "9" * 5000 + ")]",
    ],
)
def test_prose_and_what_is_malformed_are_no_calls(answer):
    assert parse_tool_calls(answer) == []


PARTS = st.sampled_from(
    [
        *("<|python_tag|>", "<|eom_id|>", "<function=", "a>", "</function>", "lambda:", "await "),
        *("brave_search.call(query=", '{"name": "a"', '"parameters": ', "f(x=", "f'", "\ud800"),
        *"[]{}():,;1\\'\"\n\0 é*",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(PARTS, max_size=30).map("".join)))
def test_no_answer_raises(answer):
    for text in (answer, f"[{answer}]", f"<|python_tag|>{answer}"):
        for call in parse_tool_calls(text):
            assert isinstance(call.name, str)
            assert isinstance(call.arguments, dict)


@pytest.mark.parametrize(
    "answer",
    [
        "[" * 1_000_000,
        "[" * 500_000 + "]" * 500_000,
        '{"a":' * 200_000,
        '{"name":"a","parameters":"' + "[" * 900_000 + '"}',
        '{"name":"a","parameters":{"x":' + "9" * 900_000 + "}}",
        '{"name":"a"};' * 40_000,
        "<function=a>" * 80_000,
        "<function=" + "a" * 900_000,
        "<function=a>" + "[" * 900_000 + "</function>",
        "brave_search.call(query=" + " " * 900_000,
        "brave_search.call(query=" + "-" * 90_000 + "1)",
        "[f(x=" + "-" * 90_000 + "1)]",
        "[a" + ".b" * 49_000 + "()]",
        "[f" + "()" * 49_000 + "]",
        "[f(x=" + "1+" * 45_000 + "1j)]",
        "[" + "f(a=[{'b':(" * 45 + "1 1" + ")}])" * 45 + "]",
        "[" + "f(x=1)," * 140_000 + "]",
        "<|eot_id|>" * 100_000,
        " " * 1_000_000,
        "<|python_tag|>" + "x" * 1_000_000,
    ],
    ids=range(20),
)
def test_no_answer_takes_long(answer):
    start = time.thread_time()
    parse_tool_calls(answer)
    assert time.thread_time() - start < 2
