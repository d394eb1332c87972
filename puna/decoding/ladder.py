"""The few sizes that arrays of tokens come in, so that few programs are compiled."""

from __future__ import annotations

# Tokens of a prompt that one step takes. A longer prompt is taken in several.
CHUNKS = (16, 32, 64, 128, 256, 512)

# Tokens that a cache holds at the least, and that it is made larger than the prompt: a new size is
# a new program, while unused places cost little.
_SMALLEST_CAPACITY = 256


def chunk_size(tokens: int) -> int:
    """The size of the chunk that holds the next of `tokens` tokens.

    >>> chunk_size(20), chunk_size(9000)
    (32, 512)
    """
    return next((size for size in CHUNKS if size >= tokens), CHUNKS[-1])


def capacity(tokens: int) -> int:
    """The size of a cache that holds `tokens` tokens: a power of two.

    >>> capacity(10), capacity(300), capacity(1024)
    (256, 512, 1024)
    """
    size = _SMALLEST_CAPACITY
    while size < tokens:
        size *= 2
    return size


def first_capacity(prompt: int, total: int) -> int:
    """The size of a cache for a prompt that may grow to `total` tokens; it can be grown later.

    >>> first_capacity(20, 100_000), first_capacity(20, 30)
    (512, 256)
    """
    return capacity(min(total, prompt + _SMALLEST_CAPACITY))
