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

# Source: Meta's reference code, `llama_models/llama3/model.py`; its rotary embedding turns pairs of
# neighbours.
META = NameTable(
    (
        Rule("tok_embeddings.weight", "model.embed_tokens.weight", SAME),
        Rule("norm.weight", "model.norm.weight", SAME),
        Rule("output.weight", "lm_head.weight", SAME),
        Rule("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", SAME),
        Rule("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", SAME),
        *(
            Rule(f"layers.{{}}.{theirs}.weight", f"model.layers.{{}}.{ours}.weight", transform)
            for theirs, ours, transform in [
                ("attention.wq", "self_attn.q_proj", QUERY_ROWS),
                ("attention.wk", "self_attn.k_proj", KEY_ROWS),
                ("attention.wv", "self_attn.v_proj", SAME),
                ("attention.wo", "self_attn.o_proj", SAME),
                ("feed_forward.w1", "mlp.gate_proj", SAME),
                ("feed_forward.w3", "mlp.up_proj", SAME),
                ("feed_forward.w2", "mlp.down_proj", SAME),
            ]
        ),
    )
)

# A Keras kernel has its inputs first. One axis or two (heads, head size) are the outputs of q, k
# and v, and the inputs of o; so either the first axis alone is the inputs, or the last the outputs.
INPUTS_FIRST = Transform(
    "inputs first, then heads",
    lambda array, _: array.reshape(array.shape[0], -1).T,
    lambda array, heads: array.T.reshape(array.shape[1], heads.query, -1),
)
KEY_INPUTS_FIRST = Transform(
    "inputs first, then key heads",
    INPUTS_FIRST.to_ours,
    lambda array, heads: array.T.reshape(array.shape[1], heads.key_value, -1),
)
HEADS_FIRST = Transform(
    "heads first, then outputs",
    lambda array, _: array.reshape(-1, array.shape[-1]).T,
    lambda array, heads: array.T.reshape(heads.query, -1, array.shape[0]),
)
TRANSPOSED = Transform("transposed", lambda array, _: array.T, lambda array, _: array.T)

# Source: keras-hub's `models/llama/llama_{backbone,decoder,attention}.py` and Keras's
# `saving_lib.py`, which names what it saves by attributes and classes. Its rotary embedding turns
# halves, as Hugging Face's.
_DECODER = "layers.llama_transformer_decoder.{}"
KERAS_HUB = NameTable(
    (
        Rule("layers.reversible_embedding.vars.0", "model.embed_tokens.weight", SAME),
        Rule("layers.reversible_embedding.vars.1", "lm_head.weight", TRANSPOSED),
        Rule("layers.llama_layer_norm.vars.0", "model.norm.weight", SAME),
        *(
            Rule(f"{_DECODER}.{theirs}.vars.0", f"model.layers.{{}}.{ours}.weight", transform)
            for theirs, ours, transform in [
                ("_self_attention_layernorm", "input_layernorm", SAME),
                ("_feedforward_layernorm", "post_attention_layernorm", SAME),
                ("_self_attention_layer._query_dense", "self_attn.q_proj", INPUTS_FIRST),
                ("_self_attention_layer._key_dense", "self_attn.k_proj", KEY_INPUTS_FIRST),
                ("_self_attention_layer._value_dense", "self_attn.v_proj", KEY_INPUTS_FIRST),
                ("_self_attention_layer._output_dense", "self_attn.o_proj", HEADS_FIRST),
                ("_feedforward_gate_dense", "mlp.gate_proj", TRANSPOSED),
                ("_feedforward_intermediate_dense", "mlp.up_proj", TRANSPOSED),
                ("_feedforward_output_dense", "mlp.down_proj", TRANSPOSED),
            ]
        ),
    )
)
