"""Presets that keras-hub wrote are read, and broken or foreign ones are refused by name."""

import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from puna.checkpoint.h5_file import H5File
from puna.checkpoint.keras_hub import KerasHubSource, preprocessor_settings
from puna.checkpoint.names import KERAS_HUB, META, Heads
from puna.config import LlamaConfig
from puna.errors import PresetError, TokenizerError
from puna.text.keras_hub_tokenizer import settings_from_keras_hub
from puna.text.tokenizer import Tokenizer
from tests.parity.make_keras_hub_golden import DATA, SHAPE, TEXTS

pytestmark = [
    pytest.mark.backend_free,
    pytest.mark.filterwarnings("ignore:.*rope_position_scaling_factor"),
]

QUERY = "layers/llama_transformer_decoder/_self_attention_layer/_query_dense/vars/0"


@pytest.fixture(params=["single", "sharded"])
def name(request):
    return request.param


@pytest.fixture
def preset(tmp_path):
    """A copy of the preset in one file, to be broken."""
    return shutil.copytree(DATA / "single", tmp_path / "preset")


def change(preset, file, **changes):
    path = preset / file
    content = json.loads(path.read_text())
    content["config"] |= changes
    path.write_text(json.dumps(content))


def test_every_tensor_has_the_shape_of_a_llama(name):
    source = KerasHubSource(DATA / name)
    D, F, V = SHAPE["hidden_dim"], SHAPE["intermediate_dim"], 443
    shapes = {n.removeprefix("model.layers.1."): source.info(n).shape for n in source.names()}
    expected = {
        "model.embed_tokens.weight": (V, D),
        "self_attn.q_proj.weight": (D, D),
        "self_attn.k_proj.weight": (D // 2, D),
        "self_attn.o_proj.weight": (D, D),
        "mlp.gate_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    assert expected.items() <= shapes.items()
    for tensor in source.names():
        array, info = source.read(tensor), source.info(tensor)
        assert array.shape == info.shape
        assert array.dtype == info.dtype
        assert array.flags.c_contiguous
        source.release(tensor)


def test_a_kernel_is_the_transpose_of_its_heads():
    with h5py.File(DATA / "single" / "model.weights.h5") as file:
        kernel = file[QUERY][()]
    weight = KerasHubSource(DATA / "single").read("model.layers.0.self_attn.q_proj.weight")
    # Row h of head n reads the inputs that the kernel has at [:, n, h].
    np.testing.assert_array_equal(weight.reshape(4, 8, 32)[2, 5], kernel[:, 2, 5])


@pytest.mark.parametrize("table", [META, KERAS_HUB], ids=["Meta", "keras-hub"])
def test_the_transforms_are_reversible(table):
    heads, numbers = Heads(4, 2), np.random.default_rng(0)
    for rule in table.rules:
        rows = 16 if "k_proj" in rule.ours or "v_proj" in rule.ours else 32
        ours = numbers.normal(size=(32,) if "norm" in rule.ours else (rows, 32))
        theirs = rule.transform.to_theirs(ours, heads)
        np.testing.assert_array_equal(rule.transform.to_ours(theirs, heads), ours)


def test_the_configuration_is_keras_hubs():
    config = LlamaConfig.from_hf(KerasHubSource(DATA / "single").hf_config())
    assert config.rms_norm_eps == 1e-5
    assert config.rope.rope_type == "llama3"
    assert config.rope.factor == 8
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (436, 437)
    config = LlamaConfig.from_hf(KerasHubSource(DATA / "sharded").hf_config())
    # keras-hub does not write that the head is the embedding: only the weights tell.
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"


def test_a_scaling_that_keras_hub_does_not_compute_is_warned_of():
    with pytest.warns(UserWarning, match="rope_position_scaling_factor=2"):
        source = KerasHubSource(DATA / "sharded")
    assert source.config.rope.rope_type == "default"


def test_the_ids_are_keras_hubs(name):
    tokenizer = Tokenizer.from_directory(DATA / name)
    golden = np.load(DATA / "golden.npz")
    ids = [tokenizer(text) for text in TEXTS]
    np.testing.assert_array_equal(np.concatenate(ids), golden[f"{name}_tokens"])
    assert [tokenizer.detokenize(row) for row in ids] == list(TEXTS)
    assert tokenizer.start_token_id == 436
    assert tokenizer.pad_token_id == 0
    assert set(tokenizer.stop_token_ids) == {437, 441, 442}


def test_words_are_split_as_llama_3_does():
    tokenizer = Tokenizer.from_directory(DATA / "single")
    # keras-hub merges over the end of a word, into "ĠĠ" and "a".
    assert [tokenizer.id_to_token(i) for i in tokenizer("  are")] == ["Ġ", "Ġa", "re"]


def test_the_preprocessors_settings_are_read(preset):
    expected = {"sequence_length": 48, "add_start_token": True, "add_end_token": False}
    assert preprocessor_settings(preset) == expected
    (preset / "preprocessor.json").unlink()
    assert preprocessor_settings(preset) == expected  # from task.json
    (preset / "task.json").unlink()
    assert preprocessor_settings(preset) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"registered_name": "keras_hub>GemmaBackbone"}, "GemmaBackbone"),
        ({"registered_name": None}, "None"),
        ({"config": []}, "Llama3Backbone"),
    ],
)
def test_other_models_are_refused_by_name(preset, changes, named):
    path = preset / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(PresetError, match=named):
        KerasHubSource(preset)


