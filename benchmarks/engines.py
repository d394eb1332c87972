"""The engines that are compared, each behind the same few calls. See `benchmarks.decode`.

Every engine gets token ids, continues them greedily and does not stop at any token. A library is
imported when its engine is made, in the engine's own process.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Sequence[int]]


class Engine(abc.ABC):
    """One way of running a checkpoint.

    Args:
        checkpoint: a Hugging Face directory, or a GGUF file; for llama.cpp the latter.
        dtype: what to run in.
        context: tokens of the longest sequence to come.
        quantization: how Puna quantizes the weights while it loads; None leaves them.
    """

    def __init__(self, checkpoint: Path, dtype: str, context: int, quantization: str | None = None):
        self.checkpoint, self.dtype, self.context = checkpoint, dtype, context
        self.quantization = quantization

    @abc.abstractmethod
    def load(self) -> None:
        """Load the model, as a user would."""

    @abc.abstractmethod
    def generate(self, prompts: Rows, new: int) -> list[list[int]]:
        """The `new` tokens that follow each prompt, all prompts in one batch."""

    @abc.abstractmethod
    def first(self, prompt: Sequence[int], max_length: int) -> float:
        """Seconds until the first token, in a call with room for `max_length` tokens in all."""

    def opening(self, prompt: Sequence[int], new: int) -> float:
        """Seconds that a call for `new` tokens spends on its first; here, a call for one alone."""
        del new
        start = time.perf_counter()
        self.generate([prompt], 1)
        return time.perf_counter() - start

    def pace(self, prompt: Sequence[int], new: int) -> float:
        """Seconds of each token after the first; here, from the times when tokens arrive."""
        times = self.arrivals(prompt, new)
        # The slope of a line through them is right also where tokens come in bursts.
        return float(np.polyfit(np.arange(len(times)), times, 1)[0])

    def arrivals(self, prompt: Sequence[int], new: int) -> list[float]:
        """When each of the new tokens was there."""
        raise NotImplementedError

    @abc.abstractmethod
    def weights_bytes(self) -> int:
        """Bytes of the weights as they are held."""


class Puna(Engine):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        import puna.models

        self._models = puna.models

    def load(self) -> None:
        self.model = self._models.Llama3CausalLM.from_preset(
            self.checkpoint, dtype=self.dtype, quantization=self.quantization
        )

    def generate(self, prompts: Rows, new: int) -> list[list[int]]:
        rows = self.model.generate(
            [np.asarray(prompt, np.int32) for prompt in prompts],
            max_new_tokens=new,
            stop_token_ids=None,
            strip_prompt=True,
            sampler="greedy",
        )
        return [[int(token) for token in row] for row in rows]

    def first(self, prompt: Sequence[int], max_length: int) -> float:
        start = time.perf_counter()
        return self._stream(prompt, most=1, max_length=max_length)[0] - start

    def arrivals(self, prompt: Sequence[int], new: int) -> list[float]:
        return self._stream(prompt, most=new, max_new_tokens=new)

    def _stream(self, prompt: Sequence[int], most: int, **lengths: Any) -> list[float]:
        """When each token reached the text, up to `most` or some more."""
        times: list[float] = []
        stream = self.model.stream(
            np.asarray(prompt, np.int32), stop_token_ids=None, sampler="greedy", **lengths
        )
        with stream:
            while len(times) < most and stream.finish_reason is None:
                # A token need not make a piece of text: it reaches it with the next that does.
                next(stream, None)
                times += [time.perf_counter()] * (len(stream.token_ids) - len(times))
        return times

    def weights_bytes(self) -> int:
        return _variables_bytes(self.model)


class KerasHub(Engine):
    """keras-hub takes padded arrays and generates up to their length; it cannot stream."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        from keras_hub.models import Llama3CausalLM

        self._class = Llama3CausalLM
        self._known: dict[tuple[int, int], tuple[Sequence[int], int]] = {}

    def load(self) -> None:
        self.model = self._class.from_preset(str(self.checkpoint), dtype=self.dtype)
        self.model.compile(sampler="greedy")
        self.model.preprocessor = None

    def generate(self, prompts: Rows, new: int) -> list[list[int]]:
        result = self._run(prompts, max(map(len, prompts)) + new, None)
        return [
            [int(t) for t in row[len(prompt) : len(prompt) + new]]
            for row, prompt in zip(result, prompts, strict=True)
        ]

    def first(self, prompt: Sequence[int], max_length: int) -> float:
        # As early as it can be stopped: its first token is the one to stop at. Which that is must
        # be known before, and another one would be compiled anew; so the first prompt of each
        # length is the one that is always timed. Nothing of it is kept between calls.
        key = (len(prompt), max_length)
        if key not in self._known:
            row = self._run([prompt], max_length, None)[0]
            self._known[key] = (prompt, int(row[len(prompt)]))
        prompt, stop = self._known[key]
        start = time.perf_counter()
        self._run([prompt], max_length, (stop,))
        return time.perf_counter() - start

    def opening(self, prompt: Sequence[int], new: int) -> float:
        # It takes in the padding too, so the call must be as long as the one that it is part of.
        return super().opening(prompt, 1) if new == 1 else self.first(prompt, len(prompt) + new)

    def pace(self, prompt: Sequence[int], new: int) -> float:
        opening = self.opening(prompt, new)
        start = time.perf_counter()
        self.generate([prompt], new)
        return (time.perf_counter() - start - opening) / (new - 1)

    def _run(self, prompts: Rows, max_length: int, stops: tuple[int, ...] | None) -> np.ndarray:
        ids = np.zeros((len(prompts), max_length), np.int32)
        mask = np.zeros((len(prompts), max_length), bool)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
            mask[i, : len(prompt)] = True
        inputs = {"token_ids": ids, "padding_mask": mask}
        return np.asarray(self.model.generate(inputs, stop_token_ids=stops)["token_ids"])

    def weights_bytes(self) -> int:
        return _variables_bytes(self.model)


