"""How fast Puna and its peers generate: side by side, on the same weights.

Usage:
    python -m benchmarks.decode CHECKPOINT [--json FILE] [--rounds 5]
        [--question decode ...] [--engine puna-jax ...] [--baseline transformers]
        [--peer-python keras-hub=PYTHON] [--peer-python llama.cpp=PYTHON]

CHECKPOINT is a Hugging Face directory with a tokenizer; `python -m benchmarks.checkpoints` makes
one of a real shape. llama.cpp gets a GGUF file of the same weights, which is written here. With
--quantization int8 or int4, Puna quantizes while it loads, and llama.cpp gets Q8_0 or Q4_0: as many
bytes of weights. CHECKPOINT may also be a GGUF file, which both then run as it is.

Each engine is a process of its own that loads once; one computes at a time. In every round each
engine takes its turn, so that a noisy machine disturbs all alike. Figures are medians of the rounds
after a warm-up; a ratio is the median of the rounds' own ratios to the baseline, and above 1 it is
better than the baseline. An engine that is not installed is skipped, which is said. The first
greedy tokens of each engine are shown: alike, or not, they are what was computed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import ENGINES, QUANTIZED
from benchmarks.peers import note, peer_of
from benchmarks.questions import FASTER, PLAIN, QUESTIONS, Answer, Question, Shape, longest
from benchmarks.workers import Fresh, NotInstalledError, Run, Worker, WorkerError
from puna.checkpoint.preset import Preset
from puna.config import LlamaConfig
from puna.errors import PresetError
from puna.machine import describe

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def main() -> None:
    arguments = _arguments()
    shape = _shape(arguments)
    questions = {name: QUESTIONS[name](shape) for name in arguments.question or QUESTIONS}
    packed = arguments.quantization is not None or arguments.checkpoint.is_file()
    engines = list(dict.fromkeys(arguments.engine or (QUANTIZED if packed else ENGINES)))
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as scratch:
        run = Run(
            checkpoint=arguments.checkpoint.resolve(),
            gguf=_gguf(arguments, Path(scratch)) if "llama.cpp" in engines else None,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            context=longest(list(questions.values())),
            pythons=dict(arguments.peer_python),
        )
        results = {
            "benchmark": "decode",
            "date": datetime.date.today().isoformat(),
            "command": command(sys.argv[1:]),
            "checkpoint": run.checkpoint.name,
            "dtype": run.dtype if run.quantization is None else f"{run.quantization}, {run.dtype}",
            "rounds": arguments.rounds,
            "fresh_rounds": arguments.fresh_rounds,
            "baseline": arguments.baseline,
            "machine": describe(),
            **compare(run, engines, questions, arguments),
        }
    _print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def compare(
    run: Run,
    engines: Sequence[str],
    questions: dict[str, Question],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Put every question to every engine."""
    told: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = dict.fromkeys(questions)

    def put(name: str, workers: Mapping[str, Worker | None]) -> None:
        question = questions[name]
        asked = {e: w for e, w in workers.items() if question.takes(e)}
        rounds = arguments.fresh_rounds if question.fresh else arguments.rounds
        baseline = arguments.baseline
        if baseline in workers and not question.takes(baseline):  # then a peer that it is for
            baseline = next((engine for engine in asked if "puna" not in engine), baseline)
        found[name] = {
            "about": question.about,
            "baseline": baseline,
            "figures": {f.name: {"unit": f.unit, "better": f.better} for f in question.figures},
            "engines": _ask(run, name, question, asked, rounds, baseline),
        }

    lasting = [name for name, question in questions.items() if not question.fresh]
    with contextlib.ExitStack() as stack:
        workers = _start(run, engines, told, bool(lasting), stack)
        for name in lasting:
            put(name, workers)
    # The others need the memory that these have given back.
    for name in questions:
        if name not in lasting:
            put(name, dict.fromkeys(workers))
    return {"engines": told, "questions": found}


def _start(
    run: Run,
    engines: Sequence[str],
    told: dict[str, dict[str, Any]],
    load: bool,
    stack: contextlib.ExitStack,
) -> dict[str, Worker]:
    """Workers of the engines that are installed, with the model loaded if it is needed."""
    workers: dict[str, Worker] = {}
    for engine in engines:
        note(f"{'loading' if load else 'looking for'} {engine}")
        try:
            worker = run.start(engine)
            stack.callback(worker.close)
            told[engine] = {"versions": worker.versions}
            if load:
                told[engine]["load_seconds"] = worker.ask(do="load")["seconds"]
            workers[engine] = worker
        except NotInstalledError as error:
            told[engine] = {"skipped": str(error)}
        except WorkerError as error:
            told[engine] = {"skipped": f"it failed: {error}"}
    return workers


def _ask(
    run: Run,
    name: str,
    question: Question,
    workers: Mapping[str, Worker | None],
    rounds: int,
    baseline: str,
) -> dict[str, Any]:
    """One question to all engines: a warm-up each, then the rounds, in turn."""
    answers: dict[str, list[Answer]] = {engine: [] for engine in workers}
    failed: dict[str, str] = {}
    for turn in range(0 if not question.fresh else 1, rounds + 1):
        for engine, worker in workers.items():
            if engine in failed:
                continue
            note(f"{name}: {engine}, " + (f"round {turn} of {rounds}" if turn else "warm-up"))
            try:
                if worker is None:
                    with contextlib.closing(Fresh(run, engine)) as fresh:
                        answers[engine].append(question.measure(fresh.ask, turn))
                elif turn == 0:
                    question.measure(worker.ask, turn)
                else:
                    answers[engine].append(question.measure(worker.ask, turn))
            except (WorkerError, NotInstalledError, RuntimeError) as error:
                failed[engine] = str(error)
                note(f"{name}: {engine} failed: {error}")
    given = {engine: rows for engine, rows in answers.items() if engine not in failed}
    return summary(question, given, baseline) | {e: {"error": why} for e, why in failed.items()}


