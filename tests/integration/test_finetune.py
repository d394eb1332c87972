"""Whole runs of `puna.runs.finetune` on a tiny preset: what they leave, and how they go on."""

import json
import re
import signal
from pathlib import Path

import keras
import numpy as np
import pytest

from puna.errors import StoppedError
from puna.models import CausalLM
from puna.runs import finetune
from puna.runs.checkpoints import Checkpoints
from puna.runs.lines import JsonLines
from puna.runs.report import summary
from puna.tuning import TextData, read_rows
from tests.finetuning import (
    At,
    CrashError,
    crash,
    held_out_losses_of,
    interrupt,
    lines_of,
    losses_of,
    tiny_run,
)

STEPS = 10  # five an epoch

# Every run compiles its steps, where they are compiled: what does not depend on it runs once.
once = pytest.mark.backend_free


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
    assert told["data"]["files"] == {settings.data[0]: 34}
    assert told["data"]["train"]["rows"] == 31
    assert told["data"]["eval"]["rows"] == 3
    assert told["versions"]["keras"] == keras.__version__
    assert told["seconds"] > 0
    lines = summary(finished)
    assert f"  puna chat {finished.directory}" in lines
    assert f"  puna fuse {settings.preset} --adapter {finished.directory} --out ./merged" in lines


def test_the_model_card_tells_of_the_training(unbroken):
    settings, finished = unbroken
    card = (finished.directory / "README.md").read_text(encoding="utf-8")
    assert f"| {Path(settings.data[0]).name} | 34 |" in card
    assert re.search(rf"\| learning.rate \| {settings.rate:g} \|", card)
    after = re.search(r"\| held-out loss after \| ([\d.]+) \|", card)
    assert after
    assert float(after[1]) == pytest.approx(finished.report["losses"]["eval_last"], 1e-3)
    assert ("loss.png" in card) == (finished.directory / "loss.png").exists()


def test_checkpoints_are_adapters_and_the_newest_stay(unbroken):
    found = Checkpoints(Path(unbroken[0].out) / "checkpoints").all()
    assert list(found) == [9, STEPS]
    assert CausalLM.from_preset(found[9]).generate("Hello", max_new_tokens=1)
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
