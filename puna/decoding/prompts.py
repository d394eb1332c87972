"""Prompts as users bring them, and what is made of them given back in the same kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from puna.errors import TokenizerError
from puna.text.inputs import as_ids, holds_ids
from puna.text.preprocessor import CausalLMPreprocessor, unpadded

# Makes texts of rows of ids.
AsText: TypeAlias = Callable[[Sequence[np.ndarray]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came in.

    Args:
        rows: each prompt's tokens, int32.
        batched: whether several prompts were given, in a list or the like.
        holds_ids: whether they were ids, perhaps in a dict.
        is_dict: whether a dict came in.
        as_text: makes texts of rows of ids; None without a tokenizer.
    """

    rows: list[np.ndarray]
    batched: bool
    holds_ids: bool
    is_dict: bool
    as_text: AsText | None

    def give_back(self, results: list[Any], again: int, *, listed: bool, as_dict: bool) -> Any:
        """The rows' results in the kind that came in.

        Args:
            results: one for each row.
            again: how many rows each prompt has.
            listed: whether a prompt's results are a list, also where there is one.
            as_dict: whether they are ids to be put in a dict.
        """
        if as_dict:
            batch = _as_dict(results)
            return batch if self.batched or listed else _one_row(batch)
        if listed:
            results = [results[i : i + again] for i in range(0, len(results), again)]
        return results if self.batched else results[0]


def read(inputs: Any, preprocessor: CausalLMPreprocessor | None) -> Found:
    """The prompts' ids, and the way back from finished ids.

    Args:
        inputs: see `Llama3CausalLM.generate`.
        preprocessor: the model's; None where inputs are ids.

    Raises:
        TokenizerError: it is none of what is taken, or text without a preprocessor.
    """
    if preprocessor is not None:
        found, batched = preprocessor.prompt_ids(inputs)
    elif isinstance(inputs, Mapping):
        found, batched = unpadded(inputs)
    elif holds_ids(inputs):
        found, batched = as_ids(inputs)
    else:
        raise TokenizerError(
            "the model has no preprocessor, so it cannot read text; pass token ids, or load it "
            "with its tokenizer"
        )

    def as_text(finished: Sequence[np.ndarray]) -> list[str]:
        assert preprocessor is not None
        rows = [row.tolist() for row in finished]
        return preprocessor.tokenizer.detokenize(rows, skip_special_tokens=True) if rows else []

    is_dict = isinstance(inputs, Mapping)
    return Found(
        rows=[np.array(row, np.int32) for row in found],
        batched=batched,
        holds_ids=is_dict or holds_ids(inputs),
        is_dict=is_dict,
        as_text=None if preprocessor is None else as_text,
    )


def read_rows(
    inputs: Any, preprocessor: CausalLMPreprocessor | None
) -> tuple[list[np.ndarray], bool]:
    """The tokens of each prompt, int32, and whether several were given, in a list or the like."""
    found = read(inputs, preprocessor)
    return found.rows, found.batched


def read_one(prompt: Any, preprocessor: CausalLMPreprocessor | None) -> np.ndarray:
    """The tokens of the one prompt that came in.

    Raises:
        TokenizerError: there is not one prompt.
    """
    rows, _ = read_rows(prompt, preprocessor)
    if len(rows) != 1:
        raise TokenizerError(f"there are {len(rows)} prompts; expected one")
    return rows[0]


def _one_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in batch.items()}


def _as_dict(finished: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    longest = max((len(row) for row in finished), default=0)
    token_ids = np.zeros((len(finished), longest), np.int32)
    mask = np.zeros((len(finished), longest), bool)
    for i, row in enumerate(finished):
        token_ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return {"token_ids": token_ids, "padding_mask": mask}
