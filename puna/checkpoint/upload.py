"""`puna.upload_preset`: a directory, published."""

from __future__ import annotations

import os

from puna.checkpoint import hub, kaggle_upload
from puna.checkpoint.hub_upload import upload_to_hub
from puna.checkpoint.publication import Publication, publication_of
from puna.errors import PresetError


def upload_preset(
    uri: str,
    preset: str | os.PathLike[str],
    *,
    private: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Publish what `save_to_preset` wrote, all of it or nothing.

    What is not whole is refused before anything is sent. Only the files of a preset go out, with
    its card, licence and pictures. On the Hub they are one commit, which takes the place of an
    earlier checkpoint in the same repository. Details: `docs/publish.md`.

    Args:
        uri: `hf://user/name[@branch]`; the repository is made if it is not there. Or
            `kaggle://user/model/framework/variation`, with kagglehub installed.
        preset: the directory of a model or of an adapter.
        private: whether a repository that is made is for its owner alone.
        commit_message: what is said of the change; None says that it is an upload.
        revision: a branch of the Hub, where the address names none; made from the main one if new.

    Returns:
        The address of the page of what was published.

    Raises:
        PresetError: the directory is not whole, the address is none, or the Hub refuses it.
        ConfigError: `config.json` asks for what is not computed.
        TokenizerError: the tokenizer cannot be read.

    The Hub's client has its own settings: `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`.
    """
    return publish(
        uri,
        publication_of(preset),
        private=private,
        message=commit_message,
        revision=revision,
    )


def publish(
    uri: str,
    publication: Publication,
    *,
    private: bool = False,
    message: str | None = None,
    revision: str | None = None,
) -> str:
    """Publish what is known to be whole; see `upload_preset`."""
    if uri.startswith(kaggle_upload.SCHEME):
        if revision is not None:
            raise PresetError("revision was given, and Kaggle has no branches; leave it out")
        return kaggle_upload.upload_to_kaggle(uri, publication, message=message)
    if not uri.startswith(hub.SCHEME):
        raise PresetError(
            f"the address {uri!r} has no scheme that can be written to; expected "
            f"{hub.SCHEME}user/name or {kaggle_upload.SCHEME}user/model/framework/variation"
        )
    return upload_to_hub(uri, publication, private=private, message=message, revision=revision)
