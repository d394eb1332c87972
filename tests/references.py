"""Tiny random Llamas of transformers, the reference of the parity tests, and how to compare.

`transformers` runs on torch on the CPU, whatever backend Keras is on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM as HfModel

VOCABULARY = 61

# What every tiny model shares. Grouped heads, and an epsilon that is not the default.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def rope(rope_type: str, *, rope_theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 has them."""
    return {"rope_type": rope_type, "rope_theta": rope_theta, **settings}


# The settings of every type of rotary embedding, for a context of 64; "theta" is "default"'s own.
ROPES: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "theta": rope("default", rope_theta=500.0),
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0),
    "llama3": rope(
        "llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama3-as-long": rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn-as-long": rope("yarn", factor=4.0),
    "yarn-attention": rope("yarn", factor=4.0, attention_factor=0.75),
    "yarn-beta": rope(
        "yarn", factor=4.0, beta_fast=4.0, beta_slow=0.25, original_max_position_embeddings=32
    ),
    "yarn-smooth": rope("yarn", factor=4.0, beta_fast=8.0, truncate=False),
    "yarn-mscale": rope("yarn", factor=16.0, mscale=1.5, mscale_all_dim=0.5),
    "yarn-mscale-alone": rope("yarn", factor=16.0, mscale=1.5),
}


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> HfModel:
    """A model whose weights, biases and norms are all far from what they start as.

    Args:
        seed: of the weights.
        dtype: what the weights are rounded to and saved in; the model computes in float32.
        fields: fields of `LlamaConfig` that differ from `TINY`.
    """
    config = HfConfig(**(TINY | fields))
    config._attn_implementation = "eager"
    model = HfModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise
            parameter.copy_(value.to(dtype))
    model.config.dtype = dtype
    return model


def save(
    model: HfModel, directory: Path, *, layout: str = "v5", max_shard_size: str = "5GB"
) -> Path:
    """Write a checkpoint as transformers does, and return its directory.

    Args:
        model: from `make`.
        directory: where to.
        layout: "v5", or "v4" or "v3" for the `config.json` of those days (see `as_written_by`).
        max_shard_size: such as "8KB", to get an index.
    """
    # A copy, as `to` would round the model's own rotary frequencies too.
    rounded = copy.deepcopy(model).to(model.config.dtype)
    rounded.save_pretrained(directory, max_shard_size=max_shard_size)
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(as_written_by(layout, json.loads(path.read_text()))))
    return Path(directory)


def as_written_by(layout: str, hf: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of transformers 5 in the layout of 5, 4 or early 4.

    Version 4 has `rope_theta` beside `rope_scaling`, and `torch_dtype`. Its first releases ("v3"
    here) called the scaling's `rope_type` `type`, and had no `head_dim`.
    """
    if layout == "v5":
        return hf
    hf = dict(hf)
    scaling = dict(hf.pop("rope_parameters"))
    hf["rope_theta"] = scaling.pop("rope_theta")
    hf["torch_dtype"] = hf.pop("dtype")
    if layout == "v3":
        scaling["type"] = scaling.pop("rope_type")
        del hf["head_dim"]
    is_default = (scaling.get("type") or scaling.get("rope_type")) == "default"
    return hf | {"rope_scaling": None if is_default else scaling, "transformers_version": "4.45.0"}


def token_ids(rows: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Random ids int32 [rows, length]."""
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).astype(np.int32)


def padded_mask(lengths: list[int], length: int, side: str) -> np.ndarray:
    """A mask bool [rows, length] of rows that are padded on one side."""
    place = np.arange(length)[None]
    count = np.array(lengths)[:, None]
    return place < count if side == "right" else place >= length - count


def _inputs(ids: np.ndarray, mask: np.ndarray | None) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    if mask is not None:
        real = torch.tensor(mask, dtype=torch.long)
        inputs["attention_mask"] = real
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    return inputs


def logits(model: HfModel, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits float32 [B, T, V] of transformers, the positions counting the mask's tokens."""
    with torch.no_grad():
        return model(**_inputs(ids, mask), use_cache=False).logits.numpy()


def hidden_states(model: HfModel, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """What `LlamaModel` returns, float32 [B, T, D]."""
    with torch.no_grad():
        outputs = model.model(**_inputs(ids, mask), use_cache=False)
    return outputs.last_hidden_state.numpy()


def greedy(model: HfModel, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens that transformers' `generate` puts after a prompt, no token stopping it."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return answer[0, len(prompt) :].tolist()


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the reference's largest number."""
    assert ours.shape == theirs.shape, f"{ours.shape} instead of {theirs.shape}"
    assert np.isfinite(ours).all()
    assert np.abs(theirs).max() > 0
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_close(ours: np.ndarray, theirs: np.ndarray, relative: float) -> None:
    """Fail where `relative_difference` is over a bound."""
    difference = relative_difference(ours, theirs)
    assert difference <= relative, f"relative difference {difference:.2e} > {relative:.0e}"
