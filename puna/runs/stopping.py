"""Ctrl-C and SIGTERM, which let a step end before a run does."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from puna.backend import hosts

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody wants the run to end.

    Attributes:
        asked: so it is; of several processes all know it after the same step.
    """

    def __init__(self) -> None:
        self.asked = self._has_heard = False

    def agree(self) -> None:
        """At the end of a step: whether anybody has heard a signal, in any process."""
        self.asked = hosts.any_of(self._has_heard)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as a wish, and a second one as an order.

        Only the main thread hears of signals; in others nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: Any) -> None:
        del number, frame
        if self._has_heard:
            raise KeyboardInterrupt
        self._has_heard = True
        sys.stderr.write(
            "\nStopping after this step; once more to leave at once, and lose the steps since the "
            "last checkpoint.\n"
        )
