"""Frequencies equal transformers', bad settings raise, and contexts are as long as they say."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from puna.errors import ConfigError
from puna.rope import RopeConfig
from tests import references

ULPS = 4  # of float32: what two roundings of a power, a product and a quotient come to


def reference(parameters, head_dim, max_positions, seq_len=None):
    """transformers' frequencies and scaling."""
    config = HfConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        frequencies, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, scaling = init(config, torch.device("cpu"), seq_len=seq_len)
    return frequencies.numpy(), scaling


def ours(parameters, max_positions):
    return RopeConfig.from_hf(
        {"rope_parameters": parameters}, max_position_embeddings=max_positions
    )


def assert_same_float32(found, expected):
    np.testing.assert_allclose(found, expected, rtol=ULPS * np.finfo(np.float32).eps, atol=0)


LLAMA_3_1 = references.rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
ROPES = references.ROPES | {
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_1 | {"factor": 32.0},
    "smollm2": references.rope("default", rope_theta=100000.0),
    "long-yarn": references.rope("yarn", factor=16.0, original_max_position_embeddings=4096),
}


@pytest.mark.backend_free
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_scaling_equal_transformers(name, head_dim):
    expected, scaling = reference(ROPES[name], head_dim, 64)
    rope = ours(ROPES[name], 64)
    assert_same_float32(rope.inverse_frequencies(head_dim), expected)
    assert rope.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.backend_free
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
def test_frequencies_are_rounded_as_transformers_rounds_them(theta, head_dim):
    # Not only near: one unit in the last place is another angle at position 6,000.
    expected, _ = reference(references.rope("default", rope_theta=theta), head_dim, 64)
    np.testing.assert_array_equal(
        RopeConfig(rope_theta=theta).inverse_frequencies(head_dim), expected
    )


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150, 5000])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_dynamic_frequencies_of_a_length_equal_transformers(head_dim, length):
    from keras import ops

    from puna.layers.rope import RotaryEmbedding

    parameters = ROPES["dynamic"]
    expected, _ = reference(parameters, head_dim, 64, seq_len=length)
    rotary = RotaryEmbedding(ours(parameters, 64), head_dim, 64)
    positions = ops.convert_to_tensor(np.array([[length - 1]], np.int32))
    found = ops.convert_to_numpy(rotary._dynamic_frequencies(positions, None))[0, 0]
    # The base itself is a float32 power here, and a float64 in transformers.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=0)


@pytest.mark.backend_free
@pytest.mark.parametrize("name", ROPES)
def test_round_trip_through_both_layouts(name):
    rope = ours(ROPES[name], 64)
    written = rope.to_hf()
    new = {"rope_parameters": written["rope_parameters"]}
    old = {"rope_theta": written["rope_theta"], "rope_scaling": written["rope_scaling"]}
    for layout in (written, new, old):
        assert RopeConfig.from_hf(layout, max_position_embeddings=64) == rope


@pytest.mark.backend_free
def test_early_name_of_the_type_is_read():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = RopeConfig.from_hf(old, max_position_embeddings=64)
    assert rope == RopeConfig(rope_type="linear", rope_theta=5e5, factor=2.0)


@pytest.mark.backend_free
@pytest.mark.parametrize("hf", [{}, {"rope_scaling": None}, {"rope_parameters": None}])
def test_no_settings_are_the_default(hf):
    assert RopeConfig.from_hf(hf, max_position_embeddings=64) == RopeConfig(rope_theta=10000.0)


@pytest.mark.backend_free
def test_context_of_pre_training_is_taken_from_where_transformers_takes_it():
    settings = {"rope_type": "yarn", "factor": 2.0}
    inner = settings | {"original_max_position_embeddings": 16}

    def original(**hf):
        rope = RopeConfig.from_hf(hf, max_position_embeddings=64)
        return rope.original_max_position_embeddings

    assert original(rope_scaling=settings) == 64
    assert original(rope_scaling=inner) == 16
    assert original(rope_scaling=inner, original_max_position_embeddings=32) == 32


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "high_freq_factor, low_freq_factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
        ({"rope_type": "default", "long_factor": [1.0]}, "long_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_3_1 | {"high_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
    ],
)
def test_bad_settings_raise_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        ours(settings, 64)


@pytest.mark.backend_free
@pytest.mark.parametrize("rope_type", ["llama3", "yarn"])
def test_scaling_without_the_context_of_pre_training_raises(rope_type):
    band = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        RopeConfig(rope_type=rope_type, factor=8.0, **band)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(), 64),
        (RopeConfig(rope_type="linear", factor=4.0), 256),
        (RopeConfig(rope_type="dynamic", factor=2.0), 128),
        (RopeConfig(rope_type="linear", factor=0.5), 64),
        (RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
        (ours(ROPES["llama3"], 64), 64),
    ],
)
def test_context_length(rope, expected):
    assert rope.context_length(64) == expected
