"""Runs the cases of a format in worker processes, and judges what came of them."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 2.0  # of processor time that a case may take
SILENCE = 10.0  # seconds by the clock after which a worker is taken for hung
START = 60.0  # the same for its start, when it imports
ROOM = 32 << 20  # bytes that a case may take beside twice its files


@dataclass
class Tally:
    """What came of a format's cases."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)

    def add(self, result: dict[str, Any]) -> None:
        """Judge a case."""
        number, outcome = result["case"], result["outcome"]
        self.slowest = max(self.slowest, (result["wall"], number))
        self.largest = max(self.largest, (result["peak"], number))
        if outcome in ("loaded", "refused"):
            if result["cpu"] > SECONDS:
                outcome = "slow"
            elif result["peak"] > 2 * result["size"] + ROOM:
                outcome = "memory"
        self.outcomes[outcome] += 1
        if outcome not in ("loaded", "refused"):
            self.fail(
                number,
                f"{outcome}: {result['what']} ({result['cpu']:.2f} s, {result['peak'] >> 20} MB "
                f"for {result['size']} bytes)",
            )

    def fail(self, number: int, what: str) -> None:
        """Note a failure, and how to see it again."""
        self.failures.append(f"python -m tests.fuzz {self.name} --case {number}: {what}")

    def row(self) -> str:
        """A line of the table."""
        good = self.outcomes["loaded"], self.outcomes["refused"]
        total = self.outcomes.total()
        return (
            f"{self.name:12} {total:6} {good[0]:7} {good[1]:8} {total - sum(good):7} "
            f"{self.slowest[0]:8.2f} s (case {self.slowest[1]:4}) "
            f"{self.largest[0] / 2**20:6.1f} MB (case {self.largest[1]:4})"
        )


HEAD = (
    f"{'format':12} {'cases':>6} {'loaded':>7} {'refused':>8} {'failed':>7} {'slowest':>21} "
    f"{'largest peak':>21}"
)


def run(name: str, originals: Path, first: int, end: int) -> Tally:
    """Run the cases `first` to `end - 1` of a format; a worker that dies is started anew."""
    tally = Tally(name)
    while first < end:
        first = _run_worker(tally, originals, first, end)
    return tally


def _run_worker(tally: Tally, originals: Path, first: int, end: int) -> int:
    """Run one worker until it ends; returns the case to go on with."""
    command = [sys.executable, "-m", "tests.fuzz.worker", tally.name, str(originals)]
    # One arena and one thread, so that address space is what a case takes and not what C reserves.
    settings = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    # Rust's traces of a panic that we catch take memory of their own, where somebody asks for them.
    settings |= {"RUST_BACKTRACE": "0"}
    worker = subprocess.Popen(
        [*command, str(first), str(end)],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(worker.stdout, lines.put)),
        threading.Thread(target=_read, args=(worker.stderr, errors.append)),
    ]
    for reader in readers:
        reader.start()
    running: int | None = None
    patience, hung = START, False
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            hung = True
            break
        if line is None:
            break
        result, patience = json.loads(line), SILENCE
        if "begins" in result:
            running = result["begins"]
        else:
            tally.add(result)
            first, running = result["case"] + 1, None
    if hung:
        worker.kill()
    worker.wait()
    for reader in readers:
        reader.join()
    told = " ".join("".join(line for line in errors if line)[-600:].split())
    if running is None:
        if first < end:
            raise RuntimeError(f"the worker for {tally.name} failed: {told}")
        return first
    outcome = "hang" if hung else "crash"
    tally.outcomes[outcome] += 1
    tally.fail(running, f"{outcome}: exit code {worker.returncode}: {told}")
    return running + 1


def _read(stream: Any, put: Any) -> None:
    for line in stream:
        put(line)
    put(None)