def summary(question: Question, answers: dict[str, list[Answer]], baseline: str) -> dict[str, Any]:
    """Medians, and medians of ratios to the baseline's figure of the same round."""
    found: dict[str, Any] = {}
    for engine, rows in answers.items():
        figures: dict[str, Any] = {}
        for figure in question.figures:
            values = [row.figures[figure.name] for row in rows]
            told: dict[str, Any] = {"median": _median(values), "values": [_json(v) for v in values]}
            if figure.better != PLAIN and baseline in answers:
                theirs = [row.figures[figure.name] for row in answers[baseline]]
                pairs = list(zip(values, theirs, strict=True))
                ratios = [o / t if figure.better == FASTER else t / o for o, t in pairs if o and t]
                told["ratio"] = _median(ratios)
            figures[figure.name] = told
        found[engine] = {"figures": figures, "tokens": rows[0].tokens[:8]}
    return found


def _median(values: Sequence[float]) -> float | None:
    """The median of what is a number."""
    numbers = [value for value in values if value == value]
    return statistics.median(numbers) if numbers else None


def _json(value: float) -> float | None:
    return value if value == value else None


def command(arguments: Sequence[str]) -> str:
    """The command as others would give it: of paths, the last part.

    >>> command(["/home/me/llama", "--peer-python", "llama.cpp=/opt/x/bin/python"])
    'python -m benchmarks.decode llama --peer-python llama.cpp=python'
    """
    short = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        short.append(f"{name}{equals}{Path(value).name}" if "/" in argument else argument)
    return " ".join(["python -m benchmarks.decode", *short])


def _print(results: dict[str, Any]) -> None:
    machine = results["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}"
    print(f"{results['checkpoint']}, {results['dtype']}, {where}")
    print("a ratio above 1 is better than the baseline; where that is left out, there are none")
    for name, engine in results["engines"].items():
        versions = ", ".join(f"{n} {v}" for n, v in engine.get("versions", {}).items())
        print(f"{name:22}{'skipped: ' + engine['skipped'] if 'skipped' in engine else versions}")
    for name, question in results["questions"].items():
        _print_question(name, question)


def _print_question(name: str, question: dict[str, Any]) -> None:
    print(f"\n{name}: {question['about']} Baseline: {question['baseline']}.\n")
    heads = [f"{n}, {f['unit']}" for n, f in question["figures"].items()]
    print(f"{'':22}" + "".join(f"{head:>27}" for head in heads) + "  first tokens")
    for engine, given in question["engines"].items():
        if "error" in given:
            print(f"{engine:22}  failed: {given['error']}")
            continue
        cells = [_cell(given["figures"][figure]) for figure in question["figures"]]
        tokens = " ".join(str(token) for token in given["tokens"])
        print(f"{engine:22}" + "".join(f"{cell:>27}" for cell in cells) + f"  {tokens}".rstrip())


def _cell(told: dict[str, Any]) -> str:
    """A median and its ratio."""
    if told["median"] is None:
        return "noise"
    ratio = told.get("ratio")
    return f"{told['median']:.4g}" + ("" if ratio is None else f" ({ratio:.2f} x)").rjust(10)


def _shape(arguments: argparse.Namespace) -> Shape:
    try:
        config = LlamaConfig.from_hf(Preset(arguments.checkpoint).config)
    except PresetError as error:
        sys.exit(str(error))
    token = 2 * config.num_hidden_layers * config.num_kv_heads * config.head_size
    return Shape(
        vocab_size=config.vocab_size,
        new=arguments.new,
        context=arguments.context,
        token_bytes=token * SIZES[arguments.dtype],
    )


def _gguf(arguments: argparse.Namespace, scratch: Path) -> Path:
    """The GGUF file of the checkpoint: the one that was given, else a new one."""
    if arguments.checkpoint.is_file():
        return arguments.checkpoint.resolve()
    file = arguments.gguf or scratch / "model.gguf"
    if not file.exists():
        from benchmarks.gguf_file import write_gguf

        note(f"writing {file.name}")
        write_gguf(arguments.checkpoint, file, arguments.quantization or arguments.dtype)
    return file.resolve()


def _rounds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds; expected 1 or more")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--question", action="append", choices=QUESTIONS, help="else all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="else all")
    parser.add_argument("--baseline", choices=ENGINES, default="transformers")
    parser.add_argument("--dtype", choices=SIZES, default="bfloat16")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--rounds", type=_rounds, default=5)
    parser.add_argument(
        "--fresh-rounds", type=_rounds, default=3, help="of what needs new processes each time"
    )
    parser.add_argument("--new", type=int, default=64, help="new tokens of the question decode")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the long context")
    peer = peer_of(ENGINES, example="keras-hub")
    parser.add_argument("--peer-python", action="append", type=peer, default=[])
    parser.add_argument("--gguf", type=Path, help="where to keep llama.cpp's file; used if there")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
