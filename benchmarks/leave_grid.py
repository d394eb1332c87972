"""A float32 checkpoint whose weights lie on no grid, for measuring what rounding does to a model.

Usage: python -m benchmarks.leave_grid DIRECTORY [--gguf FILE] [--text FILE]

A file in Q4_1 has at most 16 values in each group of 32 weights, so that rounding them to 4 bits
again says little. This trains all weights, in float32, with AdamW on a text; without arguments on
SmolLM2 and another part of the novel than `tests.assets.quality_text`. A group has left its grid
when its weights are off it by a twentieth of the grid's step, as a root mean square; numbers that
have forgotten their grid altogether are off it by 0.29. From --least-steps on it looks every fifth
step whether --share of the groups have left, and then stops. Seed, data and their order are fixed.

DIRECTORY becomes a Hugging Face directory, which Puna and transformers load, and of which
`benchmarks.gguf_file` makes a file for llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import note

GROUP = 32  # weights that share a step in Q4_1
LEFT = 0.05  # of a step
EVERY = 5  # steps of training after which groups are looked at


class Grid(NamedTuple):
    """Where a matrix's weights may lie in Q4_1: `least + step * q`, q from 0 to 15.

    Both are float32 `(out, in / 32)`, with rows in the order of GGUF.
    """

    step: np.ndarray
    least: np.ndarray


def read_grids(gguf: Path) -> dict[str, Grid]:
    """The grid of each matrix that the file has in Q4_1, under GGUF's names."""
    from gguf import GGMLQuantizationType, GGUFReader

    grids = {}
    for tensor in GGUFReader(gguf).tensors:
        if tensor.tensor_type is GGMLQuantizationType.Q4_1:
            # A block is a step and a least value in float16, and 16 bytes of numbers.
            both = tensor.data.reshape(len(tensor.data), -1, 20)[..., :4].copy().view(np.float16)
            grids[tensor.name] = Grid(*both.astype(np.float32).transpose(2, 0, 1))
    return grids


def distances(weights: np.ndarray, grid: Grid) -> np.ndarray:
    """How far each group is from its grid, as a root mean square, in steps.

    Args:
        weights: `(out, in)`, with rows in the order of GGUF.
        grid: the matrix's own; a group whose step is 0 is left out.

    >>> grid = Grid(np.array([[0.5]]), np.array([[-1.0]]))
    >>> on = np.arange(32, dtype="float32")[None] % 16 * 0.5 - 1
    >>> distances(on, grid).tolist(), distances(on + 0.125, grid).tolist()
    ([0.0], [0.25])
    """
    real = grid.step != 0
    groups = weights.reshape(len(weights), -1, GROUP)[real]
    places = (groups - grid.least[real][:, None]) / grid.step[real][:, None]
    return np.sqrt(np.square(places - np.rint(places).clip(0, 15)).mean(axis=-1))


def all_distances(model: Any, grids: dict[str, Grid]) -> np.ndarray:
    """Those of all groups of a model of transformers."""
    from benchmarks.gguf_file import gguf_name, permute

    found = []
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or (place := gguf_name(name)) not in grids:
            continue
        weights = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights = permute(weights, len(weights) // model.config.head_dim)
        found.append(distances(weights, grids[place]))
    return np.concatenate(found)


def train(model: Any, tokens: np.ndarray, grids: dict[str, Grid], settings: Any) -> dict[str, Any]:
    """Train until enough groups have left their grids; return what is to be told of it."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, weight_decay=0.0, fused=True
    )
    before = all_distances(model, grids)
    start, losses = time.perf_counter(), []
    for step, batch in enumerate(batches(tokens, settings), start=1):
        for group in optimizer.param_groups:  # Adam's first steps are as long as its rate
            group["lr"] = settings.rate * min(1.0, step / settings.warm_up)
        loss = model(input_ids=torch.from_numpy(batch), labels=torch.from_numpy(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # new memory costs more than zeros
        losses.append(loss.item())
        note(f"step {step}: loss {losses[-1]:.3f}")
        if step < settings.least_steps or step % EVERY:
            continue
        off = all_distances(model, grids)
        share = float((off >= LEFT).mean())
        note(f"{share:.2%} of the groups have left the grid")
        if share >= settings.share:
            return {
                "steps": step,
                "seconds": time.perf_counter() - start,
                "losses": losses,
                "groups": len(off),
                "distance_before": float(np.median(before)),
                "distance": float(np.median(off)),
                "left": share,
            }
    sys.exit(f"after {len(losses)} steps, too few groups have left the grid; raise --rate")


def batches(tokens: np.ndarray, settings: Any) -> Iterator[np.ndarray]:
    """`[batch, length]` of tokens from random places of the text; the same in every run."""
    random = np.random.default_rng(settings.seed)
    for _ in range(settings.most_steps):
        starts = random.integers(0, len(tokens) - settings.length, settings.batch)
        yield np.stack([tokens[start : start + settings.length] for start in starts])


def main() -> None:
    settings = _arguments()
    if settings.directory.exists():
        sys.exit(f"{settings.directory} exists already; name another directory, or remove it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(settings.seed)
    gguf, text = settings.gguf or _asset("smollm2_gguf"), settings.text or _asset("training_text")
    with tempfile.TemporaryDirectory(prefix="puna-tune-") as scratch:
        plain = _dequantized(gguf, Path(scratch) / "plain")
        tokenizer = AutoTokenizer.from_pretrained(plain)
        # The weights are read, not mapped: the directory does not stay.
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).train()
        tokens = np.asarray(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], np.int64)
        told = train(model, tokens, read_grids(gguf), settings)
        tokenizer.save_pretrained(settings.directory)
        model.eval().save_pretrained(settings.directory)
    print(
        f"{settings.directory}: {told['steps']} steps in {told['seconds']:.0f} s, "
        f"loss {told['losses'][0]:.3f} to {told['losses'][-1]:.3f}\n"
        f"{told['left']:.2%} of {told['groups']:,} groups have left the grid; they were "
        f"{told['distance_before']:.2g} of a step off it, and are {told['distance']:.2g} (medians)"
    )


def _dequantized(gguf: Path, directory: Path) -> Path:
    """A Hugging Face directory of the file, in float32."""
    from puna.checkpoint.preset import Preset
    from puna.cli.conversion import write_hf

    write_hf(Preset(gguf), directory, "float32")
    return directory


def _asset(name: str) -> Path:
    """A real file that tests run on, fetched if need be."""
    from tests import assets

    return getattr(assets, name)()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="what to make")
    parser.add_argument("--gguf", type=Path, help="in Q4_1; else SmolLM2's")
    parser.add_argument("--text", type=Path, help="in UTF-8; else the first chapters of a novel")
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--warm-up", type=int, default=10, help="steps until that rate is reached")
    parser.add_argument("--share", type=float, default=0.95, help="of groups that are to leave")
    parser.add_argument("--least-steps", type=int, default=20)
    parser.add_argument("--most-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
