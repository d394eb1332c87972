"""Logits equal those of Meta's own model code, for a tiny Llama 3.1."""

import json
import sys
import types

import keras
import numpy as np
import pytest
import safetensors.torch
import torch

from puna.models import Llama3CausalLM
from tests import assets, references

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free

TOLERANCE = 1e-4  # of the largest logit

V, D, L, N, K, MULTIPLE_OF, T = 61, 64, 2, 4, 2, 24, 2000
F = 192  # 2/3 of 4 D is 170; the next multiple of 24


class PlainLinear(torch.nn.Linear):
    """What fairscale's parallel layers are with one device."""

    def __init__(self, inputs, outputs, bias=True, **kwargs):
        super().__init__(inputs, outputs, bias=bias)


class PlainEmbedding(torch.nn.Embedding):
    def __init__(self, rows, width, **kwargs):
        super().__init__(rows, width)


@pytest.fixture(scope="module")
def meta():
    """Meta's module of the model, fairscale's layers replaced by plain ones."""
    with pytest.MonkeyPatch.context() as patch:
        initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
        initialize.get_model_parallel_world_size = lambda: 1
        layers = types.ModuleType("fairscale.nn.model_parallel.layers")
        layers.ColumnParallelLinear = layers.RowParallelLinear = PlainLinear
        layers.VocabParallelEmbedding = PlainEmbedding
        parallel = types.ModuleType("fairscale.nn.model_parallel")
        parallel.initialize, parallel.layers = initialize, layers
        nn, fairscale = types.ModuleType("fairscale.nn"), types.ModuleType("fairscale")
        nn.model_parallel, fairscale.nn = parallel, nn
        for module in (fairscale, nn, parallel, initialize, layers):
            patch.setitem(sys.modules, module.__name__, module)
        patch.syspath_prepend(str(assets.meta_wheel()))
        from llama_models.llama3 import args, model

        yield types.SimpleNamespace(ModelArgs=args.ModelArgs, Transformer=model.Transformer)
        for name in [name for name in sys.modules if name.split(".")[0] == "llama_models"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def transformer(meta):
    args = meta.ModelArgs(
        dim=D, n_layers=L, n_heads=N, n_kv_heads=K, vocab_size=V, multiple_of=MULTIPLE_OF,
        norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True, max_batch_size=1, max_seq_len=T,
    )  # fmt: skip
    model = meta.Transformer(args).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
HEADS = {"attention.wq": N, "attention.wk": K}


def renamed(state):
    """Meta's tensors under Hugging Face's names; q and k with the pairs of a head apart."""
    tensors = {}
    for name, weight in state.items():
        if name in NAMES:
            tensors[NAMES[name]] = weight.clone()
            continue
        _, layer, inner = name.removesuffix(".weight").split(".", 2)
        if inner in HEADS:
            pairs = weight.reshape(HEADS[inner], -1, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        tensors[f"model.layers.{layer}.{BLOCK_NAMES[inner]}.weight"] = weight.contiguous().clone()
    return tensors


def write(directory, transformer, rope_scaling):
    config = {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": L, "num_attention_heads": N, "num_key_value_heads": K,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": rope_scaling, "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    state = renamed(transformer.state_dict())
    safetensors.torch.save_file(state, directory / "model.safetensors")
    return directory


def our_logits(directory, ids):
    model = Llama3CausalLM.from_preset(directory, preprocessor=None, dtype="float32")
    return keras.ops.convert_to_numpy(model(ids))


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_logits_equal_metas_at_long_positions(transformer, tmp_path):
    ids = references.token_ids(1, T, vocabulary=V)
    theirs = transformer(torch.tensor(ids, dtype=torch.long), 0).numpy()
    ours = our_logits(write(tmp_path, transformer, LLAMA_3_1), ids)
    references.assert_close(ours, theirs, TOLERANCE)


def test_metas_scaled_rope_is_felt(transformer, tmp_path):
    # The test above would say little if the scaling changed nothing at its positions.
    ids = references.token_ids(1, T, vocabulary=V)
    theirs = transformer(torch.tensor(ids, dtype=torch.long), 0).numpy()
    unscaled = our_logits(write(tmp_path, transformer, None), ids)
    assert references.relative_difference(unscaled, theirs) > 100 * TOLERANCE


def test_every_tensor_of_metas_model_was_used(transformer):
    shapes = {name: tuple(t.shape) for name, t in renamed(transformer.state_dict()).items()}
    assert len(shapes) == len(transformer.state_dict())
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (F, D)
    assert np.prod(shapes["model.layers.1.self_attn.k_proj.weight"]) == K * D // N * D
