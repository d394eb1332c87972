"""Adapters: what they compute, what is trained, and how they are chosen."""

import keras
import numpy as np
import pytest

from puna.errors import ConfigError
from puna.layers.lora import LoraSettings
from puna.quantization.rounding import dequantize
from puna.testing import tiny_model
from tests.adapters import (
    ALL,
    GREEDY,
    KINDS,
    TEXTS,
    adapted,
    assert_close,
    by_formula,
    each_kind,
    fit,
    logits,
    model_of,
    shake,
)
from tests.unit.test_quantization import packed_of
from tests.weights import array, assert_same

# What is computed


@each_kind
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_the_logits_are_those_of_the_formula(kind, bias):
    model = adapted(kind, attention_bias=bias, mlp_bias=bias)
    assert np.abs(logits(model) - logits(model_of(attention_bias=bias, mlp_bias=bias))).max() > 0.1
    assert_close(logits(model), logits(by_formula(model)))


@each_kind
def test_a_new_adapter_changes_nothing(kind):
    model = model_of()
    before = logits(model)
    model.enable_lora(**kind, target_modules=ALL)
    assert_close(logits(model), before, 1e-5)


def test_a_begins_evenly_in_its_range_and_b_at_zero():
    keras.utils.set_random_seed(0)
    model = model_of()
    model.enable_lora(rank=32, target_modules=["down_proj"])
    layer = model.linears()["model.layers.0.mlp.down_proj"]
    a, b = array(layer.adapters["default"].a), array(layer.adapters["default"].b)
    bound = 96**-0.5
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert abs(a.mean()) < 0.05 * bound
    assert not b.any()


@each_kind
def test_generation_takes_them_along(kind):
    # Two of the layers' strengths differ, which is all that tells their compiled forms apart.
    model = adapted(kind)
    other = model.linears()["model.layers.1.self_attn.q_proj"].adapters["default"]
    other.settings = LoraSettings(**(other.settings.to_config() | {"alpha": 1.5}))
    twin = by_formula(model)
    assert model.generate(TEXTS, **GREEDY) == twin.generate(TEXTS, **GREEDY)
    for ours, theirs in zip(model.token_logprobs(TEXTS), twin.token_logprobs(TEXTS), strict=True):
        assert_close(*(np.array([token.logprob for token in row]) for row in (ours, theirs)))


def test_what_was_compiled_follows_the_adapter_in_use():
    model = adapted(name="one")
    base, one = model_of().generate(TEXTS, **GREEDY), by_formula(model).generate(TEXTS, **GREEDY)
    assert base != one
    for names, expected in ((None, base), ("one", one), (None, base), (["one"], one)):
        model.set_adapter(names)
        assert model.generate(TEXTS, **GREEDY) == expected
    model.merge_lora()
    assert model.generate(TEXTS, **GREEDY) == one
    model.unmerge_lora()
    model.delete_adapter("one")
    assert model.generate(TEXTS, **GREEDY) == base


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_base_may_be_quantized(scheme, first):
    model = model_of()
    if first:
        model.quantize(scheme)
    model.enable_lora(rank=4, target_modules=ALL)
    if not first:
        model.quantize(scheme)
    shake(model)
    twin = by_formula(model)
    embedding = dequantize(packed_of(model.backbone.embed_tokens))
    twin.backbone.embed_tokens.weight.assign(embedding.astype("float32"))
    assert_close(logits(model), logits(twin), 2e-2)
    assert np.abs(logits(model) - logits(model_of())).max() > 0.1


# What is trained


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_a_fit_changes_the_adapter_alone(kind, dtype):
    model = model_of(dtype)
    model.enable_lora(**kind, dropout=0.1)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert all("/lora_" in v.path for v in model.trainable_variables)
    assert len(model.trainable_variables) == 2 * 7 * (3 if "dora" in kind else 2)
    before = {name: array(v) for name, v in model.tensors().items()}
    losses = fit(model)
    assert losses[-1] < losses[0]
    for name, variable in model.tensors().items():
        np.testing.assert_array_equal(array(variable), before[name], err_msg=name)
    assert all(np.abs(array(v)).max() > 0 for v in model.trainable_variables)


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
@each_kind
def test_a_quantized_base_trains_its_adapter(scheme, kind):
    model = model_of("bfloat16")
    model.quantize(scheme)
    model.enable_lora(**kind)
    before = {name: array(v) for name, v in model.tensors().items()}
    losses = fit(model)
    assert losses[-1] < losses[0]
    for name, variable in model.tensors().items():
        np.testing.assert_array_equal(array(variable), before[name], err_msg=name)


