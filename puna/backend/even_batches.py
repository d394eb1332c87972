"""Batches that the devices of a mesh divide evenly.

Keras cuts each batch along the batch axis. One that does not divide fails in the middle of `fit`,
where the weights have been handed to the step and are lost. So rows of weight 0 are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree  # pyright: ignore
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from puna.backend import placement


class EvenBatches(DataAdapter):
    """Keras's batches of some data, each with as many rows as a number divides.

    Args:
        data: arguments of `fit`, of which Keras makes batches.
        multiple: what the rows of a batch shall be a multiple of.
    """

    def __init__(self, data: dict[str, Any], multiple: int):
        self._batches = get_data_adapter(**data)
        self._multiple = multiple
        self._is_real: list[bool] = []

    def get_jax_iterator(self) -> Iterator[Any]:
        """The batches of an epoch."""
        for batch in self._batches.get_jax_iterator():
            yield self._even(batch)

    @property
    def num_batches(self) -> int | None:
        """As Keras counts them."""
        return self._batches.num_batches

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch, before any are added."""
        return self._batches.batch_size

    @property
    def has_partial_batch(self) -> bool:
        """No: all batches are whole."""
        return False

    @property
    def partial_batch_size(self) -> None:
        """There is none."""

    def on_epoch_begin(self) -> None:
        """As Keras has it."""
        self._batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """As Keras has it."""
        self._batches.on_epoch_end()

    def real(self, outputs: Any) -> Any:
        """What `predict` has made of the rows that are the data's."""
        return tree.map_structure(lambda a: a[np.array(self._is_real[: len(a)])], outputs)

    def _even(self, batch: Any) -> Any:
        x, y, weights = _unpacked(batch)
        rows = len(tree.flatten(x)[0])
        more = -rows % self._multiple
        self._is_real += [True] * rows + [False] * more
        if y is not None and weights is None:  # in all batches alike, or there are two programs
            weights = tree.map_structure(lambda a: np.ones(a.shape[:2], np.float32), y)
        if more:
            fuller: Any = tree.map_structure(
                lambda a: None if a is None else _with_zeros(a, more), (x, y, weights)
            )
            x, y, weights = fuller
        return keras.utils.pack_x_y_sample_weight(x, y, weights)  # pyright: ignore


def _with_zeros(array: Any, rows: int) -> np.ndarray:
    array = np.asarray(array)
    return np.concatenate([array, np.zeros((rows, *array.shape[1:]), array.dtype)])


# What of the arguments of `fit` makes batches.
_ARRAYS = ("x", "y", "sample_weight")
_OTHERS = ("batch_size", "shuffle", "class_weight")


def _multiple() -> int:
    """How many devices there are for the rows of a batch."""
    distribution = placement.current()
    if distribution is None:
        return 1
    return placement.mesh_sizes(distribution)[distribution.batch_dim_name]


def real_rows(batch: Any) -> Any:
    """How many rows of a step's batch were not added; None where none may have been."""
    if _multiple() == 1:
        return None
    x, _, weights = _unpacked(batch)
    mask = x.get("padding_mask", weights) if isinstance(x, dict) else weights
    if mask is None:
        return None
    has_any = ops.any(ops.cast(mask, "bool"), axis=tuple(range(1, len(mask.shape))))
    return ops.sum(ops.cast(has_any, "float32"))


def _unpacked(batch: Any) -> tuple[Any, Any, Any]:
    return keras.utils.unpack_x_y_sample_weight(batch)  # pyright: ignore


def evened(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method with even batches, where a mesh's devices share out rows.

    Args:
        method: "fit", "evaluate" or "predict".
        arguments: Keras's.
    """
    multiple = _multiple()
    if multiple == 1 or isinstance(arguments["x"], EvenBatches):
        return arguments
    rest = dict(arguments)
    if split := rest.pop("validation_split", 0.0):
        whole: Any = tuple(rest.pop(name, None) for name in _ARRAYS)
        whole, rest["validation_data"] = train_validation_split(whole, validation_split=split)
        rest |= dict(zip(_ARRAYS, whole, strict=True))
    if rest.get("validation_data") is not None:
        data = dict(zip(_ARRAYS, _unpacked(rest["validation_data"]), strict=True))
        size = rest.pop("validation_batch_size", None) or rest.get("batch_size")
        data |= {"batch_size": size, "steps_per_epoch": rest.get("validation_steps")}
        rest["validation_data"] = EvenBatches(data, multiple)
    data = {name: rest.pop(name) for name in (*_ARRAYS, *_OTHERS) if name in rest}
    if method == "fit":
        data.setdefault("shuffle", True)
    steps = "steps_per_epoch" if method == "fit" else "steps"
    data["steps_per_epoch"] = rest.get(steps)
    return rest | {"x": EvenBatches(data, multiple)}
