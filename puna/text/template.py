"""Chat templates: conversations as text, and as text with trusted special tokens told apart.

`ChatTemplate.render` does what transformers does. `ChatTemplate.segments` also says which special
tokens of the rendered text the *template* wrote, so that those in messages can be tokenized as
plain characters and nobody can forge a turn. How:

1. In the parsed template, every special token that stands in a literal that may be written out is
   replaced by a marker that holds a random number; so is it in `bos_token` and the like.
2. The conversation is rendered with the real contents, so the template's logic and its changes to
   them (`| trim`, `split`, `tojson`) are what they are. Where a marker comes out, the template
   wrote that special token; whatever else reads like one came from the conversation.
3. With the markers turned back, the text must be the ordinary rendering. A template whose logic
   depends on its own literals (they are left alone in comparisons, tests, string methods and
   filter arguments) would differ, and is refused.

What goes wrong here goes wrong safely: a special token that is lost sight of becomes plain text,
never the other way round. A template that makes special tokens from parts (`'<|' + role + '|>'`)
loses them, which is noticed by rendering the conversation with harmless contents, and refused.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from puna.errors import TemplateError
from puna.text.budget import TooMuch, bounded
from puna.text.sandbox import MAX_SOURCE, Sandbox, to_json

# String methods and filters whose arguments are looked for in text, not written out.
_SEARCHES = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind"}
    | {"index", "rindex", "count", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix"}
    | {"replace", "get"}
)
_WRITING_FILTERS = frozenset({"join", "default", "d", "format"})


class ChatTemplate:
    """A Jinja chat template.

    Args:
        source: the template.
        special_tokens: the texts of the tokenizer's added tokens, for `segments`.

    Raises:
        TemplateError: the template is not valid Jinja.

    >>> template = ChatTemplate("<s>{{ messages[0].content | trim }}", ["<s>"])
    >>> template.segments([{"role": "user", "content": " <s> "}])
    [('<s>', True), ('<s>', False)]
    """

    def __init__(self, source: str, special_tokens: Iterable[str] = ()):
        self.source = source
        self.special_tokens = tuple(special_tokens)
        self._template = _compile(source)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as text, as transformers' `apply_chat_template` gives it.

        Args:
            messages: the conversation; values that are None are left out, as in transformers.
            variables: what else the template reads: `add_generation_prompt`, `tools`,
                `documents`, `bos_token`, `eos_token` and its own.

        Raises:
            TemplateError: the template refuses the conversation or fails on it.
        """
        chat, given = _given(messages, variables)
        with bounded([chat, given]):
            return self._run(self._template, chat, given)

    def segments(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> list[tuple[str, bool]]:
        """The conversation as (text, is a special token that the template wrote).

        The texts joined are what `render` gives.

        Args:
            messages: as for `render`.
            variables: as for `render`.

        Raises:
            TemplateError: as for `render`, or special tokens cannot be told apart (see above).
        """
        chat, given = _given(messages, variables)
        with bounded([chat, given]):
            segments, strays = self._marked(chat, given)
            lost = self._marked_harmless(chat, given) if strays else []
        if lost:
            raise TemplateError(
                f"The chat template makes the special token {lost[0]!r} from parts, so it cannot "
                "be told from one that a message contains. Write it whole in the template. If you "
                "trust every message, render to text and tokenize that."
            )
        return segments

    def _marked(
        self, chat: list[Any], given: dict[str, Any]
    ) -> tuple[list[tuple[str, bool]], list[str]]:
        """The segments, and the special tokens in the text that are not the template's."""
        plain = self._run(self._template, chat, given)
        if not self.special_tokens:
            return ([(plain, False)] if plain else []), []
        marks, template = self._marks, self._marked_template
        trusted = {k: marks.mark(v) if _names_token(k, v) else v for k, v in given.items()}
        segments = marks.split(self._run(template, chat, trusted))
        if "".join(text for text, _ in segments) != plain:
            raise TemplateError(
                "The chat template gives another text when its special tokens are marked, so its "
                "logic depends on them in a way that cannot be followed. If you trust every "
                "message, render to text and tokenize that."
            )
        strays: list[str] = []
        place = 0
        marked: set[tuple[int, int]] = set()
        for text, special in segments:
            if special:
                marked.add((place, place + len(text)))
            place += len(text)
        strays = [m[0] for m in marks.pattern.finditer(plain) if m.span() not in marked]
        return segments, strays

    def _marked_harmless(self, chat: list[Any], given: dict[str, Any]) -> list[str]:
        """Special tokens that the template writes unmarked even where no message holds any."""
        harmless = {k: v if _names_token(k, v) else _harmless(v, True) for k, v in given.items()}
        try:
            return self._marked(_harmless(chat), harmless)[1]
        except TemplateError:
            return []  # it refuses such contents: what it lost sight of stays plain text

    def _run(self, template: jinja2.Template, chat: list[Any], given: dict[str, Any]) -> str:
        try:
            return template.render(**{**given, "messages": chat})
        except TooMuch as error:
            raise TemplateError(
                f"The chat template does too much: {_line(error)}. No chat template needs that: "
                "do not use it, pass another."
            ) from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"The chat template refuses: {_line(error)}") from error
        except Exception as error:
            raise TemplateError(
                f"The chat template fails on this conversation: {type(error).__name__}: "
                f"{_line(error)}. "
                "Check that roles and contents are what the template reads."
            ) from error

    @cached_property
    def _marks(self) -> _Marks:
        return _marks_of(self.special_tokens)

    @cached_property
    def _marked_template(self) -> jinja2.Template:
        return _compile_marked(self.source, self.special_tokens)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """Render a chat template's source; see `ChatTemplate.render`.

    >>> render("{{ bos_token }}{{ messages[0].content }}", [{"content": "Hi"}], bos_token="<s>")
    '<s>Hi'
    """
    return ChatTemplate(template).render(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        bos_token=bos_token,
        eos_token=eos_token,
        **variables,
    )


