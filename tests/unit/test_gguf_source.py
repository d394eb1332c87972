"""GGUF read by us, against what the `gguf` package writes, reads and dequantizes."""

import hashlib
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.gguf_header import STORAGE, read_header
from puna.checkpoint.names import GGUF, Heads
from puna.checkpoint.source import MappedFile
from puna.errors import PresetError

QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Q = GGMLQuantizationType
HEADS = Heads(4, 2)
DIM, HEAD_DIM, FF, VOCAB = 256, 64, 512, 48

LLAMA = {
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS.query,
    "llama.attention.head_count_kv": HEADS.key_value,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.tokens": [f"t{i}é" for i in range(VOCAB)],
    "tokenizer.ggml.scores": [-0.1 * i for i in range(VOCAB)],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
}
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, DIM),
    "model.norm.weight": (DIM,),
    "lm_head.weight": (VOCAB, DIM),
    "model.layers.0.input_layernorm.weight": (DIM,),
    "model.layers.0.post_attention_layernorm.weight": (DIM,),
    "model.layers.0.self_attn.q_proj.weight": (HEADS.query * HEAD_DIM, DIM),
    "model.layers.0.self_attn.q_proj.bias": (HEADS.query * HEAD_DIM,),
    "model.layers.0.self_attn.k_proj.weight": (HEADS.key_value * HEAD_DIM, DIM),
    "model.layers.0.self_attn.k_proj.bias": (HEADS.key_value * HEAD_DIM,),
    "model.layers.0.self_attn.v_proj.weight": (HEADS.key_value * HEAD_DIM, DIM),
    "model.layers.0.self_attn.o_proj.weight": (DIM, HEADS.query * HEAD_DIM),
    "model.layers.0.mlp.gate_proj.weight": (FF, DIM),
    "model.layers.0.mlp.up_proj.weight": (FF, DIM),
    "model.layers.0.mlp.down_proj.weight": (DIM, FF),
}


def llama_cpp_permute(array, heads):
    """The permutation of llama.cpp's converter, in its own words: HF to GGUF."""
    shape = array.shape
    return array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def theirs(name, array):
    """A tensor of ours as llama.cpp's converter would name and lay it out."""
    gguf_name, _ = GGUF.inverse.to_ours(name)
    if ".q_proj." in name:
        array = llama_cpp_permute(array, HEADS.query)
    if ".k_proj." in name:
        array = llama_cpp_permute(array, HEADS.key_value)
    return gguf_name, array