@pytest.mark.parametrize(
    "dtype",
    [
        {"class_name": "DTypePolicyMap", "config": {"name": "map"}},
        {"class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}},
        {"class_name": "DTypePolicy", "config": {"name": "int8_from_bfloat16"}},
        "int4_from_float32",
    ],
    ids=str,
)
def test_quantized_presets_are_refused(preset, dtype):
    change(preset, "config.json", dtype=dtype)
    with pytest.raises(PresetError, match="quantized"):
        KerasHubSource(preset)


def test_unknown_arguments_are_refused_by_name(preset):
    change(preset, "config.json", mystery=1)
    with pytest.raises(PresetError, match="mystery"):
        KerasHubSource(preset)


@pytest.mark.parametrize("changes", [{"num_query_heads": 2}, {"num_key_value_heads": 4}], ids=str)
def test_heads_of_another_model_are_refused(preset, changes):
    change(preset, "config.json", **changes)
    with pytest.raises(PresetError, match="heads"):
        KerasHubSource(preset)


def test_missing_and_foreign_shards_are_refused(tmp_path):
    preset = shutil.copytree(DATA / "sharded", tmp_path / "preset")
    index = preset / "model.weights.json"
    original = json.loads(index.read_text())
    norm = "/layers/llama_layer_norm/vars"
    for file in ("../model.weights.h5", "/etc/passwd", "a\\b.weights.h5", 7):
        index.write_text(json.dumps({"weight_map": original["weight_map"] | {norm: file}}))
        with pytest.raises(PresetError, match="beside it"):
            KerasHubSource(preset)
    moved = original["weight_map"] | {norm: "model_00000.weights.h5"}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(PresetError, match="should be in"):
        KerasHubSource(preset)
    index.write_text(json.dumps(original))
    (preset / "model_00001.weights.h5").unlink()
    with pytest.raises(PresetError, match=r"missing: model_00001"):
        KerasHubSource(preset)
    index.unlink()
    with pytest.raises(PresetError, match="neither"):
        KerasHubSource(preset)


# HDF5 that Keras does not write.


def write_h5(path, fill):
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def external(file):
    file.create_dataset("a", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def group_of_itself(file):
    group = file.create_group("a")
    for number in range(20):
        group[f"b{number}"] = group


def shared(file):
    file["a"] = np.zeros(4, "f4")
    file["b"] = file["a"]


FOREIGN = {
    "external storage": external,
    "external link": lambda f: f.__setitem__("a", h5py.ExternalLink("/etc/hostname", "/")),
    "soft link": lambda f: f.__setitem__("a", h5py.SoftLink("/b")),
    "cycle": group_of_itself,
    "shared": shared,
    "chunks": lambda f: f.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 20,)),
    "compressed": lambda f: f.create_dataset("a", data=np.zeros(9, "f4"), compression="gzip"),
    "empty": lambda f: f.create_dataset("a", (1 << 50,), "f4"),
    "integers": lambda f: f.create_dataset("a", data=np.zeros(9, "i1")),
    "strings": lambda f: f.create_dataset("a", data=np.array([b"x"])),
    "opaque": lambda f: f.create_dataset("a", data=np.zeros(9, "V4")),
    "big-endian": lambda f: f.create_dataset("a", data=np.zeros(9, ">f4")),
    "type": lambda f: f.__setitem__("a", np.dtype("f4")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_keras_does_not_write_is_refused(tmp_path, kind):
    with pytest.raises(PresetError):
        H5File(write_h5(tmp_path / "x.h5", FOREIGN[kind]))


def test_tensors_that_a_llama_has_not_are_refused(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        file["layers/mystery/vars/0"] = np.zeros(4, "f4")
    with pytest.raises(PresetError, match="mystery"):
        KerasHubSource(preset)


def test_truncated_and_mutated_files_are_refused_or_read(tmp_path):
    raw = (DATA / "sharded" / "model_00000.weights.h5").read_bytes()
    path, numbers = tmp_path / "x.h5", random.Random(0)
    for length in range(0, len(raw), 5000):
        path.write_bytes(raw[:length])
        with pytest.raises(PresetError):
            H5File(path)
    for _ in range(200):
        mutated = bytearray(raw)
        for _ in range(numbers.randint(1, 8)):
            mutated[numbers.randrange(11320)] = numbers.randrange(256)  # before the numbers
        path.write_bytes(mutated)
        try:
            file = H5File(path)
        except PresetError:
            continue
        for tensor in file.names():
            assert file.read(tensor).nbytes <= len(raw)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", '{"registered_name": "keras_hub>GemmaTokenizer"}', "GemmaTokenizer"),
        ("tokenizer.json", "[]", "list"),
        ("assets/tokenizer/vocabulary.json", "{", "not valid JSON"),
        ("assets/tokenizer/vocabulary.json", "{}", "begin_of_text"),
        ("assets/tokenizer/merges.txt", "a b c", "line 1"),
        ("assets/tokenizer/merges.txt", "nothing here", "do not fit"),
    ],
)
def test_broken_tokenizers_are_refused(preset, file, content, named):
    (preset / file).write_text(content)
    with pytest.raises(TokenizerError, match=named):
        settings_from_keras_hub(preset)


def test_a_tokenizer_without_its_files_is_refused(preset):
    (preset / "assets/tokenizer/merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"merges\.txt"):
        settings_from_keras_hub(preset)


def test_a_word_that_is_a_token_of_llama_3_stays_whole(preset, llama3_tokenizer_dir):
    model = json.loads((Path(llama3_tokenizer_dir) / "tokenizer.json").read_text())["model"]
    special = json.loads((preset / "tokenizer.json").read_text())["config"]["unsplittable_tokens"]
    vocabulary = model["vocab"] | {t: 128000 + place for place, t in enumerate(special)}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (preset / "assets/tokenizer/vocabulary.json").write_text(json.dumps(vocabulary))
    (preset / "assets/tokenizer/merges.txt").write_text("\n".join(merges))
    # keras-hub, which merges letters, gets [3355, 26298, 66].
    assert Tokenizer.from_directory(preset)(" việc").tolist() == [100769]
