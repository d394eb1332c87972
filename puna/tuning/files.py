"""Files of rows: JSON, JSON lines, CSV and Parquet, with the place of each row kept for errors."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from puna.errors import DataError
from puna.tuning.rows import RowError, check_rows

# A field of a CSV file may be a whole book; Python's own limit is 128 KB.
_LONGEST_FIELD = 1 << 30

Found = tuple[int, Any]  # the line or number of a row, and the row or the error in its place


class Rows(Sequence[Any]):
    """Rows that know where each of them stands.

    A slice of rows is rows too, such as `rows[:-100]` to train on and `rows[-100:]` to validate.

    Args:
        rows: strings or mappings.
        places: where each stands, such as "train.jsonl, line 3".
    """

    def __init__(self, rows: Sequence[Any], places: Sequence[str]):
        self._rows = list(rows)
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return Rows(self._rows[place], self._places[place])
        return self._rows[place]

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows{', from ' + self._places[0] if self._places else ''})"

    def where(self, place: int) -> str:
        """Where a row stands, such as "train.jsonl, line 3"."""
        return self._places[place]


def read_rows(*paths: str | os.PathLike[str]) -> Rows:
    r"""Read and check the rows of files.

    Args:
        *paths: files that end in `.jsonl` or `.ndjson` (an object or a string a line), `.json` (a
            list), `.csv` or `.tsv` (with a line of column names) or `.parquet`. Their rows come
            one after the other. What a row may be is told in `puna.tuning.rows`.

    Returns:
        The rows as they are in the files: a sequence of mappings and strings.

    Raises:
        DataError: a file is missing, or of another kind; or rows are bad: the error names the
            first of them by file and line, and counts the others.
        ImportError: a Parquet file, and pyarrow is not installed.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n"Ahoy!"\n')
    >>> list(read_rows(path))
    [{'prompt': '2 + 2 =', 'completion': ' 4'}, 'Ahoy!']
    """
    rows: list[Any] = []
    places: list[str] = []
    for path in map(Path, paths):
        reader, word = _reader(path)
        for number, row in reader(path):
            rows.append(row)
            places.append(f"{path}, {word} {number:,}")
    check_rows(rows, places.__getitem__)
    return Rows(rows, places)


def _reader(path: Path) -> tuple[Any, str]:
    """What reads a file of this name, and what it counts."""
    found = READERS.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{path} is not of a kind that is read; expected a name that ends in one of "
            f"{', '.join(READERS)}. Convert it, or read it yourself and pass a list of rows"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}; check its name and the directory you are in")
    return found


def _json_lines(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, RowError(f"it is not JSON ({error})")


def _json(path: Path) -> Iterator[Found]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON ({error}); expected a list of rows. If it has an object a line, "
            "name it .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}; expected a list of rows, [{{...}}, ...]"
        )
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Iterator[Found]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    before = csv.field_size_limit(_LONGEST_FIELD)
    line = 1
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
            strict=True,
        )
        names = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(names):
                yield line, dict(zip(names, fields, strict=True))
            elif fields:
                yield line, RowError(f"it has {len(fields)} fields; the first line names {names}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line:,}: it is not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Found]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{path} needs pyarrow, which is not installed: pip install 'puna[train]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error


# What reads a file by the end of its name, and what it counts.
READERS = {
    ".jsonl": (_json_lines, "line"),
    ".ndjson": (_json_lines, "line"),
    ".json": (_json, "row"),
    ".csv": (_csv, "line"),
    ".tsv": (_csv, "line"),
    ".parquet": (_parquet, "row"),
}
