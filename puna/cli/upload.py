"""`puna upload`: a directory, published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "puna upload ./pirate hf://me/pirate-llama --private",
    'puna upload ./pirate hf://me/pirate-llama --revision v2 --message "Longer training"',
    "puna upload ./pirate kaggle://me/pirate/keras/135m",
)


def upload(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A model or an adapter, as save_to_preset, puna fuse, convert or quantize "
            "write it.",
            show_default=False,
        ),
    ],
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS",
            help="hf://user/name[@branch], or kaggle://user/model/framework/variation. What is "
            "not there is made.",
            show_default=False,
        ),
    ],
    *,
    private: Annotated[
        bool,
        typer.Option("--private", help="If the repository is made, make it for its owner alone."),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", help="What the commit says of itself."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="A branch; made from the main one if it is new."),
    ] = None,
) -> None:
    """Publish a preset on the Hugging Face Hub or on Kaggle, all of it or nothing.

    What is not whole is refused before anything is sent. Only the files of a preset go out, and
    what is left out is named. The Hub wants HF_TOKEN, or hf auth login. The page's address is
    printed.
    """
    from puna.checkpoint.publication import publication_of
    from puna.checkpoint.upload import publish
    from puna.cli import terminal

    publication = publication_of(directory)
    if publication.left_out:
        terminal.note(f"left out: {', '.join(publication.left_out)}")
    count, size = len(publication.files), publication.nbytes
    terminal.note(f"uploading {count} files, {size:,} bytes, to {address}")
    print(publish(address, publication, private=private, message=message, revision=revision))
