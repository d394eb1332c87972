"""`puna tokenize`: text as ids and pieces."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from puna.cli.options import AsJson, Preset

EXAMPLES = (
    'puna tokenize ./my-llama "Hello world"',
    'puna tokenize llama3.2_1b --json --no-special "<|eot_id|> is plain text here"',
    "puna tokenize model.gguf < book.txt | tail -n 1",
)


def tokenize(
    preset: Preset,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="The text; read from standard input, as it is, where left out.",
            show_default=False,
        ),
    ] = None,
    *,
    as_json: AsJson = False,
    special: Annotated[
        bool,
        typer.Option(
            "--special/--no-special",
            help="Put the start token before the text where the tokenizer does so, and read "
            "special tokens in it as such. With --no-special all of it is plain text.",
        ),
    ] = True,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the Hub.")
    ] = None,
) -> None:
    """Show the tokens of a text.

    A line each, its id and its text, and at last how many there are. A part of a character shows as
    its bytes. No weights are read or fetched.
    """
    if text is None and sys.stdin.isatty():
        raise typer.BadParameter("there is no text; give it as an argument or on standard input")
    if text is None:
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")

    from puna.cli.opened import open_headers, tokenizer_of

    with open_headers(preset, revision, headers=False) as opened:
        tokenizer = tokenizer_of(opened)
    ids = tokenizer.tokenize(text, parse_special=special, add_special_tokens=special).tolist()
    pieces = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    if as_json:
        print(json.dumps({"ids": ids, "pieces": pieces, "count": len(ids)}, ensure_ascii=False))
        return
    width = len(str(max(ids, default=0)))
    lines = [
        f"{token_id:>{width}}  {_shown(piece)}" for token_id, piece in zip(ids, pieces, strict=True)
    ]
    print("\n".join([*lines, f"{len(ids)} token{'' if len(ids) == 1 else 's'}"]))


def _shown(piece: str) -> str:
    r"""A piece on one line between quotes, so that its spaces are to be seen.

    >>> print(_shown(" a" + chr(10)))
    ' a\n'
    """
    plain = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    shown = (plain.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in piece)
    return f"'{''.join(shown)}'"
