"""What may be published: a whole preset, and of its directory the files that belong to it."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from puna.checkpoint.publication import publication_of
from puna.errors import ConfigError, PresetError, PunaError, TokenizerError
from puna.models import CausalLM
from puna.testing import tiny_model, write_tiny_preset

pytestmark = pytest.mark.backend_free

SHARD = 30_000
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = TOKENIZER | {"README.md", "config.json", "generation_config.json", "puna.json"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model in one file, in shards, quantized, and an adapter."""
    root = tmp_path_factory.mktemp("originals")
    model = tiny_model(hidden_size=64, intermediate_size=96)
    model.save_to_preset(root / "single")
    model.save_to_preset(root / "sharded", max_shard_size=SHARD)
    model.quantize("int4")
    model.save_to_preset(root / "quantized")
    base = CausalLM.from_preset(root / "single")
    base.preset = ("org/base", None)
    base.enable_lora(rank=2, dora=True)
    base.save_to_preset(root / "adapter", adapter="only")
    return root


@pytest.fixture
def copy(originals, tmp_path):
    return lambda name: shutil.copytree(originals / name, tmp_path / name)


def refusal(directory, kind=PresetError):
    with pytest.raises(kind) as error:
        publication_of(directory)
    assert isinstance(error.value, PunaError)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


# What is whole


@pytest.mark.parametrize("name", ["single", "quantized"])
def test_a_whole_model_is_published_with_all_its_files(originals, name):
    found = publication_of(originals / name)
    assert set(found.files) == MODEL | {"model.safetensors"}
    assert not found.is_adapter
    assert found.left_out == ()
    assert found.nbytes == sum(path.stat().st_size for path in (originals / name).iterdir())


def test_shards_go_out_with_their_index(originals):
    found = publication_of(str(originals / "sharded"))
    shards = {path.name for path in (originals / "sharded").glob("model-*.safetensors")}
    assert len(shards) > 3
    assert set(found.files) == MODEL | shards | {"model.safetensors.index.json"}


def test_an_adapter_goes_out_with_its_tokenizer(originals):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = publication_of(originals / "adapter")
    assert found.is_adapter
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(found.files) == TOKENIZER | weights | {"README.md"}


@pytest.mark.parametrize("name", [None, "./base", "here"])
def test_an_adapter_whose_base_others_cannot_find_is_told(copy, name, monkeypatch):
    directory = copy("adapter")
    (directory.parent / "here").mkdir()
    monkeypatch.chdir(directory.parent)
    change_json(directory / "adapter_config.json", base_model_name_or_path=name)
    with pytest.warns(UserWarning, match=r"save_adapter\(base='org/name'\)"):
        publication_of(directory)


def test_only_what_belongs_to_a_preset_goes_out(copy):
    directory = copy("single")
    (directory / "additional_chat_templates").mkdir()
    left_out = [".git/config", "additional_chat_templates/.hidden.jinja", ".cache",
                "model.safetensors.123.tmp", ".model.safetensors.9.tmp", "optimizer.pt",
                "checkpoints/1/model.keras", "run.yaml", "metrics.jsonl", "train.jsonl",
                "pytorch_model.bin",
                "model-00001-of-00002.safetensors", "model.safetensors.index.json", ".secret.png",
                "adapter_model.bin", "token", "model.gguf"]  # fmt: skip
    sent = ["loss.png", "LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja",
            "special_tokens_map.json"]  # fmt: skip
    for name in (*left_out, *sent):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    found = publication_of(directory)
    assert set(found.files) == MODEL | {"model.safetensors", *sent}
    tops = {name.partition("/")[0] + "/" * ("/" in name) for name in left_out}
    tops = {name for name in tops if not name.startswith((".", "additional"))}
    assert set(found.left_out) == tops


# What is not


