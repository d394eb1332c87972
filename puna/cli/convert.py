"""`puna convert`: any checkpoint that is read, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from puna.cli import terminal

EXAMPLES = (
    "puna convert SmolLM2.Q4_1.gguf --to hf --out ./smollm2",
    "puna convert ./my-llama --out ./my-llama-bf16 --dtype bfloat16",
)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="The checkpoint to read: a directory (Hugging Face's, Meta's or keras-hub's), a "
            ".gguf file, hf://org/name (also /FILE or @REVISION), or a short name.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The directory to write; it must be empty or not there yet.",
            show_default=False,
        ),
    ],
    to: Annotated[Literal["hf"], typer.Option(help="The format to write.")] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Write all tensors in this dtype. Else the checkpoint's own; float32 for a "
            "quantized GGUF.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A PEFT adapter (a directory, or hf://org/name) to merge into the weights.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the Hub.")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory.

    Any format that is read goes into the one that transformers and others open. One tensor is in
    memory at a time. DIR appears when all of it is written, or not at all.
    """
    del to  # there is one so far
    from puna.checkpoint import hub
    from puna.checkpoint.preset import Preset
    from puna.cli.conversion import write_hf

    path = hub.locate(source, revision=revision)
    adapters = [] if adapter is None else [hub.locate(adapter)]
    with terminal.waiting(f"Writing {out}"):
        files, size = write_hf(Preset(path, adapters), out, dtype)
    terminal.note(f"wrote {files} weight file{'s' if files > 1 else ''}, {size:,} bytes, to {out}")
    print(out)
