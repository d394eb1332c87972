"""Arrays on several devices: what each holds of a variable, and where a step's arrays lie.

All of it is of use only where a Keras distribution is set; then XLA cuts each compiled program into
one for each device, by where its arrays lie.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from puna.backend import jax_gather
from puna.backend.protocol import Tensor
from puna.errors import ConfigError


class Shards(NamedTuple):
    """What each device of this process gets of an array; devices that hold the same share it."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: tuple[tuple[Any, np.ndarray], ...]  # devices, and memory of theirs

    def assemble(self) -> Tensor:
        """The array, on its devices."""
        arrays = [jax.device_put(part, device) for device, part in self.parts]
        dtype = self.parts[0][1].dtype
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, arrays, dtype=dtype
        )


def sharding_of(variable: Any) -> Any:
    """How a variable is cut, by the distribution that is set; None where none is."""
    variable._initialize_layout()
    return getattr(variable._layout, "backend_layout", variable._layout)


def cut(
    array: np.ndarray, sharding: Sharding, prepare: Callable[[np.ndarray], np.ndarray]
) -> Shards:
    """The shards of an array that this process's devices hold; each is read once.

    Args:
        array: perhaps a view of a mapped file, of which only the shards' bytes are touched.
        sharding: how it is cut.
        prepare: what is done with each shard's view.
    """
    found: dict[tuple[Any, ...], np.ndarray] = {}
    parts = []
    indices: Any = sharding.addressable_devices_indices_map(array.shape)
    for device, index in indices.items():
        key = tuple(span.indices(size) for span, size in zip(index, array.shape, strict=True))
        if key not in found:
            found[key] = prepare(array[index])
        parts.append((device, found[key]))
    return Shards(array.shape, sharding, tuple(parts))


def initialize_at_random(variable: Any, sharding: Sharding) -> None:
    """Give a variable its initializer's value, with no more on a device than its share."""
    initializer = variable._initializer
    shape, dtype = tuple(variable.shape), variable._dtype
    if (held := getattr(initializer, "array", None)) is not None:
        value = cut(held, sharding, np.ascontiguousarray).assemble()
    elif isinstance(initializer, keras.initializers.Initializer):
        config = initializer.get_config()
        if "seed" in config:
            config["seed"] = 0  # takes the place of one that would be drawn from Keras's
        draw = _drawn(type(initializer), tuple(config.items()), shape, dtype, sharding)
        value = draw(np.array([getattr(initializer, "seed", 0), 0], np.uint32))
    else:
        value = in_place(initializer(shape, dtype), sharding)
    variable._initialize(value)
    variable._initializer = None


@functools.cache
def _drawn(
    kind: type, config: tuple[Any, ...], shape: tuple[int, ...], dtype: str, sharding: Sharding
) -> Callable[[Tensor], Tensor]:
    """An initializer's values of a seed: the same numbers, however they are cut."""

    def draw(seed: Tensor) -> Tensor:
        initializer = kind(**dict(config))
        initializer.seed = seed
        return initializer(shape, dtype=dtype)

    return jax.jit(draw, out_shardings=sharding)


def check_places(variables: Sequence[Any]) -> None:
    """Refuse weights that are elsewhere than the distribution that is set now would have them.

    They would be copied to all devices, or from all to one, in every call.

    Raises:
        ConfigError: as said.
    """
    distribution = keras.distribution.distribution()
    wanted = 1 if distribution is None else distribution.device_mesh.devices.size
    for variable in variables:
        devices = len(variable.value.sharding.device_set)
        if devices != wanted:
            raise ConfigError(
                f"{variable.path} is on {devices} devices, and the distribution that is set has "
                f"{wanted}; set keras.distribution before the model is made, and leave it set "
                "while the model is used"
            )


def gather(value: Tensor) -> np.ndarray:
    """An array in the host's memory, which is let go of with the result."""
    if len(value.sharding.device_set) == 1:
        return np.asarray(value)
    if not value.is_fully_addressable:
        return jax_gather.gather(value)
    # JAX keeps what it has gathered with the array; so this is done with another of its kind.
    arrays = [shard.data for shard in value.addressable_shards]
    again = jax.make_array_from_single_device_arrays(value.shape, value.sharding, arrays)
    return np.asarray(again)


