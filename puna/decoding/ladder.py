"""The few sizes that arrays of tokens come in, so that few programs are compiled."""

from __future__ import annotations

# Tokens of a prompt that one step takes. A longer prompt is taken in several.
CHUNKS = (16, 32, 64, 128, 256, 512)

_SMALLEST_CAPACITY = 64


def chunk_size(tokens: int) -> int:
    """The size of the chunk that holds the next of `tokens` tokens.

    >>> chunk_size(20), chunk_size(9000)
    (32, 512)
    """
    return next((size for size in CHUNKS if size >= tokens), CHUNKS[-1])


def capacity(tokens: int) -> int:
    """The size of a cache that holds `tokens` tokens: a power of two, or 3/4 of one.

    >>> capacity(10), capacity(130), capacity(1024)
    (64, 192, 1024)
    """
    size = _SMALLEST_CAPACITY
    while size < tokens:
        if size * 3 // 2 >= tokens:
            return size * 3 // 2
        size *= 2
    return size
