"""Ways to break bytes and JSON. All of it depends on the random generator alone."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

SIZES = (
    *range(9), 16, 31, 32, 33, 64, 127, 128, 255, 256, 4095, 4096, 2**15, 2**16 - 1, 2**16, 2**20,
    2**24, 2**26, 2**27, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**60,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8,
)  # fmt: skip

# JSON as text: `json.dumps` writes neither NaN in an integer's place nor 5,000 digits.
VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e308", "1e999",
    "1e-320", "NaN", "Infinity", "-Infinity", "2147483647", "2147483648", "4294967295",
    "4294967296", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "1" + "0" * 30, "1" * 5000, '""', '"a"', '"1"', '"\\u0000"',
    '"\\ud800"', '"../x"', '"/etc/passwd"', '"' + "x" * 20_000 + '"', '"\\n\\n"', '"é🦙"', "[]",
    "{}", "[[]]", "[null]", "[{}]", '[["a"]]', '{"a": null}', "[-1, 1e400]", "[0, 0, 0]",
    '["a", "a"]', "[" * 60 + "]" * 60, "[" * 50_000 + "]" * 50_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "[9223372036854775807, 9223372036854775807]", "[1, 2, 3, 4, 5, 6, 7, 8]",
)  # fmt: skip


def mutate_bytes(
    rng: random.Random, raw: bytes, places: Sequence[int] = (), most: int = 4
) -> bytes:
    """Break a file in one to `most` places.

    Args:
        rng: the randomness.
        raw: the file.
        places: where its numbers are, of which most are then changed; any byte without.
        most: the number of changes.
    """
    data = bytearray(raw)
    for _ in range(rng.randint(1, most)):
        if not data:
            break
        at = rng.choice(places) if places and rng.random() < 0.8 else rng.randrange(len(data))
        at = min(at, len(data) - 1)
        kind = rng.random()
        if kind < 0.45:
            layout = rng.choice(["<B", "<H", "<I", "<Q", "<Q"])
            size = struct.calcsize(layout)
            number = rng.choice([*SIZES, len(raw), len(raw) - at, at, rng.randrange(len(raw) + 1)])
            if rng.random() < 0.3:  # near what is there
                number = int.from_bytes(data[at : at + size], "little") + rng.randint(-9, 9)
            data[at : at + size] = struct.pack(layout, number % 256**size)
        elif kind < 0.65:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.75:
            data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif kind < 0.82:
            del data[at : at + rng.choice([1, 2, 4, 8, 64, 1000])]
        elif kind < 0.9:
            start, length = rng.randrange(len(data)), rng.choice([1, 8, 40, 500])
            data[at:at] = data[start : start + length]
        elif kind < 0.95:
            del data[at:]
        else:
            data += rng.randbytes(rng.choice([1, 8, 100])) if rng.random() < 0.5 else bytes(64)
    return bytes(data)


def mutate_json(rng: random.Random, text: str, values: Sequence[str] = ()) -> bytes:
    """Break a JSON file in its structure, and at times in its text.

    Args:
        rng: the randomness.
        text: the file.
        values: JSON texts to put in, beside `VALUES`.
    """
    tree: Any = [json.loads(text)]
    put: dict[str, str] = {}
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        _change(rng, tree, put, values)
    result = json.dumps(tree[0] if tree else None, ensure_ascii=rng.random() < 0.5)
    for mark, value in put.items():
        result = result.replace(f'"{mark}": 0', value).replace(f'"{mark}"', value)
    raw = result.encode("utf-8", "surrogatepass")
    if rng.random() < 0.12:
        raw = mutate_bytes(rng, raw, most=2)
    if rng.random() < 0.04:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.choice([b"\xff\xfe", b"\xc3", b"\xef\xbb\xbf", b"\0"]) + raw[at:]
    return raw


def _change(rng: random.Random, tree: Any, put: dict[str, str], values: Sequence[str]) -> None:
    """Change one place of a tree; `put` gets what is to stand where its marks are."""
    node, key = tree, 0
    while True:  # down from the root, so that rare fields change as often as entries of long lists
        child = node[key] if node else None
        if not isinstance(child, dict | list) or not child or rng.random() < 0.2:
            break
        node = child
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if not node:
        return
    mark = f"mark{len(put)}"
    kind = rng.random()
    if kind < 0.5:
        chosen = rng.choice(values) if values and rng.random() < 0.5 else rng.choice(VALUES)
        node[key], put[mark] = mark, chosen
    elif kind < 0.6 and node is not tree:
        del node[key]
    elif kind < 0.7 and isinstance(node, dict):
        node[rng.choice(["", "a", "type", "id", str(key) + "_", "x" * 300])] = node.pop(key)
    elif kind < 0.8 and isinstance(node, dict):
        other = json.dumps(rng.choice(list(node.values()))) if rng.random() < 0.5 else "0"
        node[mark], put[mark] = 0, f"{json.dumps(str(key))}: {other}"  # the key twice
    elif kind < 0.9:
        other = tree
        for _ in range(rng.randint(1, 4)):  # a part of the same tree, elsewhere
            if not isinstance(other, dict | list) or not other:
                break
            other = rng.choice(list(other.values()) if isinstance(other, dict) else other)
        node[key] = json.loads(json.dumps(other))
    elif isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = rng.choice([node[key] + 1, node[key] - 1, -node[key], rng.choice(SIZES)])
    elif isinstance(node[key], str):
        node[key] = rng.choice([node[key] + "x", node[key][:-1], node[key] * 2, node[key].upper()])
    else:
        node[key] = [node[key]]
