"""The few sizes that arrays of tokens come in, so that few programs are compiled."""

from __future__ import annotations

# Tokens of a prompt that one step takes. A longer prompt is taken in several.
CHUNKS = (16, 32, 64, 128, 256, 512)

# Tokens that a cache holds at the least, and from where on its sizes double. Up to the second a
# cache is made for all that may come; a longer one grows.
_SMALLEST, _DOUBLING = 256, 1024


def chunk_size(tokens: int) -> int:
    """The size of the chunk that holds the next of `tokens` tokens.

    >>> chunk_size(20), chunk_size(9000)
    (32, 512)
    """
    return next((size for size in CHUNKS if size >= tokens), CHUNKS[-1])


def chunks(start: int, end: int) -> list[tuple[int, int]]:
    """The chunks that take the tokens from `start` to `end`: where each begins, and its size.

    >>> chunks(0, 530), chunks(40, 60)
    ([(0, 512), (512, 32)], [(40, 32)])
    """
    found = []
    while start < end:
        found.append((start, chunk_size(end - start)))
        start += found[-1][1]
    return found


def capacity(tokens: int) -> int:
    """The size of a cache that holds `tokens` tokens.

    >>> capacity(10), capacity(300), capacity(1024), capacity(1025)
    (256, 1024, 1024, 2048)
    """
    size = _SMALLEST if tokens <= _SMALLEST else _DOUBLING
    while size < tokens:
        size *= 2
    return size


def first_capacity(prompt: int, total: int) -> int:
    """The size of a cache for a prompt that may grow to `total` tokens; it can be grown later.

    >>> first_capacity(20, 100_000), first_capacity(20, 30), first_capacity(20, 300)
    (1024, 256, 1024)
    """
    return capacity(total if total <= _DOUBLING else min(total, prompt + _SMALLEST))


def rows(prompts: int) -> int:
    """The number of rows that a batch of `prompts` is computed with: a power of two.

    >>> rows(1), rows(3), rows(8)
    (1, 4, 8)
    """
    return power_of_two(prompts, 1)


def power_of_two(needed: int, least: int) -> int:
    """The size of a table of `needed` places.

    >>> power_of_two(0, 8), power_of_two(8, 8), power_of_two(9, 8)
    (8, 8, 16)
    """
    return max(least, 1 << max(needed - 1, 0).bit_length())
