"""Whole runs of `puna.runs.finetune` on a tiny preset: what they leave, and how they go on."""

import json
import os
import shutil
import signal
import types
from pathlib import Path

import keras
import numpy as np
import pytest

from puna.checkpoint.peft import PeftAdapter
from puna.errors import ConfigError, RunError, StoppedError
from puna.models import CausalLM
from puna.runs import finetune
from puna.runs.checkpoints import Checkpoints
from puna.runs.lines import JsonLines
from puna.runs.report import summary
from puna.tuning import TextData, read_rows
from tests.finetuning import tiny_run, write_rows

STEPS = 10  # five an epoch

# Every run compiles its steps, where they are compiled: what does not depend on it runs once.
once = pytest.mark.backend_free


class At(keras.callbacks.Callback):
    """Does something once a step is taken down."""

    def __init__(self, step, action):
        super().__init__()
        self.step = step
        self.action = action

    def on_train_batch_end(self, batch, logs=None):
        if logs["step"] == self.step:
            self.action()


class CrashError(Exception):
    """What a test ends a run with."""


def crash():
    raise CrashError


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def lines_of(settings):
    return JsonLines(Path(settings.out) / "metrics.jsonl").read()


def losses_of(settings):
    return [line["loss"] for line in lines_of(settings) if "loss" in line]


