"""Text to padded ids, masks and labels: keras-hub's causal-LM preprocessor, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from puna.errors import ContextLengthError, TokenizerError
from puna.text.inputs import as_ids, as_texts, holds_ids, to_numpy
from puna.text.tokenizer import Tokenizer


class CausalLMPreprocessor:
    """Turns strings into what a causal language model trains on and generates from.

    Calling it gives `(x, y, sample_weight)` for training: the start token, the text and the end
    token, padded to `sequence_length`, and as labels the same shifted by one.
    Padding is known by the mask alone: the id that fills up may be a real token's.

    Args:
        tokenizer: the tokenizer.
        sequence_length: the padded length T, in tokens.
        add_start_token: whether to put the start token before a text that does not begin with it;
            None means as the tokenizer's files have it (Llama 3: yes, SmolLM2: no).
        add_end_token: whether to put the end token after a text in training.

    Attributes:
        truncated_count: how many training texts were too long and lost their end, so far.

    Raises:
        TokenizerError: a start or end token is asked for and the tokenizer has none.

    Example:
        x, y, sample_weight = CausalLMPreprocessor(tokenizer, sequence_length=6)("Hello")
        x["token_ids"]     # [128000, 9906, 128009, 0, 0, 0]
        x["padding_mask"]  # [True, True, True, False, False, False]
        y                  # [9906, 128009, 0, 0, 0, 0]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence_length: int = 1024,
        add_start_token: bool | None = None,
        add_end_token: bool = True,
    ):
        if add_start_token is None:
            add_start_token = tokenizer.add_start_token
        for wanted, name in ((add_start_token, "start"), (add_end_token, "end")):
            if wanted and getattr(tokenizer, f"{name}_token_id") is None:
                raise TokenizerError(
                    f"The preprocessor is to add the {name} token, but the tokenizer has none. "
                    f"Name one when you load the tokenizer, or say add_{name}_token=False."
                )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_start_token = bool(add_start_token)
        self.add_end_token = bool(add_end_token)
        self.truncated_count = 0

    @property
    def sequence_length(self) -> int:
        """The padded length of training examples, in tokens. It may be set."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = _checked_length(value)

    def __call__(
        self, x: Any, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Turn text into a training example or batch.

        Args:
            x: a string, or a list or array of strings (or UTF-8 bytes).
            y: ignored, as in keras-hub: the labels are made from the text.
            sample_weight: ignored likewise.
            sequence_length: a length for this call only.

        Returns:
            `({"token_ids": int32, "padding_mask": bool}, labels int32, weights bool)`, each of
            shape `[T]` for a string or `[B, T]` for several. A text too long keeps its beginning
            and the end token, which is then the last label, and is counted.
        """
        texts, batched = as_texts(x)
        length = (
            self.sequence_length if sequence_length is None else _checked_length(sequence_length)
        )
        rows = [ids.tolist() for ids in self.tokenizer.tokenize(texts)]
        # One token more than asked for: the last is nothing but the last input's label.
        packed, too_long = self._pack(rows, length + 1)
        self.truncated_count += too_long
        ids, mask = self._pad(packed, length + 1)
        if not batched:
            ids, mask = ids[0], mask[0]
        inputs = {"token_ids": ids[..., :-1], "padding_mask": mask[..., :-1]}
        return inputs, ids[..., 1:], mask[..., 1:]

    def prompt_ids(self, x: Any) -> tuple[list[list[int]], bool]:
        """Prompts as unpadded rows of ids, and whether they were a batch.

        Args:
            x: a string, several, token ids (1-D, 2-D or nested lists), or a dict with
                `token_ids` and `padding_mask`. Strings get the start token unless they begin with
                it; ids are taken as they are.

        Raises:
            TokenizerError: `x` is none of these.
        """
        if isinstance(x, Mapping):
            return unpadded(x)
        if holds_ids(x):
            return as_ids(x)
        texts, batched = as_texts(x)
        rows = [ids.tolist() for ids in self.tokenizer.tokenize(texts)]
        return [self.tokenizer.with_start(row, self.add_start_token) for row in rows], batched

    def generate_preprocess(
        self, x: Any, sequence_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Turn prompts into padded ids to generate from: no labels and no end token.

        Args:
            x: a string, several, or token ids; see `prompt_ids`.
            sequence_length: the padded length; None means the preprocessor's own.

        Returns:
            `{"token_ids": int32, "padding_mask": bool}`, of shape `[T]` or `[B, T]`.

        Raises:
            ContextLengthError: a prompt is longer than `sequence_length`.
        """
        rows, batched = self.prompt_ids(x)
        length = (
            self.sequence_length if sequence_length is None else _checked_length(sequence_length)
        )
        longest = max((len(row) for row in rows), default=0)
        if longest > length:
            raise ContextLengthError(
                f"A prompt has {longest} tokens, and sequence_length is {length}. Shorten it, or "
                "raise the preprocessor's sequence_length (max_length in generate)."
            )
        ids, mask = self._pad(rows, length)
        if not batched:
            ids, mask = ids[0], mask[0]
        return {"token_ids": ids, "padding_mask": mask}

    def generate_postprocess(self, x: Mapping[str, Any], strip_special: bool = True) -> Any:
        """Turn generated ids back into text: the inverse of `generate_preprocess`.

        Args:
            x: `{"token_ids", "padding_mask"}` of shape `[T]` or `[B, T]`, in NumPy or any
                backend's tensors.
            strip_special: whether to leave special tokens out.

        Returns:
            A string, or a list of strings.
        """
        rows, batched = unpadded(x)
        texts = self.tokenizer.detokenize(rows, skip_special_tokens=strip_special) if rows else []
        return texts if batched else texts[0]

    def get_config(self) -> dict[str, Any]:
        """The settings as JSON values, the whole tokenizer among them."""
        return {
            "tokenizer": self.tokenizer.get_config(),
            "sequence_length": self.sequence_length,
            "add_start_token": self.add_start_token,
            "add_end_token": self.add_end_token,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The preprocessor that `get_config` describes; its "tokenizer" may be one already."""
        tokenizer = config["tokenizer"]
        if isinstance(tokenizer, Mapping):
            tokenizer = Tokenizer.from_config(tokenizer)
        return cls(**{**config, "tokenizer": tokenizer})

    def _pack(self, rows: Sequence[list[int]], length: int) -> tuple[list[list[int]], int]:
        """Rows between start and end tokens, cut to `length`; how many were cut."""
        end_id = self.tokenizer.end_token_id
        end = [end_id] if self.add_end_token and end_id is not None else []
        started = [self.tokenizer.with_start(row, self.add_start_token) for row in rows]
        room = length - len(end)
        packed = [row[:room] + end for row in started]
        return packed, sum(len(row) > room for row in started)

    def _pad(self, rows: Sequence[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id, dtype=np.int32)
        mask = np.zeros((len(rows), length), dtype=bool)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
            mask[place, : len(row)] = True
        return ids, mask


def unpadded(x: Mapping[str, Any]) -> tuple[list[list[int]], bool]:
    """The rows of a dict of ids and mask without padding; without a mask all of them."""
    if "token_ids" not in x:
        raise TokenizerError(
            f'Expected a dict with "token_ids" and "padding_mask", got the keys {sorted(x)}.'
        )
    ids = to_numpy(x["token_ids"])
    mask = np.ones(ids.shape, dtype=bool)
    if x.get("padding_mask") is not None:
        mask = to_numpy(x["padding_mask"]).astype(bool)
    if ids.shape != mask.shape or ids.ndim not in (1, 2):
        raise TokenizerError(
            f"token_ids has shape {ids.shape} and padding_mask {mask.shape}; expected both [T], or "
            "both [B, T]."
        )
    pairs = zip(np.atleast_2d(ids), np.atleast_2d(mask), strict=True)
    return [row[kept].tolist() for row, kept in pairs], ids.ndim == 2


def _checked_length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 2:
        raise TokenizerError(
            f"sequence_length is {value!r}; expected a whole number of tokens, at least 2."
        )
    return int(value)
