"""A configuration is read from and written to `config.json` without loss, or refused by name."""

import dataclasses
import json

import pytest
from transformers import LlamaConfig as HfConfig

from puna.config import LlamaConfig
from puna.errors import ConfigError
from puna.rope import RopeConfig
from tests import references

pytestmark = pytest.mark.backend_free

FULL = LlamaConfig(
    vocab_size=100,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    hidden_act="gelu",
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rope_type="linear", rope_theta=5000.0, factor=2.0),
    tie_word_embeddings=True,
    attention_bias=True,
    mlp_bias=True,
    attention_dropout=0.25,
    initializer_range=0.1,
    bos_token_id=5,
    eos_token_id=(6, 7),
    pad_token_id=8,
    dtype="bfloat16",
)


def through_json(hf):
    return json.loads(json.dumps(hf))


def test_round_trip_of_every_field():
    defaults = LlamaConfig()
    for field in dataclasses.fields(LlamaConfig):
        assert getattr(FULL, field.name) != getattr(defaults, field.name), (
            f"{field.name} is untried"
        )
    assert LlamaConfig.from_hf(through_json(FULL.to_hf())) == FULL


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": None},
        {"eos_token_id": 0},
        {"bos_token_id": None},
        {"pad_token_id": None},
        {"pad_token_id": 0},
        {"dtype": None},
        {"rope": RopeConfig()},
        {"attention_dropout": 0.0, "initializer_range": 0.0},
    ],
)
def test_round_trip_of_absent_and_zero_values(changes):
    config = dataclasses.replace(FULL, **changes)
    assert LlamaConfig.from_hf(through_json(config.to_hf())) == config


def test_defaults_are_transformers_own():
    ours, theirs = LlamaConfig.from_hf({}), HfConfig()
    for field in dataclasses.fields(LlamaConfig):
        if field.name != "rope":
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.rope.to_hf()["rope_parameters"] == theirs.rope_parameters
    assert ours == LlamaConfig()


@pytest.mark.parametrize("name", references.ROPES)
@pytest.mark.parametrize("layout", ["v3", "v4", "v5"])
def test_layouts_of_transformers_mean_the_same(name, layout):
    hf = HfConfig(**references.TINY, rope_parameters=references.ROPES[name], dtype="float16")
    new = json.loads(hf.to_json_string(use_diff=False))
    config = LlamaConfig.from_hf(references.as_written_by(layout, new))
    assert config == LlamaConfig.from_hf(new)
    assert config.dtype == "float16"
    assert config.rope.rope_type == references.ROPES[name]["rope_type"]


@pytest.mark.parametrize("name", references.ROPES)
def test_transformers_reads_what_we_write(name):
    hf = HfConfig(**references.TINY, rope_parameters=references.ROPES[name], dtype="float16")
    config = LlamaConfig.from_hf(hf.to_dict())
    again = HfConfig(**through_json(config.to_hf()))
    assert again.rope_parameters == hf.rope_parameters
    for field in dataclasses.fields(LlamaConfig):
        if field.name not in ("rope", "dtype"):
            assert getattr(again, field.name) == getattr(hf, field.name), field.name


def test_missing_heads_follow_from_the_others():
    config = LlamaConfig.from_hf({"hidden_size": 48, "num_attention_heads": 6})
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    config = LlamaConfig.from_hf(
        {"hidden_size": 48, "num_attention_heads": 6, "head_dim": None, "num_key_value_heads": None}
    )
    assert (config.num_kv_heads, config.head_size) == (6, 8)


@pytest.mark.parametrize(
    ("stored", "ids"), [(None, ()), (0, (0,)), (3, (3,)), ([3, 4], (3, 4)), ([], ())]
)
def test_eos_token_ids(stored, ids):
    assert LlamaConfig.from_hf({"eos_token_id": stored}).eos_token_ids == ids


