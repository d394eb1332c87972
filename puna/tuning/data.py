"""Texts in the arguments of `fit`, `evaluate` and `predict`, turned into arrays."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import GeneratorType
from typing import Any

import keras
import numpy as np
from rich.console import Console


def contains_text(data: Any) -> bool:
    """Whether `data` is text: strings, an array, a list or a data set of them."""
    if isinstance(data, (str, bytes)):
        return True
    if isinstance(data, np.ndarray):
        return data.dtype.kind in "USO"
    if isinstance(data, (list, tuple)):
        return len(data) > 0 and contains_text(data[0])
    if _is_tf_dataset(data):
        spec = data.element_spec
        spec = spec[0] if isinstance(spec, tuple) else spec
        return getattr(getattr(spec, "dtype", None), "name", "") == "string"
    if isinstance(data, keras.utils.PyDataset):
        return contains_text(data[0])
    return False


class Preprocessed:
    """The arguments of Keras's `fit` with arrays where there was text, for one `with`.

    Args:
        preprocessor: a `CausalLMPreprocessor`; None where there is no text.
        x: the first argument.
        y: the second; texts bring their own labels, so it must be None beside texts.
        kwargs: the others.
        labels: whether labels and weights are wanted; `predict` wants none.

    On leaving, texts that had to be cut are reported on standard error.
    """

    def __init__(self, preprocessor: Any, x: Any, y: Any, kwargs: dict[str, Any], *, labels: bool):
        self._preprocessor = preprocessor
        self._labels = labels
        self._data: dict[str, Any] = dict(kwargs)
        self._cut = 0
        if y is not None:
            self._data["y"] = y
        self._data["x"] = x

    def __enter__(self) -> dict[str, Any]:
        if self._preprocessor is not None:
            self._cut = self._preprocessor.truncated_count
        data = self._data
        data["x"], is_text = _look(data["x"])
        if is_text:
            self._refuse_beside_text(data)
            data |= self._named(self._converted(data["x"]))
        if data.get("validation_data") is not None:
            validation, is_text = _look(data["validation_data"])
            data["validation_data"] = self._converted(validation) if is_text else validation
        return data

    def __exit__(self, *exception: Any) -> None:
        if self._preprocessor is None:
            return
        cut = self._preprocessor.truncated_count - self._cut
        if cut:
            Console(file=sys.stderr).print(
                f"{cut} texts were longer than the preprocessor's sequence_length of "
                f"{self._preprocessor.sequence_length} tokens and were cut to it.",
                style="yellow",
            )

    def _refuse_beside_text(self, data: dict[str, Any]) -> None:
        for name in ("y", "sample_weight"):
            if data.get(name) is not None:
                raise ValueError(
                    f"{name} was given beside texts, which bring their own; preprocess the texts "
                    "and pass arrays, or leave it out"
                )

    def _named(self, converted: Any) -> dict[str, Any]:
        if not isinstance(converted, tuple):
            return {"x": converted}
        names = ("x", "y", "sample_weight")
        return dict(zip(names, converted, strict=True)) if self._labels else {"x": converted[0]}

    def _converted(self, texts: Any) -> Any:
        """Arrays for texts in memory; a data set of arrays for a data set of texts."""
        if isinstance(texts, GeneratorType):
            return (_as_tuple(self._full_arrays(batch)) for batch in texts)
        if isinstance(texts, (str, bytes)):
            texts = [texts]
        texts = _without_tuple(texts)
        if isinstance(texts, (list, tuple, np.ndarray)):
            return self._arrays(list(texts))
        if isinstance(texts, keras.utils.PyDataset):
            return _MappedPyDataset(texts, self._full_arrays)
        return _map_tf_dataset(texts, self._full_arrays, self._preprocessor.sequence_length)

    def _arrays(self, texts: list[Any]) -> Any:
        """As long as the longest text needs, which changes neither loss nor gradient."""
        x, y, weight = self._preprocessor(texts)
        longest = int(x["padding_mask"].sum(axis=1).max())
        # One size for all batches, so one compiled step; a multiple of 16 suits vector units.
        T = min(-(-longest // 16) * 16, x["padding_mask"].shape[1])
        return {name: array[:, :T] for name, array in x.items()}, y[:, :T], weight[:, :T]

    def _full_arrays(self, batch: Any) -> Any:
        x, y, weight = self._preprocessor(_without_tuple(batch))
        return (x, y, weight) if self._labels else x


def _look(data: Any) -> tuple[Any, bool]:
    """The data, and whether it is text; a generator's first batch is looked at and put back."""
    if not isinstance(data, GeneratorType):
        return data, contains_text(data)
    ahead = list(itertools.islice(data, 1))

    def again() -> Iterator[Any]:
        yield from ahead
        yield from data

    return again(), bool(ahead) and contains_text(ahead[0])


def _without_tuple(data: Any) -> Any:
    """The texts of `(texts,)`, as Keras writes inputs without labels; a tuple of texts as it is."""
    if isinstance(data, tuple) and data and not isinstance(data[0], (str, bytes)):
        if any(rest is not None for rest in data[1:]):
            raise ValueError("labels or weights were given beside texts, which bring their own")
        return data[0]
    return data


def _as_tuple(arrays: Any) -> tuple[Any, ...]:
    return arrays if isinstance(arrays, tuple) else (arrays,)


class _MappedPyDataset(keras.utils.PyDataset):
    """A data set of batches of texts, preprocessed as they are asked for."""

    def __init__(self, texts: keras.utils.PyDataset, function: Any):
        super().__init__(workers=1)
        self._texts = texts
        self._function = function

    @property
    def num_batches(self) -> Any:
        return self._texts.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._function(self._texts[index])

    def on_epoch_begin(self) -> None:
        self._texts.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._texts.on_epoch_end()


def _is_tf_dataset(data: Any) -> bool:
    # TensorFlow is not imported to find out: where it is not, there is no data set of it.
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def _map_tf_dataset(dataset: Any, function: Any, length: int) -> Any:
    """A `tf.data.Dataset` of text batches as one of array batches."""
    tf = sys.modules["tensorflow"]

    def batches() -> Iterator[Any]:
        for texts in dataset.as_numpy_iterator():
            yield function(texts)

    spec = {
        "token_ids": tf.TensorSpec((None, length), tf.int32),
        "padding_mask": tf.TensorSpec((None, length), tf.bool),
    }
    labels = (spec, tf.TensorSpec((None, length), tf.int32), tf.TensorSpec((None, length)))
    sample = function(next(iter(dataset.take(1).as_numpy_iterator())))
    signature = labels if isinstance(sample, tuple) else spec
    mapped = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return mapped.apply(tf.data.experimental.assert_cardinality(dataset.cardinality()))
