"""Tokens that are added to a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from puna.errors import TokenizerError


def new_tokens(
    backend: tokenizers.Tokenizer, texts: Sequence[str], first_id: int, special: bool
) -> dict[int, AddedToken]:
    """Those of `texts` that a vocabulary lacks, each once, by the ids that they shall have.

    Args:
        backend: the Rust tokenizer; it is not changed.
        texts: the tokens' texts.
        first_id: the id of the first: one more than the largest there is.
        special: whether they are control tokens.

    Raises:
        TokenizerError: a text is empty or no text, or the Rust library would give other ids.
    """
    for text in texts:
        if not isinstance(text, str) or not text:
            raise TokenizerError(
                f"Expected the texts of tokens to add, got {text!r} among them; nothing was added."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise TokenizerError(f"The token {text!r} is not valid Unicode; nothing was added.")
    missing = [text for text in dict.fromkeys(texts) if backend.token_to_id(text) is None]
    # The library counts on from the number of the model's tokens, or from the largest added id.
    largest_added = max(backend.get_added_tokens_decoder(), default=-1)
    next_id = max(backend.get_vocab_size(with_added_tokens=False), largest_added + 1)
    if missing and next_id != first_id:
        raise TokenizerError(
            f"The vocabulary leaves ids unused between {next_id} and {first_id - 1}, so the "
            "tokenizers library cannot add tokens after it. Name those ids in tokenizer.json."
        )
    # Not normalized: found as they are written, also where a normalizer changes text (Llama 2).
    return {
        first_id + place: AddedToken(text, special=special, normalized=False)
        for place, text in enumerate(missing)
    }


def list_in_config(config: dict[str, Any], new: Mapping[int, AddedToken]) -> None:
    """List new tokens where `tokenizer_config.json` lists the old: readers want it complete."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    config["added_tokens_decoder"] = dict(listed) | {
        str(token_id): {"content": token.content} | {flag: getattr(token, flag) for flag in flags}
        for token_id, token in new.items()
    }
