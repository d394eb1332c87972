"""Adapters beside the weights compute, learn and are written as PEFT's.

`make_peft_golden.py` and `make_lora_golden.py` wrote what PEFT makes and computes.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from puna.errors import PresetError
from puna.models import Llama3Backbone, Llama3CausalLM
from tests import references
from tests.parity.test_gradients import batch
from tests.parity.test_peft import ADAPTERS
from tests.parity.test_peft import DATA as PEFT

DATA = Path(__file__).parent / "data" / "lora"
TOLERANCE = 1e-5  # of the largest logit
OF_GRADIENTS = 1e-4  # of the largest number of each gradient

# Those that change linear layers only, by LoRA.
BESIDE = ("lora", "rslora", "all_linear", "dora", "patterns", "one_layer", "excluding")
DIRECTORIES = {name: PEFT / name for name in BESIDE} | {"seven": DATA / "seven"}
PREFIX = "base_model.model."

# What a file says, in words that may differ though they mean the same.
WORDS = {
    "target_modules",
    "layers_to_transform",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
}


def base_of(name):
    return PEFT / ADAPTERS.get(name, "base")


def loaded(name, **options):
    model = Llama3CausalLM.from_preset(base_of(name), preprocessor=None, dtype="float32", **options)
    model.load_adapter(DIRECTORIES.get(name, PEFT / name))
    return model


def logits(model, ids):
    return keras.ops.convert_to_numpy(model(ids))


@pytest.fixture(scope="module")
def golden():
    return np.load(PEFT / "golden.npz")


@pytest.mark.parametrize("name", BESIDE)
def test_logits_equal_pefts(golden, name):
    model = loaded(name)
    references.assert_close(logits(model, golden["ids"]), golden[name], TOLERANCE)
    model.disable_adapters()
    difference = references.relative_difference(logits(model, golden["ids"]), golden[name])
    assert difference > 1000 * TOLERANCE


@pytest.mark.parametrize("name", BESIDE)
def test_merged_weights_give_the_adapters_logits(golden, name):
    model = loaded(name)
    model.merge_lora()
    references.assert_close(logits(model, golden["ids"]), golden[name], TOLERANCE)


def test_a_backbone_takes_an_adapter_too(golden):
    backbone = Llama3Backbone.from_preset(base_of("lora"), dtype="float32")
    backbone.load_adapter(PEFT / "lora")
    hidden = keras.ops.convert_to_numpy(backbone(golden["ids"]))
    head = load_file(base_of("lora") / "model.safetensors")["lm_head.weight"]
    references.assert_close(hidden @ head.T, golden["lora"], TOLERANCE)


@pytest.mark.backend_free
@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - set(BESIDE)))
def test_what_is_more_than_lora_of_linear_layers_is_refused_with_the_way_out(name):
    with pytest.raises(PresetError, match=r"from_preset\(adapter=\)"):
        loaded(name)


# Learning


def fitted_step(model):
    """Loss and the adapter's gradients of one `fit`: with a learning rate of 1, what it loses."""
    ids, mask, labels, weight = batch([16, 3, 11, 7], 16)
    before = tensors(model)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    x = {"token_ids": ids, "padding_mask": mask}
    history = model.fit(x, labels, sample_weight=weight, batch_size=len(ids), epochs=1, verbose=0)
    after = tensors(model)
    return history.history["loss"][0], {name: before[name] - after[name] for name in before}


def tensors(model):
    """The adapter's tensors under their names in PEFT's file."""
    found = {}
    for module, layer in model.linears().items():
        for adapter in layer.adapters.values():
            for part, variable in adapter.variables().items():
                ending = "" if part == "lora_magnitude_vector" else ".weight"
                value = keras.ops.convert_to_numpy(variable.value)
                found[f"{PREFIX}{module}.{part}{ending}"] = value.copy()
    return found


@pytest.mark.parametrize("name", ["seven", "rslora", "dora", "patterns"])
def test_loss_and_gradients_of_a_fit_step_equal_pefts(name):
    theirs = dict(np.load(DATA / f"{name}.npz"))
    our_loss, ours = fitted_step(loaded(name))
    assert our_loss == pytest.approx(float(theirs.pop("loss")), rel=OF_GRADIENTS)
    assert ours.keys() == theirs.keys()
    for tensor, gradient in theirs.items():
        difference = references.relative_difference(ours[tensor], gradient)
        assert difference <= OF_GRADIENTS, f"{tensor}: relative difference {difference:.2e}"


# Files


@pytest.mark.backend_free
@pytest.mark.parametrize("name", DIRECTORIES)
def test_files_are_those_that_peft_writes(name, tmp_path):
    model = loaded(name)
    model.save_adapter(tmp_path)
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path, DIRECTORIES[name])
    )
    assert ours.keys() == theirs.keys()
    for tensor, array in theirs.items():
        assert ours[tensor].dtype == array.dtype
        np.testing.assert_array_equal(ours[tensor], array)
    ours, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path, DIRECTORIES[name])
    )
    assert ours.keys() <= theirs.keys()
    ours["base_model_name_or_path"] = theirs["base_model_name_or_path"]
    for field in ours.keys() - WORDS:
        assert ours[field] == theirs[field], field
    # What is put in other words has the same meaning to the reader that has been tested by now.
    again = Llama3CausalLM.from_preset(base_of(name), preprocessor=None, dtype="float32")
    again.load_adapter(tmp_path)
    assert again.adapters() == model.adapters()


@pytest.mark.backend_free
@pytest.mark.parametrize("name", ["seven", "rslora", "dora", "patterns", "one_layer"])
def test_peft_opens_what_we_write_and_computes_the_same(golden, name, tmp_path):
    peft = pytest.importorskip("peft")
    model = loaded(name)
    for variable in model.trainable_variables:  # as if it had been trained on
        variable.assign(variable.value * 0.7)
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(references.make(), tmp_path).eval()
    expected = references.logits(theirs, golden["ids"])
    references.assert_close(logits(model, golden["ids"]), expected, TOLERANCE)
