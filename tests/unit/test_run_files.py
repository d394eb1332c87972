"""What a run writes: checkpoints, lines, the learning rate's course and the curve."""

import os
import shutil

import keras
import numpy as np
import pytest

from puna.checkpoint.safetensors import SafetensorsSource, write_safetensors
from puna.errors import DataError, PresetError, RunError
from puna.models.adapter_files import restore_adapter
from puna.runs import FinetuneSettings, data
from puna.runs.checkpoints import TRAINING, Checkpoints, read_state, restore
from puna.runs.curve import draw
from puna.runs.folder import RunFolder
from puna.runs.lines import JsonLines
from puna.runs.progress import ProgressDisplay
from puna.runs.schedule import Schedule
from puna.testing import tiny_model
from tests.finetuning import tiny_run

pytestmark = pytest.mark.backend_free

TEXTS = ["Hello world", "Hi there"]


def compiled(seed=0, **adapter):
    """A model with an adapter and an optimizer that has done a step."""
    keras.utils.set_random_seed(seed)
    model = tiny_model(num_hidden_layers=1)
    model.enable_lora(**({"rank": 2, "dropout": 0.1} | adapter))
    model.compile(optimizer=keras.optimizers.AdamW(0.01))
    model.optimizer.build(model.trainable_variables)
    return model


def numbers(variables):
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


# Checkpoints


