"""Meta's `tokenizer.model` of Llama 3: a tiktoken vocabulary, as a Rust tokenizer.

The file holds lines of a base64 token and its rank, no merges, no regex and no special tokens:
those are facts of Llama 3, and here.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from puna.errors import TokenizerError
from puna.text.streaming import byte_alphabet

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
# What ends a turn of an instruct model, or a text: generation stops at each that exists.
LLAMA3_STOP_TOKENS = ("<|eot_id|>", "<|eom_id|>", END_OF_TEXT)


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later, in the order of their ids from 128,000.

    Llama 3.0 gives the fifth, ninth and eleventh the names of reserved tokens; it does not use
    them. Source: the `tokenizer.json` of Llama 3.1 to 3.3.
    """
    named = {
        0: BEGIN_OF_TEXT,
        1: END_OF_TEXT,
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    tokens = []
    for place in range(256):
        reserved = place - sum(other < place for other in named)
        tokens.append(named.get(place, f"<|reserved_special_token_{reserved}|>"))
    return tokens


def is_tiktoken_file(path: Path) -> bool:
    """Whether the file's first line is a base64 token and a rank (SentencePiece is binary)."""
    with open(path, "rb") as file:
        fields = file.readline(4096).split()
    if len(fields) != 2 or not fields[1].isdigit():
        return False
    try:
        base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        return False
    return True


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file with their ranks.

    Raises:
        TokenizerError: a line is not a base64 token and a rank, or the ranks are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(
                f"{path}, line {number}: expected a base64 token and its rank, got {line[:80]!r}. "
                "Is this Meta's tokenizer.model? Download it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{path}: expected {len(ranks)} different tokens ranked 0 to {len(ranks) - 1}; "
            "ranks are missing or twice there. Download the file again."
        )
    return ranks


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges, in order of application, that a vocabulary of ranks stands for.

    tiktoken merges whichever neighbours make the token of lowest rank, so every split of a token
    into two tokens is a merge, as urgent as the token's rank. Among splits of one token the
    order is that of the parts' ranks, as in the `tokenizer.json` that Meta's models come with.
    """
    merges: list[tuple[bytes, bytes]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(splits, key=lambda split: (ranks[split[0]], ranks[split[1]]))
    return merges


def backend_from_tiktoken(path: Path) -> tokenizers.Tokenizer:
    """The Rust tokenizer for Meta's Llama 3 `tokenizer.model`, its special tokens included.

    Raises:
        TokenizerError: the file is not a tiktoken vocabulary.
    """
    ranks = read_ranks(path)
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    text_of = {token: "".join(char_of[byte] for byte in token) for token in ranks}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={text_of[token]: rank for token, rank in ranks.items()},
            merges=[(text_of[left], text_of[right]) for left, right in merges_of_ranks(ranks)],
            # tiktoken looks a whole word up before it merges
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = byte_level_split(LLAMA3_PATTERN)
    backend.decoder = decoders.ByteLevel()
    special = llama3_special_tokens()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.post_processor = start_token_processor(BEGIN_OF_TEXT, len(ranks))
    return backend


def byte_level_split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Split at every pattern in turn, keeping all of the text, then write bytes as characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def start_token_processor(token: str, token_id: int) -> processors.PostProcessor:
    """Put the start token before a text (and each text of a pair)."""
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, token_id)],
    )
