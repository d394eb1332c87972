"""The models as Keras models: configs, files, functional use, dtypes, and keras-hub's own words."""

import json
import os

import keras
import numpy as np
import pytest

import puna
from puna.models import (
    CausalLM,
    Llama3Backbone,
    Llama3CausalLM,
    Llama3CausalLMPreprocessor,
    Llama3Tokenizer,
)
from puna.testing import randomize, tiny_config, tiny_model, tiny_tokenizer, write_tiny_preset
from tests.processes import result_of

TEXTS = ["Hello world", "Hi there, how are you?"]

KERAS_HUB_ARGUMENTS = {
    "vocabulary_size": 307,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "num_key_value_heads": 2,
    "rope_max_wavelength": 500000,
    "layer_norm_epsilon": 1e-5,
}


@pytest.fixture
def model():
    return tiny_model(sequence_length=16)


@pytest.fixture
def batch(model):
    return model.preprocessor(TEXTS)[0]


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


# What a model says of itself


def test_summary_names_the_parts_and_counts_the_parameters(model):
    lines = []
    model.summary(print_fn=lambda text, **_: lines.append(text))
    text = "\n".join(lines)
    assert "Llama3Backbone" in text
    assert "lm_head" in text
    assert f"{model.count_params():,}" in text


def test_the_backbones_config_is_json_and_makes_its_twin():
    backbone = tiny_model(attention_bias=True, dtype="bfloat16").backbone
    config = json.loads(json.dumps(backbone.get_config()))
    twin = Llama3Backbone.from_config(config)
    assert twin.config == backbone.config
    assert twin.dtype_policy.name == "bfloat16"
    assert [v.path for v in twin.weights] == [v.path for v in backbone.weights]


def test_the_models_config_is_json_and_makes_its_twin_with_tokenizer(model, batch):
    config = json.loads(json.dumps(model.get_config()))
    twin = Llama3CausalLM.from_config(config)
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(twin(batch)), numpy(model(batch)))
    assert twin.preprocessor.sequence_length == 16
    assert twin.tokenizer("Hello there").tolist() == model.tokenizer("Hello there").tolist()
    assert twin.tokenizer.stop_token_ids == model.tokenizer.stop_token_ids


def test_a_clone_is_a_model_of_the_same_shape(model):
    twin = keras.models.clone_model(model)
    assert [tuple(v.shape) for v in twin.weights] == [tuple(v.shape) for v in model.weights]


# `.keras` files