def test_a_checkpoint_brings_back_weights_optimizer_and_seeds(checkpoints):
    model = compiled()
    model.fit(TEXTS, verbose=0)
    path = checkpoints.save(model, {"step": 1})
    other = compiled(seed=1)
    restore(other, path)
    assert read_state(path) == {"step": 1}
    for mine, theirs in (
        (model.trainable_variables, other.trainable_variables),
        (model.optimizer.variables, other.optimizer.variables),
        (model.non_trainable_variables, other.non_trainable_variables),
    ):
        for a, b in zip(numbers(mine), numbers(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(other.optimizer.iterations) == 1


@pytest.mark.parametrize("moment", ["rename", "fsync", "write"])
def test_a_save_that_fails_leaves_what_was_there(checkpoints, monkeypatch, moment):
    model = compiled()
    checkpoints.save(model, {"step": 1})

    def fail(*arguments, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr("puna.runs.checkpoints.write_safetensors", fail)
        else:
            patch.setattr(os, moment, fail)
        with pytest.raises(PresetError, match="No space left on device"):
            checkpoints.save(model, {"step": 2})
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]
    restore(model, checkpoints.at(1))
    checkpoints.save(model, {"step": 2})
    assert list(checkpoints.all()) == [1, 2]


def test_the_newest_stay_and_the_best(checkpoints):
    model = compiled()
    for step in (1, 2, 3, 10, 100):
        checkpoints.save(model, {"step": step})
    checkpoints.prune(2, also=2)
    assert list(checkpoints.all()) == [2, 10, 100]
    assert checkpoints.latest() == checkpoints.at(100)


def test_what_a_kill_leaves_is_no_checkpoint_and_is_cleaned_up(checkpoints):
    checkpoints.save(compiled(), {"step": 1})
    shutil.copytree(checkpoints.at(1), checkpoints.directory / ".step-00000002.77.new")
    shutil.copytree(checkpoints.at(1), checkpoints.directory / "..step-00000003.77.new.abc")
    (checkpoints.directory / "notes.txt").write_text("mine")
    assert list(checkpoints.all()) == [1]
    checkpoints.clean()
    left = sorted(path.name for path in checkpoints.directory.iterdir())
    assert left == ["notes.txt", "step-00000001"]


def test_a_checkpoint_of_another_optimizer_is_refused(checkpoints):
    path = checkpoints.save(compiled(), {"step": 1})
    other = compiled()
    other.compile(optimizer=keras.optimizers.SGD(0.01))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(PresetError, match="is of another optimizer or model"):
        restore(other, path)


def test_a_checkpoint_of_another_adapter_is_refused(checkpoints):
    path = checkpoints.save(compiled(), {"step": 1})
    with pytest.raises(PresetError, match="not the one in use"):
        restore_adapter(compiled(rank=4), path)


def test_a_broken_checkpoint_is_named(checkpoints):
    model = compiled()
    path = checkpoints.save(model, {"step": 1})
    raw = (path / TRAINING).read_bytes()
    (path / TRAINING).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(PresetError, match=TRAINING):
        restore(model, path)


def test_numbers_of_every_kind_are_kept_as_they_are(tmp_path):
    arrays = {"a": np.array(7, "int64"), "b": np.array([3, 4], "uint32"), "c": np.array(True)}
    write_safetensors(
        tmp_path / "x.safetensors",
        [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()],
    )
    source = SafetensorsSource(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert source.read(name).dtype == array.dtype
        np.testing.assert_array_equal(source.read(name), array)
    source.close()


# Lines


def test_a_line_that_was_cut_off_is_none(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in range(1, 6):
        lines.add({"step": step, "text": "ahoy\n¡"})
    with lines.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in lines.read()] == [1, 2, 3, 4, 5]
    lines.cut(after=3)
    lines.add({"step": 4})
    assert [line["step"] for line in lines.read()] == [1, 2, 3, 4]
    assert lines.read()[0]["text"] == "ahoy\n¡"
    lines.cut(after=-1)
    assert lines.path.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# The learning rate


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        (
            {"schedule": "cosine", "warmup": 4},
            [0.25, 0.5, 0.75, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
        ),
    ],
)
def test_the_learning_rate_of_each_step(changes, expected):
    settings = FinetuneSettings(preset="x", data="y", learning_rate=2.0, **changes)
    schedule = Schedule.of(settings, 8)
    assert [schedule.at(step) for step in range(8)] == pytest.approx([2 * x for x in expected])
    again = Schedule.from_config(schedule.get_config())
    assert again.at(5) == schedule.at(5)


def test_an_optimizer_goes_by_the_schedule():
    settings = FinetuneSettings(
        preset="x", data="y", learning_rate=1.0, warmup=0, schedule="linear"
    )
    weight = keras.Variable(np.zeros(1, "float32"))
    optimizer = keras.optimizers.SGD(Schedule.of(settings, 4))
    optimizer.build([weight])
    found = []
    for _ in range(4):
        optimizer.apply([keras.ops.ones(1)], [weight])
        found.append(-float(keras.ops.convert_to_numpy(weight)[0]))
    assert found == pytest.approx(np.cumsum([1, 0.75, 0.5, 0.25]))


# Rows


def test_rows_are_held_out_by_the_seed(tmp_path):
    settings = tiny_run(tmp_path, rows=20, eval_share=0.25)
    train, held_out = data.read(settings)
    assert (len(train), len(held_out)) == (15, 5)
    places = [rows.where(i) for rows in (train.rows, held_out.rows) for i in range(len(rows))]
    assert len(set(places)) == 20
    again = data.read(settings)[1]
    assert list(again.rows) == list(held_out.rows)
    other = data.read(tiny_run(tmp_path, eval_share=0.25, seed=1))[1]
    assert list(other.rows) != list(held_out.rows)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_no_rows_is_refused(tmp_path, share):
    with pytest.raises(DataError, match="expected one row at the least on both sides"):
        data.read(tiny_run(tmp_path, eval_share=share))


def test_the_rest_of_an_epoch_is_its_end(tmp_path):
    settings = tiny_run(tmp_path, packing=False)
    rows = data.read(settings)[0]
    preprocessor = tiny_model().preprocessor
    batches = rows.batches(preprocessor, 4, shuffle=True)
    batches.epoch = 3
    whole = [batches[i] for i in range(len(batches))]
    tokens = [batches.tokens(i) for i in range(len(batches))]
    assert tokens == [int(batch[0]["padding_mask"].sum()) for batch in whole]
    rest = data.EpochBatches(rows.batches(preprocessor, 4, shuffle=True), 3, 2)
    assert rest.num_batches == len(batches) - 2
    rest.on_epoch_begin()
    for i in range(rest.num_batches):
        np.testing.assert_array_equal(rest[i][0]["token_ids"], whole[2 + i][0]["token_ids"])


# The directory, the curve and what people see


def test_two_processes_do_not_run_in_one_directory(tmp_path):
    settings = FinetuneSettings(preset="x", data="y", out=tmp_path / "out")
    with (
        RunFolder(settings).claimed(False),
        pytest.raises(RunError, match="another process is at the run"),
        RunFolder(settings).claimed(False),
    ):
        pass
    with RunFolder(settings).claimed(False):
        pass


def test_a_file_is_no_directory_to_run_in(tmp_path):
    (tmp_path / "out").write_text("mine")
    settings = FinetuneSettings(preset="x", data="y", out=tmp_path / "out")
    with pytest.raises(RunError, match="cannot be written"), RunFolder(settings).claimed(True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_the_curve_is_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": step, "loss": 3.0 / step} for step in range(1, 30)]
    lines += [{"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 0.5}]
    for name, some in (("all", lines), ("train", lines[:29]), ("none", [])):
        draw(some, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_step_is_told_with_the_time_left(capsys):
    display = ProgressDisplay()
    display.begin(100)
    line = {"loss": 1.25, "tokens_per_second": 1234.5, "peak_memory": 2_500_000_000}
    display.step(line | {"step": 1, "seconds": 60.0})
    display.step(line | {"step": 2, "seconds": 1.0})  # soon after, so not told
    display.step(line | {"step": 100, "seconds": 3.0, "peak_memory": None})
    display.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1/100  loss 1.2500  1,234 tokens/s  2.50 GB  1 h 39 min left",
        "step 100/100  loss 1.2500  1,234 tokens/s  0 s left",
    ]
