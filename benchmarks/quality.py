"""How well models predict a text, rounded or not, and how well the peers do on the same weights.

Usage:
    python -m benchmarks.quality CHECKPOINT [--json FILE] [--text FILE]
        [--engine puna-float32 ...] [--window 512] [--peer-python llama.cpp=PYTHON]

CHECKPOINT is a Hugging Face directory in float32 with a tokenizer, such as
`python -m benchmarks.leave_grid` makes; without --text, the text is the last chapters of a novel.
All engines predict the same tokens from the same windows, each of which begins with the last token
of the one before, as `puna perplexity` has it. Puna runs on Keras's backend, and rounds symmetric
matrices while it loads: int8 for each row, int4 for each 32 inputs; the embedding too. llama.cpp
rounds a float32 GGUF file, which is written here: all matrices to Q4_0 ("pure"), or as its tool
does by default, which keeps more bits of a tied embedding. transformers also runs on the weights
that Q4_0 stands for, in float32: that is the rounding alone, since llama.cpp rounds what it
multiplies them with as well.

Each engine is a process of its own, one after the other; one that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import NOT_INSTALLED, note, peer_of, python_of

# In llama.cpp's Python there is nothing but that and NumPy: what else is needed is imported late.

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    """What an engine is given: a checkpoint, the text's tokens, and the length of a window."""

    checkpoint: str
    tokens: Sequence[int]
    window: int


def windows(length: int, window: int) -> Iterator[tuple[int, int]]:
    """The beginning and end of each window; all of its tokens but the first are predicted.

    >>> list(windows(10, 4))
    [(0, 4), (3, 7), (6, 10)]
    """
    for begin in range(0, length - 1, window - 1):
        yield begin, min(begin + window, length)


def perplexity(job: Job, logits_of: Callable[[Sequence[int]], np.ndarray]) -> float:
    """The exponential of the mean negative log-probability.

    Args:
        job: the tokens and the window.
        logits_of: given a window's tokens, their logits, float32 `[tokens, vocabulary]`.
    """
    total = 0.0
    for begin, end in windows(len(job.tokens), job.window):
        piece = job.tokens[begin:end]
        logits = logits_of(piece)[:-1]
        peaks = logits.max(axis=-1)
        sums = np.exp(logits - peaks[:, None]).sum(axis=-1, dtype=np.float64)
        chosen = np.take_along_axis(logits, np.asarray(piece[1:])[:, None], axis=-1)[:, 0]
        total += float((np.log(sums) + peaks - chosen).sum())
    return math.exp(total / (len(job.tokens) - 1))


def _puna(quantization: str | None) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        from puna.models import Llama3CausalLM

        model = Llama3CausalLM.from_preset(
            job.checkpoint, dtype="float32", quantization=quantization
        )
        return model.perplexity(np.asarray(job.tokens, np.int32), max_length=job.window)

    return run


def _transformers(q4_0: bool) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32).eval()
        if q4_0:
            _round_as_gguf(model)

        def logits_of(piece: Sequence[int]) -> np.ndarray:
            with torch.no_grad():
                return model(input_ids=torch.tensor([piece])).logits[0].numpy()

        return perplexity(job, logits_of)

    return run


def _round_as_gguf(model: Any) -> None:
    """Make each matrix of a model of transformers what Q4_0 of it stands for."""
    import torch
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                rounded = quants.dequantize(quants.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))


def _llama_cpp(pure: bool | None) -> Callable[[Job], float]:
    def run(job: Job) -> float:
        import llama_cpp

        with tempfile.TemporaryDirectory(prefix="puna-quality-") as scratch:
            file = job.checkpoint
            if pure is not None:
                file = str(Path(scratch) / "model.gguf")
                settings = llama_cpp.llama_model_quantize_default_params()
                settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
                settings.pure = pure
                names = os.fsencode(job.checkpoint), os.fsencode(file)
                if status := llama_cpp.llama_model_quantize(*names, settings):
                    raise RuntimeError(f"llama_model_quantize answered {status}")
            sizes = {"n_ctx": job.window, "n_batch": job.window, "n_ubatch": job.window}
            threads = os.cpu_count()
            model = llama_cpp.Llama(
                file,
                **sizes,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
            )

            def logits_of(piece: Sequence[int]) -> np.ndarray:
                model.reset()
                model.eval(list(piece))
                return model.scores[: len(piece)]

            return perplexity(job, logits_of)

    return run


class Engine(NamedTuple):
    """What computes a perplexity, the package that it needs, and what it is compared with."""

    run: Callable[[Job], float]
    package: str
    baseline: str


