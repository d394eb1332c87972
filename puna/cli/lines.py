"""What a user types: messages of one line or several, with history and editing."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

FENCE = '"""'
PROMPT, MORE = ">>> ", "... "
_HISTORY_LENGTH = 1000


class Lines:
    """Messages from standard input.

    On a terminal there is a prompt, and lines are edited and kept in a history between sessions
    (`PUNA_HISTORY` names its file; empty, there is none). Else the lines are read as they come.

    Attributes:
        interactive: whether somebody sits there.
    """

    def __init__(self):
        self.interactive = sys.stdin.isatty()
        self._history: Path | None = None
        if self.interactive:
            self._load_history()

    def read(self) -> str | None:
        """The next message, a command or text; None at the end of the input.

        A message that begins with three double quotes goes on to the next three.

        Raises:
            KeyboardInterrupt: the user has dropped the message.
        """
        line = self._line(PROMPT)
        if line is None or not line.lstrip().startswith(FENCE):
            return line
        text = line.lstrip().removeprefix(FENCE)
        while not text.rstrip().endswith(FENCE):
            line = self._line(MORE)
            if line is None:
                break
            text += "\n" + line
        return text.rstrip().removesuffix(FENCE).strip("\n")

    def close(self) -> None:
        """Keep the history for the next session."""
        if self._history is None:
            return
        import readline

        # A history that cannot be kept is no reason to fail.
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(_HISTORY_LENGTH)
            readline.write_history_file(self._history)
            self._history.chmod(0o600)

    def _line(self, prompt: str) -> str | None:
        if self.interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.interactive:  # the answers go to a file, the prompt must not
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _load_history(self) -> None:
        try:
            import readline
        except ImportError:  # Windows: the console edits lines itself
            return
        place = os.environ.get("PUNA_HISTORY")
        if place == "":
            return
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self._history = Path(place or Path(state, "puna", "history")).expanduser()
        with contextlib.suppress(OSError):
            readline.read_history_file(self._history)
