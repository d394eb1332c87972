"""GGUF files, written with whatever is to be wrong in them."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.gguf_header import STORAGE
from puna.config import LlamaConfig
from puna.text.gguf_tokenizer import settings_from_gguf
from puna.text.tokenizer import Tokenizer
from tests.fuzz.mutate import SIZES, VALUES, mutate_bytes
from tests.fuzz.weights import read_all
from tests.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

D, F = 64, 96
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "general.alignment": 32,
}
_NUMBERS = ["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d"]


class _Writer:
    """The file so far, and where its counts, types, lengths and offsets are."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.places: list[int] = []

    def number(self, layout: str, value: Any) -> None:
        self.places.append(len(self.data))
        self.data += struct.pack(layout, value)

    def string(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        self.number("<Q", len(raw))
        self.data += raw

    def value(self, value: Any, kind: int | None = None, *, tagged: bool = True) -> None:
        """A metadata value; lists are arrays of the type of their first item."""
        if kind is None:
            kinds = {bool: 7, int: 5, float: 6, str: 8}
            kind = kinds.get(type(value), 9 if isinstance(value, list) else 4)
            kind = 11 if kind == 5 and not -(2**31) <= value < 2**31 else kind
        if tagged:
            self.number("<I", kind)
        if kind == 9:
            item = _Writer()
            item.value(value[0] if value else 0)
            (inner,) = struct.unpack("<I", item.data[:4])
            self.number("<I", inner)
            self.number("<Q", len(value))
            for part in value:
                self.value(part, inner, tagged=False)
        elif kind == 8:
            self.string(value)
        else:
            self.number(_NUMBERS[kind], value)


def tensors(vocabulary: int) -> list[list[Any]]:
    """Name, dimensions in GGUF's order, and type of each tensor."""
    blk = "blk.0."
    return [
        ["token_embd.weight", [D, vocabulary], 8],
        ["output_norm.weight", [D], 0],
        [blk + "attn_norm.weight", [D], 0],
        [blk + "ffn_norm.weight", [D], 0],
        [blk + "attn_q.weight", [D, D], 2],
        [blk + "attn_k.weight", [D, D // 2], 3],
        [blk + "attn_v.weight", [D, D // 2], 1],
        [blk + "attn_output.weight", [D, D], 30],
        [blk + "ffn_gate.weight", [D, F], 6],
        [blk + "ffn_up.weight", [D, F], 20],
        [blk + "ffn_down.weight", [F, D], 0],
        ["rope_freqs.weight", [8], 0],
    ]


def serialize(
    pairs: list[tuple[str, Any]], listed: list[list[Any]], rng: random.Random | None
) -> tuple[bytes, list[int]]:
    """The file, and where the numbers of its header are."""
    out = _Writer()
    out.data += b"GGUF"
    out.number("<I", 3)
    out.number("<Q", len(listed))
    out.number("<Q", len(pairs))
    for key, value in pairs:
        out.string(key)
        try:
            out.value(value)
        except (struct.error, OverflowError, TypeError, AttributeError):
            out.value(0)  # a list of several types, which the format cannot say
    data = bytearray()
    for name, dims, kind in listed:
        storage = STORAGE[kind]
        numbers = np.ones(min(math.prod(dims), 1 << 15), np.float32)
        nbytes = max(len(numbers) // storage.block, 1) * storage.nbytes
        raw = numbers.tobytes() if kind == 0 else bytes(nbytes)
        out.string(name)
        out.number("<I", len(dims))
        for dim in dims:
            out.number("<Q", dim % 2**64)
        out.number("<I", kind)
        out.number("<Q", len(data))
        data += raw + bytes(-len(raw) % 32)
        if rng is not None and rng.random() < 0.01:
            data += bytes(32)
    out.data += bytes(-len(out.data) % 32)
    return bytes(out.data) + bytes(data), out.places


class GGUF:
    """One GGUF file, its tokenizer in it."""

    name = "gguf"
    file = "model.gguf"

    def write(self, directory: Path) -> None:
        pairs = LLAMA | byte_level_metadata()
        size = len(pairs["tokenizer.ggml.tokens"])
        raw, _ = serialize(list(pairs.items()), tensors(size), None)
        (directory / self.file).write_bytes(raw)

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        vocabulary = byte_level_metadata() if rng.random() < 0.6 else sentencepiece_metadata()
        pairs: list[tuple[str, Any]] = list((LLAMA | vocabulary).items())
        listed = tensors(len(vocabulary["tokenizer.ggml.tokens"]))
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            if rng.random() < 0.65:
                self._change_pair(rng, pairs)
            else:
                self._change_tensor(rng, listed)
        raw, places = serialize(pairs, listed, rng)
        if rng.random() < 0.5:
            raw = mutate_bytes(rng, raw, [*places[:40], *places[-80:], *rng.sample(places, 40)])
        (case / self.file).write_bytes(raw)

    def _change_pair(self, rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
        place = rng.randrange(len(pairs))
        key, value = pairs[place]
        kind = rng.random()
        if kind < 0.35:
            simple = [text for text in VALUES if len(text) < 100 and not text.startswith("[[[")]
            pairs[place] = (key, json.loads(rng.choice(simple)))
        elif kind < 0.5 and isinstance(value, list) and value:
            index = rng.randrange(len(value))
            other = {str: ["", "a", value[0], "é", " ", "a b c", "<0x41>"], int: [*range(-1, 9)]}
            new = rng.choice(other.get(type(value[0]), [float("nan"), float("inf"), 0.0, -1e30]))
            pairs[place] = (key, [*value[:index], new, *value[index + rng.randint(0, 1) :]])
        elif kind < 0.6 and isinstance(value, int):
            pairs[place] = (key, rng.choice([*SIZES[:-4], -1, value + 1, value - 1]))
        elif kind < 0.75:
            del pairs[place]
        elif kind < 0.85:
            pairs[place] = (key, pairs[rng.randrange(len(pairs))][1])
        elif kind < 0.93:
            pairs.append((rng.choice([key, "llama.x", "split.count", "", "\ud800"]), value))
        else:
            extra = rng.choice(
                ["rope.scaling.type", "rope.scaling.factor", "expert_count", "attention.key_length",
                 "rope.dimension_count", "attention.scale"]
            )  # fmt: skip
            pairs.append((f"llama.{extra}", rng.choice(["yarn", "linear", 0, 2.0, 16, -1])))

    def _change_tensor(self, rng: random.Random, listed: list[list[Any]]) -> None:
        tensor = rng.choice(listed)
        kind = rng.random()
        if kind < 0.3:
            tensor[1] = [rng.choice([*SIZES, D]) for _ in range(rng.randint(0, 5))]
        elif kind < 0.6:
            tensor[2] = rng.choice(list(STORAGE))
        elif kind < 0.75:
            tensor[0] = rng.choice([listed[0][0], "", "a\nb", "blk.9999999999.attn_q.weight"])
        elif kind < 0.85:
            listed.remove(tensor)
        else:
            listed.append(list(tensor))

    def load(self, case: Path) -> None:
        source = GGUFSource(case / self.file)
        config = LlamaConfig.from_hf(source.hf_config())
        config.rope.inverse_frequencies(min(config.head_size, 1024))
        tokenizer = Tokenizer(**settings_from_gguf(source.metadata))
        tokenizer.detokenize(tokenizer("Hello  <|eot_id|> é\n"))
        read_all(source)
