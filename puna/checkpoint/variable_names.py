"""The one rule between a Keras variable's path and its tensor's name in a checkpoint."""

from __future__ import annotations

import re


def tensor_name(path: str, root: str) -> str:
    """The name of the variable at `path`, as seen from the layer at `root`.

    >>> tensor_name("llama/model/layers_3/self_attn/q_proj/weight", "llama/model")
    'layers.3.self_attn.q_proj.weight'
    """
    inner = path.removeprefix(f"{root}/")
    return re.sub(r"\blayers_(\d+)\b", r"layers.\1", inner).replace("/", ".")
