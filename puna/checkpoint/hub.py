"""Where presets are found: a directory, a file, an `hf://` address, or a short name."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from puna.checkpoint.hub_files import SMALL, WEIGHTS, needed
from puna.errors import PresetError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
    hint = f" For the Hub write {SCHEME}{text}." if text.count("/") == 1 else ""
    raise PresetError(
        f"there is no preset {text!r}; expected a directory, a .gguf or .safetensors file, "
        f"{SCHEME}org/name, or one of: {', '.join(PRESETS)}.{hint}"
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


def _fetch(address: str, *, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, in_address, file = parse_file_address(address)
    revision = in_address or revision
    at = f" at revision {revision!r}" if revision else ""
    try:
        patterns = _patterns(HfApi(), repository, revision, weights=weights, file=file)
        path = snapshot_download(repository, revision=revision, allow_patterns=patterns)
        return _file_in(Path(path), file, address)
    except GatedRepoError as error:
        raise PresetError(
            f"{address} is gated; accept its terms at https://huggingface.co/{repository} and set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise PresetError(f"{address} has no revision {revision!r}; check its branches") from error
    except RepositoryNotFoundError as error:
        raise PresetError(
            f"the Hub has no repository {repository!r}, or it is private: check the name, and set "
            "HF_TOKEN for a private one"
        ) from error
    except LocalEntryNotFoundError as error:
        raise PresetError(
            f"{address}{at} is not in the cache and the Hub cannot be reached; go online once, or "
            "give a local directory"
        ) from error
    except HFValidationError as error:
        raise PresetError(f"{address} is no name that the Hub allows: {_line(error)}") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise PresetError(
                f"the Hub does not know the token that {address} was asked for with; set HF_TOKEN "
                "to a valid one of https://huggingface.co/settings/tokens, or unset it"
            ) from error
        raise PresetError(
            f"the Hub did not give {address}{at} ({_line(error)}); try again later"
        ) from error


def _patterns(
    api: HfApi, repository: str, revision: str | None, *, weights: bool, file: str | None
) -> list[str]:
    """Which files to fetch: those of the kind that the repository is of."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # list_repo_files would retry for half a minute where there is no network.
        siblings = api.model_info(repository, revision=revision, timeout=10).siblings or []
        names = [sibling.rfilename for sibling in siblings]
    except HFValidationError:
        raise
    except Exception as error:
        # The transport's errors have no names that hold over the client's versions. Whatever is
        # wrong, the fetch that follows meets it too, and knows what the cache still allows.
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        names = _names_in_cache(repository, revision)
    if names is None:
        return [*SMALL, *(WEIGHTS if weights else ()), *([] if file is None else [file])]
    where = f"{SCHEME}{repository}" + (f"@{revision}" if revision else "")
    chosen = needed(names, weights=weights, file=file, where=where)
    # The client takes patterns, and a name may hold what a pattern means something by.
    return [glob.escape(name) for name in chosen]


def _names_in_cache(repository: str, revision: str | None) -> list[str] | None:
    """The repository's files as they were listed when some were fetched; None where unknown."""
    try:  # from version 2 on; before, the client could not tell what the cache lacks
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return [entry.path for entry in get_cached_repo_tree(repository, revision=revision)]
    except CachedRepoTreeNotFoundError:
        return None


def _file_in(directory: Path, file: str | None, address: str) -> Path:
    if file is None:
        return directory
    if not (directory / file).is_file():
        raise PresetError(
            f"{address} is not in the cache and the Hub cannot be reached; go online once, or give "
            "a local file"
        )
    return directory / file


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