def write(path, metadata=None, tensors=(), architecture="llama"):
    """Write `{key: value}` and `(GGUF name, array, type)`, by the gguf package."""
    writer = GGUFWriter(path, architecture)
    for key, value in (LLAMA if metadata is None else metadata).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array, kind in tensors:
        native = {Q.F64: np.float64, Q.F32: np.float32, Q.F16: np.float16}.get(kind)
        if native is not None:
            writer.add_tensor(name, np.ascontiguousarray(array.astype(native)))
        else:
            packed = quants.quantize(np.ascontiguousarray(array, np.float32), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(path, kind=Q.F32, metadata=None, without=(), **extra):
    """A tiny Llama: matrices of type `kind`, vectors in float32."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in SHAPES.items()
        if not any(part in name for part in without)
    }
    tensors = [
        (*theirs(name, array), kind if array.ndim > 1 else Q.F32) for name, array in arrays.items()
    ]
    tensors += [(name, array, Q.F32) for name, array in extra.items()]
    write(path, LLAMA | (metadata or {}), tensors)
    return arrays


@pytest.mark.parametrize("kind", [Q.F64, Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_every_tensor_comes_back_in_hugging_faces_layout(tmp_path, kind):
    path = tmp_path / "x.gguf"
    arrays = model(path, kind)
    source = GGUFSource(path)
    assert set(source.names()) == set(arrays)
    for name, array in arrays.items():
        info, got = source.info(name), source.read(name)
        assert info.shape == got.shape == array.shape
        assert info.dtype == got.dtype
        assert info.stored == (kind.name if array.ndim > 1 else "F32")
        if array.ndim == 1:
            want = array
        elif kind in (Q.F64, Q.F32, Q.F16):
            want = array.astype(got.dtype)
        else:
            # A permutation of rows commutes with quantization along them.
            want = quants.dequantize(quants.quantize(array, kind), kind)
        if kind == Q.BF16 and array.ndim > 1:
            assert got.dtype == ml_dtypes.bfloat16
            got = got.astype(np.float32)
        assert np.array_equal(got, want)
        source.release(name)


def test_the_size_table_is_the_packages():
    for code, storage in STORAGE.items():
        assert Q(code).name == storage.name
        assert GGML_QUANT_SIZES[Q(code)] == (storage.block, storage.nbytes)


@pytest.mark.parametrize(
    "storage",
    [s for s in STORAGE.values() if s.name not in ("F64", "F32", "F16", "BF16")],
    ids=lambda s: s.name,
)
def test_dequantization_is_the_packages_bit_for_bit(tmp_path, storage):
    """Random bytes, NaN and infinite scales too; enough of them for several chunks."""
    rows = 5 if storage.block == 256 else 2 * (1 << 19) // (40 * 256) + 6
    raw = rng_bytes((rows, 40 * 256 // storage.block * storage.nbytes))
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_head_count(2)
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=Q[storage.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        got = GGUFSource(tmp_path / "x.gguf").read("model.layers.0.mlp.up_proj.weight")
        want = quants.dequantize(raw, Q[storage.name])
    assert got.dtype == want.dtype == np.float32
    assert got.shape == want.shape
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


def rng_bytes(shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def test_metadata_is_plain_and_equal_to_the_packages(tmp_path):
    path = tmp_path / "x.gguf"
    model(path, metadata={"general.tags": ["a", "b"], "x.flags": [True, False], "x.big": [2**30]})
    metadata = GGUFSource(path).metadata
    reader = GGUFReader(path)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(metadata) == keys
    for key in keys:
        want = reader.fields[key].contents()
        # Ours has the shortest decimal of each float32.
        if isinstance(want, float) or (isinstance(want, list) and isinstance(want[0], float)):
            assert np.array_equal(np.float32(metadata[key]), np.float32(want))
        else:
            assert metadata[key] == want
            assert type(metadata[key]) is type(want)
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert metadata["tokenizer.ggml.scores"] == [round(-0.1 * i, 6) for i in range(VOCAB)]
    assert metadata["x.flags"] == [True, False]


def test_views_never_reach_the_file(tmp_path):
    path = tmp_path / "x.gguf"
    arrays = model(path, Q.F16)
    before = hashlib.sha256(path.read_bytes()).digest()
    source = GGUFSource(path)
    view = source.read("model.embed_tokens.weight")
    assert np.shares_memory(view, source.read("model.embed_tokens.weight"))
    view[:] = 0
    source.read("model.layers.0.self_attn.q_proj.weight")[:] = 0
    source.close()
    assert not view.any()
    assert hashlib.sha256(path.read_bytes()).digest() == before
    again = GGUFSource(path).read("model.embed_tokens.weight")
    assert np.array_equal(again, arrays["model.embed_tokens.weight"].astype(np.float16))
    with pytest.raises(PresetError, match="was closed"):
        source.read("model.norm.weight")


def test_config(tmp_path):
    path = tmp_path / "x.gguf"
    model(path, Q.Q8_0, {"tokenizer.ggml.eos_token_id": 2})
    assert GGUFSource(path).hf_config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": FF,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": True,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Q.F32, "float32"), (Q.F16, "float16"), (Q.BF16, "bfloat16"), (Q.Q4_1, "float32")],
)
def test_config_dtype_is_that_of_the_matrices(tmp_path, kind, dtype):
    model(tmp_path / "x.gguf", kind)
    assert GGUFSource(tmp_path / "x.gguf").hf_config()["torch_dtype"] == dtype


@pytest.mark.parametrize(
    ("metadata", "want"),
    [
        (
            {"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eot_token_id": 9},
            {"eos_token_id": 9},
        ),
        (
            {
                "tokenizer.ggml.eos_token_id": 8,
                "tokenizer.ggml.eot_token_id": 9,
                "tokenizer.ggml.eom_token_id": 7,
                "tokenizer.ggml.padding_token_id": 3,
            },
            {"eos_token_id": [8, 9, 7], "pad_token_id": 3},
        ),
        ({}, {"eos_token_id": None}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        (
            {"llama.rope.scale_linear": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 16.0,
                    "beta_slow": 1.0,
                }
            },
        ),
        ({"llama.rope.scaling.type": "none"}, {"rope_scaling": None}),
        ({"llama.feed_forward_length": [FF, FF]}, {"intermediate_size": FF}),
        ({"llama.expert_count": 0, "llama.attention.key_length": 64}, {"head_dim": 64}),
    ],
)
def test_config_follows_the_metadata(tmp_path, metadata, want):
    model(tmp_path / "x.gguf", metadata=metadata)
    config = GGUFSource(tmp_path / "x.gguf").hf_config()
    assert {key: config[key] for key in want} == want


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64"),
        ({"llama.rope.scaling.type": "longrope"}, "is 'longrope', expected none, linear or yarn"),
        ({"llama.rope.scaling.type": "linear"}, "scaling.factor is missing, expected a positive"),
        ({"llama.rope.scaling.yarn_attn_factor": 2.0}, "yarn_attn_factor is 2.0"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32 and the heads are 64"),
        ({"llama.attention.value_length": 32}, "value_length is 32"),
        ({"llama.feed_forward_length": [1, 2]}, "same in all layers"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "rms_epsilon is 'x'"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token's id"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, metadata, message):
    model(tmp_path / "x.gguf", metadata=metadata)
    source = GGUFSource(tmp_path / "x.gguf")
    with pytest.raises(PresetError, match=message):
        source.hf_config()


def test_unknown_metadata_warns(tmp_path):
    model(tmp_path / "x.gguf", metadata={"llama.new_trick": 1.0})
    source = GGUFSource(tmp_path / "x.gguf")
    with pytest.warns(UserWarning, match=r"llama\.new_trick"):
        source.hf_config()


def test_tied_head(tmp_path):
    model(tmp_path / "x.gguf", without=["lm_head", ".bias"])
    config = GGUFSource(tmp_path / "x.gguf").hf_config()
    assert config["tie_word_embeddings"]
    assert not config["attention_bias"]


def converter_divisors(factor, original, theta=500000.0, dim=HEAD_DIM, low=1, high=4):
    """The divisors as llama.cpp's converter computes them, in float32."""
    result = []
    for i in range(0, dim, 2):
        wavelength = np.float32(2 * np.pi) * np.float32(theta) ** np.float32(i / dim)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8, 8192), (32, 8192), (4, 64), (2.5, 1024)])
