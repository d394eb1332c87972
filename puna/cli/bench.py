"""`puna bench`: how fast a preset runs here."""

from __future__ import annotations

import csv
import json
import sys
from typing import Annotated, Any, Literal

import typer

from puna import machine
from puna.cli import terminal
from puna.cli.options import Loading, Preset

EXAMPLES = (
    "puna bench ./my-llama",
    "puna bench llama3.2_1b --random-weights --dtype bfloat16 --prompt 512 --batch 1,8",
    "puna bench ./my-llama --prompt 128 --new 64 --depth 0,4096 --format csv > speed.csv",
)


def bench(
    preset: Preset,
    *,
    prompt: Annotated[
        str,
        typer.Option(metavar="N,...", help="Tokens of the prompts to take in (pp); 0 leaves it."),
    ] = "128,512",
    new: Annotated[
        str, typer.Option(metavar="N,...", help="New tokens to make (tg); 0 leaves it.")
    ] = "64",
    batch: Annotated[
        str, typer.Option(metavar="N,...", help="Prompts that are worked on at once.")
    ] = "1",
    depth: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens that are in the context before.")
    ] = "0",
    repetitions: Annotated[
        int,
        typer.Option("--repetitions", "-r", min=1, help="Times to measure, after a warm-up."),
    ] = 5,
    output: Annotated[
        Literal["table", "json", "csv"], typer.Option("--format", help="How to print the result.")
    ] = "table",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Read config.json alone, and make up weights: they cost the same.",
        ),
    ] = False,
    loading: Loading,
) -> None:
    """Measure how fast a preset runs.

    pp128 is the time from a prompt of 128 tokens to the first new one; tg64 is the time of 64
    tokens after the first. With --depth both come after that many other tokens. Each is measured
    several times, on prompts of random tokens, greedily; compiling is in the warm-up. The rate is
    that of the whole batch, in tokens a second: the median, and the slowest and the fastest.

    Peak memory is what the process held at most, loading included, beyond what it held when Keras
    and its backend were imported.
    """
    from puna.cli import bench_run

    cases = bench_run.cases(
        prompts=_numbers("--prompt", prompt, least=0),
        new=_numbers("--new", new, least=0),
        batches=_numbers("--batch", batch, least=1),
        depths=_numbers("--depth", depth, least=0),
    )
    if not cases:
        raise typer.BadParameter("--prompt and --new are both 0; expected something to measure")
    if random_weights and loading.adapter is not None:
        raise typer.BadParameter("--adapter goes with real weights; leave out --random-weights")

    with terminal.waiting("Importing Keras"):
        before = bench_run.imported()
    model, seconds = bench_run.load(preset, loading, random_weights)
    bench_run.check_lengths(cases, model.config.context_length)
    results: list[dict[str, Any]] = []
    for case in cases:
        with terminal.waiting(f"Measuring {case.name}, batch {case.batch}"):
            results.append(bench_run.measure(model, case, repetitions))
    facts = {
        "preset": preset,
        "random_weights": random_weights,
        **bench_run.describe(model),
        "load_seconds": round(seconds, 3),
        **bench_run.memory(before),
        **machine.describe(),
    }
    _PRINT[output](facts, results)
    for result in results:
        if result["tokens_per_second"] is None:
            terminal.note(
                f"{result['test']} drowned in noise: the longer call was not slower; raise --new, "
                "--prompt or --repetitions"
            )


def _numbers(option: str, text: str, least: int) -> list[int]:
    """The numbers of an option, each once."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(
            f"{option} is {text!r}; expected whole numbers from {least} on, such as 128 or 128,512"
        )
    return list(dict.fromkeys(found))


def _print_json(facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    print(json.dumps({**facts, "results": results}, indent=2, ensure_ascii=False))


def _print_csv(facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """A row for each test, with all facts in each, so that files can be put together."""
    rows = [{**result, **facts} for result in results]
    for row in rows:
        row["seconds"] = " ".join(f"{s:.6f}" for s in row["seconds"])
        row["versions"] = " ".join(f"{n}={v}" for n, v in row["versions"].items())
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print_table(facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold cyan", no_wrap=True)
    head.add_column(overflow="fold")
    for name, value in _head(facts):
        head.add_row(name, Text(value))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    table.add_column("test", no_wrap=True)
    for name in ("batch", "tokens/s", "slowest", "fastest", "ms/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        rates = (result["tokens_per_second"], result["slowest"], result["fastest"])
        each = result["milliseconds_per_token"]
        numbers = [_number(rate) for rate in (*rates, each)]
        table.add_row(result["test"], str(result["batch"]), *numbers)
    # What is piped is neither coloured nor folded to a terminal's width, nor padded to it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    if console.is_terminal:
        console.print(head, table)
        return
    with console.capture() as captured:
        console.print(head, table)
    print("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()).rstrip())


def _head(facts: dict[str, Any]) -> list[tuple[str, str]]:
    peak = facts["peak_memory_bytes"]
    weights = f"{facts['parameters']:,} parameters, {facts['weights_bytes'] / 1e9:.3f} GB"
    return [
        ("preset", facts["preset"]),
        ("weights", weights + (", made up" if facts["random_weights"] else "")),
        ("dtype", facts["dtype"]),
        ("backend", f"{facts['backend']} on {facts['device']}"),
        ("machine", f"{facts['cpu']}, {facts['cores']} cores"),
        ("versions", ", ".join(f"{n} {v}" for n, v in facts["versions"].items())),
        ("loaded in", f"{facts['load_seconds']:.2f} s"),
        ("peak memory", "not known here" if peak is None else f"{peak / 1e9:.3f} GB"),
    ]


def _number(value: float | None) -> str:
    """A number as people read it.

    >>> _number(None), _number(0.1234), _number(12.34), _number(1234.5)
    ('-', '0.123', '12.3', '1,234')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


_PRINT = {"table": _print_table, "json": _print_json, "csv": _print_csv}
