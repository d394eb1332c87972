"""How much memory a training step takes for its loss, by the size of the vocabulary.

Usage:
    python -m benchmarks.loss_memory [--vocabulary 128256] [--length 2048] [--width 2048]
        [--dtype float32] [--engine torch ...] [--json FILE]

The model is Llama 3.2 1B's head, tied to the embedding, above as little as there can be: one block
of one head and an MLP of 64, both with LoRAs, which alone are trained. A figure is what one step
(`train_on_batch` of one row), after one of 16 tokens, takes at its peak beyond what the process
held before it, weights included. Each is of a process of its own. Of the same model with a
vocabulary of 256, nearly nothing is for the loss: the difference is what the loss takes.
"-all-logits" is the same with Keras's own loss, which gets the logits of all tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import note

BACKENDS = ("torch", "jax", "tensorflow")
ENGINES = (*BACKENDS, *(f"{name}-all-logits" for name in BACKENDS))
SMALL = 256  # the vocabulary whose loss takes nearly nothing


def step_memory(arguments: argparse.Namespace) -> int:
    """Bytes that a step takes at its peak."""
    import keras

    from puna.config import LlamaConfig
    from puna.machine import peak_memory, resident_memory
    from puna.models import Llama3Backbone, Llama3CausalLM

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
    )
    model = Llama3CausalLM(Llama3Backbone(config=config, dtype=arguments.dtype))
    model.enable_lora(8)
    options: dict[str, Any] = {}
    if arguments.worker.endswith("all-logits"):
        options["loss"] = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        options["weighted_metrics"] = []
    model.compile(optimizer=keras.optimizers.Adam(1e-4), **options)
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)

    def step(length: int) -> None:
        ids = random.integers(0, arguments.vocabulary, (1, length), np.int32)
        loss = model.train_on_batch({"token_ids": ids}, np.roll(ids, -1, axis=1))
        if not np.isfinite(loss).all():
            sys.exit(f"the loss is {loss}")

    step(16)  # what is imported and set up at the first step is not counted
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = resident_memory() or 0
    step(arguments.length)
    return (peak_memory() or 0) - before


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(step_memory(arguments)))
        return
    results: dict[str, dict[str, float]] = {}
    print(f"{'MB':24}{'vocabulary of ' + str(SMALL):>20}{arguments.vocabulary:>12,}{'loss':>8}")
    for engine in arguments.engine or ENGINES:
        found = [_run(engine, size) / 1e6 for size in (SMALL, arguments.vocabulary)]
        results[engine] = {"small": found[0], "large": found[1], "loss": found[1] - found[0]}
        print(f"{engine:24}{found[0]:20.0f}{found[1]:12.0f}{found[1] - found[0]:8.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _run(engine: str, vocabulary: int) -> int:
    note(f"{engine}, {vocabulary:,}")
    environment = os.environ | {"KERAS_BACKEND": engine.partition("-")[0]}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # glibc gives back at once what was larger; left alone it learns to keep up to 32 MB of it.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:]]
    command += ["--worker", engine, "--vocabulary", str(vocabulary)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