def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path, factor, original):
    path = tmp_path / "x.gguf"
    divisors = converter_divisors(factor, original)
    model(path, **{"rope_freqs.weight": divisors})
    source = GGUFSource(path)
    assert np.array_equal(source.rope_freqs, divisors)
    assert not any("rope" in name for name in source.names())
    assert source.hf_config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize(
    ("divisors", "metadata", "message"),
    [
        (converter_divisors(8, 8192, low=2), {}, "no llama3 rope scaling"),
        (converter_divisors(8, 8192)[:-1], {}, "no llama3 rope scaling"),
        (np.full(32, np.nan, np.float32), {}, "no llama3 rope scaling"),
        (
            converter_divisors(8, 8192),
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            "are both there",
        ),
    ],
)
def test_other_divisors_are_refused(tmp_path, divisors, metadata, message):
    model(tmp_path / "x.gguf", metadata=metadata, **{"rope_freqs.weight": divisors})
    with pytest.raises(PresetError, match=message):
        GGUFSource(tmp_path / "x.gguf").hf_config()


def test_divisors_of_one_are_no_scaling(tmp_path):
    model(tmp_path / "x.gguf", **{"rope_freqs.weight": np.ones(32, np.float32)})
    assert GGUFSource(tmp_path / "x.gguf").hf_config()["rope_scaling"] is None


