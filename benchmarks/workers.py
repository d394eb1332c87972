"""Engines in processes of their own, as `benchmarks.decode` handles them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES
from benchmarks.peers import NOT_INSTALLED, python_of

ROOT = Path(__file__).parents[1]


class NotInstalledError(Exception):
    """The engine's library is not there."""


class WorkerError(Exception):
    """A worker could not do what was asked, or has ended."""


@dataclass(frozen=True)
class Run:
    """What all workers of a run have in common.

    Args:
        checkpoint: a Hugging Face directory, or a GGUF file.
        gguf: the same weights for llama.cpp; None where it does not take part.
        dtype: what to run in.
        quantization: how Puna quantizes; None leaves the weights as they are.
        context: tokens of the longest sequence.
        pythons: interpreters by an engine's name or the beginning of one; else this one.
    """

    checkpoint: Path
    gguf: Path | None
    dtype: str
    quantization: str | None
    context: int
    pythons: Mapping[str, str]

    def python(self, engine: str) -> str:
        """The interpreter for an engine."""
        return python_of(engine, self.pythons)

    def start(self, engine: str, cache: Path | None = None) -> Worker:
        """A worker for an engine.

        Args:
            engine: its name.
            cache: the user's cache directory, as the worker shall see it; None leaves it.

        Raises:
            NotInstalledError: its library is not there.
            WorkerError: it ended at once for another reason.
        """
        return Worker(self, engine, cache)


class Worker:
    """A process that answers a line of JSON with a line of JSON; see `benchmarks.worker`.

    Attributes:
        versions: of the engine and what it runs on.
    """

    def __init__(self, run: Run, engine: str, cache: Path | None):
        self.engine = engine
        _, package, backend = ENGINES[engine]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if not backend:
            del environment["KERAS_BACKEND"]
        if cache is not None:
            environment["XDG_CACHE_HOME"] = str(cache)
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        checkpoint = run.gguf if engine == "llama.cpp" else run.checkpoint
        arguments = [engine, str(checkpoint), run.dtype, str(run.context)]
        arguments += [run.quantization] if run.quantization else []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the worker
        self._process = subprocess.Popen(
            [run.python(engine), "-m", "benchmarks.worker", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except WorkerError:
            if self._process.returncode != NOT_INSTALLED:
                raise
            family = engine.removesuffix(f"-{backend}") if backend else engine
            raise NotInstalledError(
                f"{package} is not installed{f' with {backend}' if backend else ''}; name a Python "
                f"that has it with --peer-python {family}=PYTHON"
            ) from None

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request.

        Raises:
            WorkerError: it failed; the message says how.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        answer = self._read()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        raise WorkerError(f"ended with status {status}: {said[-1] if said else 'nothing said'}")


class Fresh:
    """What stands for a worker where each load shall be in a process of its own.

    All of its processes share a cache directory that was empty at first.
    """

    def __init__(self, run: Run, engine: str):
        self._run, self._engine = run, engine
        self._cache = tempfile.TemporaryDirectory(prefix="puna-bench-")
        self._worker: Worker | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request; `load` starts a process, `kept` counts the files in the cache."""
        if request["do"] == "kept":
            files = [path for path in Path(self._cache.name).rglob("*") if path.is_file()]
            return {"files": len(files)}
        if request["do"] == "load":
            self._end()
            self._worker = self._run.start(self._engine, Path(self._cache.name))
        assert self._worker is not None
        return self._worker.ask(**request)

    def close(self) -> None:
        """End the process, and throw the cache away."""
        self._end()
        self._cache.cleanup()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
