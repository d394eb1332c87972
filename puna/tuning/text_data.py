"""Rows with what is to be made of them: the data set that `fit` takes."""

from __future__ import annotations

from typing import Any, get_args

from puna.errors import DataError
from puna.text.preprocessor import CausalLMPreprocessor
from puna.tuning.batches import TokenBatches
from puna.tuning.examples import ExampleMaker, Examples, Long, LossOn
from puna.tuning.rows import check_rows
from puna.tuning.sources import all_rows

BATCH_SIZE = 32


class TextData:
    """Rows for `fit`, `evaluate` and `predict`, and how they become batches.

    The rows are read and checked at once. They are tokenized when a model is there, with its
    preprocessor. Without packing, rows of about the same length share a batch, which is padded to
    one of a few lengths.

    Args:
        rows: a path, a list of paths, or rows, in a list, a data frame or a data set of any
            library; see `puna.tuning.rows` for what a row may be. All of them are read into
            memory.
        loss_on: what is learned. "auto": completions, the assistant's turns of chats, and all of
            plain texts. "assistant": the assistant's turns (a completion counts as one).
            "completion": of a chat the assistant's last turn alone. "all": everything. With
            "assistant" and "completion" plain texts are refused. The token that ends a turn is
            learned with it.
        packing: whether rows share sequences, none of which sees another: less padding, so faster.
        sequence_length: tokens of a sequence at the most; None means the preprocessor's.
        long: what becomes of rows that are longer: "cut" keeps their beginning, "drop" leaves them
            out, "refuse" raises an error. The count is shown.
        seed: what the order of an epoch depends on, beside its number.
        template_variables: what the chat template reads besides, such as `date_string`, which is
            "26 Jul 2024" unless it is given, so that the same rows give the same tokens on any
            day. `chat_template` names or is another template.

    Raises:
        DataError: rows are bad; the error names the first of them by file and line.
        ValueError: an option is none of those it may be.

    Example:
    >>> from puna.testing import tiny_model
    >>> model = tiny_model()
    >>> rows = [{"prompt": "Hello", "completion": " world"}, {"prompt": "Hi", "completion": " you"}]
    >>> data = TextData(rows, packing=True)
    >>> history = model.fit(data, batch_size=1, verbose=0)
    >>> x, labels, weights = data.batches(model.preprocessor, batch_size=1)[0]
    >>> x["segment_ids"][0, :8].tolist()
    [1, 1, 1, 2, 2, 2, 0, 0]
    >>> weights[0, :8].tolist()
    [False, True, True, False, True, True, False, False]
    """

    def __init__(
        self,
        rows: Any,
        *,
        loss_on: LossOn = "auto",
        packing: bool = False,
        sequence_length: int | None = None,
        long: Long = "cut",
        seed: int = 0,
        template_variables: dict[str, Any] | None = None,
    ):
        for name, value, kind in (("loss_on", loss_on, LossOn), ("long", long, Long)):
            if value not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} is {value!r}; expected one of {known}")
        if sequence_length is not None and sequence_length < 2:
            raise ValueError(f"sequence_length is {sequence_length}; expected at least 2 tokens")
        self.rows = all_rows(rows)
        check_rows(self.rows, self.rows.where)
        self.loss_on: LossOn = loss_on
        self.packing = packing
        self.sequence_length = sequence_length
        self.long: Long = long
        self.seed = seed
        self.template_variables = template_variables

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def length(self, preprocessor: CausalLMPreprocessor) -> int:
        """How many tokens a sequence has at the most."""
        return self.sequence_length or preprocessor.sequence_length

    def examples(self, preprocessor: CausalLMPreprocessor) -> Examples:
        """The rows as token ids with a mask of what is learned.

        Args:
            preprocessor: the model's.

        Raises:
            DataError: rows do not fit the template or `loss_on`, or are too long and refused.
        """
        make = ExampleMaker(preprocessor, self.loss_on, self.template_variables)
        return make(self.rows, self.rows.where, self.length(preprocessor), self.long)

    def batches(
        self,
        preprocessor: CausalLMPreprocessor,
        batch_size: int = BATCH_SIZE,
        shuffle: bool = False,
    ) -> TokenBatches:
        """Batches of arrays, for loops of your own; `fit` makes them by itself.

        Args:
            preprocessor: the model's.
            batch_size: sequences of a batch.
            shuffle: whether every epoch has an order of its own.

        Returns:
            A `keras.utils.PyDataset` of `(x, labels, weights)`; see
            `puna.tuning.batches.TokenBatches`. Its `report` tells what became of the rows.

        Raises:
            DataError: as `examples`; or nothing is left to learn.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        found = self.examples(preprocessor)
        if not found.examples:
            raise DataError(
                f"none of the {len(self):,} rows is left to learn from: {found.dropped:,} are "
                f"too long for {self.length(preprocessor):,} tokens, and of {found.empty:,} what "
                "is to be learned lies beyond; raise sequence_length"
            )
        return TokenBatches(
            found,
            self.length(preprocessor),
            batch_size,
            packing=self.packing,
            shuffle=shuffle,
            seed=self.seed,
            pad_id=preprocessor.tokenizer.pad_token_id,
        )
