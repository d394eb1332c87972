"""Publishing on the Hub: all of a preset in one commit, or nothing.

The client's own `upload_folder` makes several commits of one upload, between which a repository
holds half a model. Here the large files are sent first, where nobody sees them, and one commit then
makes all of them visible, in the place of what an earlier upload of a checkpoint left.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from puna.checkpoint.hub import SCHEME, parse_address
from puna.checkpoint.hub_errors import (
    NotAHubError,
    Retries,
    check_token,
    quiet_client,
    status_of,
)
from puna.checkpoint.hub_upload_errors import (
    TOKENS,
    may_have_arrived,
    may_pass,
    upload_explained,
)
from puna.checkpoint.model_card import CARD, is_ours, placed, read_card
from puna.checkpoint.preset_files import CHECKPOINT, matches
from puna.checkpoint.publication import Publication
from puna.errors import PresetError

_MAIN = "main"
_TIMEOUT = 10.0  # seconds for the Hub to answer a question
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOTHING = "nothing was published"

Answer = TypeVar("Answer")


def upload_to_hub(
    address: str,
    publication: Publication,
    *,
    private: bool,
    message: str | None,
    revision: str | None,
) -> str:
    """Publish a preset as one commit of a repository, which is made if it is not there.

    Args:
        address: `hf://user/name[@branch]`.
        publication: what to publish.
        private: whether a repository that is made is for its owner alone.
        message: of the commit.
        revision: the branch, where the address names none; made from the main one if it is new.

    Returns:
        The address of the commit's page.

    Raises:
        PresetError: the Hub refuses it, or cannot be reached; nothing is published then, or the
            message says what is not known.
    """
    repository, in_address = parse_address(address)
    branch = in_address or revision or _MAIN
    if _COMMIT.fullmatch(branch):
        raise PresetError(f"{branch} is a commit, which never changes; give the name of a branch")
    return _Upload(repository, branch, publication, private, message).run()


@dataclass
class _Upload:
    """One upload, and what it has left on the Hub so far."""

    repository: str
    branch: str
    publication: Publication
    private: bool
    message: str | None
    outcome: str | None = None  # what became of it, where that is known
    made: str | None = None  # "repository" or "branch", if this upload has made it
    retries: Retries = field(init=False)

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi

        self.api: Any = HfApi()
        self.retries = Retries(self.where, "taking")

    @property
    def where(self) -> str:
        """The address."""
        at = "" if self.branch == _MAIN else f"@{self.branch}"
        return f"{SCHEME}{self.repository}{at}"

    def run(self) -> str:
        """See `upload_to_hub`."""
        with (
            upload_explained(self.where, self.repository, self._what_became_of_it),
            quiet_client(self.retries),
        ):
            _check_settings()
            info = self._open()
            operations: list[Any] = []
            try:
                operations += self._operations(info)
                return self._commit(operations, info.sha)
            except BaseException as error:
                url = self._found_after_all(operations, info.sha, error)
                if url is not None:
                    return url
                self._clean_up(info.sha, error)
                raise

    # The repository

    def _open(self) -> Any:
        """What the branch holds; it is made where it is not there, and so is the repository."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        has_branch = True
        try:
            info = self._info(self.branch)
        except RevisionNotFoundError:
            info, has_branch = self._info(_MAIN), False
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            info, has_branch = self._make(), self.branch == _MAIN
        if self.private and info.private is False:
            # The Hub would keep the repository as it is, and show all of this to everyone.
            raise PresetError(
                f"{self.where} is there and public, and private=True was given; make it private at "
                f"https://huggingface.co/{self.repository}/settings, or give another name"
            )
        if not has_branch:
            self._patiently(
                lambda: self.api.create_branch(
                    self.repository, branch=self.branch, revision=info.sha, exist_ok=True
                )
            )
            self.made = self.made or "branch"
        return info

    def _make(self) -> Any:
        """Make the repository; one that came to be meanwhile is as good."""
        try:
            # None leaves it to the organization, which may want all to be private.
            private = True if self.private else None
            self._patiently(lambda: self.api.create_repo(self.repository, private=private))
            self.made = "repository"
        except Exception as error:
            if status_of(error) != 409:
                raise
            with contextlib.suppress(Exception):
                return self._info(_MAIN)
            raise
        return self._info(_MAIN)

    def _info(self, revision: str) -> Any:
        """What the Hub says of a branch: its commit, its files, and who may see it."""

        def ask() -> Any:
            try:
                return self.api.model_info(
                    self.repository, revision=revision, files_metadata=True, timeout=_TIMEOUT
                )
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise NotAHubError(str(error)) from error

        return self._patiently(ask)

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        failures = 0
        while True:
            try:
                return ask()
            except Exception as error:
                failures += 1
                self.retries.wait(error, failures)

    # The commit

    def _operations(self, info: Any) -> list[Any]:
        """The files to add, and those of an earlier checkpoint that would be taken for this one's.

        A reader prefers `model.safetensors` to an index, and would find the older weights there.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files: dict[str, Any] = dict(self.publication.files)
        there = {sibling.rfilename for sibling in info.siblings or []}
        text = read_card(files[CARD]) if CARD in files else None
        if text is not None and is_ours(text):
            if CARD in there and not self._is_ours_there(info.sha):
                del files[CARD]
                warnings.warn(
                    f"{CARD} of {self.where} is not Puna's and stays as it is; remove it there, "
                    "or write your own here",
                    UserWarning,
                    stacklevel=5,
                )
            else:
                files[CARD] = placed(text, self.repository).encode()
        stale = sorted(name for name in there - files.keys() if matches(name, CHECKPOINT))
        return [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]

    def _is_ours_there(self, commit: str) -> bool:
        """Whether the card on the Hub is as we made it."""
        from huggingface_hub import hf_hub_download

        path = self._patiently(lambda: hf_hub_download(self.repository, CARD, revision=commit))
        text = read_card(Path(path))
        return text is not None and is_ours(text)

    def _commit(self, operations: list[Any], parent: str) -> str:
        name = self.publication.directory.name
        what = "adapter" if self.publication.is_adapter else "model"
        info = self.api.create_commit(
            self.repository,
            operations,
            commit_message=self.message or f"Upload the {what} {name} with Puna",
            revision=self.branch,
            parent_commit=parent,  # who has committed meanwhile may have meant something else
        )
        if info.oid == parent:
            text = f"{self.where} holds all of this already; nothing was changed"
            warnings.warn(text, UserWarning, stacklevel=5)
        return info.commit_url

    # When it fails

    def _found_after_all(
        self, operations: list[Any], parent: str, error: BaseException
    ) -> str | None:
        """The commit's page, where only the answer was lost on its way."""
        if not may_have_arrived(error):
            return None
        try:
            info = self._info(self.branch)
        except Exception:
            page = f"https://huggingface.co/{self.repository}/commits/{self.branch}"
            self.outcome = f"whether the commit has arrived is not known: see {page}"
            return None
        if info.sha == parent or not _holds(info, operations):
            return None
        return f"{self.api.endpoint}/{self.repository}/commit/{info.sha}"

    def _what_became_of_it(self) -> str:
        """What is published now, and what is left behind; for an upload that failed."""
        if self.outcome is not None:
            return self.outcome
        if self.made == "repository":
            return f"{_NOTHING}: {self.where} was made for it and is empty"
        if self.made == "branch":
            return f"{_NOTHING}: the branch {self.branch} was made for it and is as {_MAIN} is"
        return _NOTHING

    def _clean_up(self, parent: str, error: BaseException) -> None:
        """Remove what was made for this upload, where that loses nothing.

        A repository goes only if this upload made it, nobody has put anything there, and trying
        again is of no use: what has arrived of large files would go with it, and need not be sent
        again. A branch that was made holds what the main one holds.
        """
        if self.made is None or self.outcome is not None:
            return
        if self.made == "repository" and may_pass(error):
            self.outcome = (
                f"{self._what_became_of_it()}; what has arrived is not sent again next time"
            )
            return
        try:
            if self._info(self.branch).sha != parent:
                return
            if self.made == "branch":
                self.api.delete_branch(self.repository, branch=self.branch)
            else:
                self.api.delete_repo(self.repository)
        except Exception:
            page = f"https://huggingface.co/{self.repository}/settings"
            self.outcome = f"{self._what_became_of_it()}; remove it at {page}, or try again"
        else:
            self.outcome = f"{_NOTHING}, and the {self.made} made for it is removed again"


def _check_settings() -> None:
    """Refuse what no upload can be made with, before anything is asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise PresetError("HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it")
    check_token()
    if get_token() is None:
        raise PresetError(
            f"there is no token for the Hub; set HF_TOKEN to one of {TOKENS} that may write, or "
            "log in with: hf auth login"
        )


def _holds(info: Any, operations: list[Any]) -> bool:
    """Whether a branch holds what operations would make of it."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    return all(
        _is_done(there.get(operation.path_in_repo), getattr(operation, "upload_info", None))
        for operation in operations
    )


def _is_done(found: Any, upload: Any) -> bool:
    """Whether a file that is there, or not, is what was sent, or is gone."""
    if found is None or upload is None:
        return found is upload
    digest = None if found.lfs is None else found.lfs.sha256
    return found.size == upload.size and digest in (None, upload.sha256.hex())
