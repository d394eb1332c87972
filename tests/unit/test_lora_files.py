"""Adapters: merged, saved, loaded, and known to what was made with them."""

import json

import numpy as np
import pytest

import puna
from puna.chat import ChatState
from puna.errors import ConfigError, PresetError
from puna.models import CausalLM, Llama3Backbone, Llama3CausalLM
from tests.adapters import (
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
from tests.weights import array, assert_same

# Merging


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_compute_the_same_and_come_back_to_the_bit(kind, dtype):
    model = adapted(kind, dtype)
    beside, before = logits(model), {name: array(v) for name, v in model.tensors().items()}
    if dtype == "float32":
        exact = logits(by_formula(model))
        assert_close(beside, exact)
    model.merge_lora()
    assert model.is_merged
    if dtype == "float32":
        assert_close(logits(model), exact)
    with pytest.raises(ConfigError, match="call unmerge_lora first"):
        model.merge_lora()
    with pytest.raises(ConfigError, match=r"nothing to train.*call unmerge_lora first"):
        model.fit(TEXTS, verbose=0)
    model.unmerge_lora()
    for name, variable in model.tensors().items():
        np.testing.assert_array_equal(array(variable), before[name], err_msg=name)
    np.testing.assert_array_equal(logits(model), beside)
    assert fit(model, epochs=1)


@each_kind
def test_bfloat16_rounds_off_as_much_beside_the_weights_as_within_them(kind):
    # Over four draws, as one can be off by twice another: from 0.8 to 1.3 times on the backends.
    beside, merged = [], []
    for seed in range(4):
        model = adapted(kind, "bfloat16")
        shake(model, seed)
        exact = logits(by_formula(model))
        beside.append(logits(model) - exact)
        model.merge_lora()
        merged.append(logits(model) - exact)
    off, off_merged = (np.sqrt(np.mean(np.square(errors))) for errors in (beside, merged))
    assert 0 < off <= 1.5 * off_merged


@pytest.mark.backend_free
def test_merging_says_when_it_cannot():
    model = adapted()
    with pytest.raises(ConfigError, match="no adapter is merged"):
        model.unmerge_lora()
    model.merge_lora(keep=False)
    with pytest.raises(ConfigError, match="were not kept"):
        model.unmerge_lora()
    quantized = adapted()
    quantized.quantize("int4")
    with pytest.raises(ConfigError, match=r'15 matrices with adapters are quantized.*"none"'):
        quantized.merge_lora()


# What is kept


def twins(model):
    config = json.loads(json.dumps(model.get_config()))
    twin = Llama3CausalLM.from_config(config)
    twin.set_weights(model.get_weights())
    return twin


@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_the_config_makes_a_twin_with_adapters(merged):
    model = adapted(KINDS["dora"], name="one")
    model.enable_lora(rank=2, target_modules=["v_proj", "lm_head"], dropout=0.5, name="two")
    shake(model, 3)
    if merged:
        model.merge_lora()
    twin = twins(model)
    assert twin.adapters() == model.adapters()
    assert twin.active_adapters() == {"two": 1.0}
    assert twin.is_merged == merged
    assert [v.path for v in twin.weights] == [v.path for v in model.weights]
    assert [v.path for v in twin.trainable_variables] == [v.path for v in model.trainable_variables]
    np.testing.assert_array_equal(logits(twin), logits(model))
    backbone = Llama3Backbone.from_config(json.loads(json.dumps(model.backbone.get_config())))
    assert [v.path for v in backbone.weights] == [v.path for v in model.backbone.weights]


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_a_keras_file_holds_them_too(scheme, tmp_path):
    model = adapted(KINDS["rslora"])
    if scheme:
        model.quantize(scheme)
    fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    again = puna.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(logits(again), logits(model))
    assert again.fit(TEXTS, batch_size=4, verbose=0).history["loss"][0] > 0


def test_an_adapter_is_saved_loaded_and_goes_on_learning(tmp_path):
    model_of().save_to_preset(tmp_path / "base")
    model = CausalLM.from_preset(tmp_path / "base")
    model.enable_lora(rank=4, alpha=8, dropout=0.1)
    losses = fit(model)
    model.save_adapter(tmp_path / "adapter")
    again = CausalLM.from_preset(tmp_path / "base", dtype="bfloat16")
    again.quantize("int8", filters="mlp")
    again.load_adapter(tmp_path / "adapter", name="pirate")
    assert again.adapters() == {"pirate": model.adapters()["default"]}
    for ours, theirs in zip(model.trainable_variables, again.trainable_variables, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))
    assert fit(again)[-1] < losses[0]
    with pytest.raises(ConfigError, match="'pirate' already"):
        again.load_adapter(tmp_path / "adapter", name="pirate")


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_what_was_saved_learns_on_from_where_it_was(form, tmp_path):
    model_of().save_to_preset(tmp_path / "base")
    model = CausalLM.from_preset(tmp_path / "base")
    model.enable_lora(rank=4, alpha=8)
    losses = fit(model)
    if form == "adapter":
        model.save_to_preset(tmp_path / "tuned", adapter="only")
        again = CausalLM.from_preset(tmp_path / "base")
        again.load_adapter(tmp_path / "tuned")
    else:
        model.save_to_preset(tmp_path / "tuned")
        again = CausalLM.from_preset(tmp_path / "tuned")
        again.enable_lora(rank=4, alpha=8)  # a new one, which changes nothing at first
    unbroken, broken = fit(model), fit(again)
    assert broken[0] == pytest.approx(unbroken[0], rel=1e-5)
    assert broken[-1] < broken[0] < losses[-1] < losses[0]
    if form == "adapter":
        assert broken == pytest.approx(unbroken, rel=1e-5)


