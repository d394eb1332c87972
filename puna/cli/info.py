"""`puna info`: what a preset is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from puna.cli import terminal
from puna.cli.options import AsJson, Preset

EXAMPLES = (
    "puna info ./my-llama",
    "puna info hf://meta-llama/Llama-3.1-8B-Instruct --context 8192",
    "puna info model.gguf --json",
)


def info(
    preset: Preset,
    *,
    context: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            min=1,
            help="Work out the memory for so many tokens of context; may be given several times. "
            "Else 4096 and the model's whole context.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="The dtype to run in. Else the checkpoint's own.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the Hub.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is.

    And what it takes to run it, from its headers alone: no weights are read. Of a repository on the
    Hub the small files are fetched, and of the weight files only their headers.
    """
    from puna.cli.describe import describe, tokenizer_or_reason
    from puna.cli.opened import open_headers, tokenizer_of

    with open_headers(preset, revision) as opened:
        tokenizer, reason = tokenizer_or_reason(lambda: tokenizer_of(opened))
        facts = {"preset": preset, **describe(opened, tokenizer, context or [], dtype)}
        if opened.adapters:
            facts["adapters"] = [_adapter(path) for path in opened.adapters]
    if reason is not None:
        terminal.note(f"there is no tokenizer: {reason}")
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(facts)


def _adapter(directory: Path) -> dict[str, Any]:
    from puna.checkpoint.peft_config import CONFIG, AdapterConfig

    config = AdapterConfig.read(directory / CONFIG)
    files = [file for file in directory.iterdir() if file.name.startswith("adapter_model.")]
    return {
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "bytes": sum(file.stat().st_size for file in files),
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in _rows(facts):
        table.add_row(name, Text("\n".join(lines)))
    # What is piped is neither coloured nor folded to a terminal's width, nor padded to it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _rows(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    a, rope, memory = facts["architecture"], dict(facts["rope"]), facts["memory"]
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    scaling = ", ".join(f"{name} {value:g}" for name, value in rope.items())
    embeddings = "embedding and head tied" if a["tied_embeddings"] else "head of its own"
    return [
        ("preset", [f"{facts['preset']}  ({facts['format']})"]),
        *(
            [("adapter", [_adapter_line(adapter) for adapter in facts["adapters"]])]
            if "adapters" in facts
            else []
        ),
        (
            "architecture",
            [
                f"Llama, {a['layers']} layers, width {a['hidden_size']:,}, feed-forward "
                f"{a['intermediate_size']:,} ({a['activation']})",
                f"{a['query_heads']} query heads and {a['key_value_heads']} key/value heads of "
                f"{a['head_size']}",
                f"vocabulary {a['vocabulary_size']:,}, {embeddings}"
                + (", with biases" if a["biases"] else ""),
            ],
        ),
        ("parameters", [f"{facts['parameters']:,}"]),
        ("stored as", [_stored_line(n, kind) for n, kind in facts["stored"].items()]),
        ("files", [f"{_size(f['bytes']):>9}  {f['name']}" for f in facts["files"]]),
        ("context", [f"{facts['context_length']:,} tokens"]),
        ("RoPE", [f"{kind}, theta {theta:,g}" + (f", {scaling}" if scaling else "")]),
        (
            "memory",
            [
                f"{_size(c['total_bytes']):>9}  in {memory['dtype']} with {c['tokens']:,} tokens: "
                f"weights {_size(memory['weights_bytes'])} + KV cache {_size(c['kv_cache_bytes'])}"
                for c in memory["contexts"]
            ],
        ),
        ("chat template", [_template_line(facts["template"])]),
        ("stop tokens", [f"{s['id']}  {s['token']}" for s in facts["stop_tokens"]] or ["none"]),
        ("tokenizer", [_tokenizer_line(facts["tokenizer"])]),
    ]


def _adapter_line(adapter: dict[str, Any]) -> str:
    return (
        f"{_size(adapter['bytes']):>9}  rank {adapter['rank']}, alpha {adapter['alpha']:g}, merged "
        f"into {adapter['base']}, of which the rest is told"
    )


def _stored_line(name: str, kind: dict[str, int]) -> str:
    return f"{_size(kind['bytes']):>9}  {name} ({kind['tensors']} tensors)"


def _template_line(template: dict[str, Any] | None) -> str:
    if template is None:
        return "none: a base model; puna generate continues its texts"
    names = [name for name in template["names"] if name != "default"]
    return ", ".join(
        [
            template["style"],
            "system messages" if template["supports_system"] else "no system messages",
            "tools" if template["supports_tools"] else "no tools",
            *([f"also: {' '.join(names)}"] if names else []),
        ]
    )


def _tokenizer_line(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    start = f"begins texts with {tokenizer['start_token']}"
    return (
        f"{tokenizer['kind']}, {tokenizer['size']:,} tokens, {tokenizer['special_tokens']} of them "
        "special; " + (start if tokenizer["adds_start_token"] else "no start token before texts")
    )


def _size(count: int) -> str:
    """Bytes as people write them, in powers of 1000 as the Hub shows them.

    >>> _size(2_471_645_608), _size(734)
    ('2.47 GB', '734 B')
    """
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
