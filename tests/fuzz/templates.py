"""Chat templates that loop, grow, recurse and reach for Python, made from pieces."""

from __future__ import annotations

import random
from pathlib import Path

from puna.text.template import ChatTemplate
from tests.fuzz.mutate import mutate_bytes
from tests.tiny_tokenizers import LLAMA3_SPECIAL, LLAMA3_TEMPLATE

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello <|eot_id|> there"},
    {"role": "assistant", "content": "Hi! " * 20, "tool_calls": [{"name": "f", "arguments": {}}]},
]
_NUMBERS = (
    "0",
    "1",
    "-1",
    "3",
    "7",
    "1000",
    "99999",
    "100000",
    "1000000000",
    "10 ** 9",
    "2 ** 63",
    "1.5",
    "loop.index",
    "n.i",
    "messages | length",
)
_TEXTS = (
    "'a'",
    "'<|eot_id|>'",
    "''",
    "messages[1].content",
    "s",
    "n.s",
    "'%s' * 9",
    "bos_token",
    "'{:>9999}'",
    "'{0.__class__}'",
    "'%1000000000d'",
    "'é\n'",
    "('ab' * 500)",
)
_LISTS = (
    "messages",
    "range(N)",
    "[T, T, T]",
    "l",
    "n.l",
    "[l, l]",
    "(T * N) | list",
    "T.split('')",
    "range(100000) | map('string')",
    "[[1] * N]",
    "(l, l)",
    "messages | tojson",
    "l + l",
    "range(99999) | select",
    "messages[::-1]",
    "[n, n]",
    "{'a': l, 'b': l}.values()",
)
_FILTERS = (
    "center(N)",
    "replace('', T)",
    "replace(T, T)",
    "join(T)",
    "tojson(indent=N)",
    "tojson",
    "indent(N)",
    "wordwrap(N)",
    "batch(N, T) | list",
    "slice(N) | list",
    "round(N, 'ceil')",
    "truncate(N)",
    "pprint",
    "urlize",
    "format(N, T)",
    "list",
    "sum(start=[])",
    "sum",
    "sort",
    "unique | list",
    "string",
    "length",
    "map('center', N) | list",
    "map('replace', '', T) | join",
    "int(base=36)",
    "float",
    "xmlattr",
    "striptags",
    "dictsort",
    "groupby('role')",
    "random",
    "reverse | list",
    "first",
    "last",
    "title",
    "trim",
    "default(L)",
    "map(attribute='x', default=L) | list",
    "attr('__class__')",
    "min",
    "max",
    "filesizeformat",
    "urlencode",
    "escape",
    "safe",
    "items | list",
    "selectattr('role') | list",
    "tojson(separators=(T, T))",
    "map('map', 'center', N) | map('list') | list",
    "wordcount",
    "abs",
)
_EXPRESSIONS = (
    "T",
    "N",
    "L",
    "T * N",
    "N ** N",
    "N * N",
    "L * N",
    "T ~ T ~ T",
    "T + T",
    "T % N",
    "T % (N, T)",
    "T | F",
    "L | F",
    "N | F",
    "T.center(N)",
    "T.ljust(N)",
    "T.zfill(N)",
    "T.replace('', T)",
    "T.join(L)",
    "T.format(N)",
    "'{:{}}'.format(1, N)",
    "'%*d' % (N, 1)",
    "T.expandtabs(N)",
    "(N).to_bytes(N, 'big')",
    "{}.fromkeys(L, L)",
    "dict(a=L, b=L)",
    "L == L",
    "L in L",
    "T in T",
    "L < L",
    "T[::-1]",
    "L[N:]",
    "L[N]",
    "T.translate({97: T})",
    "namespace(s=T, l=L)",
    "lipsum(N)",
    "cycler(L, L).next()",
    "joiner(T)()",
    "''.__class__.__mro__",
    "messages.__class__",
    "n.__init__.__globals__",
    "self.__dict__",
    "m(N)",
    "m",
    "raise_exception(T)",
    "strftime_now(T)",
    "range.__self__",
    "loop",
    "loop(L)",
    "self.b()",
    "caller()",
    "(().__class__.__base__).__subclasses__()",
    "[].append(1)",
    "messages.clear()",
    "T if L else N",
    "L is sameas L",
    "T is in L",
    "N is divisibleby N",
    "T.encode('utf-16') * N",
    "T.splitlines() | F",
    "n | string",
    "[T] * N | join(T)",
    "not L",
    "-N",
    "T | attr('for' ~ 'mat')",
    "(L, L) | F | F",
    "1 / 0",
    "undefined.x",
    "'' | map('x')",
    "T.count('')",
    "T | map('upper') | join | F",
    "9" * 4400,
)
_STATEMENTS = (
    "{{ E }}",
    "{% set s = E %}",
    "{% set l = L %}",
    "{% set l = [l, l] %}",
    "{% set s = s + s %}",
    "{% set n.s = n.s + n.s %}",
    "{% set n.l = [n.l, n.l] %}",
    "{% set n.n = n %}",
    "{% set n.i = E %}",
    "{% set s = s ~ s ~ s ~ s %}",
    "{% set s %}{{ s }}{{ s }}S{% endset %}",
    "text <|eot_id|> \n",
    "{% for x in L %}S{% endfor %}",
    "{% for x in L recursive %}S{{ loop(L) }}{% endfor %}",
    "{% for x in range(99999) %}{% for y in range(99999) %}S{% endfor %}{% endfor %}",
    "{% for x in range(99999) if E %}S{% else %}S{% endfor %}",
    "{% if E %}S{% elif E %}S{% endif %}",
    "{% macro m(a) %}S{{ m(a) }}{{ m(a) }}{% endmacro %}",
    "{% block b %}S{{ self.b() }}{% endblock %}",
    "{% call m(1) %}S{% endcall %}",
    "{% filter F %}S{% endfilter %}",
    "{% with s = E %}S{% endwith %}",
    "{% include T %}",
    "{% import T as t %}",
    "{% extends T %}",
    "{% set _ = E %}{% continue %}",
    "{% generation %}S{% endgeneration %}",
    "{% raw %}{{ x }}",
    "{% set x, y = L %}",
    "{# {{ #}",
    "{% do E %}",
    "{% for x in range(N) %}{% set n.s = n.s + T %}{% endfor %}{{ n.s }}",
    "{% break %}",
    "{{ E",
    "{% if %}",
    "{% for x in range(N) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l F }}",
    "{% autoescape true %}S",
    "{% for x in range(N) %}{% set n.l = (n.l, n.l) %}{% endfor %}{{ n.l == n.l }}",
)
_GROWN = {
    "S": _STATEMENTS,
    "E": _EXPRESSIONS,
    "L": _LISTS,
    "T": _TEXTS,
    "N": _NUMBERS,
    "F": _FILTERS,
}
_START = "{% set n = namespace(s='ab', l=[1], i=0) %}{% set s = 'ab' %}{% set l = [1, 2] %}"