@each_kind
def test_a_preset_is_written_merged(kind, tmp_path):
    model = adapted(kind)
    model.save_to_preset(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert_close(logits(CausalLM.from_preset(tmp_path)), logits(model))
    np.testing.assert_array_equal(array(model.lm_head.weight), array(model_of().lm_head.weight))
    model.merge_lora()
    model.save_to_preset(tmp_path / "merged")
    assert_same(CausalLM.from_preset(tmp_path / "merged"), CausalLM.from_preset(tmp_path))


def test_a_preset_of_the_adapter_only_finds_its_base(tmp_path):
    model_of().save_to_preset(tmp_path / "base")
    model = CausalLM.from_preset(tmp_path / "base")
    model.enable_lora(rank=2)
    shake(model)
    model.save_to_preset(tmp_path / "tuned")
    model.save_to_preset(tmp_path / "tuned", adapter="only")
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    again = CausalLM.from_preset(tmp_path / "tuned")
    assert_close(logits(again), logits(model))
    assert again.tokenizer("Hello").tolist() == model.tokenizer("Hello").tolist()
    # A merged save in its place is a whole model again.
    model.save_to_preset(tmp_path / "tuned", adapter="merged")
    assert_close(logits(CausalLM.from_preset(tmp_path / "tuned")), logits(model))


@pytest.mark.backend_free
def test_saving_says_when_a_choice_is_needed(tmp_path):
    model = adapted()
    with pytest.raises(ConfigError, match="adapter is 'both'; expected 'merged' or 'only'"):
        model.save_to_preset(tmp_path / "a", adapter="both")
    model.quantize("int4")
    for choice in (None, "merged"):
        with pytest.raises(ConfigError, match='adapter="only"'):
            model.save_to_preset(tmp_path / "a", adapter=choice)
    model.save_to_preset(tmp_path / "a", adapter="only")
    model.disable_adapters()
    with pytest.raises(ConfigError, match=r"0 adapters in use.*expected name='default'"):
        model.save_to_preset(tmp_path / "a", adapter="only")
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        model.save_adapter(tmp_path / "a", name="other")


@pytest.mark.backend_free
def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapted(targets=["q_proj"]).save_adapter(tmp_path)
    model = model_of(hidden_size=32)
    with pytest.raises(PresetError, match=r"lora_A.weight has shape \(4, 64\), expected \(4, 32\)"):
        model.load_adapter(tmp_path)
    deeper = model_of(num_hidden_layers=3)
    with pytest.raises(PresetError, match=r"layers.2.self_attn.q_proj should be adapted"):
        deeper.load_adapter(tmp_path)
    shallower = model_of(num_hidden_layers=1)
    with pytest.raises(PresetError, match=r"layers.1.self_attn.q_proj, and the model has no such"):
        shallower.load_adapter(tmp_path)
    assert not any(other.adapters() for other in (model, deeper, shallower))


# What others know of them


def test_what_was_made_by_another_adapter_is_not_reused(tmp_path):
    model = adapted()
    cache = model.prompt_cache("Hello there the world")
    cache.save(tmp_path / "cache.safetensors")
    model.disable_adapters()
    for use in (
        lambda: model.generate("Hello there the world and", prompt_cache=cache, max_new_tokens=1),
        lambda: cache.save(tmp_path / "cache.safetensors"),
    ):
        with pytest.raises(ConfigError, match="other adapters"):
            use()
    with pytest.raises(PresetError, match="other weights"):
        type(cache).load(tmp_path / "cache.safetensors", model)


def test_a_chat_follows_the_adapter_in_use():
    model = adapted()

    def second_answer(adapter, forget):
        model.set_adapter("default")
        chat = ChatState(model, sampler="greedy", max_new_tokens=6)
        chat.send_message("Hello there")
        model.set_adapter(adapter)
        if forget:
            chat.last = None  # nothing to reuse
        return chat.send_message("Hello world")

    for adapter in ("default", None):
        assert second_answer(adapter, False) == second_answer(adapter, True)
    assert second_answer("default", False) != second_answer(None, False)


@pytest.mark.backend_free
def test_a_vocabulary_does_not_change_under_an_adapted_head():
    model = adapted()
    with pytest.raises(ConfigError, match="before enable_lora"):
        model.resize_token_embeddings(400)
    other = adapted(targets=["q_proj"])
    other.resize_token_embeddings(400)
    assert not other.backbone.embed_tokens.weight.trainable
