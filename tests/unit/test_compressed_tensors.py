"""Quantized models in files: compressed-tensors as others read and write it."""

import json
import re

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from puna.checkpoint import compressed_tensors
from puna.errors import ConfigError, PresetError
from puna.models import CausalLM, Llama3Backbone
from puna.quantization.rounding import dequantize, quantize
from puna.quantization.scheme import Scheme
from puna.testing import tiny_model
from tests.compressed_reader import float8_of, read_independently
from tests.weights import array, assert_same

IDS = np.array([[300, 5, 261, 17, 3, 0, 44, 259]], np.int32)
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
WAYS = {
    "int8": {"mode": "int8"},
    "int8 groups": {"mode": "int8", "group_size": 32},
    "int8 minima": {"mode": "int8", "symmetric": False},
    "int4": {"mode": "int4"},
    "int4 rows": {"mode": "int4", "group_size": None},
    "int4 of 128": {"mode": "int4", "group_size": 128},  # which 64 and 96 inputs are made to fit
    "int4 minima": {"mode": "int4", "symmetric": False},
    "mixed": {"mode": "int4", "overrides": {"[qo]_proj": "int8", "up_proj|embed": None}},
    "float8": {"mode": "float8"},
    "float8 with others": {"mode": "float8", "overrides": {"mlp": "int4", "q_proj": None}},
    "float16 scales": {"config": Scheme(bits=4, group_size=32, scale_dtype="float16")},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def logits(model):
    return keras.ops.convert_to_numpy(model(IDS))


# What we write


@each_way
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_reload_is_bit_equal(tmp_path, way, dtype, tied):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied, attention_bias=True, **SHAPE)
    model.quantize(**way)
    model.save_to_preset(tmp_path / "first")
    loaded = CausalLM.from_preset(tmp_path / "first")
    assert_same(loaded, model)
    assert loaded.quantization() == model.quantization()
    assert loaded.dtype_policy.name == dtype
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert_same(Llama3Backbone.from_preset(tmp_path / "first"), model.backbone)
    loaded.save_to_preset(tmp_path / "second", max_shard_size=20_000)
    assert_same(CausalLM.from_preset(tmp_path / "second"), model)
    one, two = ((tmp_path / name / "config.json").read_bytes() for name in ("first", "second"))
    assert one == two


@each_way
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_independent_reader_finds_the_same_values(tmp_path, way, dtype):
    model = tiny_model(dtype=dtype, **SHAPE)
    model.quantize(**way)
    model.save_to_preset(tmp_path)
    found = read_independently(tmp_path)
    for name, layer in model.matrices().items():
        numbers = layer.weight if layer.weight_packed is None else layer.weight_packed
        ours = array(numbers).astype(np.float64)
        if layer.scheme is not None:
            held = layer.matrix()
            low = None if layer.weight_low is None else array(layer.weight_low)
            fields = {"data": array(numbers), "scale": array(layer.weight_scale), "low": low}
            ours = dequantize(held._replace(**fields))
        # Exactly: the product of a whole number and a scale is rounded once, to float32.
        theirs = found[f"{name}.weight"].astype(np.float32)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert len(found) == len(model.matrices()) + 5  # the norms


