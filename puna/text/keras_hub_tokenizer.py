"""A tokenizer from the files of a keras-hub preset.

Sources: keras-hub 0.32's `tokenizers/byte_pair_tokenizer.py` and
`models/llama3/llama3_tokenizer.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from puna.errors import TokenizerError
from puna.text.tiktoken import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    LLAMA3_PATTERN,
    LLAMA3_STOP_TOKENS,
    byte_level_split,
    llama3_special_tokens,
    start_token_processor,
)

CONFIG = "tokenizer.json"
ASSETS = "assets/tokenizer"
VOCABULARY, MERGES = f"{ASSETS}/vocabulary.json", f"{ASSETS}/merges.txt"
_CLASSES = ("keras_hub>Llama3Tokenizer", "keras_nlp>Llama3Tokenizer")


def settings_from_keras_hub(directory: Path) -> dict[str, Any]:
    """`Tokenizer`'s constructor arguments from the files of a keras-hub preset.

    The ids are those of Llama 3, which are not always keras-hub's: 0.32 gives Llama 3's rule of
    splitting to the tokenizers library as a plain string, so that it never splits and merges over
    the ends of words ("  are" begins with two spaces in one token); and it merges a word from its
    letters even where the word is a token, which gets 588 of Llama 3's tokens wrong. All of Llama
    3's special tokens that the vocabulary has are special, where keras-hub knows five.

    Args:
        directory: it holds `tokenizer.json` (Keras's, a config) and `assets/tokenizer/`.

    Returns:
        The arguments by name, the Rust tokenizer as `backend` among them.

    Raises:
        TokenizerError: a file is missing or malformed, or of another class of tokenizer.
    """
    config = _read_json(directory / CONFIG)
    if config.get("registered_name") not in _CLASSES or not isinstance(config.get("config"), dict):
        raise TokenizerError(
            f"{directory / CONFIG} is of {config.get('registered_name')!r:.80}; expected "
            f"{_CLASSES[0]}. Pass tokenizer or preprocessor of your own."
        )
    arguments = config["config"]
    if arguments.get("add_prefix_space"):
        raise TokenizerError(
            f"{directory / CONFIG} has add_prefix_space, which no Llama 3 has. Make the tokenizer "
            "with the tokenizers library and pass it."
        )
    vocabulary = _read_json(directory / VOCABULARY)
    merges = _read_merges(directory / MERGES)
    start = arguments.get("bos_token") or BEGIN_OF_TEXT
    end = arguments.get("eos_token") or END_OF_TEXT
    unsplittable = arguments.get("unsplittable_tokens") or []
    for token in (start, end, *unsplittable):
        if token not in vocabulary:
            raise TokenizerError(
                f"{directory / VOCABULARY} lacks the special token {token!r:.80}. The files are "
                "not of one preset: download them again."
            )
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)
        )
    except Exception as error:
        raise TokenizerError(
            f"The vocabulary and merges in {directory} do not fit together: {error}. Download them "
            "again."
        ) from error
    backend.pre_tokenizer = byte_level_split(LLAMA3_PATTERN)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys([start, end, *unsplittable, *llama3_special_tokens()])
    special = sorted((t for t in special if t in vocabulary), key=vocabulary.__getitem__)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.post_processor = start_token_processor(start, vocabulary[start])
    return {
        "backend": backend,
        "start_token": start,
        "end_token": end,
        "pad_token": None,  # keras-hub pads with id 0
        "stop_token_ids": [vocabulary[t] for t in LLAMA3_STOP_TOKENS if t in vocabulary],
        "config": {"clean_up_tokenization_spaces": False},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TokenizerError(f"There is no {path}. Download the whole preset.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    try:
        lines = path.read_bytes().decode().split("\n")
    except FileNotFoundError:
        raise TokenizerError(f"There is no {path}. Download the whole preset.") from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not text: {error}. Download it again.") from error
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#version:") or not line:
            continue
        parts = line.rstrip().split(" ")
        if len(parts) != 2:
            raise TokenizerError(
                f"{path}, line {number}: expected two tokens, got {line!r:.80}. Download it again."
            )
        merges.append((parts[0], parts[1]))
    return merges