def test_a_backbone_adapts_queries_and_values_as_keras_hub_does():
    model = model_of()
    model.backbone.enable_lora(4)
    assert {m.rpartition(".")[2] for m in model.adapters()["default"]} == {"q_proj", "v_proj"}
    # The head is in keras-hub's backbone, and frozen there.
    assert all("/lora_" in v.path for v in model.trainable_variables)
    losses = fit(model)
    assert losses[-1] < losses[0]


@each_kind
def test_inputs_are_dropped_in_training_alone(kind):
    model = model_of()
    model.enable_lora(**kind, target_modules=ALL, dropout=0.5)
    shake(model)
    expected = logits(by_formula(model))
    assert_close(logits(model), expected)
    first, second = logits(model, training=True), logits(model, training=True)
    assert np.abs(first - expected).max() > 0.01
    assert np.abs(first - second).max() > 0.01


def test_an_optimizer_from_before_is_refused():
    model = model_of()
    fit(model, epochs=1)
    model.enable_lora(rank=4)
    with pytest.raises(ConfigError, match="call compile again"):
        model.fit(TEXTS, verbose=0)
    fit(model, epochs=1)


def test_a_frozen_model_is_adapted_too():
    model = model_of()
    model.trainable = False
    model.enable_lora(rank=4)
    assert len(model.trainable_variables) == 2 * 7 * 2
    losses = fit(model)
    assert losses[-1] < losses[0]


# Several of them


def test_adapters_are_switched_and_combined_by_name():
    model = model_of()
    model.enable_lora(rank=2, target_modules=["q_proj", "up_proj"], name="one")
    shake(model, 1)
    one = logits(model)
    model.enable_lora(rank=4, alpha=8, target_modules=["q_proj", "lm_head"], name="two")
    assert model.active_adapters() == {"two": 1.0}
    assert len(model.trainable_variables) == 2 * 3
    shake(model, 2)
    two = logits(model)
    model.set_adapter("one")
    np.testing.assert_array_equal(logits(model), one)
    assert len(model.trainable_variables) == 2 * 4
    model.set_adapter("two")
    np.testing.assert_array_equal(logits(model), two)
    model.set_adapter(["one", "two"], weights=[0.5, -1.5])
    assert model.active_adapters() == {"one": 0.5, "two": -1.5}
    assert_close(logits(model), logits(by_formula(model)))
    model.disable_adapters()
    assert not model.active_adapters()
    assert not model.trainable_variables
    assert_close(logits(model), logits(model_of()), 1e-5)
    model.delete_adapter("one")
    assert [*model.adapters()] == ["two"]
    assert_same(model, model_of())


@pytest.mark.backend_free
def test_what_cannot_be_chosen_is_refused():
    model = adapted(KINDS["dora"], name="dora", targets=["q_proj"])
    model.enable_lora(rank=2, name="one")
    with pytest.raises(ConfigError, match="no adapter 'two'; expected 'dora' or 'one'"):
        model.set_adapter("two")
    with pytest.raises(ConfigError, match="2 weights were given for the adapters"):
        model.set_adapter("one", [1, 2])
    with pytest.raises(ConfigError, match="'dora' is DoRA"):
        model.set_adapter(["one", "dora"])
    with pytest.raises(ConfigError, match="no adapter 'two'"):
        model.delete_adapter("two")


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2, "alpha": 0}, "alpha is 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 2, "dropout": 1.0}, "dropout is 1.0"),
        ({"rank": 2, "dropout": -0.1}, "dropout is -0.1"),
        ({"rank": 2, "name": "a/b"}, "name is 'a/b'"),
        ({"rank": 2, "name": "there"}, "'there' already"),
        ({"rank": 2, "target_modules": ["q_proj", "wq"]}, "'wq' names no linear layer"),
        ({"rank": 2, "target_modules": ["embed_tokens"]}, "'embed_tokens' names no linear"),
        ({"rank": 2, "target_modules": "q_proj"}, "no linear layer fits"),
        ({"rank": 2, "target_modules": "("}, "no list of names or regular expression"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    model = model_of()
    model.enable_lora(rank=2, name="there", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=message):
        model.enable_lora(**arguments)
    assert [*model.adapters()] == ["there"]


@pytest.mark.backend_free
def test_targets_are_named_as_peft_names_them():
    model = model_of()
    for targets, count in ((r".*\.(o|down)_proj", 4), ("all-linear", 14), (["lm_head"], 1)):
        model.enable_lora(rank=2, target_modules=targets)
        assert len(model.adapters()["default"]) == count
        model.delete_adapter("default")
    with pytest.raises(ConfigError, match="tied"):
        tiny_model(tie_word_embeddings=True).enable_lora(rank=2, target_modules=["lm_head"])