LOAD = """
import json, sys
import numpy as np
import puna
{how}
x, _, _ = model.preprocessor(["Hello world", "Hi there, how are you?"])
print(json.dumps({{
    "logits": np.asarray(model.predict(x, verbose=0), np.float32).tolist(),
    "text": model.generate("Hello", max_new_tokens=5, sampler="greedy"),
    "sampler": repr(model.sampler),
    "iterations": int(model.optimizer.iterations.numpy()),
    "moments": float(sum(np.abs(v.numpy()).sum() for v in model.optimizer.variables[2:])),
}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "model = puna.load_model(sys.argv[1])",
        "puna.models; import keras; model = keras.saving.load_model(sys.argv[1])",
    ],
    ids=["puna", "keras"],
)
def test_a_keras_file_comes_back_in_a_fresh_process(model, batch, tmp_path, how):
    model.compile(sampler=puna.samplers.TopPSampler(p=0.5, seed=3))
    model.fit(TEXTS, batch_size=1, verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = result_of(LOAD.format(how=how), str(path), env=os.environ)
    np.testing.assert_array_equal(loaded["logits"], numpy(model.predict(batch, verbose=0)))
    assert loaded["text"] == model.generate("Hello", max_new_tokens=5, sampler="greedy")
    assert loaded["sampler"] == "TopPSampler(top_p=0.5, seed=3)"
    assert loaded["iterations"] == 2
    moments = sum(np.abs(numpy(v)).sum() for v in model.optimizer.variables[2:])
    assert loaded["moments"] == pytest.approx(float(moments), rel=1e-4)
    assert loaded["moments"] > 0


def test_an_uncompiled_keras_file_comes_back(model, batch, tmp_path):
    model.save(tmp_path / "model.keras")
    again = puna.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(again(batch)), numpy(model(batch)))


def test_a_half_precision_keras_file_keeps_its_dtype(tmp_path):
    model = tiny_model(dtype="bfloat16")
    model.save(tmp_path / "model.keras")
    again = puna.load_model(tmp_path / "model.keras")
    assert {v.dtype for v in again.weights} == {"bfloat16"}
    for ours, theirs in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


# How a model is called


def test_ids_alone_are_ids_with_a_full_mask(model, batch):
    ids = batch["token_ids"]
    full = {"token_ids": ids, "padding_mask": np.ones_like(ids, bool)}
    np.testing.assert_array_equal(numpy(model(ids)), numpy(model(full)))


def test_logits_and_hidden_states_have_the_promised_shapes(model, batch):
    logits, hidden = model(batch), model.backbone(batch)
    assert tuple(logits.shape) == (2, 16, 307)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert tuple(hidden.shape) == (2, 16, 16)


def test_padding_changes_nothing_on_either_side_whatever_its_id(model):
    ids = model.tokenizer("Hello there")
    alone = numpy(model(ids[None]))[0]
    for left, filler in ((0, 0), (3, 7)):
        token_ids = np.full((1, 9), filler, np.int32)
        mask = np.zeros((1, 9), bool)
        token_ids[0, left : left + len(ids)] = ids
        mask[0, left : left + len(ids)] = True
        padded = numpy(model({"token_ids": token_ids, "padding_mask": mask}))[0]
        np.testing.assert_allclose(padded[left : left + len(ids)], alone, atol=2e-5)


def test_a_functional_model_can_be_made_of_it(model, batch):
    inputs = {
        "token_ids": keras.Input((None,), dtype="int32", name="token_ids"),
        "padding_mask": keras.Input((None,), dtype="bool", name="padding_mask"),
    }
    logits = model(inputs)
    assert logits.shape == (None, None, 307)
    probabilities = keras.layers.Softmax()(logits)
    functional = keras.Model(inputs, probabilities)
    expected = numpy(keras.ops.softmax(model(batch)))
    np.testing.assert_allclose(numpy(functional(batch)), expected, atol=1e-5)
    np.testing.assert_allclose(functional.predict(batch, verbose=0), expected, atol=1e-5)
    assert len(functional.trainable_variables) == len(model.trainable_variables)


def test_predict_takes_strings_and_arrays(model, batch):
    expected = numpy(model(batch))
    np.testing.assert_allclose(model.predict(batch, verbose=0), expected, atol=2e-5)
    from_text = model.predict(TEXTS, batch_size=1, verbose=0)
    longest = int(batch["padding_mask"].sum(axis=1).max()) - 1  # the end token is a label only
    for text, whole in zip(from_text, expected, strict=True):
        np.testing.assert_allclose(text[:longest], whole[:longest], atol=2e-5)


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "variables", "compute", "tolerance"),
    [
        ("float32", "float32", "float32", 0),
        ("bfloat16", "bfloat16", "bfloat16", 0.1),
        ("float16", "float16", "float16", 0.02),
        ("mixed_bfloat16", "float32", "bfloat16", 0.1),
        ("mixed_float16", "float32", "float16", 0.02),
        (keras.DTypePolicy("bfloat16"), "bfloat16", "bfloat16", 0.1),
    ],
    ids=str,
)
def test_dtypes_and_policies_hold_everywhere(model, batch, dtype, variables, compute, tolerance):
    other = tiny_model(dtype=dtype, sequence_length=16)
    assert {v.dtype for v in other.weights} == {variables}
    assert keras.backend.standardize_dtype(other.backbone(batch).dtype) == compute
    logits = other(batch)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    expected = numpy(model(batch))
    difference = np.abs(numpy(logits) - expected)[batch["padding_mask"]].max()
    assert difference <= tolerance * np.abs(expected).max()
    assert other.generate("Hello", max_new_tokens=2, sampler="greedy").startswith("Hello")


def test_kerass_global_policy_is_the_default():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert tiny_model(dtype=None).dtype_policy.name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


# keras-hub's words


def test_a_backbone_is_built_from_keras_hubs_arguments(model, batch):
    backbone = Llama3Backbone(**KERAS_HUB_ARGUMENTS)
    assert [tuple(v.shape) for v in backbone.weights] == [
        tuple(v.shape) for v in model.backbone.weights
    ]
    positional = Llama3Backbone(307, 2, 4, 16, 32, 2, rope_max_wavelength=500000, dropout=0.1)
    assert positional.config.attention_dropout == 0.1
    assert positional.config.rope.rope_theta == 500000
    backbone = Llama3Backbone(**{**KERAS_HUB_ARGUMENTS, "rope_max_wavelength": 10000})
    backbone.set_weights(model.backbone.get_weights())
    np.testing.assert_allclose(numpy(backbone(batch)), numpy(model.backbone(batch)), atol=1e-6)


def test_a_tied_backbone_makes_a_model_without_a_head():
    backbone = Llama3Backbone(**KERAS_HUB_ARGUMENTS, tie_word_embeddings=True)
    assert Llama3CausalLM(backbone).lm_head is None


@pytest.mark.parametrize("wrong", [{"hidden_size": 16}, {"vocabulary": 3}])
def test_an_argument_that_keras_hub_does_not_have_is_refused(wrong):
    with pytest.raises(TypeError):
        Llama3Backbone(**KERAS_HUB_ARGUMENTS, **wrong)


def test_a_config_and_keras_hubs_arguments_exclude_each_other():
    with pytest.raises(TypeError, match="vocabulary_size"):
        Llama3Backbone(config=tiny_config(), vocabulary_size=3)


def test_keras_hubs_attributes_are_there(model):
    backbone = model.backbone
    assert len(backbone.transformer_layers) == 2
    assert backbone.token_embedding is backbone.embed_tokens
    assert backbone.layer_norm is backbone.norm
    assert model.preprocessor.tokenizer is model.tokenizer


def test_parts_put_together_by_hand_compile_generate_and_fit():
    preprocessor = Llama3CausalLMPreprocessor(tiny_tokenizer(), sequence_length=16)
    model = Llama3CausalLM(Llama3Backbone(**KERAS_HUB_ARGUMENTS), preprocessor)
    randomize(model)
    model.compile(optimizer=keras.optimizers.SGD(0.1), sampler="greedy")
    assert model.generate("Hello", max_length=5) == model.generate("Hello", max_length=5)
    history = model.fit(x=TEXTS, batch_size=2, epochs=2, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]


# From a preset


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("preset") / "tiny")


def test_the_base_class_picks_the_class(preset):
    assert type(CausalLM.from_preset(preset)) is Llama3CausalLM


def test_without_load_weights_the_weights_are_random_and_of_the_same_shape(preset):
    loaded = CausalLM.from_preset(preset)
    fresh = CausalLM.from_preset(preset, load_weights=False)
    assert fresh.config == loaded.config
    assert fresh.tokenizer("Hi").tolist() == loaded.tokenizer("Hi").tolist()
    ours, theirs = (numpy(m.backbone.embed_tokens.weight) for m in (fresh, loaded))
    assert ours.shape == theirs.shape
    assert ours.std() > 0
    assert not np.allclose(ours, theirs)


def test_each_part_loads_alone_from_the_same_preset(preset):
    model = CausalLM.from_preset(preset)
    backbone = Llama3Backbone.from_preset(preset, dtype="float16")
    assert {v.dtype for v in backbone.weights} == {"float16"}
    ids = np.array([[1, 2, 3]])
    np.testing.assert_allclose(numpy(backbone(ids)), numpy(model.backbone(ids)), atol=0.05)
    tokenizer = Llama3Tokenizer.from_preset(preset)
    assert tokenizer("Hello").tolist() == model.tokenizer("Hello").tolist()
    preprocessor = Llama3CausalLMPreprocessor.from_preset(preset, sequence_length=8)
    assert preprocessor("Hello")[0]["token_ids"].shape == (8,)


def test_a_model_without_a_tokenizer_can_be_asked_for(preset):
    model = CausalLM.from_preset(preset, preprocessor=None)
    assert model.preprocessor is None
    assert model.generate([1, 2], max_new_tokens=2, sampler="greedy").shape == (4,)
    with pytest.raises(puna.errors.TokenizerError, match="has no tokenizer"):
        _ = model.tokenizer
