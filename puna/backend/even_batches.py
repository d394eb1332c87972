"""Batches that the devices of a mesh divide evenly, and of which each process takes its rows.

Keras cuts each batch along the batch axis. One that does not divide fails in the middle of `fit`,
where the weights have been handed to the step and are lost. So rows of weight 0 are added.

Of several processes each gives Keras the rows of its own devices, perhaps the same as another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree  # pyright: ignore
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from puna.backend import hosts, placement


class EvenBatches(DataAdapter):
    """Keras's batches of some data, each with as many rows as a number divides.

    With several processes the data are the same in all, unless the distribution's
    `auto_shard_dataset` is false: then they are the rows of this process.

    Args:
        data: arguments of `fit`, of which Keras makes batches.
        rows: how rows are shared out.
    """

    def __init__(self, data: dict[str, Any], rows: Rows):
        with _of_any_kind():
            self._batches = get_data_adapter(**data)
        self._rows = rows
        self._places: list[int] = []  # of the data's rows, among all that the steps see
        self._seen = 0

    def get_jax_iterator(self) -> Iterator[Any]:
        """The batches of an epoch."""
        for batch in self._batches.get_jax_iterator():
            even = self._even(batch)
            self._check_alike([a.shape for a in tree.flatten(even) if a is not None])
            yield even
        self._check_alike(None)

    def _check_alike(self, shapes: Any) -> None:
        """Where each process has data of its own: steps that differ would wait for ever."""
        if not self._rows.is_same:
            hosts.check_same("the shapes of a batch", shapes)

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
        places = np.array(self._places, np.int64)
        return tree.map_structure(lambda a: a[places[places < len(a)]], outputs)

    def _even(self, batch: Any) -> Any:
        x, y, weights = _unpacked(batch)
        rows = len(tree.flatten(x)[0])
        more = -rows % self._rows.multiple
        places, every = self._rows.places(rows, rows + more)
        self._places += (self._seen + places).tolist()
        self._seen += every
        if y is not None and weights is None:  # in all batches alike, or there are two programs
            weights = tree.map_structure(lambda a: np.ones(a.shape[:2], np.float32), y)
        if more:
            fuller: Any = tree.map_structure(
                lambda a: None if a is None else _with_zeros(a, more), (x, y, weights)
            )
            x, y, weights = fuller
        if (own := self._rows.own(rows + more)) is not None:
            mine: Any = tree.map_structure(
                lambda a: None if a is None else np.asarray(a)[own], (x, y, weights)
            )
            x, y, weights = mine
        return keras.utils.pack_x_y_sample_weight(x, y, weights)  # pyright: ignore


def _with_zeros(array: Any, rows: int) -> np.ndarray:
    array = np.asarray(array)
    return np.concatenate([array, np.zeros((rows, *array.shape[1:]), array.dtype)])


class Rows:
    """How the rows of a batch are shared out by the distribution that is set.

    Attributes:
        multiple: what divides the rows of a batch that this process is given.
        is_same: whether all processes are given the same rows.
    """

    def __init__(self) -> None:
        self.multiple, self.is_same = _multiple(), True
        self._groups = self.multiple
        if hosts.count() > 1:
            distribution: Any = placement.current()
            self.is_same = bool(distribution.auto_shard_dataset)
            if not self.is_same:
                self.multiple = len(self._own(self._groups))

    @property
    def are_shared(self) -> bool:
        """Whether rows are shared out at all."""
        return self._groups > 1 or hosts.count() > 1

    def own(self, rows: int) -> np.ndarray | None:
        """Which of the rows that all are given this process gives Keras; None for all of them."""
        return self._own(rows) if hosts.count() > 1 and self.is_same else None

    def places(self, rows: int, even: int) -> tuple[np.ndarray, int]:
        """Where the rows of a batch are among those of all processes, and how many these are.

        Args:
            rows: of the batch that this process is given.
            even: the same, after some were added.
        """
        if self.is_same:
            return np.arange(rows), even
        every = even * self._groups // self.multiple
        return self._own(every)[:rows], every

    def _own(self, rows: int) -> np.ndarray:
        from puna.backend import jax_gather, jax_shards

        mesh = jax_shards.current_mesh()
        assert mesh is not None
        return jax_gather.own_rows(mesh.spec((rows,), mesh.batch), rows)


@contextlib.contextmanager
def _of_any_kind() -> Iterator[None]:
    """In this scope Keras takes data of all kinds, and cuts none of it for the processes itself."""
    distribution: Any = placement.current()
    if distribution is None:
        yield
        return
    before, distribution.auto_shard_dataset = distribution.auto_shard_dataset, False
    try:
        yield
    finally:
        distribution.auto_shard_dataset = before


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
    rows = Rows()
    if not rows.are_shared or isinstance(arguments["x"], EvenBatches):
        return arguments
    hosts.same_random_numbers()  # which shuffle the rows
    rest = dict(arguments)
    if not hosts.is_first():
        rest["verbose"] = 0
    if split := rest.pop("validation_split", 0.0):
        whole: Any = tuple(rest.pop(name, None) for name in _ARRAYS)
        whole, rest["validation_data"] = train_validation_split(whole, validation_split=split)
        rest |= dict(zip(_ARRAYS, whole, strict=True))
    if rest.get("validation_data") is not None:
        data = dict(zip(_ARRAYS, _unpacked(rest["validation_data"]), strict=True))
        size = rest.pop("validation_batch_size", None) or rest.get("batch_size")
        data |= {"batch_size": size, "steps_per_epoch": rest.get("validation_steps")}
        rest["validation_data"] = EvenBatches(data, rows)
    data = {name: rest.pop(name) for name in (*_ARRAYS, *_OTHERS) if name in rest}
    if method == "fit":
        data.setdefault("shuffle", True)
    steps = "steps_per_epoch" if method == "fit" else "steps"
    data["steps_per_epoch"] = rest.get(steps)
    return rest | {"x": EvenBatches(data, rows)}
