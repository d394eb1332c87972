"""Logits of adapted models equal those that PEFT computes with the adapter beside the base.

`make_peft_golden.py` wrote the adapters, with PEFT, and what PEFT computes.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from puna.models import Llama3Backbone, Llama3CausalLM
from tests import references

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free

DATA = Path(__file__).parent / "data" / "peft"
TOLERANCE = 1e-5  # of the largest logit

# Each adapter and its base.
ADAPTERS = {
    path.parent.name: json.loads(path.read_text())["base_model_name_or_path"].removeprefix("../")
    for path in sorted(DATA.glob("*/adapter_config.json"))
}


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "golden.npz")


def load(*arguments, **options):
    return Llama3CausalLM.from_preset(*arguments, preprocessor=None, dtype="float32", **options)


def logits(model, ids):
    return keras.ops.convert_to_numpy(model(ids))


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_pefts(golden, name):
    model = load(DATA / ADAPTERS[name], adapter=DATA / name)
    references.assert_close(logits(model, golden["ids"]), golden[name], TOLERANCE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapter_is_felt(golden, name):
    base = load(DATA / ADAPTERS[name])
    difference = references.relative_difference(logits(base, golden["ids"]), golden[name])
    assert difference > 1000 * TOLERANCE


def test_an_adapter_as_the_preset_finds_its_base(golden):
    model = load(DATA / "lora")
    references.assert_close(logits(model, golden["ids"]), golden["lora"], TOLERANCE)


def test_a_backbone_is_adapted_too(golden):
    backbone = Llama3Backbone.from_preset(DATA / "lora", dtype="float32")
    hidden = keras.ops.convert_to_numpy(backbone(golden["ids"]))
    head = keras.ops.convert_to_numpy(load(DATA / "base").lm_head.weight)
    references.assert_close(hidden @ head.T, golden["lora"], TOLERANCE)
