"""Between Keras variables' paths and tensors' names: the one rule, and the names that mean none."""

from __future__ import annotations

import re

# Tensors that some checkpoints carry and that hold nothing a model needs.
NO_PARAMETERS = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias")


def tensor_name(path: str, root: str) -> str:
    """The name of the variable at `path`, as seen from the layer at `root`.

    >>> tensor_name("llama/model/layers_3/self_attn/q_proj/weight", "llama/model")
    'layers.3.self_attn.q_proj.weight'
    """
    inner = path.removeprefix(f"{root}/")
    return re.sub(r"\blayers_(\d+)\b", r"layers.\1", inner).replace("/", ".")


def is_of_adapter(name: str) -> bool:
    """Whether a variable, by its tensor's name, is an adapter's and not the model's own.

    >>> is_of_adapter("model.layers.3.self_attn.q_proj.lora_A.default.weight")
    True
    """
    return any(part.startswith("lora_") for part in name.split("."))
