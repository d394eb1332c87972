"""Where presets are found: a directory, a file, an `hf://` address, or a short name."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from puna.checkpoint.hub_errors import (
    NotAHubError,
    Retries,
    check_token,
    explained,
    is_passing,
    quiet_client,
)
from puna.checkpoint.hub_files import WEIGHTS, needed
from puna.checkpoint.hub_large import LARGE, fetch_large
from puna.checkpoint.model_card import CARD
from puna.errors import PresetError

SCHEME = "hf://"

# Short names, keras-hub's where it has one. Each stands for the publisher's own checkpoint.
PRESETS: dict[str, str] = {
    "llama3_8b_en": "hf://meta-llama/Meta-Llama-3-8B",
    "llama3_instruct_8b_en": "hf://meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_70b": "hf://meta-llama/Meta-Llama-3-70B",
    "llama3_instruct_70b": "hf://meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3.1_8b": "hf://meta-llama/Llama-3.1-8B",
    "llama3.1_instruct_8b": "hf://meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1_70b": "hf://meta-llama/Llama-3.1-70B",
    "llama3.1_instruct_70b": "hf://meta-llama/Llama-3.1-70B-Instruct",
    "llama3.1_405b": "hf://meta-llama/Llama-3.1-405B",
    "llama3.1_instruct_405b": "hf://meta-llama/Llama-3.1-405B-Instruct",
    "llama3.1_guard_8b": "hf://meta-llama/Llama-Guard-3-8B",
    "llama3.2_1b": "hf://meta-llama/Llama-3.2-1B",
    "llama3.2_instruct_1b": "hf://meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2_3b": "hf://meta-llama/Llama-3.2-3B",
    "llama3.2_instruct_3b": "hf://meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2_guard_1b": "hf://meta-llama/Llama-Guard-3-1B",
    "llama3.3_instruct_70b": "hf://meta-llama/Llama-3.3-70B-Instruct",
    "smollm2_135m": "hf://HuggingFaceTB/SmolLM2-135M",
    "smollm2_instruct_135m": "hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2_360m": "hf://HuggingFaceTB/SmolLM2-360M",
    "smollm2_instruct_360m": "hf://HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2_1.7b": "hf://HuggingFaceTB/SmolLM2-1.7B",
    "smollm2_instruct_1.7b": "hf://HuggingFaceTB/SmolLM2-1.7B-Instruct",
}

# What an address may name in a repository.
_FILES = (".gguf", ".safetensors")
_MAIN = "main"  # the branch that is meant where none is named
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds for the Hub to answer a first question; short where the cache will do as well.
_TIMEOUT, _SHORT_TIMEOUT = 10.0, 2.0


def locate(
    preset: str | os.PathLike[str], *, weights: bool = True, revision: str | None = None
) -> Path:
    """The directory or file of a preset on this machine, fetched first where it is an address.

    Args:
        preset: a directory, a `.gguf` or `.safetensors` file, `hf://org/name[@revision]`,
            `hf://org/name/file.gguf[@revision]` (or `.safetensors`), or a name of `PRESETS`.
        weights: whether the weights are needed; else only the small files are fetched.
        revision: a branch, tag or commit, where the address names none.

    Raises:
        PresetError: nothing is there, or the hub refuses it.

    The Hub's client has its own settings: `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.
    """
    text = os.fspath(preset)
    text = PRESETS.get(text, text)
    if text.startswith(SCHEME):
        return _fetch(text, weights=weights, revision=revision)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if "://" in text:
        raise PresetError(f"the address {text!r} has an unknown scheme; expected hf://org/name")
    raise PresetError(f"there is no preset {text!r}; {_advice(text)}")


def _advice(text: str) -> str:
    """What may have been meant by a name that is nothing here."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        return f"for a repository of the Hub write {SCHEME}{text}"
    if similar := difflib.get_close_matches(text, PRESETS, 3):
        return f"did you mean {' or '.join(similar)}?"
    return (
        f"expected a directory, a .gguf or .safetensors file, {SCHEME}org/name, or a short name "
        "such as llama3.2_1b"
    )


def parse_address(address: str) -> tuple[str, str | None]:
    """`hf://org/name[@revision]` as the repository's id and the revision.

    >>> parse_address("hf://meta-llama/Llama-3.2-1B@main")
    ('meta-llama/Llama-3.2-1B', 'main')
    """
    repository, _, revision = address.removeprefix(SCHEME).strip("/").partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise PresetError(f"the address {address!r} is not of the form {SCHEME}org/name[@revision]")
    return repository, revision or None


