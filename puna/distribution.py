"""A model on several devices: which part of each weight lies where.

Keras's `ModelParallel` on JAX does the work: XLA cuts every compiled program by where its arrays
lie. Here is where they lie: a layout map for a Llama, what is done about what a mesh does not
divide, and meshes for `from_preset`.

In a block, each device computes some of the heads and some of the feed-forward's features by
itself; the products that bring them together again are summed over devices, twice a block (Shoeybi
et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from puna import backend
from puna.backend import hosts, placement
from puna.backend.memory import numpy_dtype
from puna.checkpoint.expected import expected_shapes
from puna.config import LlamaConfig
from puna.errors import BackendError, ConfigError
from puna.layout_rules import Rules

BATCH, MODEL = "batch", "model"
_EMBEDDING = "model.embed_tokens"

# Matrices are (out, in). Everything else that a layer has follows its matrix.
_RULES = {
    ".*embed_tokens/weight": "out",
    ".*self_attn/(q|k|v)_proj/weight": "out",
    ".*self_attn/o_proj/weight": "in",
    ".*mlp/(gate|up)_proj/weight": "out",
    ".*mlp/down_proj/weight": "in",
    ".*lm_head/weight": "out",
}


class ShardingWarning(UserWarning):
    """Something is on every device whole, or a rule of a layout map says nothing."""


def check_backend(what: str) -> None:
    """Refuse a backend whose Keras has no model parallelism.

    Raises:
        BackendError: the backend is not JAX.
    """
    if backend.name != "jax":
        raise BackendError(
            f"{what} puts a model on several devices, which Keras does on JAX only, and the "
            f"backend is {backend.name}; set KERAS_BACKEND=jax before Python starts, or leave it "
            "out to use one device"
        )


def initialize(
    job_addresses: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
) -> None:
    """Make this process one of several that work on one model; see `docs/hosts.md`.

    To be called once, before anything is computed. What is not given is taken from Keras's
    variables (`KERAS_DISTRIBUTION_JOB_ADDRESSES` and so on), which `python -m puna.launch` sets, or
    from SLURM, Kubernetes, MPI or the TPU pod, as JAX finds it. `keras.distribution.initialize`
    does the same, and leaves it at JAX's 100 seconds. All processes draw the same random numbers
    from here on, and the first alone shows warnings.

    Args:
        job_addresses: of process 0, such as "10.0.0.1:1234"; those of others may follow, after
            commas.
        num_processes: how many there are.
        process_id: which one this is, from 0 on.
        heartbeat_timeout: seconds after which the others end, when one is dead.

    Raises:
        BackendError: the backend is not JAX, the others cannot be reached, or something has been
            computed already.
        ConfigError: nothing says where process 0 is.
    """
    check_backend("initialize")
    hosts.start(job_addresses, num_processes, process_id, heartbeat_timeout)


def is_first_process() -> bool:
    """Whether this process is the one that should print and write, of those that `initialize` has
    connected; of one process it is true.
    """
    return hosts.index() == 0


def layout_map(device_mesh: Any, model: str, data: str, fsdp: bool) -> Any:
    """The rules for a Llama; see `Llama3Backbone.get_layout_map`."""
    check_backend("get_layout_map")
    names = list(device_mesh.axis_names)
    for argument, name in (("model_parallel_dim_name", model), ("data_parallel_dim_name", data)):
        if name not in names:
            raise ConfigError(
                f"{argument} is {name!r}, and the device mesh has the axes {names}; name one of "
                f'them, as in DeviceMesh((2, 4), ["{BATCH}", "{MODEL}"], devices)'
            )
    rules = keras.distribution.LayoutMap(device_mesh)
    for pattern, side in _RULES.items():
        other = data if fsdp else None
        rules[pattern] = (model, other) if side == "out" else (other, model)
    return rules


# Where a model's variables lie


def building(model: Any) -> contextlib.AbstractContextManager[None]:
    """A scope in which a model is built: its variables get their places, and then their values."""
    return placement.placed_first(model, lambda distribution: settle(model, distribution))


def settle(model: Any, distribution: Any = None) -> None:
    """Give all of a model's variables that have none yet their places on the devices.

    Args:
        model: a backbone or causal LM, built; its variables have no values.
        distribution: None means the one that is set, if one is.

    Raises:
        ConfigError: the layout map has keras-hub's rules, contradicts itself, or has a rule for
            another number of axes.
        BackendError: the backend is not JAX.
    """
    distribution = distribution or placement.current()
    if distribution is None:
        return
    check_backend("a distribution")
    _check_processes(distribution)
    rules = placement.layout_map(distribution)
    if rules is None:
        for variable in model.variables:
            if not placement.has_place(variable):
                placement.place_as_told(variable, distribution)
        return
    found = Rules(rules)
    # A causal LM's backbone has been settled before it, and told of then.
    unused = found.unused(model) if model.matrices()[_EMBEDDING].cut is None else []
    whole = _settle_matrices(model, found, distribution)
    for variable in model.variables:
        if not placement.has_place(variable):
            rank = len(variable.shape)
            axes = found.of(variable.path, rank) or (None,) * rank
            placement.place(variable, axes, distribution)
    _report(whole, unused, distribution)


def _check_processes(distribution: Any) -> None:
    """Refuse a mesh that leaves a process without devices: it would wait for the others for ever.

    Raises:
        ConfigError: as said.
        BackendError: there are several processes, and they are not connected.
    """
    from puna.backend.jax_shards import devices_by_process

    there = devices_by_process(distribution.device_mesh.backend_mesh)
    if len(there) > hosts.processes():
        raise BackendError(
            f"the mesh has devices of {len(there)} processes, which are not connected; call "
            "puna.distribution.initialize() before anything else"
        )
    if len(there) != hosts.processes() or len({*there.values()}) > 1:
        told = ", ".join(f"{count} of process {i}" for i, count in sorted(there.items()))
        raise ConfigError(
            f"there are {hosts.processes()} processes, and the mesh "
            f"{tuple(distribution.device_mesh.shape)} has devices of theirs: {told}; expected as "
            "many of each: give a larger mesh, or start fewer processes"
        )


def _settle_matrices(model: Any, rules: Rules, distribution: Any) -> dict[str, list[str]]:
    """Settle the matrices; what is on every device whole, by the reason."""
    sizes, config = placement.mesh_sizes(distribution), model.config
    whole: dict[str, list[str]] = {}
    for name, layer in model.matrices().items():
        if layer.cut is not None:
            continue
        axes = rules.of(f"{layer.path or layer.name}/weight", 2)
        cut: list[str | None] = [None, None]
        for i, axis in enumerate(axes or ()):
            if axis is None:
                continue
            count, what = _parts(name, i, layer.matrix_shape[i], config)
            if _divides(count, sizes[axis], config if "heads" in what else None):
                cut[i] = axis
            else:
                reason = f"{sizes[axis]} devices along {axis!r} do not divide {what}"
                whole.setdefault(reason, []).append(name)
        if axes is None or not any(axes):
            whole.setdefault("no rule cuts them", []).append(name)
        layer.cut = (cut[0], cut[1])
        layer.settle(distribution)
    return whole


def _parts(name: str, axis: int, size: int, config: LlamaConfig) -> tuple[int, str]:
    """How many parts an axis of a matrix consists of, none of which may be cut, and of what."""
    part = name.rpartition(".")[2]
    N, K = config.num_attention_heads, config.num_kv_heads
    if (part, axis) in (("q_proj", 0), ("o_proj", 1)):
        return N, f"{N} query heads (of {K} key/value heads)"
    if (part, axis) in (("k_proj", 0), ("v_proj", 0)):
        return K, f"{K} key/value heads"
    return size, f"{size:,}"


def _divides(count: int, devices: int, config: LlamaConfig | None) -> bool:
    if count % devices:
        return False
    # A device's query heads read whole key/value heads, or some of them read the same one.
    return config is None or not config.num_kv_heads % devices or not devices % config.num_kv_heads


def _report(whole: dict[str, list[str]], unused: Sequence[str], distribution: Any) -> None:
    """Warn, once for a model, of what is on every device whole and of rules that say nothing."""
    told = []
    if math.prod(placement.mesh_sizes(distribution).values()) > 1:
        told += [f"{_grouped(names)} on every device: {why}" for why, names in whole.items()]
    if unused:
        told.append(
            f"these rules of the layout map match no variable: {', '.join(map(repr, unused))}; a "
            'path is such as "model/layers_0/self_attn/q_proj/weight"'
        )
    if told:
        warnings.warn("; ".join(told), ShardingWarning, stacklevel=6)


def _grouped(names: Sequence[str]) -> str:
    """Names of matrices, with those of all layers as one."""
    counted = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{n} ({c})" if c > 1 else n for n, c in counted.items())


# Meshes for `from_preset`


@dataclass(frozen=True)
class Devices:
    """On which devices a model shall be loaded, as `from_preset` is told.

    Args:
        mesh: how many share out the rows of a batch, and how many the weights; None means as it is
            set.
        sharding: "auto" chooses the mesh; None does not.

    Raises:
        ConfigError: the arguments make no sense.
        BackendError: the backend is not JAX, and one is given.
    """

    mesh: Sequence[int] | None = None
    sharding: str | None = None

    def __post_init__(self) -> None:
        mesh, sharding = self.mesh, self.sharding
        if mesh is not None and sharding is not None:
            raise ConfigError(
                f"both mesh={mesh!r:.40} and sharding={sharding!r:.40} were given; leave one out"
            )
        if mesh is None and sharding is None:
            return
        check_backend("mesh=" if mesh is not None else "sharding=")
        if sharding not in (None, "auto"):
            raise ConfigError(f"sharding is {sharding!r:.80}; expected 'auto', or mesh=(2, 4)")
        if mesh is not None:
            sizes = tuple(mesh) if isinstance(mesh, Sequence) and not isinstance(mesh, str) else ()
            if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
                raise ConfigError(
                    f"mesh is {mesh!r:.80}; expected two whole numbers, the devices that share out "
                    "the rows of a batch and those that share out the weights, as in (2, 4)"
                )
            object.__setattr__(self, "mesh", sizes)


@contextlib.contextmanager
def loading(
    devices: Devices, config: LlamaConfig, dtype: Any = None, quantization: Any = None
) -> Iterator[None]:
    """A scope in which a model is loaded, on the devices that are asked for.

    The distribution stays set afterwards, unless loading fails.

    Args:
        devices: what is asked for.
        config: the model's shape.
        dtype: the weights', a name or a Keras dtype policy; None means the checkpoint's.
        quantization: as `from_preset` takes it.

    Raises:
        ConfigError: there are not as many devices, or another mesh is set already.
    """
    if devices == Devices():
        yield
        return
    mesh = devices.mesh or _automatic(config, _weights_bytes(config, dtype, quantization))
    with on_mesh(mesh):
        yield


@contextlib.contextmanager
def on_mesh(mesh: Sequence[int]) -> Iterator[None]:
    """A scope whose devices are those of a mesh; they stay set afterwards, unless it fails.

    Args:
        mesh: how many devices share out the rows of a batch, and how many the weights.

    Raises:
        ConfigError: there are not as many devices, or another mesh is set already.
        BackendError: the backend is not JAX.
    """
    check_backend("a mesh")
    before, shape = placement.current(), (mesh[0], mesh[1])
    if before is None:
        keras.distribution.set_distribution(_distribution(shape))
    elif tuple(before.device_mesh.shape) != shape:
        raise ConfigError(
            f"the mesh {shape} is asked for, and a distribution with the mesh "
            f"{tuple(before.device_mesh.shape)} is set; leave mesh= out to use that one, or call "
            "keras.distribution.set_distribution(None) first"
        )
    try:
        yield
    except BaseException:
        keras.distribution.set_distribution(before)
        raise


def _distribution(shape: tuple[int, int]) -> Any:
    there = keras.distribution.list_devices()
    if math.prod(shape) > len(there):
        raise ConfigError(
            f"mesh={shape} takes {math.prod(shape)} devices, and there are {len(there)}; give a "
            "smaller one (to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{math.prod(shape)} before Python starts)"
        )
    device_mesh = keras.distribution.DeviceMesh(shape, [BATCH, MODEL], there[: math.prod(shape)])
    rules = layout_map(device_mesh, MODEL, BATCH, fsdp=False)
    distribution = keras.distribution.ModelParallel(layout_map=rules, batch_dim_name=BATCH)
    _check_processes(distribution)
    return distribution


def _weights_bytes(config: LlamaConfig, dtype: Any, quantization: Any) -> int:
    """About how many bytes a model's weights take."""
    said = getattr(dtype, "variable_dtype", dtype) or config.dtype or "bfloat16"
    bits = 8 * numpy_dtype(str(said).removeprefix("mixed_")).itemsize
    if isinstance(quantization, str):
        bits = {"int4": 5, "int8": 8, "float8": 8}.get(quantization, bits)
    return sum(map(math.prod, expected_shapes(config).values())) * bits // 8


