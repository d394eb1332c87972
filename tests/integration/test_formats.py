"""Every kind of preset through `from_preset`: the same logits, the tokenizer, the settings."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.checkpoint.hub import locate, parse_file_address
from puna.checkpoint.hub_files import needed
from puna.checkpoint.preset import Preset
from puna.errors import PresetError
from puna.models import Llama3Backbone, Llama3CausalLM, Llama3CausalLMPreprocessor, Llama3Tokenizer
from puna.models.presets import open_preset
from puna.testing import tiny_model, write_tiny_preset
from tests import meta_layout, references
from tests.hub_server import HubServer
from tests.processes import result_of

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free

DATA = Path(__file__).parents[1] / "parity" / "data"
KERAS_HUB, PEFT = DATA / "keras_hub", DATA / "peft"
EXACT = 1e-5  # of the largest logit, in float32


def logits(model, ids):
    return keras.ops.convert_to_numpy(model(ids))


def float32(path, **options):
    return Llama3CausalLM.from_preset(path, dtype="float32", **options)


# Meta's layout

V, D, F = 516, 32, 96  # 516: the ranks and Llama 3's 256 special tokens fit
PARAMS = {
    "dim": D, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": V, "multiple_of": 48,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip
META_ROPE = references.rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def reference(dtype):
    return references.make(
        dtype=dtype,
        vocab_size=V,
        intermediate_size=F,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters=META_ROPE,
    )


def write_meta(directory, dtype=torch.float32, **options):
    tensors = {name: tensor.to(dtype) for name, tensor in reference(dtype).state_dict().items()}
    meta_layout.write(directory, tensors, PARAMS, **options)
    meta_layout.write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("files", [1, 2, 4])
def test_logits_of_metas_layout_equal_the_originals(tmp_path, files, dtype):
    model = float32(write_meta(tmp_path, dtype, files=files))
    ids = references.token_ids(2, 24, vocabulary=V)
    references.assert_close(logits(model, ids), references.logits(reference(dtype), ids), EXACT)


def test_metas_layout_has_its_tokenizer_and_its_dtype(tmp_path):
    model = Llama3CausalLM.from_preset(write_meta(tmp_path, torch.bfloat16))
    assert model.dtype_policy.name == "bfloat16"
    assert model.tokenizer.start_token_id == 259
    assert set(model.tokenizer.stop_token_ids) == {260, 267, 268}
    assert model.config.bos_token_id == 259
    ids = Llama3Tokenizer.from_preset(tmp_path)("hell")
    assert ids.tolist() == [258]
    assert model.generate("hell", max_new_tokens=2, sampler="greedy").startswith("hell")


@pytest.mark.parametrize("with_config", [True, False])
def test_a_mirror_with_metas_files_alone_is_read(tmp_path, with_config):
    write_meta(tmp_path / "original")
    if with_config:
        references.save(reference(torch.float32), tmp_path)
        (tmp_path / "model.safetensors").unlink()
    model = float32(tmp_path)
    ids = references.token_ids(1, 8, vocabulary=V)
    theirs = references.logits(reference(torch.float32), ids)
    references.assert_close(logits(model, ids), theirs, EXACT)
    assert model.tokenizer.start_token_id == 259


def test_metas_layout_makes_a_model_without_its_weights(tmp_path):
    write_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    model = Llama3CausalLM.from_preset(tmp_path, load_weights=False, dtype="float32")
    assert model.config.intermediate_size == F


# keras-hub's


@pytest.mark.filterwarnings("ignore:.*rope_position_scaling_factor")
@pytest.mark.parametrize("name", ["single", "sharded"])
def test_logits_and_hidden_states_equal_keras_hubs(name):
    golden = np.load(KERAS_HUB / "golden.npz")
    model = float32(KERAS_HUB / name)
    references.assert_close(logits(model, golden["ids"]), golden[f"{name}_logits"], EXACT)
    backbone = Llama3Backbone.from_preset(KERAS_HUB / name, dtype="float32")
    references.assert_close(logits(backbone, golden["ids"]), golden[f"{name}_hidden"], EXACT)


@pytest.mark.filterwarnings("ignore:.*rope_position_scaling_factor")
def test_a_keras_hub_preset_has_its_tokenizer_settings_and_dtype():
    model = Llama3CausalLM.from_preset(KERAS_HUB / "sharded")
    assert model.dtype_policy.name == "bfloat16"
    assert model.preprocessor.sequence_length == 48
    assert model.preprocessor.add_end_token is False
    assert model.tokenizer.start_token_id == model.config.bos_token_id == 436
    assert model.generate("the", max_new_tokens=2, sampler="greedy").startswith("the")


def test_a_keras_hub_preset_is_saved_in_the_fields_layout(tmp_path):
    model = float32(KERAS_HUB / "single")
    model.save_to_preset(tmp_path)
    again = float32(tmp_path)
    ids = np.load(KERAS_HUB / "golden.npz")["ids"]
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))
    assert again.preprocessor.sequence_length == 48
    assert again.tokenizer("the world").tolist() == model.tokenizer("the world").tolist()


def test_a_keras_hub_preset_makes_a_model_without_its_weights(tmp_path):
    shutil.copytree(KERAS_HUB / "single", tmp_path / "preset")
    (tmp_path / "preset" / "model.weights.h5").unlink()
    model = Llama3CausalLM.from_preset(tmp_path / "preset", load_weights=False, dtype="float32")
    assert model.config.rms_norm_eps == 1e-5


# Single files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("tiny") / "preset")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("tiny") / "shards", max_shard_size=20_000)


def same_as_tiny(model):
    pairs = zip(model.variables, tiny_model().variables, strict=True)
    convert = keras.ops.convert_to_numpy
    return all(np.array_equal(convert(ours), convert(theirs)) for ours, theirs in pairs)


def test_a_safetensors_file_is_a_preset_with_what_is_beside_it(tiny, tmp_path):
    assert same_as_tiny(Llama3CausalLM.from_preset(tiny / "model.safetensors"))
    shutil.copytree(tiny, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "other" / "step-100.safetensors")
    model = Llama3CausalLM.from_preset(tmp_path / "other" / "step-100.safetensors")
    assert same_as_tiny(model)
    assert model.tokenizer.start_token == "<|begin_of_text|>"


def test_one_shard_stands_for_all(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert same_as_tiny(Llama3CausalLM.from_preset(shards[-1]))


def test_a_file_without_a_config_says_so(tiny, tmp_path):
    shutil.copy(tiny / "model.safetensors", tmp_path)
    with pytest.raises(PresetError, match=r"has no config\.json"):
        Llama3CausalLM.from_preset(tmp_path / "model.safetensors")


def test_other_files_are_refused_with_advice(tmp_path):
    for name, advice in (
        ("adapter_model.safetensors", "give its directory"),
        ("model.bin", "expected a directory"),
        ("model.h5", "expected a directory"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(PresetError, match=advice):
            Preset(tmp_path / name)


def test_each_kind_says_what_it_is(tmp_path, tiny, smollm2_gguf):
    write_meta(tmp_path / "meta")
    kinds = {
        tiny: "safetensors",
        tmp_path / "meta": "meta",
        KERAS_HUB / "single": "keras_hub",
        Path(smollm2_gguf): "gguf",
    }
    assert {path: Preset(path).format for path in kinds} == kinds


# Adapters


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(PEFT / "lora", tmp_path / "lora")


def point(adapter, base):
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(content))
    return adapter


def test_an_adapters_base_is_found_or_named(adapter, tmp_path):
    point(adapter, str(PEFT / "base"))
    opened = open_preset(adapter)
    assert (opened.path, opened.adapters) == (PEFT / "base", (adapter,))
    with pytest.raises(PresetError, match=r"'/no/such/base'.*adapter="):
        open_preset(point(adapter, "/no/such/base"))
    with pytest.raises(PresetError, match="does not say"):
        open_preset(point(adapter, None))
    with pytest.raises(PresetError, match="without an end"):
        open_preset(point(adapter, str(adapter)))
    with pytest.raises(PresetError, match="is no adapter"):
        open_preset(PEFT / "base", PEFT / "base")


def test_adapters_upon_adapters_are_merged_in_turn(adapter, tmp_path):
    point(adapter, str(PEFT / "base"))
    upper = point(shutil.copytree(PEFT / "rslora", tmp_path / "upper"), str(adapter))
    model = float32(upper, preprocessor=None)
    both = Llama3CausalLM.from_preset(
        adapter, adapter=PEFT / "rslora", preprocessor=None, dtype="float32"
    )
    ids = references.token_ids(1, 8)
    np.testing.assert_array_equal(logits(model, ids), logits(both, ids))
    once = float32(adapter, preprocessor=None)
    assert references.relative_difference(logits(once, ids), logits(both, ids)) > 1e-2


def test_an_adapters_own_tokenizer_is_taken(tiny, adapter, tmp_path):
    base = shutil.copytree(PEFT / "base", tmp_path / "base")
    point(adapter, str(base))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, adapter)
    size = Llama3Tokenizer.from_preset(tiny).vocabulary_size()
    assert Llama3Tokenizer.from_preset(adapter).vocabulary_size() == size
    preprocessor = Llama3CausalLMPreprocessor.from_preset(adapter, sequence_length=8)
    assert preprocessor.tokenizer.vocabulary_size() == size


# The Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory, smollm2_gguf):
    root = tmp_path_factory.mktemp("hub")
    write_meta(root / "meta")
    (root / "meta" / "README.md").write_text("Meta's own")
    adapter = point(shutil.copytree(PEFT / "lora", root / "adapter"), "org/base")
    (adapter / "optimizer.pt").write_bytes(b"not needed")
    base = shutil.copytree(PEFT / "base", root / "base")
    weights = load_file(base / "model.safetensors")
    (base / "variants").mkdir()
    save_file(weights, base / "variants" / "best.safetensors")
    shutil.copy(base / "config.json", base / "variants")
    (root / "gguf").mkdir()
    for name in ("one.gguf", "two.gguf"):
        (root / "gguf" / name).symlink_to(smollm2_gguf)
    for name in ("pytorch_model.bin", "model.weights.h5"):
        (base / name).write_bytes(b"another copy of the same weights")
    with HubServer() as server:
        for name in ("meta", "adapter", "base", "gguf"):
            server.add(f"org/{name}", root / name)
        server.add("org/keras", KERAS_HUB / "sharded")
        yield server


def loaded(hub, home, address, call="{}"):
    """The class of the preset's reader, the vocabulary and what was downloaded."""
    hub.forget()
    code = f"""
import json
import puna
model = puna.models.Llama3CausalLM.from_preset({address!r}, preprocessor=None, **{call})
print(json.dumps(model.config.vocab_size))
"""
    return result_of(code, env=hub.environment(home)), set(hub.downloads)


