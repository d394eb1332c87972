"""Rows that share a sequence: how they are put together, and that none sees another."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.testing import tiny_model
from puna.tuning import TextData
from puna.tuning.batches import TokenBatches
from puna.tuning.examples import Example, Examples
from puna.tuning.packing import ladder, pack, step_for

ROWS = [
    {"prompt": "Hello", "completion": " world"},
    "Hi there, how are you?",
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the user"}]},
    "the system",
    {"prompt": "Hello Hello Hello", "completion": " there you are"},
]


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


# Which rows share a sequence


@pytest.mark.backend_free
@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 32)), capacity=st.integers(32, 64))
def test_every_example_is_in_one_sequence_with_room_for_it(lengths, capacity):
    sequences = pack(lengths, capacity)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in sequence) for sequence in sequences]
    assert all(0 < tokens <= capacity for tokens in used)
    # No two could be joined, which bounds the waste.
    assert len(used) < 2 or sum(sorted(used)[:2]) > capacity
    assert sequences == pack(lengths, capacity)


@pytest.mark.backend_free
def test_the_fullest_sequence_with_room_is_taken():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(20, 400, 5000).tolist()
    assert sum(lengths) / (len(pack(lengths, 1024)) * 1024) > 0.99


@pytest.mark.backend_free
@pytest.mark.parametrize("length", [0, 9])
def test_what_fits_in_no_sequence_is_refused(length):
    with pytest.raises(ValueError, match=f"takes {length} tokens; expected 1 to the capacity of 8"):
        pack([1, length], 8)


@pytest.mark.backend_free
def test_lengths_come_from_a_ladder():
    steps = ladder(1000)
    assert len(steps) == 13
    assert steps[-1] == 1000
    assert [step_for(n, steps) for n in (1, 16, 17, 999, 1000)] == [16, 16, 24, 1000, 1000]
    assert all(after <= 2 * before for before, after in itertools.pairwise(steps))


# Batches


def example(length, number=7):
    return Example(np.full(length + 1, number, dtype=np.int32), np.ones(length + 1, dtype=bool))


def batches(lengths, **options):
    found = Examples([example(n, number) for number, n in enumerate(lengths, 1)])
    return TokenBatches(found, 64, **options)


@pytest.mark.backend_free
def test_rows_of_about_a_length_share_a_batch():
    made = batches([10, 60, 12, 61, 11, 20, 16, 59], batch_size=2)
    shapes = [made[i][0]["token_ids"].shape for i in range(len(made))]
    assert sorted(shapes) == [(2, 16), (2, 16), (2, 64), (2, 64)]
    assert shapes[0] != shapes[1]
    assert set(made[0][0]) == {"token_ids", "padding_mask"}
    assert "8 rows with 249 tokens, 249 of them learned; padded to at most 64" in str(made.report)


@pytest.mark.backend_free
@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_has_all_rows_in_an_order_of_its_own(packing):
    lengths = np.random.default_rng(0).integers(1, 64, 50).tolist()

    def epoch(made):
        return [made[i][0]["token_ids"] for i in range(len(made))]

    options = {"batch_size": 4, "shuffle": True, "packing": packing}
    made, again = batches(lengths, **options), batches(lengths, **options)
    first = epoch(made)
    made.on_epoch_end()
    second = epoch(made)
    for arrays in (first, second):
        found = np.concatenate([array.ravel() for array in arrays])
        counts = np.bincount(found, minlength=51)[1:]
        assert counts.tolist() == lengths
    assert [a.tolist() for a in first] == [a.tolist() for a in epoch(again)]
    assert [a.tolist() for a in first] != [a.tolist() for a in second]
    assert sorted(a.shape for a in first) == sorted(a.shape for a in second)
    again.epoch = 1  # as if training goes on from there
    assert [a.tolist() for a in second] == [a.tolist() for a in epoch(again)]


@pytest.mark.backend_free
def test_packed_rows_are_numbered_and_begin_at_position_0():
    x, labels, weights = batches([3, 64, 2], batch_size=4, packing=True)[0]
    assert x["token_ids"][1].tolist() == [1, 1, 1, 3, 3] + [0] * 59
    assert x["segment_ids"][1].tolist() == [1, 1, 1, 2, 2] + [0] * 59
    assert x["positions"][1].tolist() == [0, 1, 2, 0, 1] + [0] * 59
    assert x["padding_mask"].tolist() == (x["segment_ids"] > 0).tolist() == weights.tolist()
    # the last label of a row is its own last token, not the next row's first
    assert labels[1].tolist() == [1, 1, 1, 3, 3] + [0] * 59


@pytest.mark.backend_free
def test_the_packing_ratio_is_told():
    report = batches([30, 30, 60, 4], batch_size=2, packing=True).report
    assert report.filled == pytest.approx(124 / 128)
    assert "4 rows with 124 tokens" in str(report)
    assert "packed into 2 sequences of 64, 2.0 rows each, 96.9% full" in str(report)


# The model


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_length=64)


@pytest.fixture(scope="module")
def packed(model):
    made = TextData(ROWS, packing=True).batches(model.preprocessor, batch_size=2)
    assert made.report.sequences < made.report.rows
    return made[0]


def test_packed_logits_are_those_of_each_row_by_itself(model, packed):
    x, _, _ = packed
    logits = numpy(model(x))
    seen = 0
    for row, segments in enumerate(x["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            places = segments == segment
            lone = numpy(model(x["token_ids"][row, places][None]))[0]
            np.testing.assert_allclose(logits[row, places], lone, rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == len(ROWS)


def test_positions_follow_from_the_segments(model, packed):
    x, _, _ = packed
    without = {name: array for name, array in x.items() if name != "positions"}
    np.testing.assert_array_equal(numpy(model(x)), numpy(model(without)))
    mask = x["padding_mask"]
    moved = numpy(model(x | {"positions": x["positions"] * 2}))
    assert np.abs(moved - numpy(model(x)))[mask].max() > 1e-3


def test_a_row_sees_another_without_segments(model, packed):
    """What the test above would miss, if segments were ignored on both sides."""
    x, _, _ = packed
    plain = {name: x[name] for name in ("token_ids", "padding_mask")}
    difference = np.abs(numpy(model(plain)) - numpy(model(x)))
    assert difference[x["segment_ids"] > 1].max() > 1e-2
    assert difference[x["segment_ids"] == 1].max() < 1e-5


def test_packed_loss_is_the_sum_over_the_same_rows_unpacked(model):
    def total(data):
        made = data.batches(model.preprocessor, batch_size=1)
        losses = []
        for i in range(len(made)):
            x, labels, weights = made[i]
            values = keras.losses.sparse_categorical_crossentropy(
                labels, model(x), from_logits=True
            )
            losses.append((numpy(values) * weights).sum())
        return sum(losses), made.report

    (packed, report), (alone, lone) = total(TextData(ROWS, packing=True)), total(TextData(ROWS))
    assert packed == pytest.approx(alone, rel=1e-6)
    assert (report.learned, report.rows) == (lone.learned, lone.rows)
    assert report.sequences < lone.sequences == len(ROWS)


def test_a_step_on_packed_rows_is_the_step_on_the_same_rows_unpacked():
    def moved(packing):
        model = tiny_model(sequence_length=64)
        before = {name: numpy(v) for name, v in model.tensors().items()}
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        data = TextData(ROWS, packing=packing)
        size = len(data.batches(model.preprocessor, 100)[0][0]["token_ids"])
        history = model.fit(data, batch_size=size, verbose=0)
        change = {name: numpy(v) - before[name] for name, v in model.tensors().items()}
        return history.history["loss"][0], change

    (loss, packed), (lone_loss, alone) = moved(True), moved(False)
    assert loss == pytest.approx(lone_loss, rel=1e-5)
    for name, change in alone.items():
        np.testing.assert_allclose(packed[name], change, rtol=1e-3, atol=1e-6, err_msg=name)
