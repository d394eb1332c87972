"""Publishing on Kaggle, through its own client if that is installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from puna.checkpoint.hub_errors import line_of
from puna.checkpoint.publication import Publication
from puna.errors import PresetError

SCHEME = "kaggle://"


def upload_to_kaggle(address: str, publication: Publication, *, message: str | None) -> str:
    """Publish a preset as a new version of a model on Kaggle; a new model is private there.

    Args:
        address: `kaggle://user/model/framework/variation`.
        publication: what to publish.
        message: what is new in this version.

    Returns:
        The address of the model's page.

    Raises:
        PresetError: the address is none, kagglehub is not installed, or Kaggle refuses it.
    """
    handle = address.removeprefix(SCHEME).strip("/")
    if handle.count("/") != 3 or not all(handle.split("/")):
        raise PresetError(
            f"the address {address!r} is not of the form {SCHEME}user/model/framework/variation, "
            f"such as {SCHEME}me/pirate/keras/1b"
        )
    try:
        import kagglehub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PresetError(
            f"{SCHEME} needs Kaggle's own client; install it with: pip install kagglehub"
        ) from error
    with tempfile.TemporaryDirectory(prefix="puna-") as work:
        for name, path in publication.files.items():
            _put(path.absolute(), Path(work, name))
        try:
            kagglehub.model_upload(handle, work, version_notes=message or "Uploaded with Puna")
        except Exception as error:  # of a client whose errors have no common base
            raise PresetError(
                f"Kaggle did not take {address} ({type(error).__name__}: {line_of(error)}); check "
                "the name, and the key of https://www.kaggle.com/settings"
            ) from error
    return f"https://www.kaggle.com/models/{handle}"


def _put(path: Path, place: Path) -> None:
    """Let a file be found in another place, without a copy where that is possible."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(path, place)
    except OSError:
        shutil.copyfile(path, place)
