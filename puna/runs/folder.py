"""The directory of a run: what is where, and whose it is."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from puna.backend import hosts
from puna.checkpoint.json_file import read_json
from puna.errors import RunError
from puna.runs.checkpoints import Checkpoints
from puna.runs.lines import JsonLines
from puna.runs.settings import FinetuneSettings

# What a run writes; other files of the directory are left alone.
_OURS = (
    "settings.json",
    "metrics.jsonl",
    "samples.jsonl",
    "loss.png",
    "run.json",
    "checkpoints",
    "tensorboard",
    "wandb",
    "adapter",
    "model",
)


class RunFolder:
    """The directory of a run; of several processes the first writes to it.

    Args:
        settings: the run's; their `out` says where.

    Attributes:
        identity: a few digits that tell the run from others; "" before `identify`.
    """

    def __init__(self, settings: FinetuneSettings):
        self.root = Path(settings.out).expanduser()
        self.metrics = JsonLines(self.root / "metrics.jsonl")
        self.samples = JsonLines(self.root / "samples.jsonl")
        self.checkpoints = Checkpoints(self.root / "checkpoints")
        self.curve = self.root / "loss.png"
        self.report = self.root / "run.json"
        self.tensorboard = self.root / "tensorboard"
        # A directory of its own, as a save replaces what was there before.
        merged = settings.trains_all or settings.save == "merged"
        self.result = self.root / ("model" if merged else "adapter")
        self.identity = ""
        self._settings = settings
        self._file = self.root / "settings.json"

    @contextlib.contextmanager
    def claimed(self, restart: bool) -> Iterator[None]:
        """Make the directory the run's own for a while.

        Args:
            restart: delete what an earlier run has left there.

        Raises:
            RunError: it holds something else, or a run with other settings, or another process is
                at it.
            HostError: so it was in the first process.
        """
        with contextlib.ExitStack() as stack:
            with hosts.together():
                if hosts.is_first():
                    stack.enter_context(self._claimed(restart))
            yield

    @contextlib.contextmanager
    def _claimed(self, restart: bool) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"{self.root} cannot be written ({error.strerror}); give another directory"
            ) from error
        with lock, _locked(lock, self.root):
            there = [name for name in _OURS if (self.root / name).exists()]
            if there and not self._file.exists():
                raise RunError(
                    f"{self.root} holds {', '.join(there)} and no run's settings.json, so it is "
                    "left alone; give another directory"
                )
            if restart:
                self._clear(there)
            self._check_settings()
            self.checkpoints.clean()
            yield

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return hosts.told(self.report.exists())

    def identify(self, facts: Mapping[str, Any]) -> None:
        """Keep what the run is about, or see that it is still the same.

        Args:
            facts: what settings do not say: what is in the files, and where the run computes.

        Raises:
            RunError: something is not the same.
            HostError: it is not the same in all processes.
        """
        hosts.check_same("what the run is about", {**facts, **self._settings.to_dict()})
        with hosts.together():
            if hosts.is_first():
                self._identify(facts)

    def _identify(self, facts: Mapping[str, Any]) -> None:
        before: dict[str, Any] = {}
        self.identity = secrets.token_hex(4)
        if self._file.exists():
            found = read_json(self._file)
            before, self.identity = found.get("facts", {}), found.get("id", self.identity)
            changed = [n for n in facts if n in before and facts[n] != before[n]]
            if changed:
                told = "; ".join(f"{n} was {before[n]!r:.80}" for n in changed)
                raise RunError(
                    f"{self.root} holds a run that was about something else: {told}, and is "
                    f"{', '.join(f'{facts[n]!r:.80}' for n in changed)} now. {_ADVICE}"
                )
        told = {"settings": self._settings.to_dict(), "facts": before | dict(facts)}
        write_json(self._file, {"id": self.identity, **told})

    def _check_settings(self) -> None:
        if not self._file.exists():
            return
        before = FinetuneSettings.from_dict(
            read_json(self._file).get("settings", {}), str(self._file)
        )
        if found := before.difference(self._settings):
            told = "; ".join(
                f"{name} is {a!r} there and {b!r} here" for name, (a, b) in found.items()
            )
            raise RunError(f"{self.root} holds a run with other settings: {told}. {_ADVICE}")

    def _clear(self, names: list[str]) -> None:
        # The settings go last: with them gone, what is left would be taken for somebody else's.
        for name in sorted(names, key=lambda name: name == self._file.name):
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


_ADVICE = "To go on, give what was given; else another --out, or --restart to begin anew"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, all of it or nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(lock: IO[str], directory: Path) -> Iterator[None]:
    """Keep other processes out, where the system can; the lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(
            f"another process is at the run in {directory}; wait for it, or give another directory"
        ) from error
    yield