def parse_file_address(address: str) -> tuple[str, str | None, str | None]:
    """`hf://org/name[/file][@revision]` as the repository's id, the revision and the file.

    >>> parse_file_address("hf://org/name/small.gguf@main")
    ('org/name', 'main', 'small.gguf')
    """
    path, at, revision = address.removeprefix(SCHEME).partition("@")
    parts = path.split("/")
    if len(parts) < 3 or not path.endswith(_FILES):
        return *parse_address(address), None
    return *parse_address(SCHEME + "/".join(parts[:2]) + at + revision), "/".join(parts[2:])


def listed(
    address: str, revision: str | None = None, *, is_patient: bool = True
) -> tuple[str, dict[str, int | None]]:
    """The commit that an address stands for now, and the sizes in bytes of its files.

    Args:
        address: `hf://org/name[/file][@revision]`.
        revision: a branch, tag or commit, where the address names none.
        is_patient: whether a Hub that is slow or fails is waited for.

    Raises:
        PresetError: the Hub refuses it, or is away.
    """
    wanted = _wanted(address, True, revision)
    with explained(wanted.where, wanted.repository, wanted.revision):
        check_token()
        return wanted.listed(is_patient=is_patient)


def in_cache(address: str, *, weights: bool = True, revision: str | None = None) -> Path | None:
    """What `locate` would return without a network; None where it is not all there."""
    wanted = _wanted(address, weights, revision)
    try:
        path = wanted.in_cache()
    except ValueError:  # ours, or the client's for a name that it does not allow
        return None
    return path if wanted.file is None else path / wanted.file


def _wanted(address: str, weights: bool, revision: str | None) -> _Wanted:
    repository, in_address, file = parse_file_address(address)
    return _Wanted(address, repository, in_address or revision, file, weights)


