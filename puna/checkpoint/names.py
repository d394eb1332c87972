"""The tensor names of other formats beside ours, which are Hugging Face's: pure data.

A rule is `(theirs, ours, transform)`, `{}` standing for the layer's number. A transform is its own
pair of functions, so the way back is derived and not written a second time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Heads(NamedTuple):
    """How many heads a model has: `query` and `key_value`."""

    query: int
    key_value: int


@dataclass(frozen=True, slots=True)
class Transform:
    """A reversible change of a tensor's values between their format and ours.

    Args:
        name: what it is called in messages.
        to_ours: `(array, heads)` → array, from their format.
        to_theirs: the inverse.
    """

    name: str
    to_ours: Callable[[np.ndarray, Heads], np.ndarray]
    to_theirs: Callable[[np.ndarray, Heads], np.ndarray]

    @property
    def inverse(self) -> Transform:
        """The same transform the other way round."""
        return Transform(self.name, self.to_theirs, self.to_ours)


class Rule(NamedTuple):
    """One line of a table: their name, our name, and what happens to the values between."""

    theirs: str
    ours: str
    transform: Transform


def halves_from_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows from rotary pairs (0, 1), (2, 3), … to halves (0, d/2), (1, d/2 + 1), …: Meta's to HF's.

    Args:
        array: `(heads * d, ...)`; rows of anything, packed weights too.
        heads: the number of heads along the rows.

    Returns:
        A new array of the same shape.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def pairs_from_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves_from_pairs`."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


SAME = Transform("same", lambda array, _: array, lambda array, _: array)
QUERY_ROWS = Transform(
    "query rows",
    lambda array, heads: halves_from_pairs(array, heads.query),
    lambda array, heads: pairs_from_halves(array, heads.query),
)
KEY_ROWS = Transform(
    "key rows",
    lambda array, heads: halves_from_pairs(array, heads.key_value),
    lambda array, heads: pairs_from_halves(array, heads.key_value),
)

_LAYER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")


@dataclass(frozen=True, slots=True)
class NameTable:
    """A table of rules, looked up by a concrete name of theirs.

    Example:
        >>> GGUF.to_ours("blk.3.attn_q.weight")[0]
        'model.layers.3.self_attn.q_proj.weight'
        >>> GGUF.inverse.to_ours("model.norm.weight")[0]
        'output_norm.weight'
    """

    rules: tuple[Rule, ...]
    _by_theirs: dict[str, Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_theirs", {rule.theirs: rule for rule in self.rules})

    @property
    def inverse(self) -> NameTable:
        """The table from our names to theirs."""
        return NameTable(
            tuple(Rule(rule.ours, rule.theirs, rule.transform.inverse) for rule in self.rules)
        )

    def to_ours(self, theirs: str) -> tuple[str, Transform] | None:
        """Our name of a tensor of theirs, and its transform; None for a name not in the table."""
        layer = _LAYER.search(theirs)
        template = _LAYER.sub("{}", theirs, count=1)
        rule = self._by_theirs.get(template) if "{}" not in theirs else None
        if rule is None:
            return None
        return (rule.ours.format(layer.group()) if layer else rule.ours), rule.transform


def _weights_and_biases(rules: Iterable[tuple[str, str, Transform]]) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{theirs}.{kind}", f"{ours}.{kind}", transform)
        for theirs, ours, transform in rules
        for kind in ("weight", "bias")
    )


# Source: llama.cpp's gguf-py/gguf/tensor_mapping.py, for the architecture "llama"; its converter
# keeps the rows of q and k in rotary pairs.
GGUF = NameTable(
    (
        Rule("token_embd.weight", "model.embed_tokens.weight", SAME),
        Rule("output_norm.weight", "model.norm.weight", SAME),
        Rule("output.weight", "lm_head.weight", SAME),
        Rule("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", SAME),
        Rule("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", SAME),
        *_weights_and_biases(
            [
                ("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj", QUERY_ROWS),
                ("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj", KEY_ROWS),
                ("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj", SAME),
                ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj", SAME),
                ("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj", SAME),
                ("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj", SAME),
                ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj", SAME),
            ]
        ),
    )
)