ENGINES = {
    "transformers-float32": Engine(_transformers(False), "transformers", ""),
    "puna-float32": Engine(_puna(None), "puna", "transformers-float32"),
    "puna-int8": Engine(_puna("int8"), "puna", "puna-float32"),
    "puna-int4": Engine(_puna("int4"), "puna", "puna-float32"),
    "llama.cpp-float32": Engine(_llama_cpp(None), "llama_cpp", "puna-float32"),
    "llama.cpp-q4_0": Engine(_llama_cpp(True), "llama_cpp", "puna-float32"),
    "llama.cpp-q4_0-default": Engine(_llama_cpp(False), "llama_cpp", "puna-float32"),
    "transformers-q4_0": Engine(_transformers(True), "transformers", "puna-float32"),
}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        _work(sys.argv[2])
        return
    arguments = _arguments()
    if arguments.text is None:
        from tests import assets

        arguments.text = assets.quality_text()
    text = arguments.text.read_text(encoding="utf-8")
    job = Job(str(arguments.checkpoint.resolve()), _tokens(arguments, text), arguments.window)
    engines = arguments.engine or list(ENGINES)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="puna-quality-") as scratch:
        gguf = Path(scratch) / "float32.gguf"
        for name in engines:
            note(name)
            mine = job
            if name.startswith("llama.cpp"):
                mine = job._replace(checkpoint=str(_gguf(arguments.checkpoint, gguf)))
            found[name] = _ask(name, mine, dict(arguments.peer_python))
    for name, told in found.items():
        theirs = found.get(ENGINES[name].baseline, {}).get("perplexity")
        if theirs and "perplexity" in told:
            told["percent"] = 100 * (told["perplexity"] / theirs - 1)
    results = {
        "benchmark": "quality",
        "checkpoint": arguments.checkpoint.name,
        "characters": len(text),
        "tokens": len(job.tokens),
        "window": job.window,
        "engines": found,
    }
    _print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _tokens(arguments: argparse.Namespace, text: str) -> list[int]:
    """The text's tokens, as `puna perplexity` takes them."""
    from puna.decoding.prompts import read_rows
    from puna.models import Llama3CausalLMPreprocessor

    preprocessor = Llama3CausalLMPreprocessor.from_preset(arguments.checkpoint)
    rows, _ = read_rows(text, preprocessor)
    return [int(token) for token in rows[0]]


def _gguf(checkpoint: Path, file: Path) -> Path:
    """The float32 file for llama.cpp, written when it is first asked for."""
    if not file.exists():
        from benchmarks.gguf_file import write_gguf

        write_gguf(checkpoint, file, "float32")
    return file


def _ask(name: str, job: Job, pythons: dict[str, str]) -> dict[str, Any]:
    """What an engine finds, in a process of its own."""
    command = [python_of(name, pythons), "-m", "benchmarks.quality"]
    environment = {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"} | os.environ
    start = time.perf_counter()
    ended = subprocess.run(
        [*command, "--worker", name],
        cwd=ROOT,
        env=environment,
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    if ended.returncode == NOT_INSTALLED:
        why = f"{ENGINES[name].package} is not installed; name a Python that has it with "
        return {"skipped": why + f"--peer-python {name.rpartition('-')[0]}=PYTHON"}
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        return {"skipped": f"it failed: {said[-1] if said else ended.returncode}"}
    answer = json.loads(ended.stdout.splitlines()[-1])
    return {"perplexity": answer, "seconds": time.perf_counter() - start}


def _work(name: str) -> None:
    """Read a job from standard input, and print the perplexity."""
    if importlib.util.find_spec(ENGINES[name].package) is None:
        sys.exit(NOT_INSTALLED)
    print(json.dumps(ENGINES[name].run(Job(*json.load(sys.stdin)))))


def _print(results: dict[str, Any]) -> None:
    print(
        f"{results['checkpoint']}: {results['characters']:,} characters, "
        f"{results['tokens']:,} tokens, windows of {results['window']}"
    )
    for name, told in results["engines"].items():
        if "skipped" in told:
            print(f"{name:24}skipped: {told['skipped']}")
            continue
        line = f"{name:24}{told['perplexity']:12.6f}{told['seconds']:7.0f} s"
        if "percent" in told:
            line += f"{told['percent']:+10.4f} % of {ENGINES[name].baseline}"
        print(line)


def _window(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no window; expected 2 tokens or more")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, help="in UTF-8; else the end of a novel")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="else all")
    parser.add_argument("--window", type=_window, default=512, help="tokens taken together")
    peer = peer_of(ENGINES, example="llama.cpp")
    parser.add_argument("--peer-python", action="append", type=peer, default=[])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
