"""Where presets are found: a directory, a file, an `hf://` address, or a short name."""

from __future__ import annotations

import os
from pathlib import Path

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

# What a preset needs. Repositories also hold `original/*.pth`, ONNX and other copies of the same
# weights in folders of their own, which these patterns of the top folder leave where they are.
_SMALL: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "puna.json",
)
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", _INDEX)


def locate(
    preset: str | os.PathLike[str], *, weights: bool = True, revision: str | None = None
) -> Path:
    """The directory or file of a preset on this machine, fetched first where it is an address.

    Args:
        preset: a directory, a `.gguf` file, `hf://org/name`, `hf://org/name@revision`, or a name
            of `PRESETS`.
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
        f"there is no preset {text!r}; expected a directory, a .gguf file, {SCHEME}org/name, or "
        f"one of: {', '.join(PRESETS)}.{hint}"
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


def _fetch(address: str, *, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, in_address = parse_address(address)
    revision = in_address or revision
    patterns: list[str] = [*_SMALL, *(_WEIGHTS if weights else ())]
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
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
    except HfHubHTTPError as error:
        raise PresetError(f"the Hub did not give {address}{at}: {error}") from error