def test_a_keras_hub_repository_is_fetched_and_nothing_else(hub, tmp_path):
    vocabulary, files = loaded(hub, tmp_path, "hf://org/keras")
    assert vocabulary == 443
    assert files == {
        "config.json", "tokenizer.json", "preprocessor.json", "task.json",
        "assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt",
        "model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5",
    }  # fmt: skip


def test_metas_own_repository_is_fetched(hub, tmp_path):
    vocabulary, files = loaded(hub, tmp_path, "hf://org/meta")
    assert vocabulary == V
    assert files == {"params.json", "consolidated.00.pth", "tokenizer.model", "README.md"}


def test_an_adapter_fetches_its_base_and_of_each_only_what_is_needed(hub, tmp_path):
    vocabulary, files = loaded(hub, tmp_path, "hf://org/adapter")
    assert vocabulary == 61
    assert files == {
        "adapter_config.json", "adapter_model.safetensors",
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert loaded(hub, tmp_path, "hf://org/base", "{'adapter': 'hf://org/adapter'}") == (61, set())


def test_a_file_of_a_repository_is_fetched_with_what_is_beside_it(hub, tmp_path):
    vocabulary, files = loaded(hub, tmp_path, "hf://org/base/variants/best.safetensors@main")
    assert vocabulary == 61
    assert files == {"variants/best.safetensors", "variants/config.json"}


def test_one_gguf_file_of_several_is_fetched_when_it_is_named(hub, tmp_path):
    code = """
import json, sys
from puna.checkpoint.hub import locate
from puna.errors import PresetError
try:
    locate("hf://org/gguf")
except PresetError as error:
    several = str(error)
try:
    locate("hf://org/gguf/three.gguf")
except PresetError as error:
    missing = str(error)
path = locate("hf://org/gguf/two.gguf")
print(json.dumps([several, missing, path.name, path.stat().st_size]))
"""
    hub.forget()
    several, missing, name, size = result_of(code, env=hub.environment(tmp_path))
    assert "name one as hf://org/gguf/FILE: one.gguf, two.gguf" in several
    assert "no file 'three.gguf'; its files of that kind: one.gguf, two.gguf" in missing
    assert name == "two.gguf"
    assert size > 90_000_000
    assert set(hub.downloads) == {"two.gguf"}


def test_a_named_file_is_found_again_offline(hub, tmp_path):
    address = "hf://org/base/variants/best.safetensors"
    code = f"""
import json
from puna.checkpoint.hub import locate
from puna.errors import PresetError
try:
    print(json.dumps(str(locate({address!r}))))
except PresetError as error:
    print(json.dumps(str(error)))
"""
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    assert "go online once" in result_of(code, env=offline)
    there = result_of(code, env=hub.environment(tmp_path))
    assert there.endswith("variants/best.safetensors")
    assert result_of(code, env=offline) == there


REPOSITORY = [
    "README.md", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "model.weights.h5",
    "original/consolidated.00.pth", "original/params.json", "onnx/model.safetensors",
    "sub/a-00001-of-00002.gguf", "sub/a-00002-of-00002.gguf", "sub/b.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": True}, REPOSITORY[1:6]),
        ({"weights": False}, ["config.json", "tokenizer.json"]),
        ({"weights": True, "file": "sub/a-00001-of-00002.gguf"}, REPOSITORY[10:12]),
        ({"weights": True, "file": REPOSITORY[3]}, REPOSITORY[1:6]),
    ],
)
def test_of_a_repository_only_one_kind_of_weights_is_fetched(options, expected):
    assert sorted(needed(REPOSITORY, **options)) == sorted(expected)


def test_addresses_may_name_a_file_and_a_revision():
    assert parse_file_address("hf://a/b/c/d.gguf@refs/pr/1") == ("a/b", "refs/pr/1", "c/d.gguf")
    assert parse_file_address("hf://a/b@v1") == ("a/b", "v1", None)
    for address in ("hf://a/b/c", "hf://b.gguf", "hf://a"):
        with pytest.raises(PresetError, match="is not of the form"):
            parse_file_address(address)
    with pytest.raises(PresetError, match="there is no preset"):
        locate("nothing.safetensors")