def _automatic(config: LlamaConfig, nbytes: int) -> tuple[int, int]:
    """`automatic_mesh` of the devices that there are."""
    from puna.backend.jax_shards import device_bytes

    there = len(keras.distribution.list_devices())
    found = hosts.from_first(automatic_mesh(there, device_bytes(), config, nbytes))
    return found[0], found[1]


# The share of a device's memory that weights may take: the rest is for the cache, for what a step
# computes and for adapters.
_FOR_WEIGHTS = 0.6


def automatic_mesh(
    devices: int, device_bytes: int, config: LlamaConfig, nbytes: int
) -> tuple[int, int]:
    """The mesh with the most copies of a model that fit: copies need not talk to each other.

    Args:
        devices: how many there are.
        device_bytes: memory of one.
        config: the model's shape.
        nbytes: of its weights.

    Returns:
        Devices along the batch axis and along the model axis.

    >>> config = LlamaConfig(num_attention_heads=32, num_key_value_heads=8)
    >>> automatic_mesh(8, 16 << 30, config, 16 << 30)
    (4, 2)
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    even = [size for size in sizes if _divides(config.num_attention_heads, size, config)]
    for size in even or sizes:
        if nbytes / size <= _FOR_WEIGHTS * device_bytes:
            return devices // size, size
    return 1, devices
