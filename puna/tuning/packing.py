"""Which examples share a sequence, and which lengths sequences are padded to."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put examples into as few sequences as best-fit decreasing finds.

    The longest example goes first, each into the fullest sequence that still has room for it. The
    same lengths always give the same sequences.

    Args:
        lengths: how many tokens each example takes, 1 to `capacity`.
        capacity: how many tokens a sequence has.

    Returns:
        The places of the examples in `lengths`, a list a sequence; every example is in one.

    Raises:
        ValueError: an example has no tokens, or more than fit.

    >>> pack([5, 3, 4, 2, 6], capacity=8)
    [[4, 3], [0, 1], [2]]
    """
    if wrong := [length for length in lengths if not 1 <= length <= capacity]:
        raise ValueError(
            f"an example takes {wrong[0]} tokens; expected 1 to the capacity of {capacity}: cut "
            "longer ones first, and leave out empty ones"
        )
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> sequences that have as many, a heap
    sizes: list[int] = []  # the keys of `with_room`, sorted
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect.bisect_left(sizes, lengths[place])
        if found == len(sizes):
            chosen, free = len(sequences), capacity
            sequences.append([])
        else:
            free = sizes[found]
            chosen = heapq.heappop(with_room[free])
            if not with_room[free]:
                del with_room[free], sizes[found]
        sequences[chosen].append(place)
        left = free - lengths[place]
        if left:
            if left not in with_room:
                bisect.insort(sizes, left)
            heapq.heappush(with_room.setdefault(left, []), chosen)
    return sequences


def ladder(longest: int) -> list[int]:
    """The few lengths that sequences are padded to, so that few programs are compiled.

    Each is at most a half longer than the one before, so from 16 on at most a third is padding.

    Args:
        longest: the last of them, in tokens.

    >>> ladder(200)
    [16, 24, 32, 48, 64, 96, 128, 192, 200]
    """
    steps: list[int] = []
    for power in range(4, longest.bit_length() + 1):
        steps += [2**power, 2**power * 3 // 2]
    return [step for step in steps if step < longest] + [longest]


def step_for(length: int, steps: Sequence[int]) -> int:
    """The first of the sorted `steps` that `length` tokens fit in.

    >>> step_for(50, ladder(200))
    64
    """
    return steps[bisect.bisect_left(steps, length)]
