"""`puna quantize`: a checkpoint with its matrices as whole numbers, as a Hugging Face directory."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from puna.cli.options import Out, Preset, Revision

EXAMPLES = (
    "puna quantize ./my-llama --scheme int4 --out ./my-llama-int4",
    "puna quantize ./my-llama --scheme int4 --group-size 128 --keep embed_tokens --out ./for-vllm",
)


def quantize(
    preset: Preset,
    *,
    out: Out,
    scheme: Annotated[
        Literal["int4", "int8", "float8"],
        typer.Option(
            help="4 bits in groups of 32 inputs, or 8 bits with a scale for each row: whole "
            "numbers, or floats (e4m3)."
        ),
    ] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Inputs that share a scale: 32, 64 or 128; 0 for all of a row.",
            show_default=False,
        ),
    ] = None,
    minima: Annotated[
        bool, typer.Option("--minima", help="Give each group a minimum of its own.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Leave matrices as they are in whose names this is found, such as embed_tokens or "
            r"'layers\.0\.'; may be given more than once.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of what is not quantized, and of the scales. Else the checkpoint's own.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A PEFT adapter (a directory, or hf://org/name) to merge into the weights first.",
        ),
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a checkpoint with quantized matrices, in the compressed-tensors format.

    Any format that is read goes into it. One matrix is in memory at a time. What transformers shall
    open needs --keep embed_tokens. DIR appears when all of it is written, or not at all.
    """
    from puna.cli.conversion import convert_preset
    from puna.quantization.scheme import Recipe, Scheme

    changes = {} if group_size is None else {"group_size": group_size or None}
    chosen = Scheme.parse(scheme, symmetric=not minima, **changes)
    recipe = Recipe(default=chosen, overrides=dict.fromkeys(keep or ()))
    convert_preset(preset, out, dtype, adapter=adapter, revision=revision, recipe=recipe)
