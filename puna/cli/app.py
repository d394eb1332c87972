"""The program `puna`: its verbs, and what its exit codes mean."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import puna
from puna.cli import (
    bench,
    chat,
    convert,
    finetune,
    fuse,
    generate,
    info,
    interrupts,
    perplexity,
    quantize,
    terminal,
    tokenize,
    upload,
)
from puna.cli.options import with_groups
from puna.errors import PunaError

EPILOG = (
    "Exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage, 130 interrupted. "
    "Standard output carries the result alone; progress and notes go to standard error."
)

app = typer.Typer(
    name="puna",
    help="Llama in Keras 3: chat with a checkpoint, look into it, fine-tune, quantize, publish it.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"puna {puna.__version__}")
        raise typer.Exit


@app.callback()
def _puna(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Only what stands before a verb."""


def _reported(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, its errors told in one line; what is nobody's mistake but ours keeps its trace."""

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        terminal.quiet_libraries()
        try:
            verb(**given)
        except PunaError as error:
            terminal.fail(str(error))
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise  # whoever read our output has left; typer ends in silence
        except OSError as error:
            terminal.fail(str(error))
            raise typer.Exit(1) from None

    return run


def _help(verb: Callable[..., Any], examples: Sequence[str]) -> str:
    """A verb's docstring, and examples that are not folded."""
    paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(verb) or "").split("\n\n")]
    lines = "\n".join(f"  {example}" for example in examples)
    return "\n\n".join([*paragraphs, f"\b\nExamples:\n{lines}"])


for _verb, _examples in (
    (chat.chat, chat.EXAMPLES),
    (generate.generate, generate.EXAMPLES),
    (info.info, info.EXAMPLES),
    (tokenize.tokenize, tokenize.EXAMPLES),
    (finetune.finetune, finetune.EXAMPLES),
    (convert.convert, convert.EXAMPLES),
    (quantize.quantize, quantize.EXAMPLES),
    (fuse.fuse, fuse.EXAMPLES),
    (upload.upload, upload.EXAMPLES),
    (perplexity.perplexity, perplexity.EXAMPLES),
    (bench.bench, bench.EXAMPLES),
):
    app.command(help=_help(_verb, _examples), epilog=EPILOG)(_reported(with_groups(_verb)))


def main() -> None:
    """Run the program; it ends the process."""
    interrupts.install()
    try:
        app(prog_name="puna")
    except KeyboardInterrupt:  # between two verbs' own handlers, such as while importing
        sys.stderr.write("\n")
        # A pending thread of a backend's must not hold up whoever wants to leave.
        os._exit(130)
