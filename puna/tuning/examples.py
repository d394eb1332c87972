"""Rows to token ids, with a mask of those that are to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from puna.errors import TemplateError
from puna.text.preprocessor import CausalLMPreprocessor
from puna.text.turns import TurnTokenizer
from puna.tuning.rows import Chat, Completion, Form, RowError, Text, read_row, refuse

LossOn = Literal["auto", "all", "completion", "assistant"]
Long = Literal["cut", "drop", "refuse"]

# Templates that tell the date get this one, Llama 3.1's own, so that the same rows give the same
# tokens on any day.
DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Example:
    """The tokens of one row.

    Args:
        ids: int32 [N].
        learned: bool [N], whether the model is to learn to say the token.
        closed: whether the last token stays where the example is cut.
    """

    ids: np.ndarray
    learned: np.ndarray
    closed: bool = False

    def __len__(self) -> int:
        """Tokens that go into the model: the last is nothing but a label."""
        return len(self.ids) - 1

    @property
    def labels(self) -> int:
        """How many tokens are learned."""
        return int(self.learned[1:].sum())

    def cut(self, length: int) -> Example:
        """The example with `length` tokens that go into the model."""
        kept = np.r_[:length, len(self.ids) - 1] if self.closed else np.r_[: length + 1]
        return Example(self.ids[kept], self.learned[kept], self.closed)


@dataclass(frozen=True)
class Examples:
    """The examples of many rows, and what became of the others.

    Args:
        examples: those that can be learned from, or all where rows were not to be left out.
        cut: how many lost their end.
        dropped: how many rows were left out for their length.
        empty: how many were left out because what remained of them has nothing to learn.
    """

    examples: list[Example] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0
    empty: int = 0


class ExampleMaker:
    """Turns rows into examples.

    Args:
        preprocessor: the model's: its tokenizer, and whether it adds start and end tokens.
        loss_on: what is learned; see `puna.tuning.TextData`.
        template_variables: what the chat template reads besides; `date_string` is fixed unless it
            is here.
    """

    def __init__(
        self,
        preprocessor: CausalLMPreprocessor,
        loss_on: LossOn = "auto",
        template_variables: dict[str, Any] | None = None,
    ):
        self._preprocessor = preprocessor
        self._tokenizer = preprocessor.tokenizer
        self._loss_on = loss_on
        self._variables: dict[str, Any] = {"date_string": DATE} | (template_variables or {})

    def __call__(
        self, rows: Sequence[Any], where: Any, length: int, long: Long, keep_all: bool = False
    ) -> Examples:
        """The examples of rows.

        Args:
            rows: as `read_row` takes them.
            where: called with a row's place, says where it stands, for an error.
            length: how many tokens go into the model at the most.
            long: what becomes of longer rows: "cut", "drop" or "refuse".
            keep_all: whether rows with nothing to learn are kept, one example a row.

        Raises:
            DataError: rows are bad or, where they are to be refused, too long.
            TemplateError: there are chats, and no chat template.
        """
        examples: list[Example] = []
        bad: list[tuple[str, str]] = []
        cut = dropped = empty = 0
        for place, row in enumerate(rows):
            try:
                example = self.example(read_row(row))
                if len(example) > length:
                    if long == "refuse":
                        raise RowError(
                            f"it has {len(example) + 1:,} tokens, and the sequence length takes "
                            f"{length + 1:,}; shorten it, raise sequence_length, or say "
                            "long='cut' or long='drop'"
                        )
                    if long == "drop":
                        dropped += 1
                        continue
                    example = example.cut(length)
                    cut += 1 if example.labels or keep_all else 0
            except ValueError as error:  # a RowError, or the template's or tokenizer's
                if isinstance(error, TemplateError) and not self._has_template:
                    raise
                bad.append((where(place), str(error)))
                continue
            if example.labels or keep_all:
                examples.append(example)
            else:
                empty += 1
        refuse(bad)
        return Examples(examples, cut, dropped, empty)

    def example(self, form: Form) -> Example:
        """The example of one row.

        Raises:
            RowError: what is to be learned is not in such a row.
            TemplateError: the chat template refuses it.
        """
        if isinstance(form, Text):
            return self._text(form)
        if isinstance(form, Completion):
            return self._completion(form)
        if not self._has_template and form.plain is not None:
            return self._completion(form.plain)
        return self._chat(form)

    def _text(self, form: Text) -> Example:
        if self._loss_on in ("completion", "assistant"):
            raise RowError(
                f"it is a plain text, and loss_on is {self._loss_on!r}; expected a chat or prompt "
                "and completion, or loss_on='all'"
            )
        ids = [*self._started(form.text), *self._end]
        learned = np.ones(len(ids), dtype=bool)
        return Example(np.asarray(ids, dtype=np.int32), learned, closed=bool(self._end))

    def _completion(self, form: Completion) -> Example:
        prompt = self._started(form.prompt)
        whole = self._started(form.prompt + form.completion)
        # What follows a prompt is told apart from it by the model too, token by token. Where the
        # two grow together at the border, each is tokenized by itself.
        if whole[: len(prompt)] != prompt:
            whole = [*prompt, *self._tokenizer.tokenize(form.completion).tolist()]
        ids = np.asarray([*whole, *self._end], dtype=np.int32)
        learned = np.arange(len(ids)) >= len(prompt)
        return Example(ids, learned | (self._loss_on == "all"))

    def _chat(self, form: Chat) -> Example:
        said = [
            place
            for place, message in enumerate(form.messages)
            if message.get("role") == "assistant"
        ]
        first = 0 if self._loss_on in ("auto", "assistant") else max(said, default=0)
        if form.start is not None and self._loss_on != "assistant":
            first = form.start
        wanted = [place for place in said if place >= first and place not in form.muted]
        if self._loss_on == "all":
            ids = self._tokenizer.apply_chat_template(
                form.messages, tokenize=True, tools=form.tools, **self._variables
            )
            return Example(ids, np.ones(len(ids), dtype=bool))
        if not wanted:
            raise RowError(
                "it has no turn of the assistant's to learn from; expected one, or loss_on='all'"
            )
        ids, turns = self._turns(form.messages, form.tools)
        return Example(np.asarray(ids, dtype=np.int32), np.isin(turns, wanted))

    @property
    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_templates or self._variables.get("chat_template"))

    @cached_property
    def _turns(self) -> TurnTokenizer:
        return TurnTokenizer(self._tokenizer, **self._variables)

    def _started(self, text: str) -> list[int]:
        return self._preprocessor.prompt_ids(text)[0][0]

    @property
    def _end(self) -> list[int]:
        end = self._tokenizer.end_token_id
        return [end] if self._preprocessor.add_end_token and end is not None else []
