"""Writes benchmarks/README.md, and a plot beside it, from what `benchmarks.decode --json` gave.

Usage: python -m benchmarks.report RESULTS.json... [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

HEAD = """# Benchmarks

<!-- Made by `python -m benchmarks.report` from the results of the runs; do not edit. -->

| `python -m benchmarks.…` | what it does |
|---|---|
| `decode CHECKPOINT` | how fast Puna and its peers generate, on the same weights |
| `load CHECKPOINT` | how long a checkpoint takes to load, and how much memory |
| `kernels` | how fast the native products are, beside a plain read and torch's |
| `quality CHECKPOINT` | how well models predict a text, rounded or not, and the peers |
| `finetune CHECKPOINT` | how fast a LoRA is trained, and in how much memory |
| `loss_memory` | how much memory a training step takes for its loss |
| `leave_grid DIR` | trains SmolLM2 until its weights have left their 4-bit grid |
| `checkpoints DIR` | makes a checkpoint of a real shape with random weights |
| `gguf_file CHECKPOINT FILE` | makes the GGUF file of a checkpoint, for llama.cpp |
| `report RESULTS.json...` | this page |

Figures are medians. In brackets is the median of the ratios to the baseline in the same round;
above 1 it is better than the baseline. The engines take turns, each in a process of its own, and
one computes at a time.
"""

# The question and its figure that a panel of the plot shows.
PANELS = (
    ("decode", "decode"),
    ("prefill", "512 tokens"),
    ("first-token", "first token"),
    ("first-call", "warm"),
    ("context", "long"),
    ("batch", "one batch"),
    ("memory", "peak"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("README.md"))
    arguments = parser.parse_args()
    for path in write_report(arguments.results, arguments.out):
        print(path)


def write_report(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the page, and a plot of each file's results.

    Args:
        files: as `benchmarks.decode --json` writes them.
        out: the page; plots go beside it, under the names of the files.

    Returns:
        What was written.
    """
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        sys.exit(f"{names} are not all different; the plots are named after them: rename a file")
    results = [_read(file) for file in files]
    sections = [HEAD]
    written = [out]
    for name, result in zip(names, results, strict=True):
        figure = out.with_name(f"{name}.svg")
        figure.write_text(plot(result), encoding="utf-8")
        written.append(figure)
        sections.append(section(result, figure.name))
    out.write_text("\n".join(sections), encoding="utf-8")
    return written


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{file} cannot be read: {error}")
    if not isinstance(result, dict) or result.get("benchmark") != "decode":
        sys.exit(f"{file} holds no results; expected what benchmarks.decode --json writes")
    return result


def section(result: dict[str, Any], figure: str) -> str:
    """One run, in Markdown."""
    machine = result["machine"]
    lines = [
        f"## {result['checkpoint']}, {result['dtype']}, {result['date']}",
        "",
        f"![{result['checkpoint']}]({figure})",
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"- Command: `{result['command']}`",
        f"- Rounds: {result['rounds']}; {result['fresh_rounds']} of what needs new processes",
    ]
    for name, engine in result["engines"].items():
        versions = ", ".join(f"{n} {v}" for n, v in engine.get("versions", {}).items())
        told = f"left out: {engine['skipped']}" if "skipped" in engine else versions
        lines.append(f"- {name}: {told}")
    for name, question in result["questions"].items():
        lines += [
            "",
            f"### {name}",
            "",
            f"{question['about']} Baseline: {question['baseline']}.",
            "",
            *_table(question),
        ]
    return "\n".join([*lines, ""])


def _table(question: dict[str, Any]) -> list[str]:
    figures = question["figures"]
    tokens = any(given.get("tokens") for given in question["engines"].values())
    heads = [f"{name}, {figure['unit']}" for name, figure in figures.items()]
    heads += ["first tokens"] if tokens else []
    rows = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(figures)}{'---|' * tokens}"]
    for engine, given in question["engines"].items():
        if "error" in given:
            why = " ".join(given["error"].split()).replace("|", "\\|")
            rows.append(f"| {engine} | failed: {why} |{' |' * (len(heads) - 1)}")
            continue
        cells = [_cell(given["figures"][name]) for name in figures]
        cells += [" ".join(str(t) for t in given["tokens"])] if tokens else []
        rows.append(f"| {engine} | {' | '.join(cells)} |")
    return rows


def _cell(told: dict[str, Any]) -> str:
    if told["median"] is None:
        return "noise"
    ratio = told.get("ratio")
    return _number(told["median"]) + ("" if ratio is None else f" ({ratio:.2f}×)")


def _number(value: float) -> str:
    """Three digits, and no powers of ten.

    >>> _number(1234.5), _number(0.012345), _number(8)
    ('1,234', '0.0123', '8')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# The plot: a panel a question, a bar an engine.

WIDTH, ROW, LABEL, ROOM = 760, 22, 170, 120
OURS, THEIRS = "#2563eb", "#9ca3af"
STYLE = "text{font:13px system-ui,sans-serif;fill:#111827}.t{font-weight:600}.n{fill:#4b5563}"


def plot(result: dict[str, Any]) -> str:
    """One figure of each question, as bars, in SVG."""
    parts: list[str] = []
    y = 12
    for name, figure in PANELS:
        question = result["questions"].get(name)
        if question is None:
            continue
        bars = {
            engine: given["figures"][figure]["median"]
            for engine, given in question["engines"].items()
            if "error" not in given and given["figures"][figure]["median"] is not None
        }
        if not bars:
            continue
        told = question["figures"][figure]
        title = f"{name}: {figure}, {told['unit']} ({told['better']} is better)"
        parts.append(f'<text class="t" x="12" y="{y + 15}">{escape(title)}</text>')
        parts += _bars(bars, y + 24)
        y += 24 + ROW * len(bars) + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}">'
    ground = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *parts, "</svg>", ""])


def _bars(bars: dict[str, float], top: int) -> list[str]:
    most = max(bars.values())
    parts: list[str] = []
    for i, (engine, value) in enumerate(bars.items()):
        y = top + ROW * i
        width = max((WIDTH - LABEL - ROOM) * value / most if most > 0 else 0, 1)
        colour = OURS if engine.startswith("puna") else THEIRS
        parts += [
            f'<text x="12" y="{y + 14}">{escape(engine)}</text>',
            f'<rect x="{LABEL}" y="{y + 3}" width="{width:.1f}" height="15" fill="{colour}"/>',
            f'<text class="n" x="{LABEL + width + 6:.1f}" y="{y + 14}">{_number(value)}</text>',
        ]
    return parts


if __name__ == "__main__":
    main()