class Transformers(Engine):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        # It imports a model's code when its class is asked for, and that is no loading.
        self._class: Any = transformers.AutoModelForCausalLM
        self._transformers.LlamaForCausalLM  # noqa: B018

    def load(self) -> None:
        dtype = getattr(self._torch, self.dtype)
        self.model = self._class.from_pretrained(self.checkpoint, dtype=dtype)
        self.model.generation_config = self._transformers.GenerationConfig(
            do_sample=False, pad_token_id=0
        )

    def generate(self, prompts: Rows, new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        result = self._run(prompts, max_new_tokens=new)
        return [[int(token) for token in row[longest:]] for row in result]

    def first(self, prompt: Sequence[int], max_length: int) -> float:
        torch = self._torch

        def stop(ids: Any, scores: Any, **more: Any) -> Any:
            del scores, more
            return torch.ones(ids.shape[0], dtype=torch.bool)

        start = time.perf_counter()
        self._run([prompt], max_length=max_length, stopping_criteria=[stop])
        return time.perf_counter() - start

    def arrivals(self, prompt: Sequence[int], new: int) -> list[float]:
        times: list[float] = []

        class Clock(self._transformers.generation.streamers.BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        self._run([prompt], max_new_tokens=new, streamer=Clock())
        return times[1:]  # the prompt comes first

    def _run(self, prompts: Rows, **settings: Any) -> Any:
        torch = self._torch
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        with torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, **settings)

    def weights_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def _variables_bytes(model: Any) -> int:
    """Bytes of a Keras model's variables."""
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1}
    return sum(int(np.prod(v.shape)) * sizes.get(str(v.dtype), 4) for v in model.variables)


def _llama_cpp(*arguments: Any) -> Engine:
    from benchmarks.llama_cpp_engine import LlamaCpp

    return LlamaCpp(*arguments)


# name: (what makes it, the package that must be there, the Keras backend)
ENGINES: dict[str, tuple[Callable[..., Engine], str, str]] = {
    "puna-jax": (Puna, "puna", "jax"),
    "puna-torch": (Puna, "puna", "torch"),
    "puna-tensorflow": (Puna, "puna", "tensorflow"),
    "keras-hub-jax": (KerasHub, "keras_hub", "jax"),
    "keras-hub-tensorflow": (KerasHub, "keras_hub", "tensorflow"),
    "transformers": (Transformers, "transformers", ""),
    "llama.cpp": (_llama_cpp, "llama_cpp", ""),
}

# Those that run quantized weights.
QUANTIZED = ("puna-jax", "puna-torch", "puna-tensorflow", "llama.cpp")
