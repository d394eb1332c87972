"""Python programs in processes of their own, for what depends on imports and environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of all that it printed on standard error, else on standard output."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1] if lines else ""


def run(arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Finished:
    """Run this Python with arguments, in the repository's root."""
    env = {**(os.environ if env is None else env), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def result_of(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """What a program prints as JSON on its last line; its failure fails the test."""
    done = run(["-c", code, *arguments], env)
    assert done.status == 0, f"the program failed:\n{done.out}\n{done.err}"
    return json.loads(done.out.strip().splitlines()[-1])
