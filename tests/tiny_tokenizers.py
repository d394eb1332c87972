"""Small tokenizers of the two kinds that Llamas have, for tests that need no download."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from puna.text.streaming import byte_alphabet
from puna.text.tiktoken import LLAMA3_PATTERN, byte_level_split, start_token_processor
from puna.text.tokenizer import Tokenizer

LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
LLAMA3_TEMPLATE = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'\
+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MERGES = ["H e", "l l", "Ġ t", "o Ġ", "Ċ Ċ", "He ll"]


def byte_level(**options: Any) -> Tokenizer:
    """All bytes, six merges, Llama 3's main special tokens and a non-special added token."""
    vocabulary = {char: place for place, char in enumerate(byte_alphabet())}
    merges = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = byte_level_split(LLAMA3_PATTERN)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA3_SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.post_processor = start_token_processor(
        LLAMA3_SPECIAL[0], backend.token_to_id(LLAMA3_SPECIAL[0])
    )
    given: dict[str, Any] = {
        "start_token": "<|begin_of_text|>",
        "end_token": "<|eot_id|>",
        "chat_template": LLAMA3_TEMPLATE,
    }
    return Tokenizer(backend, **{**given, **options})


def sentencepiece_metadata() -> dict[str, Any]:
    """GGUF metadata of a SentencePiece vocabulary with byte tokens, in which "</s>" could merge."""
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", "▁▁", "a", "b", "ab", "▁a", "▁ab", "c", "<", "/", "s", ">", "</", "s>", "é"]
    tokens = [*control, *byte_tokens, *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(place) for place in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def byte_level_metadata(pre: str | None = "llama-bpe") -> dict[str, Any]:
    """GGUF metadata of the vocabulary of `byte_level`."""
    pieces = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*pieces, *LLAMA3_SPECIAL, "<think>"],
        "tokenizer.ggml.token_type": [1] * len(pieces) + [3] * len(LLAMA3_SPECIAL) + [4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": len(pieces),
        "tokenizer.ggml.eos_token_id": len(pieces) + 4,
        "tokenizer.chat_template": LLAMA3_TEMPLATE,
        "tokenizer.chat_template.rag": "{{ documents }}",
        "tokenizer.chat_templates": ["rag"],
    }
    return metadata if pre is None else metadata | {"tokenizer.ggml.pre": pre}