def grow(rng: random.Random, text: str, depth: int = 0) -> str:
    """The text with its capitals replaced by pieces of their kinds."""
    words = text.replace("n.l F", "n.l | F")
    out = []
    for place, letter in enumerate(words):
        around = words[max(0, place - 1) : place] + words[place + 1 : place + 2]
        if letter not in _GROWN or any(c.isalpha() or c == "_" for c in around):
            out.append(letter)
        elif letter == "S" and depth > 3:
            out.append("x")
        elif depth > 6:
            out.append({"E": "s", "L": "l", "T": "s", "N": "7", "F": "string"}.get(letter, "x"))
        else:
            out.append(grow(rng, rng.choice(_GROWN[letter]), depth + 1))
    return "".join(out)


class Template:
    """One chat template, rendered as text and in segments."""

    name = "template"
    file = "chat_template.jinja"

    def write(self, directory: Path) -> None:
        (directory / self.file).write_text(LLAMA3_TEMPLATE)

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        kind = rng.random()
        text = (originals / self.file).read_text()
        if kind < 0.75:
            count = rng.choice([1, 1, 2, 3, 6])
            text = _START + "".join(grow(rng, rng.choice(_STATEMENTS)) for _ in range(count))
        elif kind < 0.8:
            opened, closed = rng.choice(
                [("(", ")"), ("[", "]"), ("{", "}"), ("-", ""), ("not ", "")]
            )
            times = rng.choice([20, 200, 5000, 100_000])
            text = "{{ " + opened * times + "1" + closed * times + " }}"
        elif kind < 0.85:
            piece = rng.choice(
                ["{% if 1 %}", "{% for x in [1] %}", "{{ 1 }}", "{{ s ~ s }}", "{#", "{{", " \n"]
            )
            text = piece * rng.choice([30, 1000, 20_000])
            if "for" in piece or "if" in piece:
                text += "{% endfor %}" * text.count("for") + "{% endif %}" * text.count("if")
        raw = text.encode("utf-8", "surrogatepass")
        if kind > 0.85:
            raw = mutate_bytes(rng, raw)
        (case / self.file).write_bytes(raw)

    def load(self, case: Path) -> None:
        text = (case / self.file).read_bytes().decode("utf-8", "replace")
        template = ChatTemplate(text, LLAMA3_SPECIAL)
        options = {"bos_token": "<|begin_of_text|>", "add_generation_prompt": True}
        segments = template.segments(MESSAGES, **options)
        assert all(text in LLAMA3_SPECIAL for text, special in segments if special)
