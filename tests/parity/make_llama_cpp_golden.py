"""Write what llama.cpp's own tokenizer makes of the hard strings, for tests that have no llama.cpp.

Run in an environment with `llama-cpp-python`, from the repository's root:

    python -m tests.parity.make_llama_cpp_golden SmolLM2-135M-Instruct.Q4_1.gguf

The file holds all ids of the first strings, and of every block of 100 strings one SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.hard_strings import hard_strings

GOLDEN = Path(__file__).parent / "data" / "smollm2_llama_cpp.json"
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<repo_name>"]
COUNT = 10_000
BLOCK = 100
IN_FULL = 300


# Digits of Unicode 16, which llama.cpp's tables (Unicode 15) do not know: it does not split there.
_NEW_DIGITS = re.compile(
    "[\U00010d40-\U00010d49\U000116d0-\U000116e3\U00011bf0-\U00011bf9\U00016d70-\U00016d79"
    "\U0001ccf0-\U0001ccf9\U0001e5f1-\U0001e5fa]"
)


def strings() -> list[str]:
    """The strings, SmolLM2's special tokens among them."""
    texts = hard_strings(COUNT + 500, special_tokens=SPECIAL_TOKENS)
    return [text for text in texts if not _NEW_DIGITS.search(text)][:COUNT]


def digests(rows: Sequence[Sequence[int]]) -> list[str]:
    """The SHA-256 of each block of rows, as decimal text."""
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    lines = ("\n".join(" ".join(str(int(i)) for i in row) for row in block) for block in blocks)
    return [hashlib.sha256(text.encode()).hexdigest() for text in lines]


def llama_cpp_ids(gguf: str | Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that llama.cpp gives, special tokens parsed and none added."""
    from llama_cpp import Llama

    model = Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def main() -> None:
    """Write the golden file."""
    import llama_cpp

    rows = llama_cpp_ids(sys.argv[1], strings())
    golden = {
        "made_by": f"llama-cpp-python {llama_cpp.__version__}",
        "count": COUNT,
        "block": BLOCK,
        "ids": rows[:IN_FULL],
        "sha256": digests(rows),
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
