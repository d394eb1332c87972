"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the program happens to be; inside a destructor or a
callback of C code, such as a backend's, it is printed and forgotten. So it is noted too, and asked
for where the program can stop.
"""

from __future__ import annotations

import signal
from typing import Any

_noted = False


def install() -> None:
    """Note interrupts from now on, beside raising them."""
    signal.signal(signal.SIGINT, _note)


def check() -> None:
    """Raise the interrupt that was lost, if one was."""
    if _noted:
        clear()
        raise KeyboardInterrupt


def clear() -> None:
    """Take the interrupts so far as dealt with; to be called where one is caught."""
    global _noted
    _noted = False


def _note(number: int, frame: Any) -> None:
    global _noted
    _noted = True
    signal.default_int_handler(number, frame)