def held_out_losses_of(settings):
    return {line["step"]: line["eval_loss"] for line in lines_of(settings) if "eval_loss" in line}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of ten steps in two epochs, and what it gave."""
    settings = tiny_run(
        tmp_path_factory.mktemp("run"),
        rows=34,
        eval_share=0.1,
        eval_every=4,
        sample_prompts=("Hello",),
        sample_tokens=4,
        batch_size=2,
    )
    return settings, finetune(settings)


@pytest.fixture
def another(unbroken, tmp_path):
    """The settings of the same run elsewhere, with changes."""

    def make(**changes):
        return type(unbroken[0])(**(unbroken[0].to_dict() | {"out": tmp_path / "out"} | changes))

    return make


# What a run leaves


def test_each_step_has_a_line(unbroken):
    settings, finished = unbroken
    lines = [line for line in lines_of(settings) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert finished.report["steps"] == {"planned": STEPS, "done": STEPS, "saved": STEPS}
    keys = "step epoch loss learning_rate tokens tokens_per_second seconds peak_memory"
    assert all(list(line) == keys.split() for line in lines)
    assert lines[-1]["epoch"] == 2
    assert sum(line["tokens"] for line in lines) == finished.report["tokens"]
    assert finished.report["tokens"] == 2 * finished.report["data"]["train"]["tokens"]
    assert lines[0]["learning_rate"] == pytest.approx(settings.rate)  # after a rise of one step
    assert lines[-1]["learning_rate"] < lines[1]["learning_rate"] / 10


def test_a_line_has_the_loss_of_its_own_step(unbroken, another):
    # The first step's loss is that of the first batch, with the weights as they were loaded.
    settings = another(out=unbroken[0].out)
    model = CausalLM.from_preset(settings.preset)
    model.enable_lora(settings.rank)
    held_out = held_out_losses_of(settings)
    rows = read_rows(*settings.data)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()[:3]
    data = TextData([rows[i] for i in sorted(order)], packing=True, sequence_length=64)
    found = model.evaluate(data, batch_size=2, verbose=0, return_dict=True)["loss"]
    assert held_out[0] == pytest.approx(found, rel=1e-5)
    losses = losses_of(settings)
    means = np.cumsum(losses[:5]) / np.arange(1, 6)
    assert not np.allclose(losses[1:5], means[1:], rtol=1e-3)  # and no running mean


def test_the_held_out_loss_is_measured_when_asked_and_falls(unbroken):
    held_out = held_out_losses_of(unbroken[0])
    assert list(held_out) == [0, 4, 8, STEPS]
    assert held_out[STEPS] < held_out[0] - 0.5
    told = unbroken[1].report["losses"]
    assert (told["eval_first"], told["eval_last"]) == (held_out[0], held_out[STEPS])


def test_prompts_are_answered_by_the_model_as_it_is_then(unbroken):
    samples = JsonLines(Path(unbroken[0].out) / "samples.jsonl").read()
    assert [sample["step"] for sample in samples] == [0, 4, 8, STEPS]
    assert samples[0]["text"] != samples[-1]["text"]
    from puna.chat import ChatState

    chat = ChatState(unbroken[1].model, sampler="greedy", max_new_tokens=4)
    assert chat.send_message("Hello") == samples[-1]["text"]
    base = CausalLM.from_preset(unbroken[0].preset)
    chat = ChatState(base, sampler="greedy", max_new_tokens=4)
    assert chat.send_message("Hello") == samples[0]["text"]


def test_the_adapter_is_a_preset_that_learns_on(unbroken):
    settings, finished = unbroken
    assert finished.directory == Path(settings.out) / "adapter"
    model = CausalLM.from_preset(finished.directory)
    ids = np.arange(12, dtype="int32")[None]
    theirs = keras.ops.convert_to_numpy(finished.model(ids))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(ids)), theirs, atol=1e-4)
    base = CausalLM.from_preset(settings.preset)
    base.load_adapter(finished.directory)
    assert base.adapters()["default"]["model.layers.0.self_attn.q_proj"].dropout == 0.1


def test_run_json_tells_of_the_run(unbroken):
    settings, finished = unbroken
    told = json.loads((Path(settings.out) / "run.json").read_text())
    assert told == finished.report
    assert told["settings"] == settings.to_dict()
    assert told["base"]["preset"] == str(Path(settings.preset).resolve())
    assert told["data"]["files"] == list(settings.data)
    assert told["data"]["train"]["rows"] == 31
    assert told["data"]["eval"]["rows"] == 3
    assert told["versions"]["keras"] == keras.__version__
    assert told["seconds"] > 0
    lines = summary(finished)
    assert f"  puna chat {finished.directory}" in lines
    assert (
        f"  puna convert {settings.preset} --adapter {finished.directory} --out ./merged" in lines
    )


def test_checkpoints_are_adapters_and_the_newest_stay(unbroken):
    found = Checkpoints(Path(unbroken[0].out) / "checkpoints").all()
    assert list(found) == [9, STEPS]
    PeftAdapter(found[9]).close()
    assert sorted(path.name for path in found[9].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "state.json",
        "training.safetensors",
    ]


@once
def test_a_finished_run_is_told_of_and_not_done_again(unbroken):
    before = (Path(unbroken[0].out) / "metrics.jsonl").stat().st_mtime_ns
    again = finetune(unbroken[0])
    assert again.report == unbroken[1].report
    assert (Path(unbroken[0].out) / "metrics.jsonl").stat().st_mtime_ns == before


# Going on


@pytest.mark.parametrize("step", [7, *(pytest.param(step, marks=once) for step in (2, 5, STEPS))])
def test_a_run_that_crashes_ends_as_if_it_had_not(unbroken, another, step):
    settings = another()
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(step, crash)])
    assert len(losses_of(settings)) == step
    finished = finetune(settings)
    np.testing.assert_allclose(losses_of(settings), losses_of(unbroken[0]), atol=1e-6)
    assert held_out_losses_of(settings) == pytest.approx(held_out_losses_of(unbroken[0]), abs=1e-6)
    assert finished.report["tokens"] == unbroken[1].report["tokens"]
    samples = JsonLines(Path(settings.out) / "samples.jsonl").read()
    assert samples == JsonLines(Path(unbroken[0].out) / "samples.jsonl").read()


@once
def test_dropout_has_a_part_in_the_losses(unbroken, another):
    # Otherwise the test before would say nothing of its state.
    settings = another(dropout=0.0, eval_every=None, max_steps=3, epochs=None)
    finetune(settings)
    assert not np.allclose(losses_of(settings)[1:3], losses_of(unbroken[0])[1:3], atol=1e-4)


@once
def test_an_interrupt_lets_the_step_end_and_writes_a_checkpoint(unbroken, another):
    settings, before = another(), signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="stopped after step 5, with a checkpoint"):
        finetune(settings, callbacks=[At(4, interrupt)])
    assert signal.getsignal(signal.SIGINT) is before
    assert next(reversed(Checkpoints(Path(settings.out) / "checkpoints").all())) == 5
    finetune(settings)
    np.testing.assert_allclose(losses_of(settings), losses_of(unbroken[0]), atol=1e-6)


@once
def test_a_second_interrupt_ends_the_run_at_once(another):
    settings = another()
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, callbacks=[At(4, interrupt), At(4, interrupt)])
    assert list(Checkpoints(Path(settings.out) / "checkpoints").all()) == [3]


@once
def test_callbacks_see_one_training(another):
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append("begin")

        def on_train_end(self, logs=None):
            seen.append("end")

        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, sorted(logs)))

    settings = another(eval_every=None)
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(4, crash)])
    watch = Watch()
    finetune(settings, callbacks=[watch])
    keys = ["accuracy", "loss", "val_loss"]
    expected = ["begin", 3, 4, (0, keys), 0, 1, 2, 3, 4, (1, keys), "end"]
    assert seen == expected
    assert watch.params["epochs"] == 2


@once
def test_a_callback_may_end_the_run(another):
    class End(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = logs["step"] == 2

    finished = finetune(another(eval_every=None), callbacks=[End()])
    assert finished.report["steps"] == {"planned": STEPS, "done": 2, "saved": 2}


# Kinds of runs


@once
def test_early_stopping_keeps_the_best(another, monkeypatch):
    from puna.runs.callbacks import Recorder

    told = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    real = Recorder._measure

    def measure(self, held_out):
        loss = next(told)
        monkeypatch.setattr(self._trained, "evaluate", lambda *a, **k: {"loss": loss})
        return real(self, held_out)

    monkeypatch.setattr(Recorder, "_measure", measure)
    settings = another(eval_every=2, early_stopping=2, keep_checkpoints=1, sample_prompts=())
    finished = finetune(settings)
    assert finished.report["steps"] == {"planned": STEPS, "done": 6, "saved": 2}
    assert held_out_losses_of(settings) == {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.25}
    best = Checkpoints(Path(settings.out) / "checkpoints").at(2)
    ours = (finished.directory / "adapter_model.safetensors").read_bytes()
    assert ours == (best / "adapter_model.safetensors").read_bytes()


@once
def test_training_all_weights(another, tmp_path):
    settings = another(
        method="full", dropout=0.0, learning_rate=None, max_steps=4, epochs=None, eval_every=None
    )
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
    from puna.testing import write_tiny_preset

    preset = write_tiny_preset(tmp_path / "half", dtype="bfloat16")
    settings = another(
        preset=str(preset),
        method="full",
        dropout=0.0,
        max_steps=1,
        epochs=None,
        eval_every=None,
        eval_share=0,
        sample_prompts=(),
    )
    assert finetune(settings).report["dtype"] == "mixed_bfloat16"


@once
def test_an_adapter_beside_quantized_weights(another):
    finished = finetune(another(quantization="int8", max_steps=2, epochs=None, eval_every=None))
    assert finished.model.quantization()
    assert (finished.directory / "adapter_model.safetensors").is_file()


@once
def test_a_merged_model_is_saved_where_asked(another):
    finished = finetune(another(save="merged", max_steps=2, epochs=None, eval_every=None))
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
        data=str(data), packing=False, eval_share=0, eval_every=None, sample_prompts=()
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
    settings = another(data=str(data), eval_every=None)
    with pytest.raises(CrashError):
        finetune(settings, callbacks=[At(2, crash)])
    write_rows(data, 20, seed=1)
    with pytest.raises(RunError, match="about something else: data was"):
        finetune(settings)


@once
def test_other_weights_are_refused(another, tmp_path):
    from puna.testing import write_tiny_preset

    settings = another(preset=str(write_tiny_preset(tmp_path / "base")), eval_every=None)
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
    changed = another(rank=4, max_steps=2, epochs=None, eval_every=None)
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
    settings = another(learning_rate=1e30, clip_norm=0, eval_every=None, warmup=0, save_every=1)
    with pytest.raises(RunError, match=r"the loss of step \d+ is .*lower the learning rate"):
        finetune(settings)
    assert all(np.isfinite(losses_of(settings)))


@once
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"remat": True}])
def test_what_is_not_there_yet_is_refused(another, changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} is"):
        finetune(another(**changes))


# Trackers


@once
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(another, name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setitem(__import__("sys").modules, f"{name}.summary", None)
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
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    settings = another(log="wandb", max_steps=2, epochs=None, eval_every=2)
    finetune(settings)
    steps = ["train/learning_rate", "train/loss", "train/tokens_per_second"]
    assert told == [(1, steps), (2, ["eval/loss", *steps]), "finished"]
    assert given["config"] == settings.to_dict()
    assert given["id"] == json.loads((Path(settings.out) / "settings.json").read_text())["id"]


@once
def test_tensorboard_gets_files(another):
    pytest.importorskip("tensorboard")
    settings = another(log="tensorboard", max_steps=2, epochs=None, eval_every=None)
    finetune(settings)
    assert list((Path(settings.out) / "tensorboard").glob("events.out.tfevents.*"))
    shutil.rmtree(Path(settings.out) / "tensorboard")


@once
def test_the_curve_is_a_picture(another):
    pytest.importorskip("matplotlib")
    settings = another(max_steps=2, epochs=None, eval_every=None)
    finetune(settings)
    assert (Path(settings.out) / "loss.png").read_bytes().startswith(b"\x89PNG")