def test_other_models_are_refused_by_name(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, {}, architecture="qwen2")
    with pytest.raises(PresetError, match="architecture is 'qwen2', expected 'llama'"):
        GGUFSource(path)
    extra = np.ones(4, np.float32)
    model(path, **{f"blk.0.ffn_gate_exps.{i}.weight": extra for i in range(7)})
    with pytest.raises(PresetError, match=r"ffn_gate_exps\.0\.weight, .* and 2 more"):
        GGUFSource(path)
    write(path, LLAMA, [("blk.0.attn_q.weight", np.ones((6, 32)), Q.F32)])
    with pytest.raises(PresetError, match=r"shape \(6, 32\), expected an even number of rows"):
        GGUFSource(path)
    write(path, LLAMA, [("output.weight", np.ones((6, 32)), Q.F32)])
    with pytest.raises(PresetError, match=r"token_embd\.weight is missing"):
        GGUFSource(path).hf_config()
    with pytest.raises(PresetError, match=r"no tensor 'x' in .*; the 1 there"):
        GGUFSource(path).info("x")


def test_parts_are_read_as_one(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    items = [(*theirs(name, array), Q.F32) for name, array in arrays.items()]
    for number, part in enumerate(parts):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(items)}
        metadata = split | (LLAMA if number == 0 else {})
        write(part, metadata, items[number::3], "llama")
    for part in parts:
        source = GGUFSource(part)
        assert set(source.names()) == set(arrays)
        assert all(np.array_equal(source.read(name), array) for name, array in arrays.items())
        assert source.hf_config()["vocab_size"] == VOCAB
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(PresetError, match="says that it is part 2 "):
        GGUFSource(parts[0])
    with pytest.raises(PresetError, match="no part of 3 by its name"):
        GGUFSource(tmp_path / "m-00004-of-00003.gguf")
    parts[1].unlink()
    with pytest.raises(PresetError, match="1 of 3 parts are missing: m-00002-of-00003"):
        GGUFSource(parts[0])


# Malformed files, made by hand.


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


def info(name="output_norm.weight", dims=(4,), kind=0, offset=0):
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def file(pairs=(), infos=(), data=64, version=3, counts=None, magic=b"GGUF"):
    raw = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    raw += b"".join(pairs) + b"".join(infos)
    return raw + bytes(-len(raw) % 32 + data)


ARCH = pair("general.architecture", 8, text("llama"))
HEAD = pair("llama.attention.head_count", 4, struct.pack("<I", 1))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GG", "begins with b'GG'"),
        (file(magic=b"GGML"), "begins with b'GGML'"),
        (b"GGUF\3\0", "a number at byte 4 runs over"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF"),
        (file(version=1), "GGUF version 1, and versions 2 and 3 are read"),
        (file(version=4), "GGUF version 4"),
        (file(counts=(0, 2**63)), "claims 9223372036854775808 metadata pairs"),
        (file(counts=(2**62, 0)), "claims 4611686018427387904 tensors"),
        (file([ARCH, ARCH]), "metadata key 'general.architecture' is there twice"),
        (file([struct.pack("<Q", 2**60)]), "claims a string of 1152921504606846976 bytes"),
        (file([pair("k", 8, text(b"\xff"))]), "is not UTF-8"),
        (file([pair("k", 77, b"")]), "'k' has a value of unknown type 77"),
        (file([pair("k", 9, struct.pack("<IQ", 4, 2**24 + 1))]), "claims 16777217 items"),
        (file([pair("k", 9, struct.pack("<IQ", 4, 2**20))]), "claims 1048576 items of 'k'"),
        (file([pair("k", 9, struct.pack("<IQ", 8, 2**20))]), "claims 1048576 items of 'k'"),
        (file([pair("k", 9, struct.pack("<IQ", 9, 1) * 6)]), "unknown type 9"),
        (file([pair("general.alignment", 4, struct.pack("<I", 24))]), "alignment is 24"),
        (file([pair("general.alignment", 6, struct.pack("<f", 32))]), "alignment is 32.0"),
        (file(infos=[info(dims=(1,) * 5)]), "has 5 dimensions"),
        (file(infos=[info(kind=4)]), "is of type 4, which is not read"),
        (file(infos=[info(kind=9)]), "is of type 9, which is not read"),
        (file(infos=[info(dims=(33,), kind=2)]), "rows of \\(33,\\) elements, .* of 32"),
        (file(infos=[info(dims=(2**40, 2**40))]), "larger than any memory"),
        (file(infos=[info(dims=(0, 2**62, 2**62))]), "larger than any memory"),
        (file(infos=[info(offset=4)]), "is at 4, not on 32"),
        (file(infos=[info(dims=(17,))]), "ends at byte .*, and the file has"),
        (file(infos=[info(offset=2**63)]), "ends at byte"),
        (file(infos=[info(), info()]), "overlaps the one before|is there twice"),
        (file(infos=[info(), info(offset=32)]), "'output_norm.weight' is there twice"),
        (file(infos=[info(dims=(9,)), info("b", offset=32)]), "'b' at .* overlaps"),
        (file(), "architecture is None"),
        (file([ARCH]), "llama.attention.head_count is missing"),
        (file([ARCH, HEAD], [info("blk.00.attn_q.weight")]), "blk.00.attn_q.weight"),
    ],
)
def test_malformed_files_say_what_is_off(tmp_path, raw, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(PresetError, match=message) as caught:
        GGUFSource(path)
    assert str(path) in str(caught.value)


def test_the_hand_made_file_is_good(tmp_path):
    path = tmp_path / "x.gguf"
    nested = pair("k", 9, struct.pack("<IQIQ", 9, 1, 4, 2) + struct.pack("<II", 5, 6))
    for version in (2, 3):
        path.write_bytes(file([ARCH, HEAD, nested], [info()], version=version))
        source = GGUFSource(path)
        assert source.read("model.norm.weight").tolist() == [0] * 4
        assert source.metadata["k"] == [[5, 6]]


@QUICK
@given(data=st.data())
def test_damaged_files_never_crash(tmp_path, data):
    infos = [info("token_embd.weight", (32, 2), 8), info("blk.0.attn_q.weight", (4, 4), 1, 96)]
    tokens = pair("t", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc"))
    raw = bytearray(file([ARCH, HEAD, tokens], infos, 160))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)) | st.just(len(raw)))]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    try:
        source = GGUFSource(path)
    except PresetError:
        return
    for name in source.names():
        array = source.read(name)
        assert array.shape == source.info(name).shape
        assert array.dtype == source.info(name).dtype


