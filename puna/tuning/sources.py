"""Rows from wherever users have them: lists, files, data sets of several libraries, generators."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import GeneratorType
from typing import Any

import keras
import numpy as np

from puna.errors import DataError
from puna.tuning.files import READERS, Rows, read_rows
from puna.tuning.rows import TELLING_KEYS, is_row

# More rows than anyone has: a data set that repeats itself for ever says that it has as many.
_ENDLESS = 1 << 40


def all_rows(source: Any) -> Rows:
    """All rows of a source, in memory.

    Args:
        source: a path, a list of paths, or rows: in a list, a NumPy array, a mapping of columns,
            a data frame or an Arrow table; or a data set or generator of rows or of batches of
            them: Hugging Face's, `tf.data`, grain, `PyDataset`, or anything else that can be gone
            through.

    Raises:
        DataError: there are no rows, the source has no end, or it is a text or a mapping of
            several data sets.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, os.PathLike):
        return read_rows(source)
    if isinstance(source, str | bytes):
        raise DataError(
            f"{source[:60]!r} is one text; expected rows. For a file pass pathlib.Path(...) or "
            "puna.tuning.read_rows(...), for a text a list of it"
        )
    if isinstance(source, list | tuple) and source and isinstance(source[0], os.PathLike):
        return read_rows(*source)
    refuse_endless(source)
    source = _as_list(source)
    if isinstance(source, np.ndarray):
        source = list(source.ravel())
    if isinstance(source, list | tuple):
        rows = list(source)
    else:
        rows = [row for element in elements(source) for row in expand(element)]
    if not rows:
        raise DataError(f"the {type(source).__name__} has no rows; expected one at the least")
    return Rows(rows, [f"row {place:,}" for place in range(len(rows))])


def elements(source: Any) -> Iterator[Any]:
    """What a data set holds, one by one: rows, or batches of them."""
    if is_tf_dataset(source):
        yield from source.as_numpy_iterator()
    elif isinstance(source, keras.utils.PyDataset):
        for place in range(_length(source)):
            yield source[place]
    elif isinstance(source, Mapping):
        yield source
    elif isinstance(source, Iterable):
        yield from source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        for place in range(len(source)):
            yield source[place]
    else:
        raise DataError(
            f"rows were given in a {type(source).__name__}, which cannot be gone through; expected "
            "a list, a data set or a generator"
        )


def expand(element: Any) -> list[Any]:
    """The rows of an element of a data set: itself, or those of a batch or a mapping of columns."""
    if is_row(element):
        return [element]
    if isinstance(element, tuple) and element and not is_row(element[0]):
        if any(rest is not None for rest in element[1:]):
            raise DataError("labels or weights were given beside rows, which bring their own")
        return expand(element[0])
    if isinstance(element, Mapping):
        return _of_columns(element)
    element = _as_array(element)
    if isinstance(element, list | tuple | np.ndarray):
        return list(element)
    return [element]


def _of_columns(columns: Mapping[str, Any]) -> list[Any]:
    if any(_is_dataset(value) for value in columns.values()):
        raise DataError(
            f"a mapping of data sets was given, {sorted(columns)}; pass one of them, such as "
            f"dataset[{next(iter(columns))!r}]"
        )
    lists = {
        name: list(value)
        for name, value in zip(columns, map(_as_array, columns.values()), strict=True)
        if isinstance(value, list | tuple | np.ndarray)
    }
    if len(lists) < len(columns) or not any(lists.values()):
        return [columns]  # a row of no known kind, which is reported as such
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns have different numbers of rows: {lengths}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _as_array(value: Any) -> Any:
    """A string tensor as an array; anything else as it is."""
    return value.numpy() if hasattr(value, "numpy") else value


def holds_rows(data: Any) -> bool:
    """Whether an argument of `fit` is rows, or a data set of rows or of batches of them.

    A generator says no: its first element has to be taken to know; see `peek`.
    """
    if isinstance(data, Rows | os.PathLike) or is_row(data):
        return True
    if isinstance(data, np.ndarray):
        return data.dtype.kind in "US" or (data.dtype == object and _first_is_row(data))
    if isinstance(data, Mapping):
        several = any(_is_dataset(part) for part in data.values())  # refused by `all_rows`
        return "token_ids" not in data and (several or _is_mapping_of_rows(data))
    if isinstance(data, list | tuple):
        return len(data) > 0 and (_is_unknown_row(data[0]) or holds_rows(data[0]))
    if is_tf_dataset(data):
        return _spec_holds_rows(data.element_spec)
    if isinstance(data, keras.utils.PyDataset):
        return holds_rows(data[0])
    if isinstance(data, GeneratorType | Iterator) or type(data).__module__.startswith("keras."):
        return False
    if _is_table(data):
        return True
    if _is_dataset(data):
        # A torch loader shuffles: looking at its data set leaves its order as it is.
        data = getattr(data, "dataset", data)
        return holds_rows(next(iter(elements(data)), None))
    return False


