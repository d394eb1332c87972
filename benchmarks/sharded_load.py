"""How long a checkpoint takes to load onto several devices, and what each of them gets.

Usage:
    python -m benchmarks.sharded_load CHECKPOINT [--mesh 1,8] [--quantization int8] [--repeat 5]
        [--dtype bfloat16] [--json FILE]

The devices are of one CPU. Each figure is of a process of its own, sharded and whole loads in turn.
The file is read once before the first run, so that all find it in the page cache.

seconds: of from_preset.
read: bytes of the shards that are taken out of the file's pages, each counted once.
put: the largest array that is put on a device at a time; beside its share, that is all it gets.
device: the most bytes of weights that a device holds.
peak: the largest resident size minus the size right after importing Keras and JAX. On a CPU shards
of whole rows stay in the file's pages, and are part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.machine import peak_memory, resident_memory


@contextlib.contextmanager
def counted() -> Iterator[tuple[list[int], list[int]]]:
    """In this scope, the bytes of each shard that is read, and of each array put on a device."""
    import jax

    from puna.backend import jax_shards

    read: list[int] = []
    put: list[int] = []
    cut, device_put = jax_shards.cut, jax.device_put

    def counting_cut(array: Any, sharding: Any, prepare: Any) -> Any:
        def counting(part: Any) -> Any:
            read.append(part.nbytes)
            return prepare(part)

        return cut(array, sharding, counting)

    def counting_put(value: Any, *arguments: Any, **options: Any) -> Any:
        put.append(value.nbytes)
        return device_put(value, *arguments, **options)

    jax_shards.cut, jax.device_put = counting_cut, counting_put
    try:
        yield read, put
    finally:
        jax_shards.cut, jax.device_put = cut, device_put


def work(directory: Path, mesh: tuple[int, int] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Load once, in this process."""
    from puna.backend import jax_shards
    from puna.models import Llama3CausalLM

    before = resident_memory() or 0
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    with counted() as (read, put):
        start = time.perf_counter()
        model = Llama3CausalLM.from_preset(directory, mesh=mesh, preprocessor=None, **options)
        seconds = time.perf_counter() - start
    peak = peak_memory() or 0
    values = [variable.value for variable in model.tensors().values()]
    return {
        "seconds": seconds,
        "read": sum(read),
        "put": max(put),
        "device": max(jax_shards.bytes_on_devices(values).values()),
        "total": sum(value.nbytes for value in values),
        "peak": peak - before,
    }


def run(arguments: argparse.Namespace, is_sharded: bool) -> dict[str, Any]:
    """Load once, in a process of its own."""
    devices = math.prod(arguments.mesh)
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "benchmarks.sharded_load", str(arguments.checkpoint), "--work"]
    command += ["--dtype", arguments.dtype]
    if is_sharded:
        command += ["--mesh", ",".join(map(str, arguments.mesh))]
    if arguments.quantization:
        command += ["--quantization", arguments.quantization]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loading failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both loads, in turn; medians."""
    for path in arguments.checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass
    runs: dict[str, list[dict[str, Any]]] = {"whole": [], "sharded": []}
    for _ in range(arguments.repeat):
        for name, found in runs.items():
            found.append(run(arguments, name == "sharded"))
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in runs.items()
    }


def mesh_of(text: str) -> tuple[int, int]:
    """Devices for rows and for weights."""
    batch, model = map(int, text.split(","))
    return batch, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--mesh", type=mesh_of)
    parser.add_argument("--quantization")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        how = {"dtype": given.dtype, "quantization": given.quantization}
        print(json.dumps(work(given.checkpoint, given.mesh, how)))
        sys.exit()
    given.mesh = given.mesh or (1, 8)
    results = compare(given)
    for name, found in results.items():
        sizes = ", ".join(f"{k} {found[k] / 1e6:,.1f} MB" for k in found if k != "seconds")
        print(f"{name}: {found['seconds']:.2f} s; {sizes}")
    share = results["sharded"]["total"] / given.mesh[1]
    times = results["sharded"]["seconds"] / results["whole"]["seconds"]
    print(f"sharded / whole: {times:.2f} of the time")
    print(f"the fullest device: {results['sharded']['device'] / share:.3f} of an even share")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
