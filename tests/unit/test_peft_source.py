"""PEFT's adapters are merged into a checkpoint while it is read, or refused by name."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from puna.checkpoint.peft import MergedSource, PeftAdapter
from puna.checkpoint.peft_config import AdapterConfig
from puna.checkpoint.safetensors import SafetensorsSource
from puna.errors import PresetError
from tests.parity.test_peft import ADAPTERS, DATA

pytestmark = pytest.mark.backend_free

Q = "model.layers.0.self_attn.q_proj"


def merged(name, directory=None):
    base = SafetensorsSource(DATA / ADAPTERS[name])
    return MergedSource(base, PeftAdapter(directory or DATA / name))


@pytest.fixture
def lora(tmp_path):
    """A copy of the plain adapter, to be broken."""
    return shutil.copytree(DATA / "lora", tmp_path / "lora")


def change(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


def retensor(adapter, function):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)
    return adapter


def test_what_is_not_adapted_is_the_bases_own_view():
    source = merged("lora")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert np.shares_memory(source.read(name), source.base.read(name))
    assert list(source.names()) == list(source.base.names())
    source.release(name)
    source.release(f"{Q}.weight")


def test_the_merged_weight_is_in_the_bases_dtype_and_rounded_once(tmp_path):
    base = load_file(DATA / "base" / "model.safetensors")
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in base.items()}
    tensors = {n: torch.from_numpy(a.astype("float32")).bfloat16() for n, a in rounded.items()}
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, tmp_path / "model.safetensors")
    source = MergedSource(SafetensorsSource(tmp_path), PeftAdapter(DATA / "lora"))
    lora = load_file(DATA / "lora" / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{Q}.lora_{x}.weight"] for x in "AB")
    exact = rounded[f"{Q}.weight"].astype("float64") + 2.0 * b.astype("float64") @ a
    got = source.read(f"{Q}.weight")
    assert got.dtype == source.info(f"{Q}.weight").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))


def test_long_tensors_are_merged_piece_by_piece(monkeypatch):
    for name in ("lora", "dora", "dora_embedding", "embedding"):
        whole = merged(name)
        monkeypatch.setattr("puna.checkpoint.peft._CHUNK", 100)
        pieces = merged(name)
        for tensor in whole.names():
            np.testing.assert_allclose(pieces.read(tensor), whole.read(tensor), rtol=1e-5)
        monkeypatch.undo()


def test_the_older_format_is_read_without_torch(lora):
    tensors = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    torch.save({n: torch.from_numpy(a) for n, a in tensors.items()}, lora / "adapter_model.bin")
    name = f"{Q}.weight"
    np.testing.assert_array_equal(merged("lora", lora).read(name), merged("lora").read(name))


def test_a_bare_backbone_is_a_base_too(tmp_path):
    base = load_file(DATA / "base" / "model.safetensors")
    bare = {n.removeprefix("model."): a for n, a in base.items() if not n.startswith("lm_head")}
    save_file(bare, tmp_path / "model.safetensors")
    source = MergedSource(SafetensorsSource(tmp_path), PeftAdapter(DATA / "lora"))
    name = f"{Q}.weight"
    np.testing.assert_array_equal(
        source.read(name.removeprefix("model.")), merged("lora").read(name)
    )


def test_a_vocabulary_that_grew_changes_the_configuration(tmp_path):
    adapter = shutil.copytree(DATA / "saved", tmp_path / "saved")

    def grow(tensors):
        for name in tensors:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensors[name] = np.concatenate([tensors[name], tensors[name][:3]])

    source = merged("saved", retensor(adapter, grow))
    assert source.config == {"vocab_size": 64}
    assert source.read("lm_head.weight").shape == source.info("lm_head.weight").shape == (64, 32)


def test_a_tied_head_saved_with_an_equal_embedding_stays_tied(tmp_path):
    adapter = shutil.copytree(DATA / "tied_saved", tmp_path / "tied_saved")

    def add_head(tensors):
        prefix = "base_model.model."
        tensors[f"{prefix}lm_head.weight"] = tensors[f"{prefix}model.embed_tokens.weight"]

    source = merged("tied_saved", retensor(adapter, add_head))
    assert "tie_word_embeddings" not in source.config
    assert "lm_head.weight" not in source.names()


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"target_parameters": ["experts"]},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {}},
        {"kasa_config": {"beta": 1}},
        {"monteclora_config": {}},
        {"megatron_config": {}},
        {"r": 0},
        {"r": "4"},
        {"r": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": None},
        {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": [1]},
        {"target_modules": 3},
        {"target_modules": "("},
        {"target_modules": "(a+)+b"},
        {"target_modules": ".*" * 7},
        {"rank_pattern": {"((a*)*)*": 1}},
        {"modules_to_save": [1]},
        {"layers_to_transform": [-1]},
        {"trainable_token_indices": ["a"]},
        {"bias": "some"},
        {"use_dora": "yes"},
        {"base_model_name_or_path": 7},
    ],
    ids=str,
)
def test_a_field_that_is_not_computed_is_refused_by_name(lora, changes):
    with pytest.raises(PresetError, match=next(iter(changes))):
        PeftAdapter(change(lora, **changes))


def test_an_unknown_field_is_warned_of(lora):
    with pytest.warns(UserWarning, match="mystery"):
        PeftAdapter(change(lora, mystery=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},  # v has tensors
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},  # o has none
        {"target_modules": r".*\.q_proj"},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*v_proj"},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
        {"modules_to_save": ["v_proj"]},
        {"use_dora": True},
        {"r": 5},
        {"rank_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_a_configuration_that_the_tensors_contradict_is_refused(lora, changes):
    with pytest.raises(PresetError, match="adapter and base"):
        merged("lora", change(lora, **changes))


def test_layers_to_transform_takes_the_layers_name(lora):
    merged("lora", change(lora, layers_to_transform=[0, 1], layers_pattern=["layers"]))


A, B = (f"base_model.model.{Q}.lora_{x}.weight" for x in "AB")


def renamed(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.pop(A),
        lambda t: (t.pop(A), t.pop(B)),
        lambda t: t.__setitem__(A, t[A][:, 1:].copy()),
        lambda t: t.__setitem__(B, t[B][1:].copy()),
        lambda t: t.__setitem__(f"base_model.model.{Q}.lora_C.weight", t[A]),
        lambda t: t.__setitem__(f"base_model.model.{Q}.weight", t[A]),
        lambda t: t.__setitem__(f"base_model.model.{Q}.lora_B.bias", np.zeros(32, "f4")),
        lambda t: t.__setitem__(f"base_model.model.{Q}.lora_magnitude_vector", np.zeros(32, "f4")),
        lambda t: t.__setitem__(
            "base_model.model.model.embed_tokens.weight", np.zeros((9, 9), "f4")
        ),
        renamed(A, f"other.{Q}.lora_A.weight"),
        renamed(A, A.replace("layers.0", "layers.7")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(lora, function):
    with pytest.raises(PresetError):
        merged("lora", retensor(lora, function))


def test_a_whole_layer_beyond_the_base_is_refused(lora):
    def move(tensors):
        for name in [name for name in tensors if "layers.1" in name]:
            tensors[name.replace("layers.1", "layers.2")] = tensors[name]

    with pytest.raises(PresetError, match=r"layers\.2"):
        merged("lora", retensor(lora, move))


def test_a_bias_where_the_base_has_none_is_refused():
    base = SafetensorsSource(DATA / "base")
    with pytest.raises(PresetError, match="no bias"):
        MergedSource(base, PeftAdapter(DATA / "lora_bias"))


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    adapter = shutil.copytree(DATA / "tokens", tmp_path / "tokens")
    with pytest.raises(PresetError, match="beyond the 61 tokens"):
        merged("tokens", change(adapter, trainable_token_indices=[3, 60, 61]))


def test_missing_files_are_named(lora):
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(PresetError, match=r"adapter_model\.safetensors"):
        PeftAdapter(lora)
    (lora / "adapter_config.json").unlink()
    with pytest.raises(PresetError, match=r"adapter_config\.json"):
        PeftAdapter(lora)


def test_real_target_patterns_are_taken(lora):
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:k_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    merged("lora", change(lora, target_modules=pattern))
    config = AdapterConfig.read(lora / "adapter_config.json")
    assert config.targets(Q)
    assert not config.targets("lm_head")
