"""The slow and obvious way to continue a prompt, for comparison."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def greedy_by_hand(model: Any, ids: np.ndarray, new_tokens: int) -> np.ndarray:
    """The best token again and again, each from a whole pass without a cache."""
    ids = np.asarray(ids, np.int32)
    for _ in range(new_tokens):
        # One length for all passes compiles once; what follows a token cannot change its logits.
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        mask = np.arange(128)[None] < len(ids)
        logits = model({"token_ids": padded, "padding_mask": mask})[0, len(ids) - 1]
        best = int(np.argmax(keras.ops.convert_to_numpy(logits)))
        ids = np.append(ids, np.int32(best))
    return ids
