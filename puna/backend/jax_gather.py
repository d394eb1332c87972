"""Values that lie on devices of several processes: read, and put there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from puna.backend import hosts
from puna.backend.protocol import Tensor

PIECE = 64 << 20  # bytes that a device gets at a time of a value that is gathered


def put(array: np.ndarray, sharding: Sharding) -> Tensor:
    """An array that is the same in all processes, in its place; each puts what its devices get.

    `jax.device_put` would have all processes compare the array first.
    """
    indices = sharding.addressable_devices_indices_map(array.shape)
    parts = [jax.device_put(np.array(array[index]), device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts, dtype=array.dtype)


def gather(value: Tensor) -> np.ndarray:
    """All of a value in the memory of each process, a piece at a time.

    No device gets more than a piece beside its own share. Where each process has all of the value
    on its devices, nothing is sent. All processes have to call it, with the same value.
    """
    whole = np.empty(value.shape, value.dtype)
    if _is_whole_in_each(value.sharding, value.shape):
        for shard in {str(shard.index): shard for shard in value.addressable_shards}.values():
            whole[shard.index] = _read(shard.data)
    elif not isinstance(value.sharding, NamedSharding):
        hosts.go_on()
        return multihost_utils.process_allgather(value, tiled=True)
    else:
        _gather_pieces(value, whole)
    return whole


def _gather_pieces(value: Tensor, whole: np.ndarray) -> None:
    """Fill an array with the same piece of all shards, then with the next."""
    split, axis, length = plan(value)
    take = taker(split, axis, length, value.sharding.mesh)
    parts, own = whole.reshape(split), split[2 * axis + 1]
    for start in range(0, own, length):
        start = min(start, own - length)
        hosts.go_on()
        piece = take(value, np.int32(start))
        here = (slice(None),) * (2 * axis + 1) + (slice(start, start + length),)
        parts[here] = _read(piece.addressable_data(0))


def plan(value: Tensor) -> tuple[tuple[int, ...], int, int]:
    """How a value is gathered: see `taker`."""
    shard = value.sharding.shard_shape(value.shape)
    pairs = zip(value.shape, shard, strict=True)
    split = tuple(n for size, own in pairs for n in (size // own, own))
    axis = int(np.argmax(shard))
    pieces = min(shard[axis], -(-value.nbytes // PIECE))
    return split, axis, -(-shard[axis] // pieces)


@functools.cache
def taker(
    split: tuple[int, ...], axis: int, length: int, mesh: Any
) -> Callable[[Tensor, Any], Tensor]:
    """A piece of each shard, on all devices.

    Args:
        split: how many shards there are along each axis, and how long each is.
        axis: along which a piece is cut out of a shard.
        length: of a piece.
        mesh: of the devices.
    """

    def take(value: Tensor, start: Any) -> Tensor:
        # Each shard has a place of its own then, and none has to be sent to be cut.
        parts = value.reshape(split)
        return jax.lax.dynamic_slice_in_dim(parts, start, length, axis=2 * axis + 1)

    return jax.jit(take, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _is_whole_in_each(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    """Whether each process has all of such a value; all processes know it alike."""
    found: dict[int, set[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        spans = tuple(span.indices(size) for span, size in zip(index, shape, strict=True))
        found.setdefault(device.process_index, set()).add(spans)
    shards = math.prod(shape) // max(1, math.prod(sharding.shard_shape(shape)))
    return all(len(spans) == shards for spans in found.values())


def _read(part: Tensor) -> np.ndarray:
    """What one device holds, in the host's memory; JAX keeps nothing of it with the array."""
    again = jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part])
    return np.asarray(again)


def own_rows(sharding: Sharding, rows: int) -> np.ndarray:
    """The places of the rows, of so many, that a process's devices get; in their order."""
    found = set()
    indices: Any = sharding.addressable_devices_indices_map((rows,))
    for [span] in indices.values():
        found |= set(range(*span.indices(rows)))
    return np.array(sorted(found), np.int64)
