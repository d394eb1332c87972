"""`puna fuse`: an adapter merged into the weights, as a Hugging Face directory."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from puna.cli.options import MaxShardSize, Out, Preset, Revision

EXAMPLES = (
    "puna fuse hf://HuggingFaceTB/SmolLM2-135M-Instruct --adapter ./pirate-lora --out ./pirate",
    "puna fuse ./my-llama --adapter hf://me/lora --out ./fused --dtype bfloat16",
)


def fuse(
    preset: Preset,
    *,
    adapter: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="The PEFT adapter: a directory, or hf://org/name.",
            show_default=False,
        ),
    ],
    out: Out,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Write all tensors in this dtype. Else the checkpoint's own; float32 for a "
            "quantized GGUF.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: MaxShardSize = None,
    revision: Revision = None,
) -> None:
    """Merge a LoRA adapter into the weights of its base.

    The result is a Hugging Face directory that needs no adapter, ready for puna upload. One tensor
    is in memory at a time. DIR appears when all of it is written, or not at all.
    """
    from puna.cli.conversion import convert_preset

    convert_preset(
        preset, out, dtype, adapter=adapter, revision=revision, max_shard_size=max_shard_size
    )
