"""Rows in the arguments of `fit`, `evaluate` and `predict`, turned into arrays."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any, Literal

import keras
import numpy as np
from rich.console import Console

from puna.backend import hosts
from puna.backend.even_batches import EvenBatches
from puna.errors import DataError, TokenizerError
from puna.tuning.batches import Arrays, TokenBatches, arrays
from puna.tuning.examples import ExampleMaker, Examples
from puna.tuning.rows import is_row
from puna.tuning.sources import (
    all_rows,
    elements,
    expand,
    holds_rows,
    is_batched,
    is_tf_dataset,
    peek,
    refuse_file_names,
    streams,
)
from puna.tuning.text_data import BATCH_SIZE, TextData

Method = Literal["fit", "evaluate", "predict"]


class Preprocessed:
    """The arguments of Keras's `fit` with arrays where there were rows, for one `with`.

    Args:
        preprocessor: a `CausalLMPreprocessor`; None where the model has none.
        method: the method that is called; `predict` wants no labels.
        x: the first argument.
        y: the second; rows bring their own labels, so it must be None beside rows.
        kwargs: the others.

    On leaving, rows that had to be cut are reported on standard error.
    """

    def __init__(self, preprocessor: Any, method: Method, x: Any, y: Any, kwargs: dict[str, Any]):
        self._preprocessor = preprocessor
        self._method = method
        self._data: dict[str, Any] = dict(kwargs)
        self._cut = 0
        if y is not None:
            self._data["y"] = y
        self._data["x"] = x

    def __enter__(self) -> dict[str, Any]:
        data = self._data
        if self._preprocessor is not None:
            self._cut = self._preprocessor.truncated_count
        steps = data.get("steps_per_epoch" if self._method == "fit" else "steps")
        batch_size, shuffle = data.get("batch_size"), data.get("shuffle", True)
        x, is_rows = _look(data["x"])
        data["x"] = x
        if is_rows:
            self._refuse_beside_rows(data)
            data |= self._named(self._converted(x, batch_size, steps, bool(shuffle)))
            self._refine(data)
        if data.get("validation_data") is not None:
            validation, is_rows = _look(data["validation_data"])
            if is_rows:
                batch_size = data.get("validation_batch_size") or batch_size
                steps = data.get("validation_steps")
                validation = self._converted(validation, batch_size, steps, False)
                self._report(validation, "Validation: ", quiet=True)
            data["validation_data"] = validation
        return data

    def __exit__(self, *exception: Any) -> None:
        if self._preprocessor is None:
            return
        cut = self._preprocessor.truncated_count - self._cut
        if cut:
            self._tell(
                f"{cut} texts were longer than the preprocessor's sequence_length of "
                f"{self._preprocessor.sequence_length} tokens and were cut to it."
            )

    def _refine(self, data: dict[str, Any]) -> None:
        """Leave out what Keras does not take beside a data set."""
        if isinstance(data["x"], dict):
            return
        batch_size = data.pop("batch_size", None)  # the batches are made
        if batch_size is not None and self._method == "fit":
            data.setdefault("validation_batch_size", batch_size)
        if self._method == "fit":
            data["shuffle"] = False  # a data set has its own order; Keras warns else
        if isinstance(data["x"], TokenBatches):
            data["x"].epoch = data.get("initial_epoch", 0)
        self._report(data["x"], quiet=data.get("verbose", "auto") == 0)

    def _report(self, batches: Any, before: str = "", *, quiet: bool) -> None:
        """Say what became of the rows; where it shall be quiet, only if some were lost."""
        if not isinstance(batches, TokenBatches):
            return
        report = batches.report
        lost = report.cut or report.dropped or report.empty
        if lost or not quiet:
            self._tell(f"{before}{report}", style="yellow" if lost else "")

    def _refuse_beside_rows(self, data: dict[str, Any]) -> None:
        for name in ("y", "sample_weight"):
            if data.get(name) is not None:
                raise ValueError(
                    f"{name} was given beside texts, which bring their own; preprocess the texts "
                    "and pass arrays, or leave it out"
                )

    def _tell(self, text: str, style: str = "yellow") -> None:
        quiet = not hosts.is_first()
        Console(file=sys.stderr, quiet=quiet).print(text, style=style, highlight=False)

    def _named(self, converted: Any) -> dict[str, Any]:
        if not isinstance(converted, tuple):
            return {"x": converted}
        names = ("x", "y", "sample_weight")
        with_labels = self._method != "predict"
        return dict(zip(names, converted, strict=True)) if with_labels else {"x": converted[0]}

    def _converted(self, rows: Any, batch_size: int | None, steps: int | None, shuffle: bool):
        """Arrays for rows in memory; a data set of arrays for a data set of batches of rows."""
        if self._preprocessor is None:
            raise TokenizerError(
                "the model has no preprocessor, and text was given; give "
                "Llama3CausalLM(backbone, preprocessor) one, or pass token ids"
            )
        if isinstance(rows, TextData):
            return self._of_text_data(rows, batch_size or BATCH_SIZE, shuffle)
        refuse_file_names(rows)
        if isinstance(rows, GeneratorType):
            return self._of_generator(rows, batch_size or BATCH_SIZE)
        if isinstance(rows, keras.utils.PyDataset):
            return _MappedPyDataset(rows, self._full_arrays)
        if is_tf_dataset(rows) and is_batched(rows):
            return _map_tf_dataset(rows, self._full_arrays, self._preprocessor.sequence_length)
        if steps is not None and streams(rows):
            return self._of_generator(_endless(rows), batch_size or BATCH_SIZE)
        rows = [rows] if isinstance(rows, str | bytes) else _without_tuple(rows)
        found = all_rows(rows)
        return self._arrays(list(found), found.where)

    def _of_text_data(self, data: TextData, batch_size: int, shuffle: bool) -> Any:
        if self._method != "predict":
            return data.batches(self._preprocessor, batch_size, shuffle and self._method == "fit")
        length = data.length(self._preprocessor)
        make = ExampleMaker(self._preprocessor, "all", data.template_variables)
        found = make(data.rows, data.rows.where, length, data.long, keep_all=True)
        if found.dropped:
            raise DataError(
                f"{found.dropped:,} rows are longer than {length:,} tokens, and predict has a "
                "result for every row; say long='cut', or raise sequence_length"
            )
        return self._padded(found, None)

    def _of_generator(self, rows: Iterator[Any], batch_size: int) -> Iterator[Any]:
        """Batches of arrays, of rows one by one or of the batches that they come in."""
        first, rows = peek(rows)
        batches = rows
        if is_row(first):
            one_by_one = (row for element in rows for row in expand(element))
            batches = iter(lambda: list(itertools.islice(one_by_one, batch_size)), [])
        # Keras wants a generator, and a tuple from it.
        return (_as_tuple(self._full_arrays(batch)) for batch in batches)

    def _arrays(self, rows: list[Any], where: Callable[[int], str]) -> Arrays:
        """As long as the longest row needs, which changes neither loss nor gradient."""
        x, y, weight = self._preprocessed(rows, where, None)
        longest = int(x["padding_mask"].sum(axis=1).max())
        # One size for all batches, so one compiled step; a multiple of 16 suits vector units.
        T = min(-(-longest // 16) * 16, x["padding_mask"].shape[1])
        return {name: array[:, :T] for name, array in x.items()}, y[:, :T], weight[:, :T]

    def _full_arrays(self, batch: Any) -> Any:
        length = self._preprocessor.sequence_length
        x, y, weight = self._preprocessed(
            expand(batch), lambda place: f"row {place} of a batch", length
        )
        return x if self._method == "predict" else (x, y, weight)

    def _preprocessed(
        self, rows: list[Any], where: Callable[[int], str], length: int | None
    ) -> Arrays:
        if all(isinstance(row, str | bytes) for row in rows):
            return self._preprocessor(rows)
        make = ExampleMaker(self._preprocessor, "all" if self._method == "predict" else "auto")
        found = make(rows, where, self._preprocessor.sequence_length, "cut", keep_all=True)
        return self._padded(found, length)

    def _padded(self, found: Examples, length: int | None) -> Arrays:
        """An example a row; those that were cut are counted with the preprocessor's."""
        self._preprocessor.truncated_count += found.cut
        examples = found.examples
        longest = max(1, *map(len, examples)) if length is None else length
        pad_id = self._preprocessor.tokenizer.pad_token_id
        return arrays([[example] for example in examples], longest, pad_id)


