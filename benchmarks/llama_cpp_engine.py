"""llama.cpp, through llama-cpp-python, as one of the engines of `benchmarks.decode`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.engines import Engine, Rows
from puna.machine import usable_cores

BATCH = 512  # tokens that one call takes, llama.cpp's default


class LlamaCpp(Engine):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        import llama_cpp

        self._library = llama_cpp
        self._several: tuple[Any, Any] | None = None

    def load(self) -> None:
        self.model = self._library.Llama(
            str(self.checkpoint),
            n_ctx=self.context,
            n_batch=BATCH,
            # The package's own default is half of the cores.
            n_threads=usable_cores(),
            n_threads_batch=usable_cores(),
            verbose=False,
        )

    def generate(self, prompts: Rows, new: int) -> list[list[int]]:
        if len(prompts) == 1:
            return [list(itertools.islice(self._tokens(prompts[0]), new))]
        return self._generate_several(prompts, new)

    def first(self, prompt: Sequence[int], max_length: int) -> float:
        del max_length  # its cache has one size, which is made with the model
        start = time.perf_counter()
        next(self._tokens(prompt))
        return time.perf_counter() - start

    def arrivals(self, prompt: Sequence[int], new: int) -> list[float]:
        return [time.perf_counter() for _ in itertools.islice(self._tokens(prompt), new)]

    def _tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        self.model.reset()  # else it keeps what two prompts have in common
        return self.model.generate(list(prompt), temp=0.0, repeat_penalty=1.0)

    def weights_bytes(self) -> int:
        return int(self._library.llama_model_size(self.model.model))

    # The package's high-level class has one sequence; several go through the library's own calls.

    def _generate_several(self, prompts: Rows, new: int) -> list[list[int]]:
        library = self._library
        context, batch = self._sequences(len(prompts), max(map(len, prompts)) + new)
        library.llama_memory_clear(library.llama_get_memory(context), True)
        made: list[list[int]] = [[] for _ in prompts]
        waiting = [
            (token, place, row, place == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        for start in range(0, len(waiting), BATCH):
            self._decode(context, batch, waiting[start : start + BATCH], made)
        for step in range(new - 1):
            entries = [
                (made[row][-1], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)
            ]
            self._decode(context, batch, entries, made)
        return made

    def _decode(
        self,
        context: Any,
        batch: Any,
        entries: Sequence[tuple[int, int, int, bool]],
        made: list[list[int]],
    ) -> None:
        """Take (token, place, row, whether to continue) in; add the best token of those asked."""
        library = self._library
        batch.n_tokens = len(entries)
        for i, (token, place, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if status := library.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode answered {status}")
        for i, (_, _, row, wanted) in enumerate(entries):
            if wanted:
                logits = library.llama_get_logits_ith(context, i)
                values = np.ctypeslib.as_array(logits, (self.model.n_vocab(),))
                made[row].append(int(values.argmax()))

    def _sequences(self, rows: int, length: int) -> tuple[Any, Any]:
        """A context for so many sequences, and a batch to fill it with; made once."""
        if self._several is None:
            library = self._library
            settings = library.llama_context_default_params()
            settings.n_ctx = length * rows
            settings.n_batch = settings.n_ubatch = BATCH
            settings.n_seq_max = rows
            settings.n_threads = settings.n_threads_batch = usable_cores()
            context = library.llama_init_from_model(self.model.model, settings)
            self._several = (context, library.llama_batch_init(BATCH, 0, 1))
        return self._several
