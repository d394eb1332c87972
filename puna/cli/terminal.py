"""What goes to standard error: errors, notes and signs of life."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def fail(message: str) -> None:
    """Say what went wrong, in one line."""
    print(f"puna: error: {one_line(message)}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Say something that is worth knowing and no error, in one line."""
    print(f"puna: {one_line(message)}", file=sys.stderr, flush=True)


def one_line(message: str) -> str:
    """A message without line breaks and double spaces.

    >>> one_line(" no such    file ")
    'no such file'
    """
    return " ".join(message.split())


def quiet_libraries() -> None:
    """Keep others' chatter down, and show warnings as notes.

    To be called before the libraries are imported. What the user has set stays.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any):
    del where, more
    # Warnings for programmers (deprecations and the like) are not for who runs a program.
    if issubclass(category, UserWarning):
        note(str(message))


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something takes its time; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what, spinner="dots"):
        yield