# What is no weight


class Mesh(NamedTuple):
    """The mesh of the distribution that is set."""

    mesh: Any
    batch: str

    def spec(self, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        """A sharding along these axes, as far as they divide the shape."""
        sizes = self.mesh.shape
        pairs = zip(axes, shape, strict=False)  # the axes that are left out are not cut
        fit = [a if a and size % sizes[a] == 0 else None for a, size in pairs]
        return NamedSharding(self.mesh, PartitionSpec(*fit))

    def heads(self, count: int) -> str | None:
        """The axis along which heads are cut."""
        others = [name for name in self.mesh.axis_names if name != self.batch]
        return next((name for name in others if count % self.mesh.shape[name] == 0), None)


def current_mesh() -> Mesh | None:
    """That of the distribution that is set, or None."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return Mesh(distribution.device_mesh.backend_mesh, distribution.batch_dim_name)


def groups_of_rows(rows: int) -> int:
    """In how many parts so many rows are cut."""
    mesh = current_mesh()
    count = 1 if mesh is None else mesh.mesh.shape[mesh.batch]
    return count if rows % count == 0 else 1


def place_of(shape: tuple[int, ...]) -> NamedSharding | None:
    """Where what a compiled step takes and gives lies; None where no distribution is set.

    Keys and values [B, K, S, H] are what has four axes: rows along the batch axis and heads along
    the other, where these divide them. Every device has all of anything else.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    if len(shape) == 4:
        return mesh.spec(shape, mesh.batch, mesh.heads(shape[1]))
    return NamedSharding(mesh.mesh, PartitionSpec())


def put(array: np.ndarray) -> Tensor:
    """NumPy's array as one of a compiled step, in its place."""
    return in_place(array, place_of(array.shape))


def in_place(array: Any, sharding: Sharding | None) -> Tensor:
    """An array, the same in all processes, on the devices where it belongs."""
    is_there = isinstance(array, jax.Array) and not array.is_fully_addressable
    if sharding is None or sharding.is_fully_addressable or is_there:
        return jax.device_put(array, sharding)
    return jax_gather.put(np.asarray(array), sharding)


def placed(array: Tensor) -> Tensor:
    """An array that a compiled step takes or gives, in its place."""
    sharding = place_of(array.shape)
    return array if sharding is None else constrained(array, sharding)


def by_rows(x: Tensor, axis: int = 0) -> Tensor:
    """An array such as hidden states [B, T, D] with its rows cut along the batch axis."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return constrained(x, mesh.spec(x.shape, *[None] * axis, mesh.batch))


def whole_logits(logits: Tensor) -> Tensor:
    """See `BackendOps.whole_logits`."""
    mesh = current_mesh()
    if mesh is None:
        return logits
    # They are computed in parts: XLA would sooner gather the head's weight than them.
    axes = (mesh.batch, *[None] * (logits.ndim - 2), mesh.heads(logits.shape[-1]))
    return placed(constrained(logits, mesh.spec(logits.shape, *axes)))


def constrained(array: Any, sharding: Sharding) -> Tensor:
    """An array that lies so, inside a compiled step or outside."""
    if isinstance(array, Tracer):
        return jax.lax.with_sharding_constraint(array, sharding)
    return jax.device_put(array, sharding)


def devices_by_process(mesh: Any) -> dict[int, int]:
    """How many devices of a mesh each process has."""
    return dict(Counter(device.process_index for device in mesh.devices.flat))


def device_bytes() -> int:
    """Memory of one device; several that are made of one CPU share its memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def bytes_on_devices(values: Any) -> dict[Any, int]:
    """How many bytes of some arrays each of this process's devices holds."""
    held: dict[Any, int] = {}
    for value in values:
        for shard in value.addressable_shards:
            size = math.prod(shard.data.shape) * shard.data.dtype.itemsize
            held[shard.device] = held.get(shard.device, 0) + size
    return held
