"""How far a run has come, as people see it: on standard error."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from puna.backend import hosts

_RECENT = 20  # steps by which the time left is reckoned
_PAUSE = 10.0  # seconds between two lines, where there is no terminal


class ProgressDisplay:
    """A line that changes at a terminal; elsewhere a line now and then.

    Of several processes the first shows it.
    """

    def __init__(self) -> None:
        self._console = Console(
            file=sys.stderr, highlight=False, soft_wrap=True, quiet=not hosts.is_first()
        )
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._last_line = 0.0
        self._total = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """Show at a terminal that something takes its time."""
        return self._console.status(what) if self._console.is_terminal else nullcontext()

    def begin(self, total: int) -> None:
        """Be ready for steps.

        Args:
            total: steps of the run.
        """
        self._total = total
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a step, by its line of `metrics.jsonl`."""
        step = line["step"]
        self._seconds.append(line["seconds"])
        told = self._told(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=told)
            return
        now = time.monotonic()
        if now - self._last_line >= _PAUSE or step in (1, self._total):
            self._last_line = now
            self._console.print(f"step {step}/{self._total}  {told}")

    def say(self, text: str, style: str = "") -> None:
        """Show a line that stays."""
        self._console.print(Text(text, style=style))  # a style of `print` would be the bar's too

    def close(self) -> None:
        """Take the changing line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _told(self, line: Mapping[str, Any]) -> str:
        told = [f"loss {line['loss']:.4f}", f"{line['tokens_per_second']:,.0f} tokens/s"]
        if line["peak_memory"] is not None:
            told.append(f"{line['peak_memory'] / 1e9:.2f} GB")
        # What was compiled in the first step is not compiled again.
        recent = [*self._seconds][1:] or [*self._seconds]
        left = (self._total - line["step"]) * sum(recent) / len(recent)
        return "  ".join([*told, f"{duration(left)} left"])


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(8.4), duration(75), duration(7322)
    ('8 s', '1 min 15 s', '2 h 02 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"
