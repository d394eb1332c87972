"""How fast a LoRA is trained, and in how much memory: Puna beside its peers.

Usage:
    python -m benchmarks.finetune CHECKPOINT [--rounds 3] [--steps 4] [--json FILE]
        [--engine puna-torch-bfloat16 ...] [--batch 4] [--length 256] [--rank 8]
        [--peer-python peft=PATH] [--peer-python keras-hub=PATH]

Each figure is of a process of its own, the engines in turn. All train adapters beside queries and
values with Adam, on the same tokens, each of which has a label. A system that is not installed is
skipped. An engine's name tells the dtype of what is frozen, "int8" that it is quantized beside
bfloat16; "-remat" computes blocks again.

tokens/s: of the median step, after two that are not counted.
peak: the largest resident size of the process, GB.
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

from benchmarks.peers import NOT_INSTALLED, note, peer_of, python_of
from puna.machine import peak_memory

ENGINES = (
    "puna-torch-int8", "puna-torch-bfloat16", "puna-torch-float32",
    "puna-torch-int8-remat", "puna-torch-bfloat16-remat",
    "puna-jax-int8", "puna-jax-bfloat16", "puna-jax-float32", "puna-jax-int8-remat",
    "peft-float32", "peft-bfloat16", "keras-hub-jax-float32", "keras-hub-jax-bfloat16",
)  # fmt: skip
UNCOUNTED = 2

Step = Callable[[np.ndarray], float]  # token ids [B, T] to the loss


def puna(checkpoint: Path, dtype: str, rank: int, remat: bool) -> Step:
    import keras

    from puna.models import Llama3CausalLM

    quantization = dtype if dtype == "int8" else "none"
    dtype = "bfloat16" if dtype == "int8" else dtype
    model = Llama3CausalLM.from_preset(checkpoint, dtype=dtype, quantization=quantization)
    model.enable_lora(rank, target_modules=["q_proj", "v_proj"])
    model.compile(optimizer=keras.optimizers.Adam(1e-4), remat=remat)

    def step(ids: np.ndarray) -> float:
        labels, weights = np.roll(ids, -1, axis=1), np.ones(ids.shape, np.float32)
        weights[:, -1] = 0
        loss = model.train_on_batch({"token_ids": ids}, labels, sample_weight=weights)
        return float(np.ravel(loss)[0])

    return step


def peft(checkpoint: Path, dtype: str, rank: int) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step(ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def keras_hub(checkpoint: Path, dtype: str, rank: int) -> Step:
    import keras
    from keras_hub.models import Llama3CausalLM  # type: ignore[import-not-found]

    model = Llama3CausalLM.from_preset(str(checkpoint), dtype=dtype)
    model.backbone.enable_lora(rank)
    model.preprocessor = None
    model.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def step(ids: np.ndarray) -> float:
        x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        return float(np.ravel(model.train_on_batch(x, np.roll(ids, -1, axis=1)))[0])

    return step


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process says of its engine."""
    engine, checkpoint, rank = arguments.worker, arguments.checkpoint, arguments.rank
    dtype = next(name for name in ("float32", "int8", "bfloat16") if name in engine)
    if engine.startswith("puna"):
        step = puna(checkpoint, dtype, rank, engine.endswith("remat"))
    else:
        step = (peft if engine.startswith("peft") else keras_hub)(checkpoint, dtype, rank)
    random = np.random.default_rng(0)
    times, losses = [], []
    for _ in range(UNCOUNTED + arguments.steps):
        ids = random.integers(100, 20_000, (arguments.batch, arguments.length), np.int32)
        start = time.perf_counter()
        losses.append(step(ids))
        times.append(time.perf_counter() - start)
    tokens = arguments.batch * arguments.length
    return {
        "tokens/s": tokens / statistics.median(times[UNCOUNTED:]),
        "peak": (peak_memory() or 0) / 1e9,
        "first step": times[0],
        "losses": losses,
    }


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        library = {"puna": "puna", "peft": "peft", "keras": "keras_hub"}
        if importlib.util.find_spec(library[arguments.worker.partition("-")[0]]) is None:
            sys.exit(NOT_INSTALLED)
        print(json.dumps(measure(arguments)))
        return
    pythons, results = dict(arguments.peer_python), {}
    engines = arguments.engine or ENGINES
    for turn in range(arguments.rounds):
        for engine in engines:
            note(f"{engine}, round {turn + 1} of {arguments.rounds}")
            found = _run(engine, python_of(engine, pythons))
            if found is not None:
                results.setdefault(engine, []).append(found)
    print(f"{'':28}{'tokens/s':>10}{'peak, GB':>10}{'first step, s':>15}{'loss':>9}")
    for engine, rounds in results.items():
        middle = {
            k: statistics.median(r[k] for r in rounds) for k in ("tokens/s", "peak", "first step")
        }
        print(
            f"{engine:28}{middle['tokens/s']:10.1f}{middle['peak']:10.2f}"
            f"{middle['first step']:15.1f}{rounds[0]['losses'][0]:9.4f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _run(engine: str, python: str) -> dict[str, Any] | None:
    backend = "torch" if "torch" in engine else "jax"
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [python, "-m", "benchmarks.finetune", *sys.argv[1:], "--worker", engine]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == NOT_INSTALLED:
        note(f"{engine} is not installed; skipped")
    elif done.returncode:
        note(f"{engine} failed; skipped")
    else:
        return json.loads(done.stdout.splitlines()[-1])
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--peer-python", action="append", type=peer_of(ENGINES, "peft"), default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
