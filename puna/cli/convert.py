"""`puna convert`: any checkpoint that is read, as a Hugging Face directory."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from puna.cli.options import Out, Revision

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
    out: Out,
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
    revision: Revision = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory.

    Any format that is read goes into the one that transformers and others open. One tensor is in
    memory at a time. DIR appears when all of it is written, or not at all.
    """
    del to  # there is one so far
    from puna.cli.conversion import convert_preset

    convert_preset(source, out, dtype, adapter=adapter, revision=revision)
