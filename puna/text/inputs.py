"""Strings and ids as users bring them: lists, NumPy, tensors of any backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from puna.errors import TokenizerError


def to_numpy(value: Any) -> np.ndarray:
    """A tensor of any library, or nested lists, as a NumPy array."""
    if hasattr(value, "detach"):  # torch, perhaps on an accelerator
        value = value.detach().cpu()
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def as_texts(value: Any) -> tuple[list[str], bool]:
    """Text input as a list of strings, and whether it was a batch.

    Args:
        value: a string, UTF-8 bytes, or a list, tuple, NumPy array or string tensor of them.

    Raises:
        TokenizerError: it holds something else, or bytes that are not UTF-8.
    """
    if isinstance(value, str | bytes):
        return [_as_text(value)], False
    if hasattr(value, "numpy"):  # a TensorFlow string tensor gives bytes
        value = value.numpy()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_as_text(text) for text in value], True
    return [_as_text(value)], False


def _as_text(value: Any) -> str:
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"The text is bytes that are not UTF-8: {error}.") from error
    raise TokenizerError(
        f"Expected text (a string, or a flat list or array of strings), got "
        f"{type(value).__name__}: {repr(value)[:80]}."
    )


def holds_ids(value: Any) -> bool:
    """Whether an input is token ids (integers, in lists or arrays) and not text."""
    if isinstance(value, str | bytes):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and holds_ids(value[0])
    if isinstance(value, int):
        return True
    dtype = getattr(value, "dtype", None)
    return dtype is not None and "int" in str(dtype)


def as_ids(value: Any) -> tuple[list[list[int]], bool]:
    """Token ids as a list of rows, and whether they were a batch.

    Args:
        value: integers, 1-D or 2-D, in nested lists of any lengths, NumPy or tensors.

    Raises:
        TokenizerError: it holds something else than non-negative integers.
    """
    if isinstance(value, list | tuple):
        nested = bool(value) and (
            isinstance(value[0], list | tuple) or getattr(value[0], "ndim", 0) > 0
        )
        if nested:
            return [_row(row) for row in value], True
        return [_row(value)], False
    array = to_numpy(value)
    if array.ndim == 2:
        return [_row(row) for row in array], True
    return [_row(array)], False


def _row(value: Any) -> list[int]:
    array = to_numpy(value)
    if array.ndim == 0:
        array = array[None]
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0):
        raise TokenizerError(
            "Expected token ids (non-negative integers, 1-D for one text or 2-D for several), got "
            f"an array of shape {array.shape} and dtype {array.dtype}: {repr(value)[:80]}."
        )
    return array.tolist()