@pytest.mark.backend_free
def test_what_the_configuration_says(tmp_path):
    model = tiny_model(tie_word_embeddings=True, **SHAPE)
    model.quantize("int4", overrides={"embed_tokens": None, r"layers\.1.*k_proj": None})
    model.save_to_preset(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = config["quantization_config"]
    assert config["dtype"] == "float32"
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    assert said["quantization_status"] == "compressed"
    assert said["ignore"] == ["model.layers.1.self_attn.k_proj", "lm_head"]
    [group] = said["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "group"
    assert group["weights"]["group_size"] == 32


# What others write


def write_theirs(directory, change):
    """A checkpoint of a few matrices with `change(module, weights, tensors)` for each of them."""
    model = tiny_model(**SHAPE)
    model.save_to_preset(directory)
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for module in model.matrices():
        if module not in ("lm_head", "model.embed_tokens"):
            change(module, tensors.pop(f"{module}.weight"), tensors)
    safetensors.numpy.save_file(tensors, file)


def configure(directory, weights, **others):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"} | weights}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | others
    path.write_text(json.dumps(config))


def assert_dequantized(model, expected):
    for name, weight in expected.items():
        layer = model.matrices()[name]
        numbers = layer.weight if layer.weight_packed is None else layer.weight_packed
        low = None if layer.weight_low is None else array(layer.weight_low)
        fields = {"data": array(numbers), "scale": array(layer.weight_scale), "low": low}
        found = dequantize(layer.matrix()._replace(**fields))
        np.testing.assert_allclose(found, weight, rtol=1e-6, atol=1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_eight_bits_in_int32_are_read(tmp_path, symmetric, dtype):
    numbers, expected = np.random.default_rng(0), {}

    def change(module, weight, tensors):
        out, width = weight.shape
        q = numbers.integers(-128, 128, weight.shape)
        scale = numbers.uniform(0.01, 0.02, (out, width // 32)).astype(dtype)
        zero = np.zeros(scale.shape, int)
        if not symmetric:
            zero = numbers.integers(-128, 128, scale.shape)
            stored = (zero + 128).astype(np.uint8).T
            tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(
                np.ascontiguousarray(stored).view("<i4").T
            )
        tensors[f"{module}.weight_packed"] = (q + 128).astype(np.uint8).view("<i4")
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = np.array(weight.shape, np.int64)
        wide = scale.astype(np.float64).repeat(32, axis=1)
        expected[module] = (q - zero.repeat(32, axis=1)) * wide

    write_theirs(tmp_path, change)
    configure(tmp_path, {"strategy": "group", "group_size": 32, "symmetric": symmetric})
    model = CausalLM.from_preset(tmp_path)
    assert_dequantized(model, expected)
    assert set(model.quantization()) == set(expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_plain_int8_with_one_scale_is_read(tmp_path, bits, strategy):
    numbers, expected = np.random.default_rng(0), {}

    def change(module, weight, tensors):
        q = numbers.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), weight.shape)
        shape = (1,) if strategy == "tensor" else (len(weight), 1)
        scale = numbers.uniform(0.01, 0.02, shape).astype("float32")
        tensors[f"{module}.weight"] = q.astype(np.int8)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_zero_point"] = np.zeros(shape, np.int8)  # some write it
        expected[module] = q * scale.astype(np.float64)

    write_theirs(tmp_path, change)
    weights = {"strategy": strategy, "symmetric": True, "num_bits": bits}
    configure(tmp_path, weights, format="int-quantized")
    assert_dequantized(CausalLM.from_preset(tmp_path), expected)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_float8_is_read(tmp_path, strategy, form, dynamic):
    numbers, expected = np.random.default_rng(0), {}

    def change(module, weight, tensors):
        bits = numbers.integers(0, 256, weight.shape).astype(np.uint8)
        bits[bits & 127 == 127] = 0
        shape = (1,) if strategy == "tensor" else (len(weight), 1)
        scale = numbers.uniform(0.01, 0.02, shape).astype(ml_dtypes.bfloat16)
        tensors[f"{module}.weight"] = bits.view(ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale
        if strategy == "tensor":  # some write it
            tensors[f"{module}.weight_zero_point"] = np.zeros(shape, ml_dtypes.float8_e4m3fn)
        expected[module] = float8_of(bits) * scale.astype(np.float64)

    write_theirs(tmp_path, change)
    weights = {"strategy": strategy, "symmetric": True, "type": "float", "num_bits": 8}
    group = {"targets": ["Linear"], "weights": weights}
    if dynamic:
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
        group["input_activations"] = inputs
    configure(tmp_path, {}, format=form, config_groups={"group_0": group})
    model = CausalLM.from_preset(tmp_path)
    assert_dequantized(model, expected)
    assert {scheme.name for scheme in model.quantization().values()} == {"float8"}
    plain = CausalLM.from_preset(tmp_path, quantization="none")
    np.testing.assert_allclose(logits(plain), logits(model), rtol=1e-4, atol=1e-3)


# What is refused


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("weights", "others", "named"),
    [
        ({"num_bits": 3}, {}, "num_bits"),
        ({"type": "float"}, {}, "pack-quantized"),
        ({"type": "float", "num_bits": 4}, {"format": "float-quantized"}, "num_bits"),
        ({"type": "float", "symmetric": False}, {"format": "float-quantized"}, "symmetric"),
        ({"type": "float", "strategy": "group", "group_size": 32},
         {"format": "float-quantized"}, "group"),
        ({"type": "float", "strategy": "block", "block_structure": [128, 128]},
         {"format": "float-quantized"}, "block"),
        ({"type": "int"}, {"format": "float-quantized"}, "float-quantized"),
        ({"strategy": "block"}, {}, "block"),
        ({"strategy": "group", "group_size": 48}, {}, "48"),
        ({"actorder": "group"}, {}, "actorder"),
        ({}, {"format": "marlin-24"}, "marlin-24"),
        ({}, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({}, {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({}, {"config_groups": ["W4A16"]}, "config_groups"),
        ({}, {"ignore": [3]}, "ignore"),
        ({}, {"ignore": ["re:("]}, r"re:\("),
        ({}, {"quant_method": "gptq"}, "gptq"),
        (
            {},
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8},
                                     "input_activations": {"num_bits": 8, "dynamic": False}}}},
            "input_activations",
        ),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(tmp_path, weights, others, named):
    tiny_model(**SHAPE).save_to_preset(tmp_path)
    configure(tmp_path, weights, **others)
    with pytest.raises(ConfigError, match=named):
        CausalLM.from_preset(tmp_path)


@pytest.mark.backend_free
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("end", ["weight_packed", "weight_scale", "weight_shape"])
@pytest.mark.parametrize("fault", ["gone", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, symmetric, end, fault):
    model = tiny_model(**SHAPE)
    model.quantize("int4", symmetric=symmetric)
    model.save_to_preset(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = f"model.layers.1.mlp.down_proj.{end}"
    if fault == "gone":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:-1].copy()
    else:
        tensors[name] = tensors[name].astype(np.int16)
    safetensors.numpy.save_file(tensors, file)
    if (end, fault) == ("weight_shape", "dtype"):
        assert_same(CausalLM.from_preset(tmp_path), model)  # the numbers are what counts
        return
    with pytest.raises(PresetError, match=re.escape(name.rsplit(".", 1)[0])):
        CausalLM.from_preset(tmp_path)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("end", "dtype"),
    [("weight", np.int8), ("weight", ml_dtypes.float8_e5m2), ("weight_scale", np.int32),
     ("weight_zero_point", ml_dtypes.float8_e4m3fn)],
)  # fmt: skip
def test_float8_of_other_dtypes_or_zeros_is_refused(tmp_path, end, dtype):
    model = tiny_model(**SHAPE)
    model.quantize("float8")
    model.save_to_preset(tmp_path)
    tensors = {name: array(variable) for name, variable in model.tensors().items()}
    shape = tensors[f"lm_head.{end}"].shape if f"lm_head.{end}" in tensors else (1,)
    tensors[f"lm_head.{end}"] = np.ones(shape, dtype)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PresetError, match=f"lm_head.{end} is"):
        CausalLM.from_preset(tmp_path)


@pytest.mark.backend_free
@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_float8_that_is_no_number_is_refused(tmp_path, bits):
    model = tiny_model(**SHAPE)
    model.quantize("float8")
    model.save_to_preset(tmp_path)
    tensors = {name: array(variable) for name, variable in model.tensors().items()}
    tensors["lm_head.weight"].view(np.uint8)[3, 5] = bits
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PresetError, match=r"lm_head\.weight holds NaN"):
        CausalLM.from_preset(tmp_path)


@pytest.mark.backend_free
def test_a_quantized_checkpoint_takes_no_other_scheme(tmp_path):
    model = tiny_model(**SHAPE)
    model.quantize("int8")
    model.save_to_preset(tmp_path)
    with pytest.raises(ConfigError, match="is quantized already, and quantization='int4'"):
        CausalLM.from_preset(tmp_path, quantization="int4")


@pytest.mark.backend_free
def test_minima_that_no_whole_number_makes_cannot_be_saved(tmp_path):
    model = tiny_model(**SHAPE)
    model.quantize("int4", symmetric=False, filters="lm_head")
    low = model.lm_head.weight_low
    low.assign(array(low) * 1.01)
    with pytest.raises(PresetError, match="lm_head has minima"):
        model.save_to_preset(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.backend_free
def test_a_head_that_is_stored_beside_a_tied_embedding(tmp_path):
    model = tiny_model(tie_word_embeddings=True, **SHAPE)
    model.save_to_preset(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    assert "lm_head" not in CausalLM.from_preset(tmp_path, quantization="int4").quantization()
    tensors["lm_head.weight"][0, 0] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(PresetError, match="differs from"):
        CausalLM.from_preset(tmp_path, quantization="int4")


@pytest.mark.backend_free
def test_targets_by_name_go_before_those_by_pattern_and_class():
    def group(bits, *targets):
        return {"targets": [*targets], "weights": {"num_bits": bits, "strategy": "channel"}}

    config = {
        "format": "pack-quantized",
        "config_groups": {
            "a": group(8, "Linear"),
            "b": group(4, r"re:.*mlp\..*"),
            "c": group(8, "model.layers.0.mlp.up_proj"),
        },
        "ignore": ["re:.*k_proj"],
    }
    names = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj",
                                             "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    found = compressed_tensors.layouts(config, ["model.embed_tokens", *names])
    assert {name: layout.scheme.bits for name, layout in found.items()} == {
        names[0]: 8, names[2]: 8, names[3]: 4
    }  # fmt: skip


@pytest.mark.backend_free
def test_scales_in_half_precision_are_kept_whatever_the_model_runs_in(tmp_path):
    model = tiny_model(dtype="bfloat16", **SHAPE)
    model.quantize("int4")
    model.save_to_preset(tmp_path)
    wide = CausalLM.from_preset(tmp_path, dtype="float32")
    assert array(wide.lm_head.weight_scale).dtype == ml_dtypes.bfloat16
    expected = quantize(array(tiny_model(dtype="bfloat16", **SHAPE).lm_head.weight),
                        Scheme.parse("int4"))  # fmt: skip
    np.testing.assert_array_equal(array(wide.lm_head.weight_packed), expected.data)