MISSING = {
    "config.json": ("single", "has no config.json; expected the files of a checkpoint"),
    "tokenizer.json": ("single", "has no tokenizer.json, without which nobody can use the model"),
    "model.safetensors": ("single", "has no model.safetensors and no model.safetensors.index.json"),
    "model-00002-of-": ("sharded", "shards are missing: model-00002-of-"),
    "model.safetensors.index.json": ("sharded", "has no model.safetensors and no"),
    "adapter_config.json": ("adapter", "has no config.json"),
    "adapter_model.safetensors": ("adapter", "has no adapter_model.safetensors; save the adapter"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named(copy, name):
    original, message = MISSING[name]
    directory = copy(original)
    (file,) = directory.glob(f"{name}*")
    file.unlink()
    assert message in refusal(directory)


@pytest.mark.parametrize("name", ["single", "sharded", "quantized", "adapter"])
@pytest.mark.parametrize("damage", ["cut", "longer", "header"])
def test_damaged_weights_are_refused(copy, name, damage):
    file = sorted(copy(name).glob("*.safetensors"))[-1]
    raw = file.read_bytes()
    broken = {"cut": raw[:-4], "longer": raw + b"\0" * 4, "header": b"\xff" * 8 + raw[8:]}
    file.write_bytes(broken[damage])
    assert file.name in refusal(file.parent)


@pytest.mark.parametrize("name", ["single", "quantized"])
def test_a_missing_tensor_is_named(copy, name):
    directory = copy(name)
    tensors = load_file(directory / "model.safetensors")
    lost = next(tensor for tensor in tensors if "layers.1.mlp.up_proj" in tensor)
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors")
    assert f"the checkpoint lacks {lost}" in refusal(directory)


def test_an_index_that_leaves_out_a_tensor_is_refused(copy):
    directory = copy("sharded")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = list(index["weight_map"].values())
    shared = [n for n, file in index["weight_map"].items() if files.count(file) > 1]
    del index["weight_map"][shared[0]]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"leaves out {shared[0]}, which the shards hold" in refusal(directory)


def test_a_configuration_of_another_model_is_refused(copy):
    directory = copy("single")
    change_json(directory / "config.json", intermediate_size=64)
    assert "and config.json asks for (64, 64)" in refusal(directory)
    change_json(directory / "config.json", intermediate_size=96, num_hidden_layers=3)
    assert "the checkpoint lacks model.layers.2" in refusal(directory)
    change_json(directory / "config.json", num_hidden_layers=2, hidden_act="nonsense")
    assert "hidden_act" in refusal(directory, ConfigError)


def test_a_broken_or_foreign_tokenizer_is_refused(copy):
    directory = copy("single")
    (directory / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refusal(directory, TokenizerError)
    tokenizer = tiny_model().tokenizer
    tokenizer.add_tokens([f"<{i}>" for i in range(3)])
    tokenizer.save(directory)
    assert "the tokenizer has 310 tokens and the model 307" in refusal(directory)


def test_half_an_adapter_is_refused(copy):
    directory = copy("adapter")
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        save_file({n: t for n, t in tensors.items() if n != f"{name}.{part}"}, file)
        assert "layers.0.self_attn.q_proj lacks its" in refusal(directory)
    save_file(tensors | {f"{name}.lora_A.weight": np.zeros((3, 64), np.float32)}, file)
    assert "is of rank 3, and adapter_config.json says 2" in refusal(directory)
    save_file({}, file)
    assert "holds no tensors" in refusal(directory)


def test_a_model_and_an_adapter_in_one_place_are_refused(copy, originals):
    directory = copy("single")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(originals / "adapter" / name, directory)
    assert "holds a whole model and an adapter" in refusal(directory)


def test_other_formats_and_no_directories_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert "is of another format (meta); expected a Hugging Face directory" in refusal(
        tmp_path / "meta"
    )
    for path in (tmp_path / "nothing", tmp_path / "meta" / "params.json"):
        assert "is no directory; expected one that save_to_preset wrote" in refusal(path)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_refused(copy):
    directory = copy("single")
    (directory / "chat_template.jinja").chmod(0)
    assert "cannot be read" in refusal(directory)


def test_checking_is_done_without_keras_and_reads_headers_alone(tmp_path):
    from tests.integration.test_cli_info import CONFIG, write_sparse_safetensors
    from tests.processes import result_of

    directory = write_tiny_preset(tmp_path / "large")
    write_sparse_safetensors(directory / "model.safetensors", CONFIG)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    code = """
import json, sys, time
from puna.checkpoint.publication import publication_of
began = time.process_time()
found = publication_of(sys.argv[1])
print(json.dumps([found.nbytes, time.process_time() - began, "keras" in sys.modules]))
"""
    nbytes, seconds, has_keras = result_of(code, str(directory))
    assert nbytes > 2 * 1_235_814_400
    assert seconds < 2
    assert not has_keras