def test_the_tables_inverse_is_exact():
    rng = np.random.default_rng(0)
    for rule in GGUF.rules:
        name = rule.theirs.format(17)
        ours, transform = GGUF.to_ours(name)
        back, inverse = GGUF.inverse.to_ours(ours)
        assert back == name
        array = rng.standard_normal((32, 3))
        there = transform.to_ours(array, HEADS)
        assert np.array_equal(inverse.to_ours(there, HEADS), array)
    assert GGUF.to_ours("blk.07.attn_q.weight") is None
    assert GGUF.to_ours("blk.{}.attn_q.weight") is None
    assert GGUF.to_ours("blk.1.attn_q.1.weight") is None


def test_the_real_file_opens_fast(smollm2_gguf):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        source = GGUFSource(smollm2_gguf)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    assert len(source.names()) == 272
    assert len(source.metadata["tokenizer.ggml.merges"]) == 48900
    config = source.hf_config()
    assert config["rms_norm_eps"] == 1e-5
    assert config["vocab_size"] == 49152
    assert config["eos_token_id"] == 2
    assert config["tie_word_embeddings"]
    name = "model.layers.3.self_attn.q_proj.weight"
    assert source.info(name).stored == "Q4_1"
    header = read_header(MappedFile(smollm2_gguf))
    place = next(t for t in header.tensors if t.name == "blk.3.attn_q.weight")
    raw = np.fromfile(smollm2_gguf, np.uint8, place.nbytes, offset=place.offset)
    want = quants.dequantize(raw.reshape(576, -1), Q.Q4_1)
    assert np.array_equal(llama_cpp_permute(source.read(name), 9), want)


@pytest.mark.slow  # the package's reader takes seconds
def test_the_real_file_reads_as_the_package_reads_it(smollm2_gguf):
    source, reader = GGUFSource(smollm2_gguf), GGUFReader(smollm2_gguf)
    heads = Heads(9, 3)
    for tensor in reader.tensors:
        name, _ = GGUF.to_ours(tensor.name)
        _, inverse = GGUF.inverse.to_ours(name)
        want = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(inverse.to_ours(source.read(name), heads), want)
    for key in ("tokens", "merges", "token_type"):
        key = f"tokenizer.ggml.{key}"
        assert source.metadata[key] == reader.fields[key].contents()
