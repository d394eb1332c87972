"""A model's fingerprint: what tells whether a file was made by the same weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from puna import backend
from puna.config import LlamaConfig

# What a config says about files, training and the text around, and not about the function.
_BESIDE = frozenset(
    {"attention_dropout", "initializer_range", "dtype"}
    | {f"{name}_token_id" for name in ("bos", "eos", "pad")}
)

_ROWS = 4  # of each tensor


def fingerprint(config: LlamaConfig, tensors: Mapping[str, Any]) -> str:
    """A hash of the config and of a few rows of every tensor, the same on every backend.

    A change of all weights, such as training makes, changes it; one of a single weight may not.
    It is that of the values, whatever dtype they are held in.

    Args:
        config: the model's shape and constants.
        tensors: its variables under the checkpoint's names.

    Returns:
        64 hexadecimal digits.
    """
    fields = dataclasses.asdict(config)
    said = {name: value for name, value in fields.items() if name not in _BESIDE}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].value
        shape = tuple(value.shape)
        step = max(1, shape[0] // _ROWS) if len(shape) > 1 else 1
        rows = backend.ops.gathered(value[::step]).astype("<f4")
        found.update(f"{name} {shape}".encode())
        found.update(np.ascontiguousarray(rows).tobytes())
    return found.hexdigest()
