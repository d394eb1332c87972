"""`puna perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import terminal
from puna.cli.options import AsJson, Loading, Preset
from puna.errors import PresetError

EXAMPLES = (
    "puna perplexity ./my-llama --text book.txt",
    "puna perplexity ./my-llama --text book.txt --quantization int4 --max-length 2048",
)


def perplexity(
    preset: Preset,
    *,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="The text, in UTF-8.", show_default=False)
    ],
    loading: Loading,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Tokens that are looked at together. Else the model's context.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens by which this window moves on.")
    ] = 512,
    as_json: AsJson = False,
) -> None:
    """Print the perplexity of a text: the exponential of the mean negative log-probability.

    The window moves over the text by --stride, and each token is predicted once, from at least as
    many tokens before it as the window has more than that; as the documentation of transformers
    computes it. The first token of all is not predicted.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PresetError(f"{text} is not in UTF-8 ({error.reason}); convert it") from error
    model = loading.load(preset)
    window = max_length or model.config.context_length
    with terminal.waiting(f"Reading {text}"):
        found = model.perplexity(content, max_length=window, stride=min(stride, window))
    if as_json:
        facts = {"perplexity": found, "max_length": window, "stride": min(stride, window)}
        print(json.dumps(facts))
    else:
        print(f"{found:.6g}")
