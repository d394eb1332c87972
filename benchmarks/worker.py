"""One engine in a process of its own, which answers a line of JSON with a line of JSON.

Usage: python -m benchmarks.worker ENGINE CHECKPOINT DTYPE CONTEXT [QUANTIZATION]

`benchmarks.decode` starts it, in the Python that has the engine's library. Status 3 means that the
library is not installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from benchmarks.engines import ENGINES, Engine
from benchmarks.peers import NOT_INSTALLED

PACKAGES = (
    "puna", "keras", "keras-hub", "jax", "torch", "tensorflow-cpu", "tensorflow", "transformers",
    "llama-cpp-python",
)  # fmt: skip


def main() -> None:
    name, checkpoint, dtype, context, *quantization = sys.argv[1:]
    make, package, backend = ENGINES[name]
    try:
        found = importlib.util.find_spec(package)
        keras = not backend or all(importlib.util.find_spec(p) for p in ("keras", backend))
    except (ImportError, ValueError):
        found = keras = None
    if not found or not keras:
        sys.exit(NOT_INSTALLED)
    answers = _own_output()
    engine = make(Path(checkpoint), dtype, int(context), *quantization)
    if backend:
        import keras

        if keras.backend.backend() != backend:
            raise RuntimeError(f"Keras runs on {keras.backend.backend()}; expected {backend}")
    _forget_peak()
    state = {"before": _status("VmRSS")}
    _say(answers, {"ready": True, "versions": _versions(package, backend)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(engine, request, state)
        except Exception as error:  # told to whoever asked, who goes on with the other engines
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        _say(answers, answer)


def _answer(engine: Engine, request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What is asked, timed from within."""
    start = time.perf_counter()
    match request["do"]:
        case "load":
            engine.load()
            return {"seconds": time.perf_counter() - start, "weights": engine.weights_bytes()}
        case "generate":
            tokens = engine.generate(request["prompts"], request["new"])
            return {"seconds": time.perf_counter() - start, "tokens": tokens}
        case "first":
            return {"seconds": engine.first(request["prompt"], request["max_length"])}
        case "opening":
            return {"seconds": engine.opening(request["prompt"], request["new"])}
        case "pace":
            return {"seconds": engine.pace(request["prompt"], request["new"])}
        case "memory":
            peak = _status("VmHWM")
            before = state["before"]
            return {"peak": None if peak is None or before is None else peak - before}
    raise ValueError(f"{request['do']!r} cannot be asked")


def _own_output() -> TextIO:
    """Standard output, for the answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _versions(package: str, backend: str) -> dict[str, str]:
    """Of the engine, and of what it runs on."""
    wanted = {package.replace("_", "-"), "llama-cpp-python" if package == "llama_cpp" else ""}
    wanted |= {"keras", backend, f"{backend}-cpu"} if backend else set()
    wanted |= {"torch"} if package == "transformers" else set()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        if name in wanted:
            try:
                versions[name.removesuffix("-cpu")] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def _forget_peak() -> None:
    """Let the peak of the resident size begin anew; where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> int | None:
    """A size from /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(field)), None)


if __name__ == "__main__":
    main()
