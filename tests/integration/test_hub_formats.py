"""Kinds of presets that are easily taken for another: from files, from the Hub, and in `info`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna.checkpoint.hub import locate
from puna.checkpoint.hub_files import needed
from puna.checkpoint.preset import Preset
from puna.errors import PresetError
from tests import meta_layout, references
from tests.hub_server import HubServer
from tests.processes import ROOT

pytestmark = pytest.mark.backend_free

DATA = Path(__file__).parents[1] / "parity" / "data"
PARAMS = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 516,
    "multiple_of": 48, "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip


def info(*arguments, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "puna", "info", *map(str, arguments), "--json"],
        env={**(env or {}), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gguf_beside_a_config_is_read_as_gguf(tmp_path, smollm2_gguf):
    (tmp_path / "model.Q4_1.gguf").symlink_to(smollm2_gguf)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    opened = Preset(tmp_path)
    assert opened.format == "gguf"
    assert opened.config["vocab_size"] == 49152
    assert opened.tokenizer_settings()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert Preset(tmp_path).format == "safetensors"


GGUF = ["README.md", "config.json", "model.Q4_1.gguf"]


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        (GGUF, True, GGUF[1:]),
        (GGUF, False, GGUF[1:]),  # the GGUF file has the only tokenizer
        ([*GGUF, "tokenizer.json"], False, ["config.json", "tokenizer.json"]),
        ([*GGUF, "model.safetensors"], True, ["config.json", "model.safetensors"]),
        ([*GGUF, "model.safetensors"], False, ["config.json"]),
    ],
)
def test_of_a_gguf_repository_with_a_config_both_are_fetched(names, weights, expected):
    assert sorted(needed(names, weights=weights)) == expected


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("/nowhere", "expected a directory, a .gguf or .safetensors file, hf://org/name, or a"),
        ("org/name", "write hf://org/name"),
        ("llama3_1b", "did you mean llama3.2_1b"),
        ("./org/name", "expected a directory"),
        ("s3://org/name", "unknown scheme; expected hf://org/name"),
    ],
)
def test_what_is_nothing_is_told_shortly(name, advice):
    with pytest.raises(PresetError) as caught:
        locate(name)
    assert advice in str(caught.value)
    assert len(str(caught.value)) < 160
    assert "hf:///" not in str(caught.value)


def test_info_of_an_adapter_is_of_what_it_makes_of_its_base(tmp_path):
    found = info(DATA / "peft" / "lora")
    base = info(DATA / "peft" / "base")
    (adapter,) = found.pop("adapters")
    assert (adapter["base"], adapter["rank"]) == ("../base", 4)
    assert found | {"preset": ""} == base | {"preset": ""}
    lost = shutil.copytree(DATA / "peft" / "lora", tmp_path / "lost")
    done = subprocess.run(
        [sys.executable, "-m", "puna", "info", lost],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "is an adapter, and its base is not there ('../base')" in line


def test_info_of_an_adapter_on_the_hub_fetches_no_weights(tmp_path):
    adapter = shutil.copytree(DATA / "peft" / "lora", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with HubServer() as hub:
        hub.add("org/adapter", adapter)
        hub.add("org/base", DATA / "peft" / "base")
        hub.fail("*.safetensors", method="GET", times=2, status=503)
        found = info("hf://org/adapter", env=hub.environment(tmp_path / "home"))
    assert found["adapters"][0]["base"] == "org/base"
    assert found["parameters"] == info(DATA / "peft" / "base")["parameters"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_info_of_a_keras_hub_preset(name):
    found = info(DATA / "keras_hub" / name)
    assert (found["format"], found["architecture"]["vocabulary_size"]) == ("keras_hub", 443)
    assert found["tokenizer"]["size"] == 443


def test_info_of_metas_layout(tmp_path):
    model = references.make(
        dtype=torch.bfloat16, vocab_size=516, intermediate_size=96, num_key_value_heads=4
    )
    meta_layout.write(tmp_path, model.state_dict(), PARAMS, files=2)
    meta_layout.write_tokenizer(tmp_path)
    found = info(tmp_path)
    assert found["format"] == "meta"
    assert found["parameters"] == sum(t.numel() for t in model.state_dict().values())
    assert {file["name"] for file in found["files"]} >= {"params.json", "consolidated.01.pth"}
