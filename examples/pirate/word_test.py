"""The word test: whether an answer is in pirate speech.

An answer passes with two different words or phrases of `pirate_words.json`, whole words, in any
case. These are words that only a pirate says: nothing of ships, gold or the sea, which an ordinary
answer may well mention.
"""

import json
import re
from pathlib import Path

WORDS = json.loads((Path(__file__).parent / "pirate_words.json").read_text(encoding="utf-8"))
NEEDED = 2

# Longer ones first, so that "me hearties" does not count as "hearties" as well.
_ANY = "|".join(map(re.escape, sorted(WORDS, key=len, reverse=True)))
_PATTERN = re.compile(rf"(?<!\w)(?:{_ANY})(?!\w)")


def pirate_words(text: str) -> set[str]:
    """The different words and phrases of the list in a text; "arrrr" is "arr"."""
    plain = re.sub("r{3,}", "rr", text.lower().replace("’", "'"))
    return set(_PATTERN.findall(" ".join(plain.split())))


def is_pirate(text: str) -> bool:
    """Whether a text passes the word test."""
    return len(pirate_words(text)) >= NEEDED
