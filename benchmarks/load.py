"""How long a checkpoint takes to load, and how much memory: Puna beside its peers.

Usage:
    python -m benchmarks.load CHECKPOINT [--repeat 5] [--json FILE]
        [--peer-python PATH]   # an interpreter that has keras-hub and transformers

Each figure is of a process of its own, the systems in turn, so that a noisy machine disturbs all
alike. A system that is not installed is skipped. CHECKPOINT is a Hugging Face directory with a
tokenizer; `python -m benchmarks.checkpoints` makes one of a real shape. The file is read once
before the first run, so that all find it in the page cache.

ready: seconds from the call of from_preset to weights that can be used.
first token: seconds from the same call to the first token after a prompt of 128 tokens.
peak: the largest resident size minus the size right after importing the framework, in files' sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import NOT_INSTALLED

PROMPT = np.arange(1000, 1128, dtype=np.int32)


def puna(directory: Path, dtype: str) -> tuple[Any, Callable[[Any], Any], Callable[[], Any]]:
    from puna.models import Llama3CausalLM

    def load() -> Any:
        return Llama3CausalLM.from_preset(directory, dtype=dtype)

    def first_token(model: Any) -> Any:
        return model.generate(PROMPT, max_new_tokens=1, sampler="greedy", stop_token_ids=None)

    return load, first_token


def transformers(directory: Path, dtype: str) -> tuple[Any, Callable[[Any], Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> Any:
        AutoTokenizer.from_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def first_token(model: Any) -> Any:
        prompt = torch.from_numpy(PROMPT.astype(np.int64))[None]
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            return model.generate(
                prompt, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0
            )

    return load, first_token


def keras_hub(directory: Path, dtype: str) -> tuple[Any, Callable[[Any], Any]]:
    from keras_hub.models import Llama3CausalLM

    def load() -> Any:
        return Llama3CausalLM.from_preset(str(directory), dtype=dtype)

    def first_token(model: Any) -> Any:
        # keras-hub takes padded arrays, and generates up to their length.
        model.compile(sampler="greedy")
        inputs = {"token_ids": PROMPT[None], "padding_mask": np.ones((1, 128), np.int32)}
        inputs = {k: np.pad(v, ((0, 0), (0, 1))) for k, v in inputs.items()}
        model.preprocessor = None
        return model.generate(inputs, stop_token_ids=None)

    return load, first_token


SYSTEMS: dict[str, tuple[Callable[..., Any], str, str]] = {
    # name: (what it runs, package that must be there, Keras backend)
    "puna jax": (puna, "puna", "jax"),
    "puna torch": (puna, "puna", "torch"),
    "puna tensorflow": (puna, "puna", "tensorflow"),
    "transformers": (transformers, "transformers", ""),
    "keras-hub jax": (keras_hub, "keras_hub", "jax"),
}


def work(system: str, directory: Path, dtype: str) -> dict[str, float]:
    """Measure one system in this process."""
    make, _, backend = SYSTEMS[system]
    if backend:
        import keras

        assert keras.backend.backend() == backend
    load, first_token = make(directory, dtype)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    start = time.perf_counter()
    model = load()
    ready = time.perf_counter() - start
    peak = _status("VmHWM") - before
    first_token(model)
    total = time.perf_counter() - start
    file = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {"ready": ready, "first token": total, "peak": peak / file}


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def run(system: str, python: str, directory: Path, dtype: str) -> dict[str, float] | None:
    """Measure one system in a process of its own; None where it is not installed."""
    environment = os.environ | {"KERAS_BACKEND": SYSTEMS[system][2], "TF_CPP_MIN_LOG_LEVEL": "3"}
    if not environment["KERAS_BACKEND"]:
        del environment["KERAS_BACKEND"]
    command = [python, "-m", "benchmarks.load", str(directory), "--dtype", dtype, "--work", system]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        raise RuntimeError(f"{system} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(directory: Path, dtype: str, repeat: int, pythons: list[str]) -> dict[str, Any]:
    """Every system `repeat` times, in turn; medians."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeat):
        for system in SYSTEMS:
            for python in pythons:
                if (result := run(system, python, directory, dtype)) is not None:
                    runs.setdefault(system, []).append(result)
                    break
    return {
        system: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for system, results in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer-python", action="append", default=[])
    parser.add_argument("--work", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        if importlib.util.find_spec(SYSTEMS[arguments.work][1]) is None:
            sys.exit(NOT_INSTALLED)
        print(json.dumps(work(arguments.work, arguments.checkpoint, arguments.dtype)))
        return
    pythons = [sys.executable, *arguments.peer_python]
    results = compare(arguments.checkpoint, arguments.dtype, arguments.repeat, pythons)
    print(f"{'':18}{'ready, s':>10}{'first token, s':>16}{'peak, × file':>14}")
    for system, figures in results.items():
        numbers = (figures["ready"], figures["first token"], figures["peak"])
        print(f"{system:18}{numbers[0]:10.2f}{numbers[1]:16.2f}{numbers[2]:14.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