def peek(iterator: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    """The first element, None where there is none, and the iterator as if nobody had looked."""
    ahead = list(itertools.islice(iterator, 1))
    rest = itertools.chain(ahead, iterator)
    return (ahead[0] if ahead else None), (element for element in rest)


def refuse_endless(source: Any) -> None:
    """Raise a `DataError` for a data set that is known to have no end."""
    if _length(source) >= _ENDLESS:
        raise DataError(
            f"the {type(source).__name__} has no end, so it cannot be read into memory; say "
            "steps_per_epoch= (and validation_steps=), or take a part of it"
        )


def refuse_file_names(texts: Any) -> None:
    """Raise a `DataError` for texts that are plainly the names of files of rows."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not texts or not all(map(_is_file_name, texts)):
        return
    raise DataError(
        f"{texts[0]!r} is a text, and would be learned as one. For the file of that name pass "
        f"pathlib.Path({texts[0]!r}), or puna.tuning.read_rows({texts[0]!r})"
    )


def _is_file_name(text: Any) -> bool:
    if not isinstance(text, str) or len(text) > 500 or "\n" in text:
        return False
    return Path(text).suffix.lower() in READERS


def streams(source: Any) -> bool:
    """Whether it is a data set whose rows are not all to be had, or not known in number."""
    return _is_dataset(source) and not 0 < _length(source) < _ENDLESS


def is_tf_dataset(data: Any) -> bool:
    """Whether it is a `tf.data.Dataset`; where TensorFlow is not imported, there is none."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def is_batched(dataset: Any) -> bool:
    """Whether a `tf.data.Dataset` of rows has batches of them."""
    spec = dataset.element_spec
    spec = spec[0] if isinstance(spec, tuple) else spec
    spec = next(iter(spec.values())) if isinstance(spec, Mapping) else spec
    return len(spec.shape) > 0


def _spec_holds_rows(spec: Any) -> bool:
    spec = spec[0] if isinstance(spec, tuple) else spec
    if isinstance(spec, Mapping):
        return _is_mapping_of_rows(dict.fromkeys(spec, "")) and all(
            _is_string(part) for part in spec.values()
        )
    return _is_string(spec)


def _is_string(spec: Any) -> bool:
    return getattr(getattr(spec, "dtype", None), "name", "") == "string"


def _is_mapping_of_rows(data: Mapping[str, Any]) -> bool:
    return any(name in data and not _is_dataset(data[name]) for name in TELLING_KEYS)


def _is_dataset(data: Any) -> bool:
    """A Hugging Face, grain or torch data set, or a loader of one: known by what it can do."""
    if isinstance(data, str | bytes | Mapping | list | tuple | np.ndarray):
        return False
    if hasattr(data, "dtype") or isinstance(data, keras.utils.PyDataset) or is_tf_dataset(data):
        return False
    return hasattr(data, "__iter__") or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


# How tables of pandas, polars and pyarrow give their rows as a list of mappings.
_TO_ROWS = ("to_pylist", "to_dicts")


def _is_table(data: Any) -> bool:
    return hasattr(data, "iloc") or any(hasattr(data, name) for name in _TO_ROWS)


def _as_list(data: Any) -> Any:
    """The rows of a data frame or table; anything else as it is."""
    if hasattr(data, "iloc"):
        return data.to_dict("records")
    name = next((name for name in _TO_ROWS if hasattr(data, name)), None)
    return data if name is None else getattr(data, name)()


def _first_is_row(data: np.ndarray) -> bool:
    return data.size > 0 and (_is_unknown_row(data.flat[0]) or is_row(data.flat[0]))


def _is_unknown_row(value: Any) -> bool:
    """A mapping that is no input of the model: a row, of a kind that is known or is refused."""
    return isinstance(value, Mapping) and "token_ids" not in value


def _length(source: Any) -> int:
    """How many elements a source has, as far as it says so; 0 where it does not."""
    if is_tf_dataset(source):
        cardinality = int(source.cardinality())
        return _ENDLESS if cardinality == -1 else max(cardinality, 0)
    if isinstance(source, keras.utils.PyDataset):
        batches = source.num_batches
        return _ENDLESS if batches is None else batches
    try:
        return len(source)
    except (TypeError, OverflowError, NotImplementedError) as error:
        return _ENDLESS if isinstance(error, OverflowError) else 0
