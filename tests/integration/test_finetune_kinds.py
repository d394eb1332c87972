"""Runs of every kind, what is refused, and who else is told of them."""

import json
import shutil
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest

from puna.errors import ConfigError, RunError
from puna.models import CausalLM
from puna.runs import finetune
from puna.runs.callbacks import Recorder
from puna.runs.checkpoints import Checkpoints
from puna.testing import write_tiny_preset
from tests.finetuning import (
    At,
    CrashError,
    crash,
    held_out_losses_of,
    losses_of,
    tiny_run,
    write_rows,
)

STEPS = 10

# Every run compiles its steps, where they are compiled: what does not depend on it runs once.
once = pytest.mark.backend_free


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Settings of a run of ten steps, its preset and rows on disk."""
    return tiny_run(tmp_path_factory.mktemp("run"), rows=34, eval_share=0.1, batch_size=2)


@pytest.fixture
def another(files, tmp_path):
    """The settings of a run, with changes."""

    def make(**changes):
        return type(files)(**(files.to_dict() | {"out": tmp_path / "out"} | changes))

    return make


# Kinds of runs


@once
def test_early_stopping_keeps_the_best(another, monkeypatch):
    told = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    real = Recorder._measure

    def measure(self, held_out):
        loss = next(told)
        monkeypatch.setattr(self._trained, "evaluate", lambda *a, **k: {"loss": loss})
        return real(self, held_out)

    monkeypatch.setattr(Recorder, "_measure", measure)
    settings = another(
        eval_every=2,
        early_stopping=2,
        keep_checkpoints=1,
    )
    finished = finetune(settings)
    assert finished.report["steps"] == {"planned": STEPS, "done": 6, "saved": 2}
    assert held_out_losses_of(settings) == {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.25}
    best = Checkpoints(Path(settings.out) / "checkpoints").at(2)
    ours = (finished.directory / "adapter_model.safetensors").read_bytes()
    assert ours == (best / "adapter_model.safetensors").read_bytes()


@once
def test_training_all_weights(another, tmp_path):
    settings = another(method="full", dropout=0.0, learning_rate=None, max_steps=4, epochs=None)
    assert settings.rate == 2e-5
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(3, crash)])
    finished = finetune(settings)
    assert finished.directory == tmp_path / "out" / "model"
    other = another(**(settings.to_dict() | {"out": tmp_path / "other"}))
    finetune(other)
    np.testing.assert_allclose(losses_of(settings), losses_of(other), atol=1e-6)
    model = CausalLM.from_preset(finished.directory)
    ids = np.arange(12, dtype="int32")[None]
    theirs = keras.ops.convert_to_numpy(finished.model(ids))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(ids)), theirs)


@once
def test_training_all_weights_of_a_bfloat16_checkpoint_keeps_them_in_float32(another, tmp_path):
    preset = write_tiny_preset(tmp_path / "half", dtype="bfloat16")
    settings = another(
        preset=str(preset),
        method="full",
        dropout=0.0,
        max_steps=1,
        epochs=None,
        eval_share=0,
    )
    assert finetune(settings).report["dtype"] == "mixed_bfloat16"


@once
def test_an_adapter_beside_quantized_weights(another):
    finished = finetune(another(quantization="int8", max_steps=2, epochs=None))
    assert finished.model.quantization()
    assert (finished.directory / "adapter_model.safetensors").is_file()


@once
def test_a_merged_model_is_saved_where_asked(another):
    finished = finetune(another(save="merged", max_steps=2, epochs=None))
    assert finished.directory.name == "model"
    ids = np.arange(12, dtype="int32")[None]
    ours = CausalLM.from_preset(finished.directory)(ids)
    theirs = finished.model(ids)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs), atol=1e-4
    )


def test_rows_of_many_lengths_without_packing(another, tmp_path):
    # From the second batch on all are of one length; TensorFlow has to know of the other.
    numbers = ["Hello", "Hello world " * 12]
    rows = [{"prompt": "Hi", "completion": numbers[i % 4 == 3]} for i in range(16)]
    (data := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = another(
        data=str(data),
        packing=False,
        eval_share=0,
    )
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(4, crash)])
    finetune(settings)
    other = another(**(settings.to_dict() | {"out": tmp_path / "other"}))
    finetune(other)
    np.testing.assert_allclose(losses_of(settings), losses_of(other), atol=1e-6)


# What is refused


@once
def test_other_settings_are_refused_by_name(another):
    settings = another()
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(4, crash)])
    changed = another(rank=4, batch_size=3)
    with pytest.raises(RunError, match=r"rank is 8 there and 4 here; batch_size is 2 .* 3 here"):
        finetune(changed)
    assert len(losses_of(settings)) == 4  # nothing is lost
    finetune(another(save_every=7, keep_checkpoints=1))  # these change nothing of what is learned


@once
def test_other_rows_are_refused(another, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 20)
    settings = another(data=str(data))
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(2, crash)])
    write_rows(data, 20, seed=1)
    with pytest.raises(RunError, match="about something else: data was"):
        finetune(settings)


@once
def test_other_weights_are_refused(another, tmp_path):
    settings = another(preset=str(write_tiny_preset(tmp_path / "base")))
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(2, crash)])
    write_tiny_preset(tmp_path / "base", seed=1)
    with pytest.raises(RunError, match="about something else: weights was"):
        finetune(settings)


@once
def test_restart_begins_anew_and_leaves_other_files(another):
    settings = another(eval_every=None)
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(4, crash)])
    (Path(settings.out) / "notes.txt").write_text("mine")
    changed = another(rank=4, max_steps=2, epochs=None)
    finetune(changed, restart=True)
    assert len(losses_of(changed)) == 2
    assert (Path(settings.out) / "notes.txt").read_text() == "mine"


@once
def test_a_directory_of_somebody_else_is_left_alone(another):
    settings = another()
    model = Path(settings.out) / "model"
    model.mkdir(parents=True)
    with pytest.raises(RunError, match="holds model and no run's"):
        finetune(settings, restart=True)
    assert model.exists()


@once
def test_a_loss_that_is_no_number_ends_the_run(another):
    settings = another(learning_rate=1e30, clip_norm=0, warmup=0, save_every=1)
    with pytest.raises(RunError, match=r"the loss of step \d+ is .*lower the learning rate"):
        finetune(settings)
    assert all(np.isfinite(losses_of(settings)))


@once
def test_activations_that_are_computed_again_give_the_same_losses(another, tmp_path):
    plain = another()
    finetune(plain)
    again = another(remat=True, out=tmp_path / "again")
    finetune(again)
    assert losses_of(again) == pytest.approx(losses_of(plain), rel=1e-5)


@once
def test_steps_in_parts_give_the_same_losses(another, tmp_path):
    # What is dropped at random is drawn for each part.
    options = {"batch_size": 6, "dropout": 0.0, "max_steps": 6, "epochs": None}
    plain = another(**options)
    finetune(plain)
    parts = another(**options, accumulate=3, out=tmp_path / "parts")
    finetune(parts)
    assert len(losses_of(parts)) == 6
    assert losses_of(parts) == pytest.approx(losses_of(plain), rel=1e-5)


# Trackers


@once
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(another, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.summary", None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        finetune(another(log=(name,)))


@once
def test_weights_and_biases_hears_of_each_step(another, monkeypatch):
    told, given = [], {}

    class Page:
        def log(self, values, step):
            told.append((step, sorted(values)))

        def finish(self):
            told.append("finished")

    def init(**arguments):
        given.update(arguments)
        return Page()

    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = another(log="wandb", max_steps=2, epochs=None, eval_every=2)
    finetune(settings)
    steps = ["train/learning_rate", "train/loss", "train/tokens_per_second"]
    assert told == [(1, steps), (2, ["eval/loss", *steps]), "finished"]
    assert given["config"] == settings.to_dict()
    assert given["id"] == json.loads((Path(settings.out) / "settings.json").read_text())["id"]


@once
def test_tensorboard_gets_files(another):
    pytest.importorskip("tensorboard")
    settings = another(log="tensorboard", max_steps=2, epochs=None)
    finetune(settings)
    assert list((Path(settings.out) / "tensorboard").glob("events.out.tfevents.*"))
    shutil.rmtree(Path(settings.out) / "tensorboard")


@once
def test_the_curve_is_a_picture(another):
    pytest.importorskip("matplotlib")
    settings = another(max_steps=2, epochs=None)
    finetune(settings)
    assert (Path(settings.out) / "loss.png").read_bytes().startswith(b"\x89PNG")
