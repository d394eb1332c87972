"""What a model on two processes does, in each of them; see `tests/hosts.py`."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.mesh_runs import parities
from tests.meshes import IDS, MESHES, ROWS, SHAPE, model_of, on


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A directory that all processes see, as a file system that hosts share."""
    from puna.backend import hosts

    folder = Path(hosts.from_first(tempfile.mkdtemp() if hosts.index() == 0 else ""))
    try:
        yield folder
        hosts.from_first("")
    finally:
        if hosts.index() == 0:
            shutil.rmtree(folder)


def tiny_preset(folder: Path) -> Path:
    """A preset that the first process has written."""
    from puna.backend import hosts
    from puna.testing import write_tiny_preset

    preset = folder / "preset"
    if hosts.index() == 0:
        write_tiny_preset(preset, **SHAPE, dtype="bfloat16")
    hosts.from_first("")
    return preset


# What they compute


def parity() -> dict[str, Any]:
    """A plain model whose rows are shared out over the processes."""
    return parities("plain", ((2, 4),), num_hidden_layers=1)


def fitting() -> dict[str, Any]:
    """Losses and logits with batches that do not divide, beside those of one device."""
    import keras

    def done(mesh: Any) -> tuple[dict[str, Any], Any]:
        on(mesh)
        model = model_of("lora")
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        options = {"batch_size": 3, "epochs": 2, "shuffle": False, "verbose": 0}
        history = model.fit(ROWS, validation_data=ROWS[:3], **options)
        told = {name: list(map(float, values)) for name, values in history.history.items()}
        told["evaluate"] = list(map(float, model.evaluate(ROWS[:3], batch_size=2, verbose=0)))
        return told, np.asarray(model.predict(ROWS, batch_size=3, verbose=0))

    wanted, logits = done(None)
    found: dict[str, Any] = {"wanted": wanted}
    for mesh in ((8, 1), (2, 4)):
        losses, others = done(mesh)
        apart = float(np.abs(others - logits).max())
        found[str(mesh)] = {"losses": losses, "apart": apart, "rows": len(others)}
    on(None)
    return found


def own_rows() -> dict[str, Any]:
    """The same where each process has rows of its own, and what is said of unlike ones."""
    import keras

    from puna.backend import hosts
    from puna.errors import HostError

    ids = np.array([*IDS, IDS[0][::-1], IDS[1][::-1]])

    def done(mesh: Any, own: list[int], batch_size: int) -> tuple[Any, Any]:
        on(mesh)
        model = model_of("lora")
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        if mesh is not None:
            distribution: Any = keras.distribution.distribution()
            distribution.auto_shard_dataset = False
        options = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
        history = model.fit(ids[own], ids[own] + 1, **options)
        logits = np.asarray(model.predict(ids[own], batch_size=batch_size, verbose=0))
        if mesh is not None:  # of another length in each process
            unlike = ids[own][:, : 8 - hosts.index()]
            try:
                model.predict(unlike, verbose=0)
            except HostError as error:
                found["unlike"] = str(error)
        return history.history["loss"], logits

    # Two rows of each process in a step, then the third one.
    found: dict[str, Any] = {}
    mine = [3 * hosts.index() + i for i in range(3)]
    wanted, logits = done(None, [0, 1, 3, 4, 2, 5], 4)
    for mesh in ((8, 1), (2, 4)):
        losses, others = done(mesh, mine, 2)
        places = [[0, 1, 4], [2, 3, 5]][hosts.index()]
        apart = float(np.abs(others - logits[places]).max())
        found[str(mesh)] = {"losses": losses, "apart": apart}
    on(None)
    return found | {"wanted": wanted}


# Files


def loading() -> dict[str, Any]:
    """What each process copies out of a checkpoint's files, and whether it is the right share."""
    from benchmarks.sharded_load import counted
    from puna import backend
    from puna.backend import hosts, jax_shards
    from puna.models import Llama3CausalLM

    found = {}
    with shared_folder() as folder:
        preset = tiny_preset(folder)
        for mesh in MESHES:
            on(None)
            wanted = Llama3CausalLM.from_preset(preset)
            with counted() as (read, put):
                model = Llama3CausalLM.from_preset(preset, mesh=mesh)
            values = [variable.value for variable in model.tensors().values()]
            shards = [{str(s.index): s.data.nbytes for s in v.addressable_shards} for v in values]
            pairs = zip(model.variables, wanted.variables, strict=True)
            same = [np.array_equal(backend.ops.to_numpy(a), b.value) for a, b in pairs]
            found[str(mesh)] = {
                "read": sum(read),
                "share": sum(sum(its.values()) for its in shards),
                "all": sum(value.nbytes for value in values),
                "put": sum(put),
                "held": sum(jax_shards.bytes_on_devices(values).values()),
                "same": all(same),
                "processes": hosts.count(),
            }
    on(None)
    return found


