"""The settings of a run: one dataclass, its flags and its YAML file."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

import puna.runs
from puna.cli import finetune as verb
from puna.cli.app import app
from puna.cli.options import with_groups
from puna.errors import ConfigError
from puna.runs import FinetuneSettings
from puna.runs.flags import settings_of
from puna.tuning.examples import Long, LossOn
from tests.processes import result_of

pytestmark = pytest.mark.backend_free

KNOWN = settings_of(FinetuneSettings)
NEEDED = {"preset": "llama", "data": ["train.jsonl"]}

# For each setting a value that is not its default, as YAML has it.
OTHERS = {
    "preset": "hf://org/name",
    "data": ["a.jsonl", "b.csv"],
    "eval_data": ["c.jsonl"],
    "eval_share": 0.25,
    "out": "there",
    "sequence_length": 512,
    "long": "drop",
    "packing": True,
    "loss_on": "assistant",
    "method": "dora",
    "rank": 4,
    "alpha": 2.5,
    "dropout": 0.5,
    "target_modules": ["q_proj", "v_proj"],
    "rslora": True,
    "quantization": "int4",
    "dtype": "bfloat16",
    "save": "merged",
    "epochs": 7,
    "max_steps": 9,
    "batch_size": 3,
    "accumulate": 2,
    "remat": True,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup": 5.0,
    "weight_decay": 0.01,
    "clip_norm": 0.5,
    "seed": 11,
    "mesh": "2x4",
    "eval_every": 13,
    "early_stopping": 2,
    "sample_prompts": ["Hello", "Who are you?"],
    "sample_tokens": 5,
    "save_every": 17,
    "keep_checkpoints": 4,
    "log": ["tensorboard", "wandb"],
}

# What a setting needs beside it, or must not have.
BESIDE = {
    "early_stopping": {"eval_share": 0.1},
    "eval_every": {"eval_share": 0.1},
}


@pytest.fixture
def told(monkeypatch):
    """The settings that the command line hands to the run, which does not run."""
    seen = []

    class Finished:
        directory = Path("there")
        report = None

    def run(settings, restart=False):
        seen.append((settings, restart))
        return Finished()

    monkeypatch.setattr(puna.runs, "finetune", run)
    monkeypatch.setattr("puna.runs.report.summary", lambda finished: [])
    return seen


def puna_finetune(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], prog_name="puna")


def flags_of(values):
    """A mapping of settings as flags."""
    words = []
    for name, value in values.items():
        option = KNOWN[name].option
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            items = value if isinstance(value, list) else [value]
            words += [word for item in items for word in (option, str(item))]
    return words


def one(name):
    return NEEDED | BESIDE.get(name, {}) | {name: OTHERS[name]}


# One dataclass


def test_every_setting_is_a_flag_and_nothing_else_is():
    given = inspect.signature(with_groups(verb.finetune)).parameters
    assert [*given] == ["config", "restart", "hosts", *KNOWN]
    assert [*OTHERS] == [*KNOWN]


@pytest.mark.parametrize("name", KNOWN)
def test_a_flag_a_yaml_key_and_an_argument_are_one(name, told, tmp_path):
    expected = FinetuneSettings(**one(name))
    assert expected.to_dict()[name] == OTHERS[name]
    assert OTHERS[name] != KNOWN[name].default
    assert puna_finetune(*flags_of(one(name))).exit_code == 0
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(one(name)))
    assert puna_finetune("--config", file).exit_code == 0
    assert told == [(expected, False)] * 2


def test_defaults_hold_where_nothing_is_said(told):
    assert puna_finetune(*flags_of(NEEDED)).exit_code == 0
    (settings, _), *_ = told
    for name, setting in KNOWN.items():
        if name not in NEEDED:
            assert getattr(settings, name) == setting.default


def test_a_flag_comes_before_the_file(told, tmp_path):
    (file := tmp_path / "run.yaml").write_text(
        "preset: llama\ndata: train.jsonl\nrank: 4\npacking: true\nlearning_rate: 2e-4\n"
    )
    assert puna_finetune("--config", file, "--rank", 2, "--no-packing", "--restart").exit_code == 0
    ((settings, restart),) = told
    assert (settings.rank, settings.packing, settings.learning_rate) == (2, False, 2e-4)
    assert settings.data == ("train.jsonl",)
    assert restart


def test_settings_go_through_json_and_yaml():
    settings = FinetuneSettings(**one("sample_prompts"))
    assert FinetuneSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert (
        FinetuneSettings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings
    )


def test_words_are_those_of_the_data(told):
    assert set(get_args(LossOn)) == set(get_args(KNOWN["loss_on"].kind))
    assert set(get_args(Long)) == set(get_args(KNOWN["long"].kind))


def test_settings_import_nothing_heavy():
    heavy = ["keras", "numpy", "yaml", "torch", "jax"]
    found = f"[m for m in {heavy} if m in sys.modules]"
    code = f"import json, sys, puna; puna.FinetuneSettings\nprint(json.dumps({found}))"
    assert result_of(code) == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number from 1"),
        ({"rank": 2.5}, "rank is 2.5; expected a whole number"),
        ({"rank": True}, "rank is True; expected a whole number"),
        ({"rank": "many"}, "rank is 'many'; expected a whole number"),
        ({"dropout": 1}, "dropout is 1; expected a number from 0, below 1"),
        ({"alpha": 0}, "alpha is 0; expected a number above 0"),
        ({"alpha": float("inf")}, "alpha is inf; expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"method": "ia3"}, "method is 'ia3'; expected 'lora' or 'dora' or 'full'"),
        ({"log": ["comet"]}, "log is 'comet'; expected 'tensorboard' or 'wandb'"),
        ({"packing": "yes"}, "packing is 'yes'; expected true or false"),
        ({"data": []}, "data names no file"),
        ({"data": [3]}, "data is 3; expected a text"),
        ({"eval_data": ["x"], "eval_share": 0.1}, "eval_data and eval_share were both given"),
        ({"accumulate": 9}, "accumulate is 9 and batch_size 8; a step has no more parts than"),
        ({"epochs": 1, "max_steps": 1}, "epochs and max_steps were both given"),
        ({"early_stopping": 1}, "early_stopping needs rows"),
        ({"eval_every": 1}, "eval_every was given and there is nothing to do"),
        ({"save": "merged", "quantization": "int4"}, "nothing can be merged"),
        ({"mesh": "2,4"}, "mesh is '2,4'; expected the devices that share out the sequences"),
        ({"mesh": "0x4"}, "mesh is '0x4'; expected the devices"),
        ({"method": "full", "rank": 4}, "rank is a setting of adapters"),
        ({"method": "full", "quantization": "int8"}, "quantization is a setting of adapters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as raised:
        FinetuneSettings(**(NEEDED | changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 3", "there is no setting 'bach_size'; did you mean 'batch_size'?"),
        ("learning-rate: 3", "did you mean 'learning_rate'?"),
        ("zzz: 3", "there is no setting 'zzz'; expected one of preset, data"),
        ("3: 3", "there is no setting 3"),
        ("- rank", "holds a list; expected a line for each setting"),
        ("rank: [", "is not YAML"),
        ("preset: a\ndata: b\nrank: 0", "rank is 0; expected"),
        ("rank: 8", "preset and data not given; give --preset and --data"),
    ],
)
def test_a_file_that_cannot_be_is_wrong_usage(text, message, tmp_path, told):
    (file := tmp_path / "run.yaml").write_text(text)
    result = puna_finetune("--config", file)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert told == []


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path):
    result = puna_finetune("--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("--preset", "x"), ("--rank", "0"), ("--rank", "a"), ("--method", "x")]
)
def test_wrong_flags_are_wrong_usage(arguments):
    assert puna_finetune(*arguments).exit_code == 2


def test_rows_that_are_not_there_are_one_line(tmp_path):
    out = tmp_path / "out"
    result = puna_finetune("--preset", tmp_path, "--data", tmp_path / "no.jsonl", "--out", out)
    assert result.exit_code == 1
    assert result.stderr.startswith("puna: error: there is no file ")


def test_help_has_every_flag_and_examples(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = puna_finetune("--help")
    assert "  puna finetune --preset" in result.stdout
    assert all(setting.option in result.stdout for setting in KNOWN.values())


def test_a_mesh_is_a_text_or_two_numbers():
    settings = FinetuneSettings(**NEEDED, mesh=(2, 4))
    assert settings == FinetuneSettings(**NEEDED, mesh="2x4")
    assert settings.mesh_shape == (2, 4)
    assert FinetuneSettings(**NEEDED).mesh_shape is None


# Runs that are alike


def test_a_difference_is_named_where_it_changes_what_is_learned():
    one, other = (
        FinetuneSettings(**NEEDED),
        FinetuneSettings(**NEEDED, rank=4, out="x", save_every=1),
    )
    assert one.difference(other) == {"rank": (8, 4)}
    assert one.difference(one) == {}


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FinetuneSettings(**NEEDED).rank = 3