# Markers


class _Marks:
    """Markers for special tokens: unguessable, and untouched by case and white-space filters."""

    def __init__(self, special_tokens: tuple[str, ...]):
        longest_first = sorted(special_tokens, key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(re.escape(token) for token in longest_first))
        self._tokens = longest_first
        self._place = {token: place for place, token in enumerate(longest_first)}
        self._secret = str(secrets.randbits(128))
        self._marker = re.compile(f"\ue000{self._secret}:([0-9]+)\ue001")

    def mark(self, text: str) -> str:
        """The text with its special tokens replaced by markers."""
        return self.pattern.sub(
            lambda found: f"\ue000{self._secret}:{self._place[found[0]]}\ue001", text
        )

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The marked text in pieces, the markers turned back."""
        pieces = self._marker.split(text)  # text, place, text, place, ..., text
        segments = [
            (self._tokens[int(piece)], True) if odd % 2 else (piece, False)
            for odd, piece in enumerate(pieces)
        ]
        return [segment for segment in segments if segment[0]]


def _names_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and isinstance(value, str)


def _mark_literals(node: nodes.Node, mark: Callable[[str], str]) -> None:
    """Mark the special tokens in literals that the template may write out."""
    if isinstance(node, nodes.TemplateData):
        node.data = mark(node.data)
    elif isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            node.value = mark(node.value)
    elif isinstance(node, nodes.Compare | nodes.Test):
        pass  # a question, not something written
    elif isinstance(node, nodes.Getitem):
        _mark_literals(node.node, mark)
    elif isinstance(node, nodes.If | nodes.CondExpr):
        for child in node.iter_child_nodes(exclude=("test",)):
            _mark_literals(child, mark)
    elif isinstance(node, nodes.Call) and _searches(node.node):
        _mark_literals(node.node, mark)
    elif isinstance(node, nodes.Filter) and node.name not in _WRITING_FILTERS:
        if node.node is not None:
            _mark_literals(node.node, mark)
    else:
        for child in node.iter_child_nodes():
            _mark_literals(child, mark)


def _searches(callee: nodes.Node) -> bool:
    return isinstance(callee, nodes.Getattr) and callee.attr in _SEARCHES


# What templates may see


def _given(messages: Any, variables: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The conversation and the variables, in JSON's types."""
    try:
        return _conversation(messages), _variables(variables)
    except RecursionError:
        raise TemplateError(
            "The messages or variables hold themselves, or are nested more than Python can follow; "
            "expected what JSON can say."
        ) from None


