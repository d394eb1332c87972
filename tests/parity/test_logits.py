"""Logits and hidden states equal transformers', over every field of a configuration."""

import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.activations import ACT2FN

from puna.config import ACTIVATIONS
from puna.models import Llama3Backbone, Llama3CausalLM
from tests import references

TOLERANCE = 1e-4  # of the largest logit

# Fields that differ from `references.TINY`, by a name for the test's report.
SHAPES = {
    "tiny": {},
    "one-layer": {"num_hidden_layers": 1},
    "three-layers": {"num_hidden_layers": 3},
    "narrow-mlp": {"intermediate_size": 20},
    "every-head-its-own": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "eight-heads-to-two": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "three-heads-a-group": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    "wide-heads": {"head_dim": 24},
    "narrow-heads": {"head_dim": 4},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "both-biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "tied-with-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "large-epsilon": {"rms_norm_eps": 0.5},
    "small-epsilon": {"rms_norm_eps": 1e-12},
    "dropout-is-for-training": {"attention_dropout": 0.5},
    "tensor-parallel": {"pretraining_tp": 2},
    "large-vocabulary": {"vocab_size": 1000},
}
LAYOUTS = ("v3", "v4", "v5")


def load(directory, cls=Llama3CausalLM):
    kwargs = {} if cls is Llama3Backbone else {"preprocessor": None}
    return cls.from_preset(directory, dtype="float32", **kwargs)


def run(model, ids, mask=None):
    inputs = ids if mask is None else {"token_ids": ids, "padding_mask": mask}
    return keras.ops.convert_to_numpy(model(inputs))


def check(reference, directory, ids, mask=None):
    """Our logits of a saved model against its own, at every real token."""
    ours, theirs = run(load(directory), ids, mask), references.logits(reference, ids, mask)
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    references.assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name, tmp_path):
    reference = references.make(**SHAPES[name])
    references.save(reference, tmp_path)
    check(reference, tmp_path, references.token_ids(2, 24))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_hidden_act(activation, tmp_path):
    assert activation in ACT2FN, "an activation that transformers does not know has no reference"
    reference = references.make(hidden_act=activation)
    references.save(reference, tmp_path)
    check(reference, tmp_path, references.token_ids(2, 24))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", references.ROPES)
def test_rope(name, layout, tmp_path):
    reference = references.make(rope_parameters=references.ROPES[name])
    references.save(reference, tmp_path, layout=layout)
    check(reference, tmp_path, references.token_ids(1, 64))


@pytest.mark.parametrize("name", references.ROPES)
def test_rope_beyond_max_position_embeddings(name, tmp_path):
    reference = references.make(rope_parameters=references.ROPES[name])
    references.save(reference, tmp_path)
    check(reference, tmp_path, references.token_ids(1, 150))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_rope_at_long_positions(name, tmp_path):
    fields = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    reference = references.make(
        rope_parameters=references.ROPES[name], max_position_embeddings=2048, **fields
    )
    references.save(reference, tmp_path)
    check(reference, tmp_path, references.token_ids(1, 3000))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_padded_rows(rope, side, tmp_path):
    reference = references.make(rope_parameters=references.ROPES[rope])
    references.save(reference, tmp_path)
    mask = references.padded_mask([24, 1, 13, 7], 24, side)
    check(reference, tmp_path, references.token_ids(4, 24), mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_changes_nothing(side, tmp_path):
    model = load(references.save(references.make(), tmp_path))
    ids, mask = references.token_ids(3, 20), references.padded_mask([20, 3, 11], 20, side)
    other = np.where(mask, ids, references.token_ids(3, 20, seed=1))
    assert (other != ids).any()
    np.testing.assert_array_equal(run(model, ids, mask)[mask], run(model, other, mask)[mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_dynamic_scaling_counts_each_rows_own_tokens(side, tmp_path):
    # transformers stretches all rows by the longest; alone, each gets what is its own.
    reference = references.make(rope_parameters=references.ROPES["dynamic"])
    model = load(references.save(reference, tmp_path))
    ids, mask = references.token_ids(3, 150), references.padded_mask([40, 90, 150], 150, side)
    ours = run(model, ids, mask)
    for row in range(3):  # shortest first: transformers keeps the longest length that it has met
        theirs = references.logits(reference, ids[row : row + 1, mask[row]])
        references.assert_close(ours[row : row + 1, mask[row]], theirs, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_dtype_of_the_file(dtype, layout, tmp_path):
    reference = references.make(dtype=getattr(torch, dtype))
    references.save(reference, tmp_path, layout=layout)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    check(reference, tmp_path, references.token_ids(2, 24))


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_checkpoint(tied, tmp_path):
    reference = references.make(tie_word_embeddings=tied)
    references.save(reference, tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    check(reference, tmp_path, references.token_ids(2, 24))


@pytest.mark.parametrize("side", ["left", "right"])
def test_backbone_returns_the_hidden_states_of_llama_model(side, tmp_path):
    reference = references.make(attention_bias=True)
    references.save(reference, tmp_path)
    ids, mask = references.token_ids(3, 20), references.padded_mask([20, 3, 11], 20, side)
    ours = run(load(tmp_path, Llama3Backbone), ids, mask)
    theirs = references.hidden_states(reference, ids, mask)
    references.assert_close(ours[mask], theirs[mask], TOLERANCE)


def test_checkpoint_of_a_bare_llama_model_loads_into_a_backbone(tmp_path):
    reference = references.make()
    reference.model.save_pretrained(tmp_path)
    ids = references.token_ids(2, 20)
    ours = run(load(tmp_path, Llama3Backbone), ids)
    references.assert_close(ours, references.hidden_states(reference, ids), TOLERANCE)


@pytest.mark.backend_free
@pytest.mark.parametrize("name", sorted(set(references.ROPES) - {"default"}))
def test_reference_feels_the_rope_settings(name):
    # A comparison of logits is worth something only where a wrong setting would show.
    ids = references.token_ids(1, 150)
    plain = references.logits(references.make(), ids)
    other = references.logits(references.make(rope_parameters=references.ROPES[name]), ids)
    assert references.relative_difference(other, plain) > 100 * TOLERANCE
