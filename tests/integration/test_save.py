"""`save_to_preset`: what transformers makes of it, what comes back, and what a failure leaves."""

import json
import os

import keras
import numpy as np
import pytest

from puna.checkpoint import save
from puna.errors import PresetError
from puna.models import CausalLM
from puna.testing import SAMPLING, tiny_model, write_tiny_preset

IDS = np.array([[300, 5, 261, 17, 3, 0, 44, 259]], np.int32)
CONVERSATION = [
    {"role": "system", "content": "the system"},
    {"role": "user", "content": "Hello <|eot_id|> there 🦙"},
]


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


def assert_same_weights(ours, theirs):
    ours, theirs = ours.tensors(), theirs.tensors()
    assert list(ours) == list(theirs)
    for name, variable in ours.items():
        assert variable.dtype == theirs[name].dtype
        np.testing.assert_array_equal(numpy(variable), numpy(theirs[name]), err_msg=name)


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# transformers and we agree on what was saved


@pytest.mark.slow
@pytest.mark.parametrize("shard", [5_000_000_000, 4_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_same_from_what_we_save(tmp_path, dtype, tied, shard):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied, attention_bias=True)
    model.save_to_preset(tmp_path / "saved", max_shard_size=shard)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard < 1e6)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert str(theirs.dtype) == f"torch.{dtype}"
    # Both in float32, so that only the saved values can make a difference.
    ours = CausalLM.from_preset(tmp_path / "saved", dtype="float32")
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(IDS)).logits.numpy()
    difference = np.abs(numpy(ours(IDS)) - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()


@pytest.mark.backend_free
def test_transformers_tokenizes_and_templates_the_same_from_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    model.save_to_preset(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello world", "  Hi!\n\n12345 ", "<|eot_id|>the", "漢字 🦙 é", ""):
        assert theirs(text, add_special_tokens=False)["input_ids"] == model.tokenizer(text).tolist()
        started = model.tokenizer(text, add_special_tokens=True).tolist()
        assert theirs(text)["input_ids"] == started
    ours = model.tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert ours == theirs.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, tokenize=False
    )
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")


# What comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
def test_what_was_saved_comes_back_to_the_bit(tmp_path, dtype):
    model = tiny_model(dtype=dtype, attention_bias=True, mlp_bias=True)
    model.save_to_preset(tmp_path / "saved")
    again = CausalLM.from_preset(tmp_path / "saved")
    assert again.config == model.config.__class__.from_hf(
        json.loads((tmp_path / "saved/config.json").read_text())
    )
    assert again.dtype_policy.name == dtype
    assert_same_weights(again, model)


def test_a_saved_preset_saves_to_the_same_files(tmp_path):
    tiny_model(dtype="bfloat16").save_to_preset(tmp_path / "one", max_shard_size=4_000)
    CausalLM.from_preset(tmp_path / "one").save_to_preset(tmp_path / "two", max_shard_size=4_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_preprocessors_settings_come_back(tmp_path):
    model = tiny_model(sequence_length=37)
    model.preprocessor.add_end_token = False
    model.preprocessor.add_start_token = False
    model.save_to_preset(tmp_path)
    again = CausalLM.from_preset(tmp_path).preprocessor
    assert again.sequence_length == 37
    assert not again.add_end_token
    assert not again.add_start_token


def test_the_generation_config_survives_with_all_stop_ids(tmp_path):
    write_tiny_preset(tmp_path / "theirs")
    model = CausalLM.from_preset(tmp_path / "theirs")
    model.save_to_preset(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/generation_config.json").read_text())
    assert saved == {**SAMPLING, "bos_token_id": 299, "eos_token_id": [300, 304, 305]}


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path):
    model = tiny_model()
    model.preprocessor = None
    model.save_to_preset(tmp_path / "bare")
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert set(contents(tmp_path / "bare")) == names
    again = CausalLM.from_preset(tmp_path / "bare", preprocessor=None)
    assert_same_weights(again, model)


# What is there already


def test_a_model_is_saved_over_the_files_that_it_is_mapped_from(tmp_path):
    directory = write_tiny_preset(tmp_path / "tiny")
    model = CausalLM.from_preset(directory)
    before = [numpy(v).copy() for v in model.variables]
    for _ in range(2):
        model.save_to_preset(directory)
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(numpy(variable), value)
    assert_same_weights(CausalLM.from_preset(directory), model)


def test_files_that_are_not_a_checkpoints_survive(tmp_path):
    directory = write_tiny_preset(tmp_path / "tiny", max_shard_size=4_000)
    (directory / "README.md").write_text("# mine")
    (directory / "runs").mkdir()
    (directory / "runs" / "log.txt").write_text("mine")
    (directory / "link").symlink_to("README.md")
    CausalLM.from_preset(directory).save_to_preset(directory)
    assert (directory / "README.md").read_text() == "# mine"
    assert (directory / "runs" / "log.txt").read_text() == "mine"
    assert (directory / "link").is_symlink()
    # The shards of the earlier save are gone: readers would take them for weights.
    assert [path.name for path in directory.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("place", ["write_sharded", "_write_json", "_swap"])
def test_a_save_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch, place):
    directory = write_tiny_preset(tmp_path / "tiny")
    earlier = contents(directory)
    model = tiny_model(seed=1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, place, fail)
    with pytest.raises(PresetError, match=r"No space left on device.*unchanged"):
        model.save_to_preset(directory)
    assert contents(directory) == earlier
    assert os.listdir(tmp_path) == ["tiny"]


def test_a_save_that_fails_in_the_middle_of_the_weights_leaves_nothing(tmp_path, monkeypatch):
    directory = write_tiny_preset(tmp_path / "tiny")
    earlier = contents(directory)
    to_numpy, calls = save.backend.ops.to_numpy, []

    def fail_later(variable):
        calls.append(variable)
        if len(calls) == 5:
            raise MemoryError("not in one of our errors")
        return to_numpy(variable)

    monkeypatch.setattr(save.backend.ops, "to_numpy", fail_later)
    with pytest.raises(MemoryError):
        tiny_model(seed=1).save_to_preset(directory)
    assert contents(directory) == earlier
    assert os.listdir(tmp_path) == ["tiny"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_a_read_only_place_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PresetError, match="cannot be written"):
        tiny_model().save_to_preset(tmp_path / "closed" / "preset")


@pytest.mark.parametrize("under", ["", "below"])
def test_a_file_in_the_way_is_refused_and_kept(tmp_path, under):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PresetError, match=r"is a file|cannot be written"):
        tiny_model().save_to_preset(tmp_path / "file" / under)
    assert (tmp_path / "file").read_text() == "mine"
