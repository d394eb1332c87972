"""How fast the native kernels read weights, and multiply many rows, beside what the machine gives.

Usage:
    python -m benchmarks.kernels [--rounds 7] [--out 8192] [--in 2048] [--json FILE]

One row: bytes of weights (scales included) a second, and the share of what a plain parallel read of
the same bytes reaches in the same rounds. 128 rows: floating-point operations a second, and beside
torch's matmul of the same bfloat16 and float32 arrays where torch is installed. The weights are
several copies, so that no cache holds them. Medians; the ratio is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from puna.backend.kernels.library import KINDS, Matrix, Threads, library, matrix_of
from puna.machine import describe, usable_cores

# Name, dtype of the numbers, and the inputs that share a scale.
WEIGHTS = [
    ("float32", np.float32, 0), ("bfloat16", ml_dtypes.bfloat16, 0), ("float16", np.float16, 0),
    ("int8, a scale a row", np.int8, -1), ("int8, groups of 32", np.int8, 32),
    ("4 bits, groups of 32", np.uint8, 32), ("4 bits, groups of 128", np.uint8, 128),
]  # fmt: skip
BYTES = 256 << 20  # of weights that one round reads
ROWS = 128


def main() -> None:
    arguments = _arguments()
    if library() is None:
        sys.exit("the native kernels are not installed, or PUNA_KERNELS=off")
    results: dict[str, Any] = {"machine": describe(), "threads": usable_cores(), "weights": {}}
    print(f"{'weights':24}{'read, GB/s':>12}{'1 row, GB/s':>13}{'share':>8}", end="")
    print(f"{f'{ROWS} rows, GF':>15}{'beside torch':>14}")
    for name, dtype, group in WEIGHTS:
        told = measure(dtype, group, arguments)
        results["weights"][name] = told
        beside = f"{told['torch_ratio']:.2f} ×" if "torch_ratio" in told else ""
        print(f"{name:24}{told['read']:12.1f}{told['row']:13.1f}{told['share']:8.2f}", end="")
        print(f"{told['many']:15.0f}{beside:>14}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(dtype: Any, group: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One kind of weights."""
    out, width = arguments.out, arguments.width
    rng = np.random.default_rng(0)
    group = width if group < 0 else group
    arrays = _weight(rng, dtype, out, width, group)
    nbytes = sum(array.nbytes for array in arrays)
    copies = [tuple(a.copy() for a in arrays) for _ in range(max(1, BYTES // nbytes))]
    matrices = [matrix_of(copy, width, group or width) for copy in copies]
    one, many = (rng.standard_normal((n, width)).astype(ml_dtypes.bfloat16) for n in (1, ROWS))
    loaded = library()
    assert loaded is not None
    crew = ctypes.byref(Threads(None, None, usable_cores()))

    def read() -> None:
        for copy in copies:
            for array in copy:
                loaded.puna_read(crew, array.ctypes.data, array.nbytes)

    def row() -> None:
        for matrix in matrices:
            _multiply(crew, one, matrix)

    beside = _torch_product(many, arrays[0])
    rounds = [
        [_seconds(work) for work in (read, row, lambda: _multiply(crew, many, matrices[0]), beside)]
        for _ in range(arguments.rounds + 1)
    ][1:]
    reads, rows, manys, theirs = zip(*rounds, strict=True)
    whole, flops = nbytes * len(copies) / 1e9, 2 * ROWS * out * width / 1e9
    told = {
        "read": whole / statistics.median(reads),
        "row": whole / statistics.median(rows),
        "share": statistics.median(a / b for a, b in zip(reads, rows, strict=True)),
        "many": flops / statistics.median(manys),
    }
    if all(theirs):
        told["torch_ratio"] = statistics.median(a / b for a, b in zip(theirs, manys, strict=True))
    return told


def _weight(rng: np.random.Generator, dtype: Any, out: int, width: int, group: int) -> Any:
    if not group:
        return (rng.standard_normal((out, width)).astype(dtype),)
    columns = width if dtype is np.int8 else width // 2
    numbers = rng.integers(0, 256, (out, columns)).astype(np.uint8).view(dtype)
    return numbers, rng.random((out, width // group)).astype(ml_dtypes.bfloat16)


def _multiply(crew: Any, x: np.ndarray, matrix: Matrix) -> None:
    y = np.empty((len(x), matrix.out_features), np.float32)
    loaded = library()
    assert loaded is not None
    why = loaded.puna_linear(
        crew, x.ctypes.data, KINDS[x.dtype.name], len(x), ctypes.byref(matrix), 1,
        (ctypes.c_void_p * 1)(y.ctypes.data), KINDS["float32"], 0,
    )  # fmt: skip
    assert why is None, why


def _torch_product(x: np.ndarray, weight: np.ndarray) -> Callable[[], Any] | None:
    """torch's product of the same arrays; None where it has none, or is not installed."""
    if weight.dtype not in (np.float32, ml_dtypes.bfloat16):
        return None
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(usable_cores())
    dtype = getattr(torch, weight.dtype.name)
    rows, matrix = (torch.from_numpy(a.astype(np.float32)).to(dtype) for a in (x, weight))
    return lambda: rows @ matrix.T


def _seconds(work: Callable[[], Any] | None) -> float:
    if work is None:
        return 0.0
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=int, default=8192, help="rows of the weight")
    parser.add_argument("--in", dest="width", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
