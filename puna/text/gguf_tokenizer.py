"""A tokenizer from the metadata of a GGUF file.

Source: the GGUF specification and llama.cpp's `llama-vocab.cpp`. Where llama.cpp rewrites a
regular expression for an engine without case folding or Unicode classes, the original of the
model's own `tokenizer.json` stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from puna.errors import TokenizerError
from puna.text.tiktoken import LLAMA3_PATTERN, byte_level_split, start_token_processor

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT_PATTERNS = (r"[\p{P}$+<=>^~|]+", _GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class _PreRule:
    """How a named `tokenizer.ggml.pre` splits text before merging."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_start_token: bool = False
    nfc: bool = False


_LLAMA3 = _PreRule((LLAMA3_PATTERN,), ignore_merges=True, add_start_token=True)
_GPT2 = _PreRule((_GPT2_PATTERN,))
_DIGITS = _PreRule((r"\p{N}", _GPT2_PATTERN))
_QWEN2 = _PreRule((_QWEN2_PATTERN,), nfc=True)
_PRE_RULES: dict[str, _PreRule] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _PreRule((LLAMA3_PATTERN,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _PreRule((_TEKKEN_PATTERN,), ignore_merges=True, add_start_token=True),
    "default": _PreRule(_DEFAULT_PATTERNS),
}


def settings_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`Tokenizer`'s constructor arguments from a GGUF file's metadata.

    Args:
        metadata: the file's key-value pairs as plain Python values (arrays as lists).

    Returns:
        The arguments by name, the Rust tokenizer as `backend` among them.

    Raises:
        TokenizerError: a key is missing, or the vocabulary's kind or split rule is not known.
    """
    tokens = _need_list(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        twice = sorted({token for token in tokens if tokens.count(token) > 1})[:5]
        raise TokenizerError(f"The GGUF vocabulary holds these tokens more than once: {twice!r}.")
    model = _need(metadata, "model")
    if model == "gpt2":
        backend, add_start = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, add_start = _sentencepiece(metadata, tokens)
    else:
        raise TokenizerError(
            f"The GGUF file's tokenizer.ggml.model is {model!r:.80}; Llama models have 'gpt2' "
            "(byte-level BPE) or 'llama' (SentencePiece BPE). Load the Hugging Face checkpoint."
        )
    _add_special_tokens(backend, metadata, tokens)

    def token(name: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            return None
        return tokens[token_id]

    start = token("bos")
    add_start = bool(metadata.get("tokenizer.ggml.add_bos_token", add_start)) and start is not None
    if start is not None and add_start:
        backend.post_processor = start_token_processor(start, tokens.index(start))
    stops = [token(name) for name in ("eos", "eot", "eom")]
    return {
        "backend": backend,
        "start_token": start,
        "end_token": token("eos"),
        "pad_token": token("padding"),
        "stop_token_ids": [tokens.index(stop) for stop in stops if stop is not None],
        "chat_template": _templates(metadata),
        "config": {"clean_up_tokenization_spaces": False},
    }


def _need(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if metadata.get(key) is None:
        raise TokenizerError(
            f"The GGUF file has no {key}, so it holds no whole tokenizer. Load the tokenizer from "
            "the model's Hugging Face directory, or convert the model again."
        )
    return metadata[key]


def _need_list(metadata: Mapping[str, Any], name: str, *kinds: type) -> list[Any]:
    """A list of which every item is of one of some types."""
    value = _need(metadata, name)
    if not isinstance(value, list) or not all(type(item) in kinds for item in value):
        raise TokenizerError(
            f"The GGUF file's tokenizer.ggml.{name} is {value!r:.80}; expected a list of "
            f"{kinds[0].__name__}. The file is broken: convert the model again."
        )
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The default chat template and the named ones."""
    prefix = "tokenizer.chat_template"
    found = {key: value for key, value in metadata.items() if key.startswith(prefix)}
    found.pop(f"{prefix}s", None)  # the names of the others
    for key, value in found.items():
        if not isinstance(value, str):
            raise TokenizerError(f"The GGUF file's {key} is {value!r:.80}; expected a text.")
    named = {
        key[len(prefix) + 1 :]: text for key, text in found.items() if key[len(prefix) :][:1] == "."
    }
    return ({"default": found[prefix]} if prefix in found else {}) | named


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, split by the file's own rule."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_RULES:
        raise TokenizerError(
            f"The GGUF file's tokenizer.ggml.pre is {pre!r:.80}, a way of splitting text that Puna "
            f"does not know; it knows {', '.join(sorted(_PRE_RULES))}. Guessing would give wrong "
            "ids: load the tokenizer from the model's Hugging Face directory."
        )
    rule = _PRE_RULES[pre]
    # a merge's left part may itself begin with a space, its right part may not hold one
    pairs = _need_list(metadata, "merges", str)
    wrong = next((pair for pair in pairs if " " not in pair[1:]), None)
    if wrong is not None:
        raise TokenizerError(
            f"The GGUF file's merge {wrong!r:.80} is not two tokens with a space between them. "
            "The file is broken: convert the model again."
        )
    merges = [(m[: m.index(" ", 1)], m[m.index(" ", 1) + 1 :]) for m in pairs]
    backend = _backend(tokens, merges, ignore_merges=rule.ignore_merges)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level_split(*rule.patterns)
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_start_token


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE: merges by score, unknown characters as bytes, spaces as `▁`."""
    types = _types(metadata, tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    given = _need_list(metadata, "scores", float, int)
    if len(given) != len(tokens) or type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise TokenizerError(
            f"The GGUF file has {len(tokens)} tokens, {len(given)} scores and the unknown token "
            f"{unknown!r:.80}; expected a score for each and one of them. The file is broken: "
            "convert the model again."
        )
    scores = {
        token: score
        for token, score, kind in zip(tokens, given, types, strict=True)
        # merging must not make a control token out of its letters
        if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    backend = _backend(
        tokens,
        _merges_of_scores(scores, tokens),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges_of_scores(scores: dict[str, float], tokens: list[str]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best score of the whole token first.

    SentencePiece merges the neighbours that make the token of highest score.
    """
    place = {token: index for index, token in enumerate(tokens) if token in scores}
    merges: list[tuple[str, str]] = []
    for token in sorted(scores, key=lambda token: (-scores[token], place[token])):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [(left, right) for left, right in splits if left in place and right in place]
        merges += sorted(splits, key=lambda split: (place[split[0]], place[split[1]]))
    return merges


def _backend(
    tokens: list[str], merges: list[tuple[str, str]], **settings: Any
) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **settings))
    except Exception as error:
        raise TokenizerError(
            f"The GGUF file's vocabulary and merges do not fit together: {error}"
        ) from error


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    types = _need_list(metadata, "token_type", int)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"The GGUF file has {len(tokens)} tokens but {len(types)} token types; expected one "
            "for each. The file is broken: convert the model again."
        )
    return types


def _add_special_tokens(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
    """Tell the backend which tokens of the vocabulary are found whole in text."""
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, _types(metadata, tokens), strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
