"""What the scripts that time peers share; the standard library alone, for any peer's Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping

NOT_INSTALLED = 3  # the exit status of a process whose engine's library is not there


def python_of(engine: str, pythons: Mapping[str, str]) -> str:
    """The interpreter for an engine: the longest name that fits decides; else this one.

    >>> python_of("keras-hub-jax", {"keras": "a", "keras-hub": "b"})
    'b'
    """
    fitting = [name for name in pythons if engine.startswith(name)]
    return pythons[max(fitting, key=len)] if fitting else sys.executable


def peer_of(engines: Iterable[str], example: str) -> Callable[[str], tuple[str, str]]:
    """The type of an argument NAME=PYTHON, whose name is an engine's or the beginning of one."""

    def peer(text: str) -> tuple[str, str]:
        name, equals, python = text.partition("=")
        if not equals or not any(engine.startswith(name) for engine in engines):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME=PYTHON; NAME is an engine or the beginning of its name, "
                f"such as {example}"
            )
        return name, python

    return peer


def note(message: str) -> None:
    """Tell whoever waits; results go to standard output."""
    print(message, file=sys.stderr, flush=True)
