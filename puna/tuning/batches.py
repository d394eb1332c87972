"""Examples to batches of arrays, for every epoch in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from puna.tuning.examples import Example, Examples
from puna.tuning.packing import ladder, pack, step_for

Arrays = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Report:
    """What became of the rows of a data set.

    Args:
        rows: rows that are learned from.
        tokens: their tokens that go into the model.
        learned: tokens of them that are learned.
        sequences: sequences that they are in.
        places: places of these sequences, padding included.
        length: the longest sequence.
        packed: whether several rows may share a sequence.
        cut: rows that lost their end.
        dropped: rows left out for their length.
        empty: rows left out because what remained of them has nothing to learn.
    """

    rows: int
    tokens: int
    learned: int
    sequences: int
    places: int
    length: int
    packed: bool
    cut: int
    dropped: int
    empty: int

    @property
    def filled(self) -> float:
        """The share of places that have a token: the packing ratio."""
        return self.tokens / max(self.places, 1)

    def __str__(self) -> str:
        """One paragraph for people."""
        told = [f"{self.rows:,} rows with {self.tokens:,} tokens, {self.learned:,} of them learned"]
        if self.packed:
            told.append(
                f"packed into {self.sequences:,} sequences of {self.length:,}, "
                f"{self.rows / max(self.sequences, 1):.1f} rows each, {self.filled:.1%} full"
            )
        else:
            told.append(f"padded to at most {self.length:,}, {self.filled:.1%} full")
        for count, what in (
            (self.cut, "cut"),
            (self.dropped, "left out because they are too long"),
            (self.empty, "left out because what is to be learned does not fit or is not there"),
        ):
            if count:
                told.append(f"{count:,} {what}")
        return "; ".join(told) + "."


class TokenBatches(keras.utils.PyDataset):
    """Batches that Keras trains on, made as they are asked for.

    `(x, labels, weights)`, where x has `token_ids` and `padding_mask`, and where rows are packed
    `segment_ids` and `positions`, each [B, T]. T is of a short ladder of lengths.

    Args:
        found: the examples.
        length: T at the most.
        batch_size: B; the last batch may be smaller.
        packing: whether examples share sequences of `length` tokens.
        shuffle: whether every epoch has an order of its own.
        seed: what the orders depend on.
        pad_id: the id that fills up.

    Attributes:
        report: what became of the rows.
        epoch: the number of the current epoch, which gives the order; it may be set, to go on
            from there.
    """

    def __init__(
        self,
        found: Examples,
        length: int,
        batch_size: int,
        *,
        packing: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        pad_id: int = 0,
    ):
        super().__init__(workers=1)
        self._examples = found.examples
        self._batch_size = batch_size
        self._packing = packing
        self._shuffle = shuffle
        self._seed = seed
        self._pad_id = pad_id
        lengths = [len(example) for example in found.examples]
        self._sequences = pack(lengths, length) if packing else [[i] for i in range(len(lengths))]
        steps = [length] if packing else ladder(length)
        used = [sum(lengths[i] for i in sequence) for sequence in self._sequences]
        self._lengths = [step_for(tokens, steps) for tokens in used]
        self._epoch = 0
        self._order = self._ordered()
        self.report = Report(
            rows=len(lengths),
            tokens=sum(lengths),
            learned=sum(example.labels for example in found.examples),
            sequences=len(self._sequences),
            places=sum(len(batch) * T for batch, T in self._order),
            length=max(self._lengths, default=0),
            packed=packing,
            cut=found.cut,
            dropped=found.dropped,
            empty=found.empty,
        )

    @property
    def epoch(self) -> int:
        """The number of the current epoch."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = value
        self._order = self._ordered()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch; it is the same for all."""
        return len(self._order)

    def __len__(self) -> int:
        """As `num_batches`."""
        return len(self._order)

    def __getitem__(self, index: int) -> Arrays:
        """One batch of the current epoch."""
        sequences, T = self._order[index]
        rows = [[self._examples[i] for i in self._sequences[place]] for place in sequences]
        return arrays(rows, T, self._pad_id, self._packing)

    def tokens(self, index: int) -> int:
        """How many tokens a batch of the current epoch has, padding not counted."""
        sequences, _ = self._order[index]
        return sum(len(self._examples[i]) for place in sequences for i in self._sequences[place])

    def length(self, index: int) -> int:
        """T of a batch of the current epoch."""
        return self._order[index][1]

    def on_epoch_end(self) -> None:
        if self._shuffle:
            self.epoch = self._epoch + 1

    def _ordered(self) -> list[tuple[list[int], int]]:
        """The epoch's batches: which sequences, and their length.

        What a length has too few of for a batch goes with the next longer ones. How many batches
        there are of each shape does not depend on the order.
        """
        order = np.arange(len(self._sequences))
        numbers = np.random.default_rng((self._seed, self._epoch))
        if self._shuffle:
            numbers.shuffle(order)
        batches: list[tuple[list[int], int]] = []
        left: list[int] = []
        for T in sorted(set(self._lengths)):
            left += [int(place) for place in order if self._lengths[place] == T]
            while len(left) >= self._batch_size:
                batches.append((left[: self._batch_size], T))
                left = left[self._batch_size :]
        if left:
            batches.append((left, max(self._lengths[place] for place in left)))
        if self._shuffle:
            batches = [batches[i] for i in numbers.permutation(len(batches))]
        return _two_lengths_first(batches)


def _two_lengths_first(batches: list[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    """The batches so that the first two differ in length, if any do.

    On TensorFlow, Keras takes the shape that all batches have from the first two.
    """
    other = next((i for i, (_, T) in enumerate(batches) if batches[0][1] != T), None)
    if other is not None and other > 1:
        batches[1], batches[other] = batches[other], batches[1]
    return batches


def arrays(
    rows: Sequence[Sequence[Example]], length: int, pad_id: int, packed: bool = False
) -> Arrays:
    """Rows of examples as arrays.

    Args:
        rows: the examples of each row, which have `length` tokens together at the most.
        length: T.
        pad_id: the id that fills up.
        packed: whether segments and positions tell the examples of a row apart.

    Returns:
        `({"token_ids": int32, "padding_mask": bool}, labels int32, weights bool)`, each [B, T];
        where packed also `"segment_ids"`, int32, from 1 on and 0 for padding, and `"positions"`,
        int32, from 0 in each.
    """
    shape = (len(rows), length)
    token_ids = np.full(shape, pad_id, dtype=np.int32)
    labels = np.full(shape, pad_id, dtype=np.int32)
    segments, positions = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    mask, weights = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, 1):
            end = start + len(example)
            token_ids[row, start:end] = example.ids[:-1]
            labels[row, start:end] = example.ids[1:]
            weights[row, start:end] = example.learned[1:]
            mask[row, start:end] = True
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            start = end
    x: dict[str, Any] = {"token_ids": token_ids, "padding_mask": mask}
    if packed:
        x |= {"segment_ids": segments, "positions": positions}
    return x, labels, weights