def _fetch(address: str, *, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import constants

    wanted = _wanted(address, weights, revision)
    cached, lacking = None, None
    with explained(wanted.where, wanted.repository, wanted.revision, lambda: lacking):
        check_token()
        try:
            cached = wanted.in_cache()
        except PresetError as error:
            lacking = error
        with quiet_client(wanted.retries):
            # What a commit holds never changes, so there is nothing to ask about it.
            if cached is None or not _COMMIT.fullmatch(wanted.revision or ""):
                if not constants.HF_HUB_OFFLINE:
                    cached = wanted.fetch(cached)
                elif lacking is not None:
                    raise PresetError(f"HF_HUB_OFFLINE is set, and {lacking}") from None
    assert cached is not None
    return cached if wanted.file is None else cached / wanted.file


@dataclass
class _Wanted:
    """What is wanted of a repository."""

    address: str
    repository: str
    revision: str | None
    file: str | None
    weights: bool

    def __post_init__(self) -> None:
        self.retries = Retries(self.where)

    @property
    def _at(self) -> str:
        return f"@{self.revision}" if self.revision else ""

    @property
    def where(self) -> str:
        """The address, with the revision that may have been given beside it."""
        return self.address.removesuffix(self._at) + self._at

    def _choose(self, names: Collection[str]) -> list[str]:
        where = f"{SCHEME}{self.repository}{self._at}"
        return needed(names, weights=self.weights, file=self.file, where=where)

    def in_cache(self) -> Path:
        """The snapshot in the cache.

        Raises:
            PresetError: it is not there, or not all of it.
        """
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError

        advice = "go online once, or give a local directory"
        try:
            snapshot = snapshot_download(
                self.repository, revision=self.revision, allow_patterns=[], local_files_only=True
            )
        except LocalEntryNotFoundError as error:
            raise PresetError(f"{self.where} is not in the cache; {advice}") from error
        path, sizes = Path(snapshot), _sizes_in_cache(self.repository, self.revision)
        if sizes is None:  # as the client's first versions left it: the readers see what is missing
            patterns = [self.file] if self.file else [*WEIGHTS, "*.gguf"]
            if (self.weights or self.file) and not any(any(path.glob(p)) for p in patterns):
                raise PresetError(f"{self.where} is in the cache without its weights; {advice}")
            return path
        chosen, missing = self._choose(sizes), []
        for name in chosen:
            found = try_to_load_from_cache(self.repository, name, revision=self.revision)
            if not isinstance(found, str) or os.path.getsize(found) != sizes[name]:
                missing.append(name)
        if missing:
            named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise PresetError(
                f"{self.where} is incomplete in the cache, where {len(missing)} of its "
                f"{len(chosen)} files are missing ({named}); go online once to fetch the rest"
            )
        return path

    def fetch(self, cached: Path | None) -> Path:
        """The snapshot of what the Hub has now; what it has not changed is not fetched again.

        Args:
            cached: the snapshot in the cache, which will do where the Hub is away.
        """
        try:
            commit, sizes = self.listed(is_patient=cached is None)
        except Exception as error:
            if cached is None or not (is_passing(error) or isinstance(error, NotAHubError)):
                raise
            text = f"the Hub does not answer; {self.where} is taken from the cache ({cached.name})"
            warnings.warn(text, UserWarning, stacklevel=4)
            return cached
        if cached is not None and cached.name == commit:
            return cached
        chosen = self._choose(sizes)
        self._drop_damaged(commit, chosen, sizes)
        # Else the branch stays what it was until all of what it is now has come.
        if cached is None:
            self._record(commit)
        large = [name for name in chosen if (sizes[name] or 0) >= LARGE]
        fetch_large(self.repository, commit, large, self.retries)
        # Whoever saves what is made of the model needs its licence. A cache does without.
        card = [CARD] if self.weights and (sizes.get(CARD) or LARGE) < LARGE else []
        path = self._fetch_snapshot(commit, chosen + card)
        self._record(commit)
        return path

    def listed(self, *, is_patient: bool) -> tuple[str, dict[str, int | None]]:
        """The commit, and its files with their sizes, where those are told."""
        from huggingface_hub import HfApi

        timeout = _TIMEOUT if is_patient else _SHORT_TIMEOUT
        failures = 0
        while True:
            try:
                info = HfApi().model_info(
                    self.repository, revision=self.revision, files_metadata=True, timeout=timeout
                )
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise NotAHubError(str(error)) from error
            except Exception as error:
                failures += 1
                # A Hub that is away will be so for longer than anyone waits for a first answer.
                is_away = "Connect" in type(error).__name__ or "Timeout" in type(error).__name__
                if is_away or not is_patient:
                    raise
                self.retries.wait(error, failures)
            else:
                files = {file.rfilename: file.size for file in info.siblings or []}
                return info.sha or self.revision or _MAIN, files

    def _fetch_snapshot(self, commit: str, names: list[str]) -> Path:
        """Fetch the files that are not in the cache, and say where all are."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        # The client takes patterns, and a name may hold what a pattern means something by.
        patterns = [glob.escape(name) for name in names]
        failures = 0
        while True:
            began = time.monotonic()
            try:
                path = Path(
                    snapshot_download(self.repository, revision=commit, allow_patterns=patterns)
                )
                # Where the Hub fails to list them, the client returns what there is.
                for name in names:
                    if not (path / name).is_file():
                        raise OSError(f"{name} did not come")
                return path
            except Exception as error:
                seconds = time.monotonic() - began
                # The client repeats some questions by itself, for up to half a minute.
                if isinstance(error, LocalEntryNotFoundError) and seconds > _TIMEOUT:
                    raise
                failures += 1 if seconds < _SHORT_TIMEOUT else 2
                self.retries.wait(error, failures)

    def _drop_damaged(self, commit: str, names: list[str], sizes: dict[str, int | None]) -> None:
        """Remove files of a wrong size: the client would take them for fetched."""
        from huggingface_hub import try_to_load_from_cache

        for name in names:
            found = try_to_load_from_cache(self.repository, name, revision=commit)
            if not isinstance(found, str) or sizes[name] in (None, os.path.getsize(found)):
                continue
            Path(found).resolve().unlink()
            Path(found).unlink(missing_ok=True)

    def _record(self, commit: str) -> None:
        """Note in the client's cache which commit a branch stands for."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.repository, repo_type="model")
        refs = Path(constants.HF_HUB_CACHE) / folder / "refs"
        ref = refs / (self.revision or _MAIN)
        if self.revision == commit or ".." in ref.relative_to(refs).parts:
            return
        if ref.is_file() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        beside = ref.with_name(f"{ref.name}.{os.getpid()}")
        beside.write_text(commit)
        os.replace(beside, ref)


def _sizes_in_cache(repository: str, revision: str | None) -> dict[str, int] | None:
    """The repository's files as they were listed when some were fetched; None where unknown."""
    try:  # from version 2 on; before, the client could not tell what the cache lacks
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        entries = get_cached_repo_tree(repository, revision=revision)
    except CachedRepoTreeNotFoundError:
        return None
    return {entry.path: entry.size for entry in entries}
