"""What `benchmarks.decode` asks of each engine.

A question's `measure` is called once as a warm-up, which is not counted, and then once a round,
each time with prompts of their own, so that nothing kept of an earlier one can help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Ask = Callable[..., dict[str, Any]]  # Worker.ask: a request's fields in, the answer out

FASTER, SLOWER = "higher", "lower"  # which is better
PLAIN = ""  # a figure that is told and not compared


class Figure(NamedTuple):
    """What a figure is called, its unit, and which is better."""

    name: str
    unit: str
    better: str


@dataclass
class Answer:
    """What an engine gave in one round.

    Attributes:
        figures: by the names in `Question.figures`.
        tokens: the new tokens of the first row, where there are some.
    """

    figures: dict[str, float]
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Shape:
    """What the questions depend on beside the engine.

    Args:
        vocab_size: ids are below it.
        new: new tokens of the question `decode`.
        context: tokens of the long prompt of the question `context`.
        token_bytes: bytes of keys and values of one token in the dtype of the run.
    """

    vocab_size: int
    new: int
    context: int
    token_bytes: int

    def prompt(self, length: int, turn: int) -> list[int]:
        """A prompt of random tokens, another one in each turn."""
        numbers = np.random.default_rng([length, turn])
        return numbers.integers(0, self.vocab_size, length).tolist()


class Question:
    """One thing to find out.

    Attributes:
        about: a sentence for whoever reads the figures.
        figures: those of each answer.
        length: tokens of the longest sequence.
        fresh: whether every measurement has processes of its own.
    """

    about: str
    figures: tuple[Figure, ...]
    length: int
    fresh = False

    def __init__(self, shape: Shape):
        self.shape = shape

    def takes(self, engine: str) -> bool:
        """Whether the question makes sense for an engine."""
        del engine
        return True

    def measure(self, ask: Ask, turn: int) -> Answer:
        """One round; turn 0 is the warm-up."""
        raise NotImplementedError


class Decode(Question):
    about = (
        "Tokens a second after the first, and the whole call, for a prompt of 128 tokens, alone: "
        "a whole call, minus what it spends until its first token."
    )
    figures = (
        Figure("decode", "tokens/s", FASTER),
        Figure("whole call", "s", SLOWER),
    )

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.length = 128 + shape.new

    def measure(self, ask: Ask, turn: int) -> Answer:
        new = self.shape.new
        whole = ask(do="generate", prompts=[self.shape.prompt(128, turn)], new=new)
        opening = ask(do="opening", prompt=self.shape.prompt(128, 1000 + turn), new=new)
        left = whole["seconds"] - opening["seconds"]
        figures = {"decode": _rate(new - 1, left), "whole call": whole["seconds"]}
        return Answer(figures, whole["tokens"][0])


class Prefill(Question):
    about = "Tokens of a prompt taken in a second: the prompt's length by the time of one token."
    figures = (
        Figure("128 tokens", "tokens/s", FASTER),
        Figure("512 tokens", "tokens/s", FASTER),
    )
    length = 513

    def measure(self, ask: Ask, turn: int) -> Answer:
        seconds = [
            ask(do="opening", prompt=self.shape.prompt(n, turn), new=1)["seconds"]
            for n in (128, 512)
        ]
        return Answer({"128 tokens": 128 / seconds[0], "512 tokens": 512 / seconds[1]})


class FirstToken(Question):
    about = (
        "The wait for the first token after a prompt of 16 tokens, with max_length=1024. An engine "
        "that cannot stream is stopped by its first token."
    )
    figures = (Figure("first token", "s", SLOWER),)
    length = 1024

    def measure(self, ask: Ask, turn: int) -> Answer:
        prompt = self.shape.prompt(16, turn)
        return Answer({"first token": ask(do="first", prompt=prompt, max_length=1024)["seconds"]})


class FirstCall(Question):
    about = (
        "In a new process, from the loaded model to the end of its first generate (a prompt of 128 "
        "tokens, 16 new ones): with an empty cache of compiled programs, and once more in another "
        "process with what the first one left. JAX_COMPILATION_CACHE_DIR is not set."
    )
    figures = (
        Figure("cold", "s", SLOWER),
        Figure("warm", "s", SLOWER),
        Figure("programs kept", "files", PLAIN),
    )
    fresh = True
    length = 144

    def takes(self, engine: str) -> bool:
        return engine.endswith("-jax")

    def measure(self, ask: Ask, turn: int) -> Answer:
        # `ask` starts a process for every load; all of one measurement share a cache directory.
        seconds: list[float] = []
        tokens: list[int] = []
        for _ in range(2):
            ask(do="load")
            answer = ask(do="generate", prompts=[self.shape.prompt(128, turn)], new=16)
            seconds.append(answer["seconds"])
            tokens = answer["tokens"][0]
        kept = ask(do="kept")["files"]
        figures = {"cold": seconds[0], "warm": seconds[1], "programs kept": kept}
        return Answer(figures, tokens)


class Context(Question):
    figures = (
        Figure("short", "ms/token", SLOWER),
        Figure("long", "ms/token", SLOWER),
        Figure("long / short", "×", SLOWER),
    )
    new = 32

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.length = shape.context + self.new
        self.about = (
            f"Time of a token (of {self.new}) after a prompt of 128 tokens, and after one of "
            f"{shape.context}."
        )

    def measure(self, ask: Ask, turn: int) -> Answer:
        short, long = (
            1000 * ask(do="pace", prompt=self.shape.prompt(n, turn), new=self.new)["seconds"]
            for n in (128, self.shape.context)
        )
        ratio = long / short if short > 0 else float("nan")
        return Answer({"short": short, "long": long, "long / short": ratio})


class Batch(Question):
    about = (
        "Eight prompts (24, 56, 88 and 120 tokens, each length twice) with 32 new tokens each: in "
        "one batch, and one after another. Rows alike: those that say the same both ways."
    )
    figures = (
        Figure("one batch", "tokens/s", FASTER),
        Figure("one by one", "tokens/s", FASTER),
        Figure("gain", "×", FASTER),
        Figure("rows alike", "of 8", PLAIN),
    )
    new = 32
    length = 152

    def measure(self, ask: Ask, turn: int) -> Answer:
        lengths = [24, 120, 56, 88, 120, 24, 88, 56]
        prompts = [self.shape.prompt(n, 10 * turn + i) for i, n in enumerate(lengths)]
        batch = ask(do="generate", prompts=prompts, new=self.new)
        alone = [ask(do="generate", prompts=[prompt], new=self.new) for prompt in prompts]
        seconds = sum(answer["seconds"] for answer in alone)
        made = len(prompts) * self.new
        alike = [a["tokens"][0] == b for a, b in zip(alone, batch["tokens"], strict=True)]
        figures = {
            "one batch": made / batch["seconds"],
            "one by one": made / seconds,
            "gain": seconds / batch["seconds"],
            "rows alike": sum(alike),
        }
        return Answer(figures, batch["tokens"][0])


class Memory(Question):
    about = (
        "The most that a new process holds while it loads and answers a prompt of 128 tokens with "
        "64 new ones, minus what it held when its libraries were imported. Mapped files count "
        "while they are resident. The cache is what 192 tokens need in the dtype of the run."
    )
    figures = (
        Figure("peak", "GB", SLOWER),
        Figure("weights", "GB", PLAIN),
        Figure("cache", "GB", PLAIN),
    )
    fresh = True
    length = 192

    def measure(self, ask: Ask, turn: int) -> Answer:
        loaded = ask(do="load")
        answer = ask(do="generate", prompts=[self.shape.prompt(128, turn)], new=64)
        peak = ask(do="memory")["peak"]
        if peak is None:
            raise RuntimeError("this system does not tell how much memory a process holds")
        sizes = {
            "peak": peak,
            "weights": loaded["weights"],
            "cache": 192 * self.shape.token_bytes,
        }
        return Answer({name: size / 1e9 for name, size in sizes.items()}, answer["tokens"][0])


QUESTIONS: dict[str, type[Question]] = {
    "decode": Decode,
    "prefill": Prefill,
    "first-token": FirstToken,
    "first-call": FirstCall,
    "context": Context,
    "batch": Batch,
    "memory": Memory,
}


def _rate(tokens: int, seconds: float) -> float:
    """Tokens a second; no number where noise has eaten the time."""
    return tokens / seconds if seconds > 0 else float("nan")


def longest(questions: Sequence[Question]) -> int:
    """A context in which every question fits."""
    return -(-max(question.length for question in questions) // 256) * 256