def saving() -> dict[str, Any]:
    """Whether what they save is what one process saves; what they say of what cannot be saved."""
    return saved(("lora",), ((1, 8),))


def saving_elsewhere() -> dict[str, Any]:
    """The same of other models and meshes."""
    return saved(("plain", "int4", "lora"), ((1, 8), (2, 4), (4, 2)))


def saved(kinds: Sequence[str], meshes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How the files of models on meshes, and of one device, are alike."""
    from puna.backend import hosts, jax_gather
    from puna.errors import PunaError
    from puna.models import Llama3CausalLM

    found: dict[str, Any] = {}
    jax_gather.PIECE = 4096  # bytes, so that matrices come in pieces
    with shared_folder() as folder:
        preset = tiny_preset(folder)
        for kind in kinds:
            options: dict[str, Any] = {"quantization": kind} if kind == "int4" else {}
            files = []
            for mesh in (None, *meshes):
                on(mesh)
                model = Llama3CausalLM.from_preset(preset, **options)
                if kind == "lora":
                    model.enable_lora(2)
                    for variable in model.adapter_tensors().values():
                        put(variable)
                where = folder / f"{kind} {mesh} {hosts.index() if mesh is None else ''}"
                model.save_to_preset(where, max_shard_size=100_000)
                if kind == "lora":
                    model.save_adapter(where)
                files.append({p.name: p.read_bytes() for p in sorted(where.iterdir())})
            found[kind] = all(one == files[0] for one in files)
            found[f"{kind} files"] = len(files[0])
        (folder / "file").write_text("")
        before = {p.name: p.read_bytes() for p in sorted(where.iterdir())}
        for name, broken in (("disk full", 0), ("another broken", 1)):
            with breaking(broken == hosts.index()):
                try:
                    model.save_to_preset(where)
                except (PunaError, OSError) as error:
                    found[name] = [type(error).__name__, str(error)]
            after = {p.name: p.read_bytes() for p in sorted(where.iterdir())}
            found[f"{name} unchanged"] = after == before
        for name, where in (("a file", folder / "file"), ("no directory", Path("/proc/none"))):
            try:
                model.save_to_preset(where)
            except PunaError as error:
                found[name] = [type(error).__name__, str(error)]
    on(None)
    return found


@contextlib.contextmanager
def breaking(is_broken: bool) -> Iterator[None]:
    """A scope in which the fifth tensor that a process makes for a file fails."""
    from puna.backend import jax

    made, to_numpy = [0], jax.to_numpy

    def broken(variable: Any) -> Any:
        made[0] += 1
        if is_broken and made[0] == 5:
            raise OSError(28, "No space left on device")
        return to_numpy(variable)

    jax.to_numpy = broken
    try:
        yield
    finally:
        jax.to_numpy = to_numpy


def put(variable: Any) -> None:
    """Give a variable numbers that depend on its shape alone."""
    from puna import backend

    numbers = np.random.default_rng(variable.shape[0]).normal(0, 0.1, variable.shape)
    backend.ops.assign(variable, numbers.astype(np.float32))


def gathering() -> dict[str, Any]:
    """Values gathered in pieces, and the most bytes that a device gets of them at a time."""
    from puna.backend import jax_gather
    from puna.backend.jax_shards import current_mesh

    found: dict[str, Any] = {}
    jax_gather.PIECE = 1024
    wanted = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    for mesh in ((1, 8), (4, 2)):
        on(mesh)
        place = current_mesh()
        assert place is not None
        for axes in (("model", None), (None, "model"), ("batch", "model")):
            value = jax_gather.put(wanted, place.spec(wanted.shape, *axes))
            take = jax_gather.taker(*jax_gather.plan(value), value.sharding.mesh)
            text = take.lower(value, np.int32(0)).compile().as_text()
            sizes = [
                4 * math.prod(map(int, shape.split(",")))
                for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-(?:gather|reduce)\(", text)
            ]
            same = np.array_equal(jax_gather.gather(value), wanted)
            found[f"{mesh} {axes}"] = {"same": same, "sent": max(sizes, default=0)}
    on(None)
    return found


# What cannot be


def refused() -> dict[str, Any]:
    """What is said of processes that would wait for each other, or not know of each other."""
    import puna
    from puna.errors import PunaError

    settings = puna.FinetuneSettings(preset="none", data=("none.jsonl",))
    attempts: dict[str, Any] = {
        "no mesh": lambda: puna.finetune(settings),
        "one process": lambda: puna.models.CausalLM.from_preset(tiny_preset(folder), mesh=(1, 4)),
        "twice": puna.distribution.initialize,
    }
    found = {}
    on(None)
    with shared_folder() as folder:
        for name, attempt in attempts.items():
            try:
                attempt()
            except PunaError as error:
                found[name] = str(error)
    return found