def _look(data: Any) -> tuple[Any, bool]:
    """The data, and whether it is rows; an iterator's first element is looked at and put back."""
    if isinstance(data, TextData):
        return data, True
    if isinstance(data, EvenBatches):
        return data, False
    if not isinstance(data, Iterator):
        return data, holds_rows(data)
    first, again = peek(data)
    return again, holds_rows(first)


def _without_tuple(data: Any) -> Any:
    """The rows of `(rows,)`, as Keras writes inputs without labels; a tuple of texts as it is."""
    if isinstance(data, tuple) and data and isinstance(data[0], list | tuple | np.ndarray):
        if any(rest is not None for rest in data[1:]):
            raise ValueError("labels or weights were given beside texts, which bring their own")
        return data[0]
    return data


def _endless(source: Any) -> Iterator[Any]:
    """The elements of a data set, from the beginning again when they end."""
    while True:
        found = False
        for element in elements(source):
            found = True
            yield element
        if not found:
            raise DataError(f"the {type(source).__name__} has no rows; expected one at the least")


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


class _MappedPyDataset(keras.utils.PyDataset):
    """A data set of batches of rows, preprocessed as they are asked for."""

    def __init__(self, rows: keras.utils.PyDataset, function: Any):
        super().__init__(workers=1)
        self._rows = rows
        self._function = function

    @property
    def num_batches(self) -> Any:
        return self._rows.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._function(self._rows[index])

    def on_epoch_begin(self) -> None:
        self._rows.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._rows.on_epoch_end()


def _map_tf_dataset(dataset: Any, function: Any, length: int) -> Any:
    """A `tf.data.Dataset` of batches of rows as one of array batches."""
    tf = sys.modules["tensorflow"]

    def batches() -> Iterator[Any]:
        for rows in dataset.as_numpy_iterator():
            yield function(rows)

    spec = {
        "token_ids": tf.TensorSpec((None, length), tf.int32),
        "padding_mask": tf.TensorSpec((None, length), tf.bool),
    }
    labels = (spec, tf.TensorSpec((None, length), tf.int32), tf.TensorSpec((None, length)))
    sample = function(next(iter(dataset.take(1).as_numpy_iterator())))
    signature = labels if isinstance(sample, tuple) else spec
    mapped = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return mapped.apply(tf.data.experimental.assert_cardinality(dataset.cardinality()))
