"""What a chat template may make and how long it may run: see `sandbox.py`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

import jinja2.exceptions
import jinja2.utils

MAX_SECONDS = 0.7  # of the thread's processor time; real ones take milliseconds
_BASE, _PER_CHARACTER = 1 << 23, 256  # characters that may be made: so many, and of each given
ITEM = 16  # characters that an item of a list is counted as
# Tuples, as a union would be made anew at every check.
_TEXTS, _LISTS = (str, bytes), (list, tuple)


class TooMuch(jinja2.exceptions.SecurityError):
    """A template does more than any chat template needs to."""


class Budget:
    """What a rendering may still do.

    Args:
        given: the conversation and variables; more may be made of more.
    """

    def __init__(self, given: Any):
        self.limit = sys.maxsize  # what is given is there already
        self.limit = self.left = _BASE + _PER_CHARACTER * self.weigh(given)
        self._end = time.thread_time() + MAX_SECONDS

    def spend(self, amount: int = 1) -> None:
        """Count some work.

        Raises:
            TooMuch: it is more than is left.
        """
        self.left -= amount + 1
        if self.left < 0:
            raise TooMuch(f"it makes more than {self.limit} characters or steps")
        if time.thread_time() > self._end:
            raise TooMuch(f"it runs for more than {MAX_SECONDS} s")

    def weigh(self, value: Any) -> int:
        """Characters that a value has when written out, about; a part shared counts each time.

        Raises:
            TooMuch: it has more than a whole rendering may.
        """
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, _TEXTS):
                total += len(item) + 1
            elif isinstance(item, dict):
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, _LISTS):
                stack += item
            elif isinstance(item, jinja2.utils.Namespace):
                stack += _attributes(item).values()
            elif isinstance(item, int):
                total += item.bit_length() // 3
            total += ITEM
            if total + len(stack) > self.limit:
                raise TooMuch(f"it makes something larger than {self.limit} characters")
        return total

    def made(self, value: Any) -> Any:
        """Count what a call gave, and see that it is not too large; a generator counts as it goes.

        Raises:
            TooMuch: it is more than is left.
        """
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(ITEM * len(value))
            self.weigh(value)
        elif isinstance(value, GeneratorType):
            return self._counted(value)
        return value

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(ITEM)
            yield item


_budget: ContextVar[Budget] = ContextVar("_budget")


def current() -> Budget:
    """The budget of the rendering that this is called from."""
    return _budget.get()


@contextlib.contextmanager
def bounded(given: Any) -> Iterator[None]:
    """A scope whose renderings share one budget; a scope within one has the outer's."""
    if _budget.get(None) is not None:
        yield
        return
    token = _budget.set(Budget(given))
    try:
        yield
    finally:
        _budget.reset(token)


def _attributes(namespace: jinja2.utils.Namespace) -> dict[str, Any]:
    return object.__getattribute__(namespace, "_Namespace__attrs")
