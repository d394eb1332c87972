"""The rows of a run, and the batches of one epoch from any place on."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import keras
import numpy as np

from puna.errors import DataError
from puna.runs.settings import FinetuneSettings
from puna.tuning.batches import Arrays, TokenBatches
from puna.tuning.files import Rows, read_rows
from puna.tuning.text_data import TextData


def read(settings: FinetuneSettings) -> tuple[TextData, TextData | None]:
    """The rows to learn, and those to measure the loss on.

    Raises:
        DataError: a file is missing or bad, or there are too few rows to hold some out.
    """
    rows = read_rows(*settings.data)
    held_out = read_rows(*settings.eval_data) if settings.eval_data else None
    if settings.eval_share:
        count = round(len(rows) * settings.eval_share)
        if not 0 < count < len(rows):
            raise DataError(
                f"eval_share is {settings.eval_share:g} of {len(rows):,} rows, which is {count}; "
                "expected one row at the least on both sides"
            )
        order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
        held_out, rows = _picked(rows, order[:count]), _picked(rows, order[count:])
    return _text_data(settings, rows), None if held_out is None else _text_data(settings, held_out)


def _picked(rows: Rows, places: list[int]) -> Rows:
    places = sorted(places)
    return Rows([rows[place] for place in places], [rows.where(place) for place in places])


def _text_data(settings: FinetuneSettings, rows: Rows) -> TextData:
    return TextData(
        rows,
        loss_on=settings.loss_on,
        packing=settings.packing,
        sequence_length=settings.sequence_length,
        long=settings.long,
        seed=settings.seed,
    )


def digests(settings: FinetuneSettings) -> dict[str, str]:
    """What is in the files, in a few digits each."""
    found = {}
    for name in (*settings.data, *settings.eval_data):
        with Path(name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class EpochBatches(keras.utils.PyDataset):
    """The batches of one epoch, from one of them on.

    Args:
        batches: of the run; its epoch is set.
        epoch: the number of the epoch.
        start: how many batches are left out.
    """

    def __init__(self, batches: TokenBatches, epoch: int, start: int):
        super().__init__(workers=1)
        batches.epoch = epoch
        self._batches = batches
        self._start = start
        self._has_begun = False
        first = batches.length(start)
        others = (i for i in range(start, len(batches)) if batches.length(i) != first)
        self._other = next(others, None)

    @property
    def num_batches(self) -> int:
        """Batches that are left."""
        return len(self._batches) - self._start

    def __getitem__(self, index: int) -> Arrays:
        """One of them."""
        place = self._start + index
        # On TensorFlow, Keras looks at two before it begins, and takes all to be as long as those
        # if they are of one length.
        if not self._has_begun and index == 1 and self._other is not None:
            place = self._other
        return self._batches[place]

    def on_epoch_begin(self) -> None:
        self._has_begun = True


def rows_by_file(*data: TextData) -> dict[str, int]:
    """How many rows there are of each file."""
    places = (
        rows.where(place) for rows in (part.rows for part in data) for place in range(len(rows))
    )
    return dict(sorted(Counter(place.rpartition(", ")[0] for place in places).items()))


def facts(data: TextData, batches: TokenBatches) -> dict[str, Any]:
    """What became of rows, as JSON."""
    report = batches.report
    return {
        "rows": len(data),
        "rows_used": report.rows,
        "tokens": report.tokens,
        "tokens_learned": report.learned,
        "sequences": report.sequences,
        "cut": report.cut,
        "dropped": report.dropped,
        "empty": report.empty,
        "filled": round(report.filled, 4),
    }
