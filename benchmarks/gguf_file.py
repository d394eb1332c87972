"""A GGUF file of a Hugging Face checkpoint's own weights, for measuring llama.cpp on the same.

Usage: python -m benchmarks.gguf_file CHECKPOINT FILE [--dtype bfloat16]

It does for a Llama what llama.cpp's convert_hf_to_gguf.py does, without the tokenizer: prompts are
given as ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from puna.checkpoint.safetensors import SafetensorsSource
from puna.config import LlamaConfig
from puna.rope import RopeConfig

KINDS = {
    "bfloat16": GGMLQuantizationType.BF16,
    "float16": GGMLQuantizationType.F16,
    "float32": GGMLQuantizationType.F32,
    "int8": GGMLQuantizationType.Q8_0,
    "int4": GGMLQuantizationType.Q4_0,
}

# Hugging Face's name of a part of a layer, and GGUF's.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(checkpoint: Path, file: Path, dtype: str) -> Path:
    """Write the file.

    Args:
        checkpoint: a Hugging Face directory of a Llama.
        file: where to; it appears when all of it is written.
        dtype: of the matrices: int8 is Q8_0, and int4 Q4_0; what has one dimension is float32, as
            llama.cpp wants it.
    """
    config = LlamaConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    unfinished = file.with_name(file.name + ".unfinished")
    writer = GGUFWriter(unfinished, "llama")
    _add_metadata(writer, config)
    kind = KINDS[dtype]
    source = SafetensorsSource(checkpoint)
    for name in source.names():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = source.read(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            queries = name.endswith("q_proj.weight")
            heads = config.num_attention_heads if queries else config.num_kv_heads
            array = permute(array, heads)
        _add(writer, gguf_name(name), array, kind)
    if (divisors := rope_divisors(config)) is not None:
        _add(writer, "rope_freqs.weight", divisors, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(file)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor."""
    if name in WHOLE:
        return WHOLE[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PARTS[part.removesuffix('.weight')]}.weight"


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix from rotated halves, as Hugging Face has them, to pairs."""
    rows, columns = array.shape
    halves = array.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def rope_divisors(config: LlamaConfig) -> np.ndarray | None:
    """What llama3 scaling divides each rotary frequency by; None without scaling."""
    rope = config.rope
    if rope.rope_type == "default":
        return None
    if rope.rope_type != "llama3":
        raise ValueError(f"rope_type is {rope.rope_type!r}; expected default or llama3")
    plain = RopeConfig(rope_theta=rope.rope_theta).inverse_frequencies(config.head_size)
    return (plain / rope.inverse_frequencies(config.head_size)).astype(np.float32)


def _add_metadata(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")


def _add(writer: GGUFWriter, name: str, array: np.ndarray, kind: GGMLQuantizationType) -> None:
    if array.ndim == 1:
        writer.add_tensor(name, array.astype(np.float32))
    elif kind is GGMLQuantizationType.BF16:
        raw = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16, copy=False))
        writer.add_tensor(name, raw.view(np.uint8), raw_dtype=kind)
    elif kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        writer.add_tensor(name, quants.quantize(array.astype(np.float32), kind), raw_dtype=kind)
    else:
        numbers = np.float16 if kind is GGMLQuantizationType.F16 else np.float32
        writer.add_tensor(name, np.ascontiguousarray(array.astype(numbers, copy=False)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=KINDS, default="bfloat16")
    arguments = parser.parse_args()
    print(write_gguf(arguments.checkpoint, arguments.file, arguments.dtype))


if __name__ == "__main__":
    main()
