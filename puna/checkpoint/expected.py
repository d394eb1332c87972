"""The tensors that a Llama of some shape has, and a checkpoint's held against them; no Keras."""

from __future__ import annotations

import fnmatch

import numpy as np

from puna.checkpoint.source import TensorSource
from puna.checkpoint.variable_names import NO_PARAMETERS
from puna.config import LlamaConfig
from puna.errors import PresetError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of this shape, in the order in which the model uses them."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, KV = config.num_attention_heads * config.head_size, config.num_kv_heads * config.head_size
    attention = {"q_proj": (Q, D), "k_proj": (KV, D), "v_proj": (KV, D), "o_proj": (D, Q)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        for part, matrices, biased in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in matrices.items():
                shapes[f"{layer}.{part}.{name}.weight"] = shape
                if biased:
                    shapes[f"{layer}.{part}.{name}.bias"] = shape[:1]
            if part == "self_attn":
                shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
    return shapes


def stored_names(config: LlamaConfig, source: TensorSource) -> dict[str, str]:
    """Each expected tensor's name to the file's; every tensor of the file is accounted for.

    Raises:
        PresetError: one is missing, of another shape, or of no Llama.
    """
    names = set(source.names())
    bare = not any(name.startswith("model.") for name in names)  # a backbone's file
    shapes = expected_shapes(config)
    stored = {name: name.removeprefix("model.") if bare else name for name in shapes}
    if missing := [name for name, theirs in stored.items() if theirs not in names]:
        raise PresetError(f"the checkpoint lacks {some(missing)}; expected {len(shapes)} in all")
    for name, theirs in stored.items():
        if (shape := source.info(theirs).shape) != shapes[name]:
            raise PresetError(
                f"{name} has shape {shape}, and config.json asks for {shapes[name]}; the files are "
                "of different checkpoints: fetch them together again"
            )
    left = sorted(names - set(stored.values()))
    left = [n for n in left if not any(fnmatch.fnmatch(n, pattern) for pattern in NO_PARAMETERS)]
    if HEAD in left and config.tie_word_embeddings:
        check_tied(source, stored[EMBEDDING])
        left.remove(HEAD)
    if left:
        raise PresetError(f"the checkpoint holds tensors that a Llama does not: {some(left)}")
    return stored


def check_tied(source: TensorSource, embedding: str = EMBEDDING) -> None:
    """Refuse a head that the configuration says is the embedding, and is not.

    Raises:
        PresetError: they differ.
    """
    head, table = source.read(HEAD), source.read(embedding)
    same = head.shape == table.shape and head.dtype == table.dtype
    same = same and np.array_equal(head.view(np.uint8), table.view(np.uint8))
    del head, table
    source.release(HEAD)
    source.release(embedding)
    if not same:
        raise PresetError(
            f"config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set "
            "tie_word_embeddings to false there if the head is its own"
        )


def some(names: list[str], most: int = 4) -> str:
    """The first of many names, and how many there are more.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