@pytest.mark.parametrize("stored", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(name, stored):
    assert LlamaConfig.from_hf({name: stored}).dtype == "bfloat16"
    assert LlamaConfig.from_hf({name: "auto"}).dtype is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("vocab_size", 2.5), ("hidden_size", -1), ("hidden_size", "64"),
        ("intermediate_size", 0), ("num_hidden_layers", 0), ("num_hidden_layers", True),
        ("num_attention_heads", 0), ("num_key_value_heads", 0), ("num_key_value_heads", 3),
        ("num_key_value_heads", 64), ("head_dim", 0), ("head_dim", 7),
        ("max_position_embeddings", 0), ("hidden_act", "swiglu"), ("hidden_act", 3),
        ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("nan")), ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", "1e-5"), ("attention_dropout", 1.0), ("attention_dropout", -0.1),
        ("attention_dropout", "0.1"), ("initializer_range", 2.0), ("initializer_range", "0.1"),
        ("dtype", "float12"), ("tie_word_embeddings", "false"), ("attention_bias", 1),
        ("mlp_bias", "yes"), ("bos_token_id", "1"), ("eos_token_id", 1.5),
        ("eos_token_id", [1, "2"]), ("eos_token_id", "2"), ("pad_token_id", True),
    ],
)  # fmt: skip
def test_bad_value_raises_naming_the_field(field, value):
    with pytest.raises(ConfigError, match=field):
        LlamaConfig.from_hf(references.TINY | {field: value})


@pytest.mark.parametrize("value", ["5e5", None, [1.0]])
def test_bad_theta_raises_or_is_the_default(value):
    if value is None:
        assert LlamaConfig.from_hf({"rope_theta": None}).rope.rope_theta == 10000.0
        return
    with pytest.raises(ConfigError, match="rope_theta"):
        LlamaConfig.from_hf({"rope_theta": value})


def test_width_that_heads_do_not_divide_raises_and_says_what_to_give():
    with pytest.raises(ConfigError, match=r"hidden_size 50.*num_attention_heads 4.*head_dim"):
        LlamaConfig(hidden_size=50, num_attention_heads=4)
    assert LlamaConfig(hidden_size=50, num_attention_heads=4, head_dim=8).head_size == 8


def test_other_model_is_refused():
    with pytest.raises(ConfigError, match="mistral"):
        LlamaConfig.from_hf({"model_type": "mistral"})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.vocab_size = 3  # type: ignore[misc]


KERAS_HUB = {
    "vocabulary_size": 100, "num_layers": 3, "num_query_heads": 6, "hidden_dim": 48,
    "intermediate_dim": 80, "num_key_value_heads": 2,
}  # fmt: skip


def test_from_keras_hub():
    config = LlamaConfig.from_keras_hub(
        **KERAS_HUB,
        rope_max_wavelength=500000,
        layer_norm_epsilon=1e-5,
        dropout=0.1,
        tie_word_embeddings=True,
    )
    assert config == LlamaConfig(
        vocab_size=100,
        num_hidden_layers=3,
        num_attention_heads=6,
        hidden_size=48,
        intermediate_size=80,
        num_key_value_heads=2,
        rope=RopeConfig(rope_theta=500000.0),
        rms_norm_eps=1e-5,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    )


def test_scaling_from_keras_hub():
    def rope(**settings):
        return LlamaConfig.from_keras_hub(**KERAS_HUB, **settings).rope

    llama3 = {
        "rope_frequency_adjustment_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_pretraining_sequence_length": 8192,
    }
    assert rope() == RopeConfig()
    assert rope(rope_position_scaling_factor=4) == RopeConfig(rope_type="linear", factor=4.0)
    assert rope(**llama3) == RopeConfig(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    with pytest.raises(ConfigError, match="rope_position_scaling_factor"):
        rope(**llama3, rope_position_scaling_factor=4.0)
    with pytest.raises(ConfigError, match="low_freq_factor"):
        rope(rope_frequency_adjustment_factor=8.0)
