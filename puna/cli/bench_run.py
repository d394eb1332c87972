"""What `puna bench` measures, and with what it was measured."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.errors import ContextLengthError
from puna.machine import peak_memory, resident_memory, versions

if TYPE_CHECKING:
    from puna.cli.options import Loading


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure: taking in a prompt, or making tokens.

    Args:
        kind: "pp", taking in a prompt; "tg", making tokens.
        tokens: of a row: those of the prompt, or the new ones.
        batch: rows.
        depth: tokens of each row that come before and are not counted.
    """

    kind: str
    tokens: int
    batch: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench names it.

        >>> Case(kind="pp", tokens=128, batch=1, depth=4096).name
        'pp128 @ d4096'
        """
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def calls(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The call to time and the one to take off, each as tokens of the prompt and new ones.

        >>> Case(kind="tg", tokens=64, batch=1, depth=0).calls
        ((1, 65), (1, 1))
        """
        if self.kind == "tg":
            start = max(self.depth, 1)
            return (start, self.tokens + 1), (start, 1)
        return (self.depth + self.tokens, 1), (self.depth, 1) if self.depth else None


def cases(
    *, prompts: Sequence[int], new: Sequence[int], batches: Sequence[int], depths: Sequence[int]
) -> list[Case]:
    """Every combination; 0 tokens are nothing to measure."""
    kinds = [("pp", tokens) for tokens in prompts] + [("tg", tokens) for tokens in new]
    return [
        Case(kind=kind, tokens=tokens, batch=batch, depth=depth)
        for depth in depths
        for batch in batches
        for kind, tokens in kinds
        if tokens
    ]


def check_lengths(cases: Sequence[Case], context_length: int) -> None:
    """See that all will fit, before any time is spent.

    Raises:
        ContextLengthError: one does not.
    """
    for case in cases:
        total = sum(case.calls[0])
        if total > context_length:
            raise ContextLengthError(
                f"{case.name} needs a context of {total} tokens, and the model has "
                f"{context_length}; lower --prompt, --new or --depth"
            )


def imported() -> int | None:
    """Import Keras and its backend; the resident bytes after it, where the system tells them."""
    import puna.models  # noqa: F401

    return resident_memory()


def load(preset: str, loading: Loading, random_weights: bool) -> tuple[Any, float]:
    """The model without its tokenizer, which nothing here needs, and the seconds it took."""
    from puna.checkpoint.hub import PRESETS, SCHEME
    from puna.cli import terminal
    from puna.models import CausalLM

    # The Hub's client draws bars of its own, which a spinner would spoil.
    quiet = PRESETS.get(preset, preset).startswith(SCHEME)
    with contextlib.nullcontext() if quiet else terminal.waiting(f"Loading {preset}"):
        start = time.perf_counter()
        model = CausalLM.from_preset(
            preset,
            load_weights=not random_weights,
            dtype=loading.dtype,
            revision=loading.revision,
            adapter=loading.adapter,
            preprocessor=None,
        )
        return model, time.perf_counter() - start


def measure(model: Any, case: Case, repetitions: int) -> dict[str, Any]:
    """Time one case.

    Every call has a prompt of its own, so that nothing kept of an earlier one can help.

    Args:
        model: a causal LM.
        case: what to measure.
        repetitions: how often, after a warm-up.
    """
    import numpy as np

    numbers = np.random.default_rng(0)

    def seconds(call: tuple[int, int]) -> float:
        length, new = call
        shape = (case.batch, length)
        rows = list(numbers.integers(0, model.config.vocab_size, shape, dtype=np.int32))
        start = time.perf_counter()
        model.generate(rows, max_new_tokens=new, stop_token_ids=None, sampler="greedy")
        return time.perf_counter() - start

    whole, part = case.calls
    taken: list[float] = []
    for _ in range(repetitions + 1):
        taken.append(seconds(whole) - (seconds(part) if part is not None else 0.0))
    return {**_rates(case, taken[1:]), "seconds": [round(s, 6) for s in taken[1:]]}


def _rates(case: Case, seconds: Sequence[float]) -> dict[str, Any]:
    """Tokens a second from the seconds of each repetition."""
    tokens = case.tokens * case.batch

    def rate(taken: float) -> float | None:
        # A difference of two noisy times may be no time at all.
        return round(tokens / taken, 3) if taken > 0 else None

    median = statistics.median(seconds)
    return {
        "test": case.name,
        "kind": case.kind,
        "tokens": case.tokens,
        "batch": case.batch,
        "depth": case.depth,
        "tokens_per_second": rate(median),
        "slowest": rate(max(seconds)),
        "fastest": rate(min(seconds)),
        "milliseconds_per_token": round(1000 * median / tokens, 4) if median > 0 else None,
    }


def describe(model: Any) -> dict[str, Any]:
    """What runs where."""
    import keras

    from puna.cli.conversion import parameter_count

    backend = keras.backend.backend()
    variables = list(model.variables)
    return {
        "parameters": parameter_count(model.config),
        "weights_bytes": sum(_count(v.shape) * _itemsize(v.dtype) for v in variables),
        "dtype": model.dtype_policy.compute_dtype,
        "backend": backend,
        "device": str(getattr(variables[0].value, "device", "unknown")),
        "versions": versions(backend),
    }


def memory(before: int | None) -> dict[str, Any]:
    """The most that this process has held beyond `before` bytes; None where it cannot be told."""
    peak = peak_memory()
    if peak is None or before is None:
        return {"peak_memory_bytes": None}
    return {"peak_memory_bytes": peak - before}


def _count(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _itemsize(dtype: str) -> int:
    from puna.backend.memory import numpy_dtype

    return numpy_dtype(dtype).itemsize
