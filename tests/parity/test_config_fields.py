"""Every field of transformers' `LlamaConfig` changes what we do, raises, or is known to do neither.

A field that a later transformers adds fails here until it has a rule.
"""

import dataclasses
import json
import warnings
import zlib

import keras
import numpy as np
import pytest
from keras import ops
from transformers import LlamaConfig as HfConfig

from puna.config import _REFUSED_UNLESS, IGNORED_FIELDS, LlamaConfig
from puna.errors import ConfigError, ContextLengthError
from puna.models import Llama3Backbone, Llama3CausalLM
from tests import references

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free

TINY = references.TINY | {"model_type": "llama"}
FELT = 1e-3  # of the largest logit; rounding is a thousandth of it

# Fields that change nothing of what we compute, and why.
DENIED = {
    "_name_or_path": "where transformers last loaded it from",
    "architectures": "checked by model_type",
    "chunk_size_feed_forward": "trades memory for speed, same function",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "output_attentions": "what transformers returns besides the logits",
    "output_hidden_states": "what transformers returns besides the logits",
    "pretraining_tp": "splits a product into parts, same function",
    "problem_type": "for classifiers",
    "return_dict": "how transformers returns its outputs",
    "transformers_version": "who wrote the file",
    "use_cache": "generate always uses a cache, a plain call never",
}


def build(hf):
    """A model of a configuration; a weight depends on its name and place alone."""
    config = LlamaConfig.from_hf(hf)
    model = Llama3CausalLM(Llama3Backbone(config=config, dtype=config.dtype or "float32"))
    for name, variable in model.tensors().items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=variable.shape)
        variable.assign(1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model


def logits(hf, training=False):
    return ops.convert_to_numpy(build(hf)(references.token_ids(1, 40), training=training))


def changes_logits(before, after):
    ours, theirs = logits(before), logits(after)
    return ours.shape != theirs.shape or references.relative_difference(ours, theirs) > FELT


def changes_training(before, after):
    quiet, noisy = logits(before, training=True), logits(after, training=True)
    return references.relative_difference(noisy, quiet) > FELT


def changes_fresh_weights(before, after):
    def spread(hf):
        keras.utils.set_random_seed(0)
        weight = Llama3Backbone(config=LlamaConfig.from_hf(hf)).embed_tokens.weight
        return float(np.std(ops.convert_to_numpy(weight.value)))

    return spread(after) == pytest.approx(
        spread(before) * after["initializer_range"] / before.get("initializer_range", 0.02)
    )


def changes_dtype(before, after):
    del before
    return {variable.dtype for variable in build(after).variables} == {after["dtype"]}


def completion(hf, count=12):
    prompt = references.token_ids(1, 5)
    (row,) = build(hf).generate(prompt, max_new_tokens=count, sampler="greedy", strip_prompt=True)
    return row.tolist()


def stops_generate(before, after):
    assert "eos_token_id" in after
    whole = completion(before | {"eos_token_id": None})
    stop = whole[3]
    cut = whole[: whole.index(stop) + 1]
    return all(
        completion(before | {"eos_token_id": ids}) == cut
        for ids in (stop, [stop], [60 + stop, stop])
    ) and len(cut) < len(whole)


def bounds_generate(before, after):
    assert len(completion(before)) > 0
    with pytest.raises(ContextLengthError, match=f"context of {after['max_position_embeddings']}"):
        completion(after)
    return True


def is_written(before, after, tmp_path):
    """The ids that only a tokenizer uses: the saved files say the same."""

    def saved(hf):
        build(hf).save_to_preset(tmp_path)
        return [
            json.loads((tmp_path / f"{n}.json").read_text())
            for n in ("config", "generation_config")
        ]

    (name,) = {name for name in after if after.get(name) != before.get(name)}
    return all(file[name] == after[name] for file in saved(after)) and all(
        file.get(name) != after[name] for file in saved(before)
    )


def refused(before, after):
    (name,) = {name for name in after if after.get(name) != before.get(name)}
    LlamaConfig.from_hf(before)
    with pytest.raises(ConfigError, match=name):
        LlamaConfig.from_hf(after)
    return True


# Each field's other value, and where it must show.
RULES = {
    "attention_bias": (True, changes_logits),
    "attention_dropout": (0.5, changes_training),
    "bos_token_id": (7, is_written),
    "dtype": ("bfloat16", changes_dtype),
    "eos_token_id": (3, stops_generate),
    "head_dim": (16, changes_logits),
    "hidden_act": ("gelu", changes_logits),
    "hidden_size": (48, changes_logits),
    "initializer_range": (0.2, changes_fresh_weights),
    "intermediate_size": (64, changes_logits),
    "is_encoder_decoder": (True, refused),
    "max_position_embeddings": (8, bounds_generate),
    "mlp_bias": (True, changes_logits),
    "model_type": ("mistral", refused),
    "num_attention_heads": (8, changes_logits),
    "num_hidden_layers": (3, changes_logits),
    "num_key_value_heads": (4, changes_logits),
    "pad_token_id": (9, is_written),
    "rms_norm_eps": (0.5, changes_logits),
    "rope_parameters": (references.ROPES["linear"], changes_logits),
    "tie_word_embeddings": (True, changes_logits),
    "vocab_size": (83, changes_logits),
}

FIELDS = sorted({f.name for f in dataclasses.fields(HfConfig)} | set(HfConfig().to_dict()))


@pytest.mark.parametrize("field", FIELDS)
def test_field_of_llama_config(field, tmp_path):
    assert (field in RULES) != (field in DENIED), f"transformers' {field} has no rule here"
    if field in DENIED:
        assert DENIED[field] == IGNORED_FIELDS[field]
        return
    value, is_felt = RULES[field]
    assert TINY.get(field) != value
    extra = (tmp_path,) if is_felt is is_written else ()
    assert is_felt(TINY, TINY | {field: value}, *extra)


def test_no_rule_is_of_a_field_that_is_gone():
    assert {*RULES, *DENIED} <= set(FIELDS)


@pytest.mark.parametrize("name", sorted(set(references.ROPES) - {"default"}))
def test_rope_settings_change_logits(name):
    def long(hf):
        return ops.convert_to_numpy(build(hf)(references.token_ids(1, 100)))

    ours, plain = long(TINY | {"rope_parameters": references.ROPES[name]}), long(TINY)
    assert references.relative_difference(ours, plain) > FELT


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("factor", 2.0), ("original_max_position_embeddings", 8), ("attention_factor", 0.5),
        ("beta_fast", 2.0), ("beta_slow", 0.1), ("mscale", 3.0), ("mscale_all_dim", 2.0),
        ("truncate", False), ("rope_theta", 50.0),
    ],
)  # fmt: skip
def test_each_setting_of_yarn_changes_logits(setting, value):
    yarn = references.rope(
        "yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.5, mscale_all_dim=0.5
    )
    fields = {"head_dim": 32}
    before = TINY | fields | {"rope_parameters": yarn}
    assert changes_logits(before, before | {"rope_parameters": yarn | {setting: value}})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("factor", 2.0), ("original_max_position_embeddings", 8), ("low_freq_factor", 3.0),
        ("high_freq_factor", 20.0), ("rope_theta", 50.0),
    ],
)  # fmt: skip
def test_each_setting_of_llama3_changes_logits(setting, value):
    llama3 = references.ROPES["llama3"] | {"rope_theta": 1000.0}
    before = TINY | {"rope_parameters": llama3, "head_dim": 16}
    assert changes_logits(before, before | {"rope_parameters": llama3 | {setting: value}})


