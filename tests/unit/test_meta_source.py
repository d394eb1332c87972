"""Meta's layout gives the tensors and the configuration of the model that was cut into it."""

import json
import shutil

import numpy as np
import pytest
import torch

from puna.checkpoint.meta import MetaSource
from puna.config import LlamaConfig
from puna.errors import PresetError
from tests import meta_layout

pytestmark = pytest.mark.backend_free

D, L, N, K, V, F = 32, 2, 8, 4, 48, 96
PARAMS = {
    "dim": D, "n_layers": L, "n_heads": N, "n_kv_heads": K, "vocab_size": V, "multiple_of": 32,
    "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip


def model(dtype=torch.float32, head=True):
    """Random tensors in Hugging Face's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for layer in range(L):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (D,),
                "post_attention_layernorm": (D,),
                "self_attn.q_proj": (D, D),
                "self_attn.k_proj": (D // 2, D),
                "self_attn.v_proj": (D // 2, D),
                "self_attn.o_proj": (D, D),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }.items()
        }
    shapes |= {"lm_head": (V, D)} if head else {}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def raw(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture
def written(tmp_path):
    return meta_layout.write(tmp_path / "meta", model(), PARAMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("files", [1, 2, 4])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, files, axis, dtype):
    tensors = model(dtype)
    source = MetaSource(
        meta_layout.write(tmp_path, tensors, PARAMS, files=files, embedding_axis=axis)
    )
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        array, info = source.read(name), source.info(name)
        assert array.shape == info.shape == tuple(tensor.shape)
        assert array.dtype == info.dtype
        assert array.flags.c_contiguous
        assert raw(array) == raw(tensor.view(torch.uint8).numpy())
        source.release(name)


def test_what_needs_no_change_is_a_view_of_the_file(written):
    source = MetaSource(written)
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.shares_memory(source.read(name), source.read(name))


def test_the_configuration_is_that_of_the_parameters(written):
    config = LlamaConfig.from_hf(MetaSource(written).hf_config())
    assert config == LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=config.rope,
        dtype="float32",
    )
    assert config.rope.rope_theta == 500000.0


# (dim, multiple_of, ffn_dim_multiplier) and the width that the released models have.
WIDTHS = {
    "Llama 1 7B": (4096, 256, None, 11008),
    "Llama 2 70B": (8192, 4096, 1.3, 28672),
    "Llama 3 8B": (4096, 1024, 1.3, 14336),
    "Llama 3.2 1B": (2048, 256, 1.5, 8192),
    "Llama 3.2 3B": (3072, 256, 1.0, 8192),
    "Llama 3.1 405B": (16384, 4096, 1.2, 53248),
}


def rewritten(directory, **changes):
    path = directory / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return MetaSource(directory)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_feed_forward_width_is_that_of_the_released_models(written, name):
    dim, multiple_of, multiplier, width = WIDTHS[name]
    params = {"dim": dim, "multiple_of": multiple_of, "n_heads": 32, "n_kv_heads": 8}
    path = written / "params.json"
    path.write_text(json.dumps(params | {"ffn_dim_multiplier": multiplier}))
    from puna.checkpoint.meta_config import Params

    assert Params.read(path).intermediate_size == width


def test_scaled_rope_is_what_metas_code_computes(written):
    config = rewritten(written, use_scaled_rope=True).hf_config()
    assert config["rope_scaling"]["factor"] == 8
    assert config["max_position_embeddings"] == 131072
    config = rewritten(written, use_scaled_rope=True, rope_scaling_factor=32).hf_config()
    assert config["rope_scaling"]["factor"] == 32


def test_the_unsaid_factor_of_llama_3_2_is_warned_of(tmp_path):
    from puna.checkpoint.meta_config import Params

    params = {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "use_scaled_rope": True,
        "rope_theta": 5e5,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    read = Params.read(tmp_path / "params.json")
    with pytest.warns(UserWarning, match='"rope_scaling_factor": 32'):
        read.hf_config(vocab_size=8, dtype="bfloat16", is_tied=False)


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"rope_theta": None}, 4096),
        ({"rope_theta": None, "norm_eps": 1e-6}, 2048),
        ({"rope_theta": 1e6}, 16384),
        ({}, 8192),
    ],
)
def test_the_context_is_that_of_the_generation(written, changes, context):
    config = rewritten(written, **changes).hf_config()
    assert config["max_position_embeddings"] == context
    assert config["rope_theta"] == (changes.get("rope_theta", 500000.0) or 10000.0)


def test_a_vocabulary_of_minus_one_is_the_embeddings(written):
    assert rewritten(written, vocab_size=-1).hf_config()["vocab_size"] == V
    with pytest.raises(PresetError, match="vocab_size 7"):
        rewritten(written, vocab_size=7).hf_config()


def test_the_ids_are_those_of_the_tokenizer(written):
    assert MetaSource(written).hf_config()["eos_token_id"] == 2
    meta_layout.write_tokenizer(written)
    config = MetaSource(written).hf_config()
    assert (config["bos_token_id"], config["eos_token_id"]) == (259, 260)


def test_a_missing_or_shared_head_is_tied(tmp_path):
    source = MetaSource(meta_layout.write(tmp_path / "none", model(head=False), PARAMS))
    assert source.hf_config()["tie_word_embeddings"] is True
    shared = torch.load(tmp_path / "none" / "consolidated.00.pth")
    shared["output.weight"] = shared["tok_embeddings.weight"]
    torch.save(shared, tmp_path / "none" / "consolidated.00.pth")
    source = MetaSource(tmp_path / "none")
    assert source.hf_config()["tie_word_embeddings"] is True
    assert "lm_head.weight" not in source.names()


def test_the_buffer_of_the_first_llamas_is_left_out(written):
    state = torch.load(written / "consolidated.00.pth")
    torch.save(state | {"rope.freqs": torch.ones(2)}, written / "consolidated.00.pth")
    assert set(MetaSource(written).names()) == set(model())


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}},
        {"lora_args": {"rank": 16, "scale": 2.0}},
        {"vision_model": {"image_size": 448}},
        {"moe_args": {"num_experts": 16}},
        {"dim": "32"},
        {"dim": -32},
        {"n_heads": 0},
        {"n_heads": 5},
        {"n_kv_heads": 3},
        {"multiple_of": 0},
        {"ffn_dim_multiplier": -1.0},
        {"use_scaled_rope": "yes"},
    ],
    ids=str,
)
def test_parameters_that_are_not_computed_are_refused_by_name(written, changes):
    with pytest.raises(PresetError, match=next(iter(changes))):
        rewritten(written, **changes)


def test_unknown_parameters_are_warned_of(written):
    with pytest.warns(UserWarning, match="mystery"):
        rewritten(written, mystery=1)


def test_files_that_are_missing_or_of_different_models_are_refused(tmp_path):
    directory = meta_layout.write(tmp_path / "two", model(), PARAMS, files=2)
    (directory / "consolidated.00.pth").rename(tmp_path / "away")
    with pytest.raises(PresetError, match=r"expected consolidated\.00\.pth"):
        MetaSource(directory)
    state = torch.load(tmp_path / "away")
    del state["norm.weight"]
    torch.save(state, directory / "consolidated.00.pth")
    with pytest.raises(PresetError, match="different models"):
        MetaSource(directory)
    other = meta_layout.write(tmp_path / "one", model(), PARAMS)
    shutil.copy(other / "consolidated.00.pth", directory / "consolidated.00.pth")
    with pytest.raises(PresetError, match="fetch them together again"):
        MetaSource(directory)


def test_heads_that_are_cut_are_refused(tmp_path):
    params = PARAMS | {"n_kv_heads": 2}
    tensors = {
        name: tensor[: D // 4] if ".k_proj" in name or ".v_proj" in name else tensor
        for name, tensor in model().items()
    }
    with pytest.raises(PresetError, match="whole heads in each file"):
        MetaSource(meta_layout.write(tmp_path, tensors, params, files=4))


def test_unknown_tensors_are_refused_by_name(written):
    state = torch.load(written / "consolidated.00.pth")
    torch.save(state | {"vision.weight": torch.ones(2)}, written / "consolidated.00.pth")
    with pytest.raises(PresetError, match=r"vision\.weight"):
        MetaSource(written)