# What a message's reasoning is called; transformers shows it to templates under the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def _conversation(messages: Any) -> list[Any]:
    """Messages rebuilt from plain JSON types; None-valued keys are left out, as in transformers."""
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Iterable):
        raise TemplateError(
            f"Expected a list of messages, each with a role and a content, got "
            f"{type(messages).__name__}: {repr(messages)[:80]}."
        )
    chat = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"Message {place} is a {type(message).__name__}; expected a mapping such as "
                '{"role": "user", "content": "Hello"}.'
            )
        turn = {key: _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((turn[name] for name in _REASONING if name in turn), None)
        if reasoning is not None:
            turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        chat.append(turn)
    return chat


def _variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables, with a clock that stands still while it renders."""
    now = datetime.datetime.now()
    return {key: _plain(value) for key, value in variables.items()} | {
        "strftime_now": lambda form: now.strftime(form)
    }


def _plain(value: Any) -> Any:
    """A value rebuilt from JSON's types: templates are foreign code and get no live objects."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TemplateError(
        f"Templates read only text, numbers, lists and mappings, got a {type(value).__name__}: "
        f"{repr(value)[:80]}. Tools are JSON schemas, not functions."
    )


def _harmless(value: Any, steers: bool = False) -> Any:
    """The same data with its texts replaced, but for single words that steer templates."""
    if isinstance(value, str):
        return value if steers and re.fullmatch(r"\w*", value) else "x"
    if isinstance(value, dict):
        return {name: _harmless(item, name in ("role", "type")) for name, item in value.items()}
    return [_harmless(item, steers) for item in value] if isinstance(value, list) else value


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads it so)

    def parse(self, parser: Any) -> nodes.Node:
        """The body, with variables of its own: in transformers it is a call block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=1)
def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.add_filter("tojson", to_json)
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _parse(source: str) -> nodes.Template:
    """The template's tree.

    Raises:
        TemplateError: it is not Jinja, or larger or more nested than any chat template.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(
            f"The chat template has {len(source)} characters; expected at most {MAX_SOURCE}."
        )
    try:
        return _environment().parse(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        raise TemplateError(
            f"The chat template is not valid Jinja{where}: {_line(error)}."
        ) from error
    except (RecursionError, ValueError, OverflowError) as error:
        raise TemplateError(f"The chat template cannot be parsed: {_line(error)}.") from error


def _finish(tree: nodes.Template) -> jinja2.Template:
    """Compile a tree; Python has limits to nesting that Jinja has not."""
    try:
        return _environment().compile_bounded(tree)
    except jinja2.TemplateError as error:
        raise TemplateError(f"The chat template is not valid Jinja: {_line(error)}.") from error
    except (RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise TemplateError(f"The chat template cannot be compiled: {_line(error)}.") from error


def _line(error: Exception) -> str:
    """An error's message in one line, not too long."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(message).split())[:500]


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _finish(_parse(source))


@lru_cache(maxsize=16)
def _marks_of(special_tokens: tuple[str, ...]) -> _Marks:
    return _Marks(special_tokens)


@lru_cache(maxsize=64)
def _compile_marked(source: str, special_tokens: tuple[str, ...]) -> jinja2.Template:
    tree = _parse(source)
    _mark_literals(tree, _marks_of(special_tokens).mark)
    return _finish(tree)