REFUSED = {
    "pruned_heads": {"0": [1]}, "partial_rotary_factor": 0.5, "sliding_window": 4096,
    "layer_types": ["sliding_attention"], "cross_attention_hidden_size": 32,
    "quantization_config": {"quant_method": "gptq"}, "no_rope_layers": [1],
    "no_rope_layer_interval": 4,
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(_REFUSED_UNLESS))
def test_field_that_asks_for_another_function_is_refused_by_name(field):
    allowed = _REFUSED_UNLESS[field]
    other = REFUSED.get(field, True if False in allowed else 2.0)
    with pytest.raises(ConfigError, match=rf"\b{field}\b"):
        LlamaConfig.from_hf(TINY | {field: other})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in allowed:
            LlamaConfig.from_hf(TINY | {field: value})


def test_unknown_fields_are_warned_of_once_and_together(tmp_path):
    hf = TINY | {"wavelength": 3, "colour": "red"}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.warns(UserWarning, match="colour") as caught:
        Llama3CausalLM.from_preset(tmp_path, load_weights=False, preprocessor=None)
    messages = [str(warning.message) for warning in caught if "colour" in str(warning.message)]
    assert len(messages) == 1
    assert "wavelength" in messages[0]


def test_known_fields_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LlamaConfig.from_hf(HfConfig().to_dict() | dict.fromkeys(IGNORED_FIELDS) | TINY)
