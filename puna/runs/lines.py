"""Files of JSON lines that grow while a run goes on, and survive its end at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A file with a JSON object a line, each of which has a `step`.

    A line that a kill has cut off is none.

    Args:
        path: the file; it is made with the first line.
    """

    def __init__(self, path: Path):
        self.path = path

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line at the end, all at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines; none where there is no file.

        >>> import tempfile
        >>> lines = JsonLines(Path(tempfile.mkdtemp()) / "metrics.jsonl")
        >>> for step in (1, 2, 3):
        ...     lines.add({"step": step})
        >>> lines.cut(after=1)
        >>> lines.read()
        [{'step': 1}]
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]  # after the last newline is no line

    def cut(self, after: int) -> None:
        """Leave out what came after a step, so that it can be told anew."""
        if not self.path.exists():
            return
        kept = [line for line in self.read() if line["step"] <= after]
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)
