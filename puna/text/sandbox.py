"""The sandbox in which chat templates run: no way into Python, and an end to their work.

Jinja's own sandbox keeps templates from Python's insides, but not from running for hours or from
filling the memory. Here a rendering has a `Budget`: characters and items that it may make, and
processor time of its thread. The parsed template is rewritten so that every statement, comparison,
slice and list is counted, and every call, filter and operator that can make something large is
checked before it does. Nothing depends on signals, so it holds in any thread.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

from puna.text.budget import ITEM, Budget, TooMuch, current

# Of a template, in characters and in parts of its tree; real ones have at most some ten thousand
# and some thousand. Jinja takes 30 µs to compile a part.
MAX_SOURCE, _MAX_NODES = 1 << 16, 10_000
_MAX_WIDTH = 10_000  # characters that padding may add, digits of a format
_MAX_BITS = 1 << 14  # of a whole number

# Filters that choose from what is there; all others write it out.
_CHOOSING = frozenset(
    {"list", "first", "last", "length", "count", "map", "select", "reject", "selectattr"}
    | {"rejectattr", "items", "sort", "reverse", "unique", "dictsort", "groupby", "batch"}
    | {"slice", "min", "max", "sum", "default", "d", "attr", "random", "abs", "int", "float"}
    | {"round"}
)
_WIDTHS = frozenset({"center", "indent", "batch", "slice", "round", "wordwrap", "truncate"})
# Their time grows faster than their input, which no chat template gives them anyway.
_SLOW, _SLOW_SIZE = frozenset({"urlize", "wordwrap", "pprint", "striptags", "xmlattr"}), 20_000
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"})

# A space keeps templates from naming these.
_SPEND, _PASS, _BUILT, _CONCAT = "puna spend", "puna pass", "puna built", "puna concat"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with an end to what a template may do; see the module."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options, finalize=_written)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.tests = {name: _bounded_test(test) for name, test in self.tests.items()}
        self.filters |= {_SPEND: _spend, _PASS: _pass, _BUILT: _built, _CONCAT: _concat}
        self.globals["namespace"] = Namespace
        del self.globals["lipsum"]  # text of any length, at random

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Have a filter, its work counted."""
        self.filters[name] = _bounded_filter(name, function)

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """Compile a parsed template, which is rewritten.

        Raises:
            TooMuch: it is larger than any chat template.
        """
        if sum(1 for _ in tree.find_all(nodes.Node)) > _MAX_NODES:
            raise TooMuch(f"it has more than {_MAX_NODES} parts")
        _rewrite(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See Jinja; refuses what would be too large."""
        budget = current()
        if operator in "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if max(bits, right.bit_length()) > _MAX_BITS:
                raise TooMuch(f"it computes a number of more than {_MAX_BITS} bits")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
                    budget.spend((budget.weigh(many) + ITEM) * max(times, 0))
        elif operator == "+" and isinstance(left, str | bytes | list | tuple):
            budget.spend(len(left))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See Jinja; refuses what would be too large."""
        budget = current()
        budget.spend()
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int):
            args = _check_method(budget, owner, name, args, kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))


class Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without attributes that reach into Python."""

    def __init__(*args: Any, **attributes: Any):
        self, *given = args
        values = dict(*given, **attributes)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: not escaped for HTML, as Jinja's own would be."""
    budget = current()
    width = indent if isinstance(indent, int) else len(str(indent))
    if width > 100 or len(str(separators)) > 100:
        raise TooMuch("it indents JSON by more than 100 characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:  # C code makes it, of a length that is known about
        longer = (12 if ensure_ascii else 1) + (len(str(separators)) if separators else 0)
        budget.spend(budget.weigh(value) * longer)
        return encoder.encode(value)
    pieces: list[str] = []
    for piece in encoder.iterencode(value):
        budget.spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


# What the rewritten template calls


@jinja2.pass_context
def _spend(context: Any, cost: int) -> bool:
    current().spend(cost)
    return True


@jinja2.pass_context
def _pass(context: Any, value: Any) -> Any:
    current().spend()
    return value


@jinja2.pass_context
def _built(context: Any, value: Any) -> Any:
    return current().made(value)


@jinja2.pass_context
def _concat(context: Any, values: list[Any]) -> str:
    current().spend(sum(map(current().weigh, values)))
    return "".join(map(str, values))


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    """What is written out, counted before it is text."""
    current().spend(current().weigh(value))
    return value


def _rewrite(node: nodes.Node) -> None:
    """Count every statement, and whatever may be large, below a node."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _rewrite(value)
            setattr(node, name, _counted_expression(value))
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, nodes.Node):
                    _rewrite(item)
            items = [_counted_expression(i) if isinstance(i, nodes.Node) else i for i in value]
            if name in ("body", "else_"):
                items = [new for item in items for new in (_statement_cost(item), item)]
            setattr(node, name, items)
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = nodes.And(_filter(nodes.Const(1), _SPEND), node.test)


def _counted_expression(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes), _CONCAT)
    is_store = getattr(node, "ctx", "load") != "load"
    if isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and not is_store:
        return _filter(node, _BUILT)
    if isinstance(node, nodes.Compare):
        return _filter(node, _PASS)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filter(node, _BUILT)
    return node


def _statement_cost(statement: nodes.Node) -> nodes.ExprStmt:
    """A statement that counts the next one, and the literal text that it writes."""
    literal = sum(
        len(child.data)
        for child in (statement.nodes if isinstance(statement, nodes.Output) else [])
        if isinstance(child, nodes.TemplateData)
    )
    return nodes.ExprStmt(_filter(nodes.Const(literal), _SPEND), lineno=statement.lineno)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


# What may be called


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts; as it takes the context, Jinja does not run it while compiling."""

    @functools.wraps(function)
    def counted(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        given = [*args, *kwargs.values()]
        if name in _CHOOSING:
            budget.spend(_size(value))
        else:
            budget.spend(budget.weigh(value) + budget.weigh(given))
            if name in _SLOW and budget.weigh(value) > _SLOW_SIZE:
                raise TooMuch(f"it gives more than {_SLOW_SIZE} characters to {name}")
        if name in _WIDTHS:
            _check_widths(given)
        if name == "indent" and isinstance(value, str):
            budget.spend(value.count("\n") * max([0, *map(_size, given)]))
        if name == "replace" and len(given) > 1:
            budget.spend(str(value).count(str(given[0])) * len(str(given[1])))
        if name == "format":
            _check_format(str(value), [args, kwargs])
        if name == "sum" and not all(isinstance(item, str | int | float) for item in given):
            raise TooMuch("it sums what is no number")
        if name == "join":
            value = list(value)
            budget.spend(budget.weigh(value) + len(value) * budget.weigh(given))
        before = _passed(function, context)
        return budget.made(function(*before, value, *args, **kwargs))

    for word in ("jinja_pass_arg", "jinja_async_variant"):
        counted.__dict__.pop(word, None)
    return jinja2.pass_context(counted)


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(context: Any, *args: Any, **kwargs: Any) -> Any:
        current().spend()
        return function(*_passed(function, context), *args, **kwargs)

    counted.__dict__.pop("jinja_pass_arg", None)
    return jinja2.pass_context(counted)


def _passed(function: Any, context: Any) -> list[Any]:
    """What Jinja gives a filter before its arguments."""
    kind = jinja2.utils._PassArg.from_obj(function)
    if kind is None:
        return []
    wanted = {"context": context, "eval_context": context.eval_ctx}
    return [wanted.get(kind.name, context.environment)]


def _size(value: Any) -> int:
    if isinstance(value, int):
        return max(value, 0)
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 1


def _check_widths(given: Any) -> None:
    if any(isinstance(item, int) and abs(item) > _MAX_WIDTH for item in given):
        raise TooMuch(f"it asks for a width of more than {_MAX_WIDTH}")


def _check_format(text: str | bytes, given: Any) -> None:
    """Refuse a format that pads to a large width, which may also be one of the values."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    current().spend(len(text) + current().weigh(given) * (1 + text.count("{")))
    if re.search(r"\d{5}", text):
        raise TooMuch(f"it formats with a width of more than {_MAX_WIDTH}")
    if re.search(r"%[^%a-zA-Z]*\*|\{[^{}]*[:!\[][^{}]*\{", text):
        raise TooMuch("it formats with a width that is itself a value")


def _check_method(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """See that a method of a text or number makes nothing large; returns its arguments."""
    budget.spend(budget.weigh(owner))
    given = [*args, *kwargs.values()]
    if name in _PADDING:
        _check_widths(given)
        if name == "expandtabs":
            budget.spend(owner.count("\t") * max([8, *map(_size, given)]))
    elif name == "replace" and len(given) > 1:
        budget.spend(owner.count(given[0]) * _size(given[1]))
    elif name == "join" and len(args) == 1:
        args = (list(args[0]),)
        budget.spend(budget.weigh(args) + len(args[0]) * len(owner))
    elif name in ("format", "format_map"):
        _check_format(owner, given)
    elif name == "translate" and args and isinstance(args[0], dict):
        budget.spend(len(owner) * max([1, *map(_size, args[0].values())]))
    return args
