"""Checkpoints of real shapes with random weights, for measuring speed and memory.

Usage: python -m benchmarks.checkpoints DIRECTORY [--shape llama-3.2-1b] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    },
}


def write_checkpoint(directory: Path, shape: str, dtype: str = "bfloat16") -> Path:
    """Write a checkpoint as the Hub has them: by the safetensors library, with its alignment."""
    from safetensors.numpy import save_file

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | SHAPES[shape]
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    random = np.random.default_rng(0)
    tensors = {}
    for name, size in tensor_shapes(config).items():
        if len(size) == 1:
            tensors[name] = np.ones(size, numpy_dtype)
        else:
            normal = random.standard_normal(size, np.float32)
            normal *= 0.02
            tensors[name] = normal.astype(numpy_dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama, by its name."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (N * H, D),
            f"{layer}.self_attn.k_proj.weight": (K * H, D),
            f"{layer}.self_attn.v_proj.weight": (K * H, D),
            f"{layer}.self_attn.o_proj.weight": (D, N * H),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.mlp.gate_proj.weight": (F, D),
            f"{layer}.mlp.up_proj.weight": (F, D),
            f"{layer}.mlp.down_proj.weight": (D, F),
        }
    return shapes | {"model.norm.weight": (D,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.directory, arguments.shape, arguments.dtype))


if __name__ == "__main__":
    main()
