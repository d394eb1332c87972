"""How the next token is chosen from the logits.

A sampler is a frozen description. What it asks for (temperature, how many candidates, how much
probability) travels to the compiled step as values, and randomness is a value too: one uniform
number per row and token. So changing any of them compiles nothing, and a seed gives the same
choice on every backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from puna.errors import ConfigError

# The compiled shapes of a choice: the best token; among the best `CANDIDATES`; among all by rank;
# among all.
Form = Literal["greedy", "candidates", "sorted", "all"]

CANDIDATES = 64


class SamplingValues(NamedTuple):
    """What a compiled step takes in, one number per row."""

    temperature_B: np.ndarray  # float32
    top_k_B: np.ndarray  # int32
    top_p_B: np.ndarray  # float32


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The base of all samplers.

    Args:
        temperature: divides the logits; 0 takes the best token.
        seed: makes the choices repeatable; None draws a new one at each call.
    """

    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; expected a number ≥ 0")

    @property
    def top_k(self) -> int | None:
        """How many of the best tokens may be chosen; None means all."""
        return None

    @property
    def top_p(self) -> float:
        """The share of probability that the best tokens must reach together."""
        return 1.0

    @property
    def form(self) -> Form:
        """Which compiled shape makes this choice."""
        if self.temperature == 0 or self.top_k == 1:
            return "greedy"
        if self.top_k is not None and self.top_k <= CANDIDATES:
            return "candidates"
        return "all" if self.top_k is None and self.top_p >= 1 else "sorted"

    def values(self, rows: int) -> SamplingValues:
        """The numbers for `rows` sequences."""
        top_k = self.top_k or np.iinfo(np.int32).max
        return SamplingValues(
            np.full(rows, self.temperature or 1.0, np.float32),
            np.full(rows, top_k, np.int32),
            np.full(rows, self.top_p, np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class GreedySampler(Sampler):
    """The most likely token, always."""

    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RandomSampler(Sampler):
    """Any token, as likely as the model says."""


@dataclass(frozen=True)
class TopKSampler(Sampler):
    """One of the k most likely tokens (Fan et al. 2018, arXiv:1805.04833).

    Args:
        k: how many.
        temperature: divides the logits.
        seed: makes the choices repeatable.
    """

    k: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; expected a whole number above 0")

    @property
    def top_k(self) -> int | None:
        """See `Sampler`."""
        return self.k


@dataclass(frozen=True)
class TopPSampler(Sampler):
    """One of the fewest tokens that have the probability p together (Holtzman et al. 2020).

    Args:
        p: the probability, in (0, 1].
        k: how many tokens at the most; None means no bound.
        temperature: divides the logits.
        seed: makes the choices repeatable.
    """

    p: float = 0.1
    k: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ConfigError(f"p is {self.p}; expected a number in (0, 1]")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"k is {self.k}; expected a whole number above 0 or None")

    @property
    def top_k(self) -> int | None:
        """See `Sampler`."""
        return self.k

    @property
    def top_p(self) -> float:
        """See `Sampler`."""
        return self.p


_BY_NAME: dict[str, type[Sampler]] = {
    "greedy": GreedySampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "random": RandomSampler,
}


def get(sampler: str | Sampler) -> Sampler:
    """The sampler that a name stands for, with its defaults; a sampler is returned as it is.

    >>> get("top_k")
    TopKSampler(temperature=1.0, seed=None, k=5)
    """
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in _BY_NAME:
        raise ConfigError(
            f"sampler {sampler!r} is not known; expected a puna.samplers.Sampler or one of: "
            f"{', '.join(_BY_NAME)}"
        )
    return _BY_NAME[sampler]()


def to_config(sampler: Sampler) -> dict[str, Any]:
    """A sampler as JSON."""
    return {"class_name": type(sampler).__name__, **dataclasses.asdict(sampler)}


def from_config(config: Mapping[str, Any]) -> Sampler:
    """The inverse of `to_config`."""
    classes = {cls.__name__: cls for cls in _BY_NAME.values()}
    fields = dict(config)
    return classes[fields.pop("class_name")](**fields)


class UniformNumbers:
    """The random numbers of one call: for each row a stream of its own.

    Args:
        seed: the sampler's; None draws one from NumPy's global generator, so that
            `keras.utils.set_random_seed` makes it repeatable.
        rows: how many sequences.
    """

    _KEY: ClassVar[int] = 0x70756E61  # sets our streams apart from others of the same seed

    def __init__(self, seed: int | None, rows: int):
        if seed is None:
            seed = int(np.random.randint(2**31))
        self._streams = [
            np.random.Generator(np.random.Philox(seed=np.random.SeedSequence([self._KEY, seed, r])))
            for r in range(rows)
        ]

    def next(self) -> np.ndarray:
        """The next number of each row, float32 in [0, 1)."""
        return np.array([stream.random(dtype=np.float32) for stream in self._streams], np.float32)
