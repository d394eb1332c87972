"""Writes a model in Meta's original layout, over as many files as wanted: what Meta publishes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna.text.streaming import byte_alphabet

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def write(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    *,
    files: int = 1,
    embedding_axis: int = 0,
) -> Path:
    """Write `params.json` and `consolidated.NN.pth`.

    Args:
        directory: where to; it is made.
        tensors: the model's, in Hugging Face's names.
        params: what `params.json` says; `n_heads` and `n_kv_heads` are needed.
        files: how many files the tensors are cut over.
        embedding_axis: along which the embedding is cut: 0 as in Llama 3, 1 as in Llama 2.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        theirs, inner = _theirs(name)
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = params["n_heads"] if "q_proj" in inner else params["n_kv_heads"]
            # A head's row i of the first half stands beside row i of the second.
            halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
            tensor = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(tensor.shape)
        axis = 1 if inner in ("self_attn.o_proj", "mlp.down_proj") else 0
        axis = embedding_axis if inner == "model.embed_tokens" else axis
        cut = [tensor] * files if tensor.ndim == 1 else tensor.chunk(files, axis)
        for part, piece in zip(parts, cut, strict=True):
            part[theirs] = piece.clone()
    for number, part in enumerate(parts):
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    return directory


def write_tokenizer(directory: Path, words: tuple[str, ...] = ("he", "ll", "hell")) -> None:
    """Write a `tokenizer.model` of the 256 bytes and some words, with their ranks."""
    tokens = [bytes([byte]) for byte in byte_alphabet().values()] + [
        word.encode() for word in words
    ]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")


def _theirs(name: str) -> tuple[str, str]:
    """Meta's name of a tensor, and the part of ours that says what it is."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None:
        inner = name.removesuffix(".weight")
        return f"{NAMES[inner]}.weight", inner
    return f"layers.{match[1]}.{NAMES[match[2]]}.weight", match[2]
