"""Schemes, rounding, and models whose matrices are quantized."""

import keras
import ml_dtypes
import numpy as np
import pytest

import puna
from puna.backend.packed import Packed
from puna.errors import ConfigError, PresetError
from puna.models import CausalLM, Llama3Backbone
from puna.quantization.rounding import dequantize, quantize, unpacked
from puna.quantization.scheme import Recipe, Scheme
from puna.testing import tiny_model
from tests.weights import array, assert_same

IDS = np.array([[300, 5, 261, 17, 3, 0, 44, 259]], np.int32)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
SCHEMES = {
    "int8": Scheme(bits=8),
    "int8 groups": Scheme(bits=8, group_size=32),
    "int8 minima": Scheme(bits=8, symmetric=False),
    "int4": Scheme(bits=4, group_size=32),
    "int4 rows": Scheme(bits=4),
    "int4 minima": Scheme(bits=4, group_size=32, symmetric=False),
    "float8": Scheme(bits=8, kind="float"),
}
WHOLE = {name: scheme for name, scheme in SCHEMES.items() if scheme.kind == "int"}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
each_whole_scheme = pytest.mark.parametrize("scheme", WHOLE.values(), ids=WHOLE.keys())


def gaussian(shape, dtype="float32", seed=0):
    numbers = np.random.default_rng(seed).normal(0, 0.02, shape)
    return numbers.astype(getattr(ml_dtypes, dtype, dtype))


def packed_of(layer):
    held = layer.matrix()
    numbers = layer.weight if layer.weight_packed is None else layer.weight_packed
    arrays = (array(numbers), array(layer.weight_scale))
    low = None if layer.weight_low is None else array(layer.weight_low)
    return Packed(*arrays, low, held.in_features, held.group)


def logits(model):
    return keras.ops.convert_to_numpy(model(IDS))


def q4_0(matrix):
    """What llama.cpp's `quantize_row_q4_0_ref` makes of a matrix, dequantized."""
    groups = matrix.reshape(-1, 32).astype(np.float32)
    where = np.abs(groups).argmax(axis=1)[:, None]
    scale = np.take_along_axis(groups, where, axis=1) / np.float32(-8)
    inverse = np.divide(1, scale, where=scale != 0, out=np.zeros_like(scale))
    q = np.minimum(15, np.floor(groups * inverse + np.float32(8.5)))
    return ((q - 8) * scale.astype(np.float16).astype(np.float32)).reshape(matrix.shape)


# Schemes


@pytest.mark.backend_free
def test_names_of_schemes():
    assert Scheme.parse("int8") == Scheme(bits=8)
    assert Scheme.parse("int4", symmetric=False).group_size == 32
    assert Scheme.parse("float8") == Scheme(bits=8, kind="float")
    assert [scheme.name for scheme in SCHEMES.values()][-2:] == ["int4", "float8"]
    with pytest.raises(ConfigError, match=r"'int3'.*int8, int4, float8"):
        Scheme.parse("int3")


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "fields",
    [{"bits": 3}, {"bits": True}, {"bits": 4, "group_size": 48}, {"bits": 4, "symmetric": 1},
     {"bits": 8, "scale_dtype": "float64"}, {"bits": 8, "kind": "uint"},
     {"bits": 4, "kind": "float"}, {"bits": 8, "kind": "float", "group_size": 32},
     {"bits": 8, "kind": "float", "symmetric": False}],
)  # fmt: skip
def test_a_scheme_takes_only_what_it_knows(fields):
    with pytest.raises(ConfigError, match="expected one of"):
        Scheme(**fields)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("group", "in_features", "expected"),
    [(32, 96, 32), (128, 192, 64), (64, 96, 32), (128, 100, None), (None, 96, None)],
)
def test_a_group_that_does_not_divide_becomes_smaller(group, in_features, expected):
    assert Scheme(bits=4, group_size=group).fit(in_features, "float32").group_size == expected


@pytest.mark.backend_free
def test_the_first_override_that_is_found_decides():
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    recipe = Recipe(
        default=Scheme.parse("int4"),
        filters=["up_proj"],
        overrides={r"layers\.1\.": "int8", "up": None},
    )
    assert recipe.schemes(dict.fromkeys(names)) == {names[1]: Scheme(bits=8)}
    with pytest.raises(ConfigError, match=r"'down'.*none of 3 names"):
        Recipe(filters="down").schemes(dict.fromkeys(names))
    with pytest.raises(ConfigError, match="no regular expression"):
        Recipe(filters="(")


# Rounding


@pytest.mark.backend_free
@each_whole_scheme
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(7, 96), (300, 33), (1, 1), (5, 4096)])
def test_each_number_is_the_nearest_for_its_stored_scale(scheme, dtype, shape):
    matrix = gaussian(shape, dtype)
    packed = quantize(matrix, scheme)
    wide, found = matrix.astype(np.float32), dequantize(packed)
    stored = getattr(ml_dtypes, dtype, np.dtype(dtype))
    np.testing.assert_array_equal(packed.scale, packed.scale.astype(stored))
    step = np.abs(packed.scale.astype(np.float32)).repeat(packed.group, axis=1)
    q = unpacked(packed).astype(int)
    lowest = 0 if packed.is_4_bit else -127 if scheme.symmetric else -128
    inside = (q > lowest) & (q < (15 if packed.is_4_bit else 127))
    error = np.abs(found.astype(np.float64) - wide)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    # Narrowing a group's range costs its extremes more than half a step, but not two.
    assert (error <= 2 * step).all()


def every_float8():
    """The finite numbers of e4m3, by its definition: 4 bits of exponent, 3 of mantissa."""
    whole = np.arange(8)
    small = whole * 2.0**-9
    others = [(1 + whole / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16)]
    positive = np.concatenate([small, *others])[:-1]  # the last stands for no number
    return np.unique(np.concatenate([-positive, positive]))


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(7, 96), (300, 33), (1, 1), (5, 4096)])
def test_float8_is_the_nearest_for_its_stored_scale(dtype, shape):
    matrix = gaussian(shape, dtype)
    packed = quantize(matrix, SCHEMES["float8"])
    assert packed.data.dtype == ml_dtypes.float8_e4m3fn
    assert packed.scale.dtype == ("float32" if dtype == "float16" else matrix.dtype)
    assert packed.scale.shape == (shape[0], 1)
    wide, scale = matrix.astype(np.float64), packed.scale.astype(np.float64)
    largest, eps = np.abs(wide).max(axis=1, keepdims=True), ml_dtypes.finfo(packed.scale.dtype).eps
    np.testing.assert_allclose(scale, largest / 448, rtol=eps)
    held, numbers = packed.data.astype(np.float64), every_float8()
    assert np.isin(held, numbers).all()
    # No other number is nearer, but for what float32 rounds off.
    least = np.concatenate(
        [np.abs(wide[i : i + 1] / scale[i] - numbers[:, None]).min(axis=0) for i in range(shape[0])]
    ).reshape(shape)
    assert (np.abs(wide / scale - held) <= least + 1e-6 * np.abs(held)).all()
    # Half a step of 3 bits: a sixteenth of the number, or half of the smallest number.
    error = np.abs(dequantize(packed) - wide)
    inside = np.abs(wide) <= 448 * scale
    bound = np.maximum(np.abs(wide) / 16, scale * 2.0**-10) * (1 + 1e-6)
    assert (error <= bound)[inside].all()
    rounded = (matrix.astype(np.float32) / packed.scale.astype(np.float32)).clip(-448, 448)
    np.testing.assert_array_equal(held, rounded.astype(ml_dtypes.float8_e4m3fn).astype(float))


@pytest.mark.backend_free
def test_float8_holds_its_own_numbers_exactly():
    numbers = every_float8()
    assert len(numbers) == 253
    matrix = (numbers[None] * np.float32([[0.25], [3.0]])).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(matrix, SCHEMES["float8"])), matrix)


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_int4_is_nowhere_worse_than_q4_0(dtype, seed):
    matrix = gaussian((256, 1024), "float32", seed)
    ours = dequantize(quantize(matrix, Scheme(bits=4, group_size=32, scale_dtype=dtype)))
    ours, theirs = ((found - matrix) ** 2 for found in (ours, q4_0(matrix)))
    assert ours.sum() <= 0.92 * theirs.sum()
    if dtype == "float16":  # the same scales can be chosen; Q4_0 rounds by the unrounded one
        by_group = [e.reshape(-1, 32).sum(axis=1) for e in (ours, theirs)]
        assert (by_group[0] <= by_group[1] * 1.001).all()


@pytest.mark.backend_free
@each_scheme
def test_zeros_and_the_largest_numbers_survive(scheme):
    assert not dequantize(quantize(np.zeros((3, 64), np.float32), scheme)).any()
    matrix = np.zeros((2, 64), np.float32)
    matrix[0, 3], matrix[1, 5] = 3e38, -1e-30
    found = dequantize(quantize(matrix, scheme))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, matrix, rtol=0.01)


@pytest.mark.backend_free
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_an_error(bad):
    matrix = gaussian((4, 32))
    matrix[2, 7] = bad
    with pytest.raises(ConfigError, match=r"model\.x holds NaN or infinite"):
        quantize(matrix, Scheme(bits=4), name="model.x")
    with pytest.raises(ConfigError, match=r"model\.x holds NaN or infinite"):
        quantize(matrix, SCHEMES["float8"], name="model.x")
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        quantize(np.zeros(3), Scheme(bits=8))


# Models


@each_scheme
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_dequantized_weights(scheme, scale_dtype, tied):
    model, reference = (tiny_model(tie_word_embeddings=tied, **SHAPE) for _ in range(2))
    before = logits(model)
    model.quantize(config=Scheme.parse(scheme, scale_dtype=scale_dtype))
    assert len(model.quantization()) == 15 + (not tied)
    for name, layer in reference.matrices().items():
        layer.weight.assign(dequantize(packed_of(model.matrices()[name])))
    expected = logits(reference)
    assert np.abs(logits(model) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(before - expected).max() > 1e-3


def test_keras_protocol_and_what_follows_it():
    model = tiny_model(**SHAPE)
    before = model.generate("Hello", max_new_tokens=4, sampler="greedy")
    model.compile(optimizer="sgd")
    model.predict(IDS, verbose=0)
    model.quantize("int8")
    assert model.lm_head.quantization_mode == "int8"
    assert {v.dtype for n, v in model.tensors().items() if n.endswith("proj.weight")} == {"int8"}
    assert all("proj.weight" not in v.path and "embed" not in v.path
               for v in model.trainable_variables)  # fmt: skip
    assert model.generate("Hello", max_new_tokens=4, sampler="greedy").startswith(before[:5])
    np.testing.assert_allclose(model.predict(IDS, verbose=0), logits(model), atol=1e-4)
    with pytest.raises(ConfigError, match="already quantized"):
        model.quantize("int4")
    with pytest.raises(ConfigError, match="before quantizing"):
        model.add_tokens(["<|new|>"])


def test_filters_widths_and_mistakes():
    model = tiny_model(**SHAPE)
    with pytest.raises(ConfigError, match="'int3'"):
        model.quantize("int3")
    with pytest.raises(ConfigError, match="expected 'int8', 'int4' or 'float8'"):
        model.quantize()
    with pytest.raises(ConfigError, match="a float8 scheme's group_size is 32"):
        model.quantize("float8", group_size=32)
    with pytest.raises(TypeError, match="group"):
        model.quantize("int4", group=32)
    with pytest.raises(ConfigError, match="none of 16 names"):
        model.quantize("int4", filters="qproj")
    assert not model.quantization()
    model.quantize("int4", group_size=64, filters="mlp", overrides={r"layers\.0\..*up": "int8"})
    found = model.quantization()
    assert len(found) == 6
    assert found["model.layers.0.mlp.up_proj"].bits == 8
    assert found["model.layers.0.mlp.gate_proj"].group_size == 64
    assert found["model.layers.0.mlp.down_proj"].group_size == 32  # of 96 inputs
    assert np.isfinite(logits(model)).all()
    model.quantize(overrides={"lm_head": "int8"})
    model.quantize("int8", filters=lambda layer: layer.name == "k_proj")
    assert len(model.quantization()) == 9


def test_kerass_own_quantize_reaches_the_layers():
    model = tiny_model(**SHAPE)
    inner = keras.Input((8,), dtype="int32")
    outer = keras.Model(inner, model.backbone(inner))
    with pytest.warns(UserWarning, match="RMSNorm does not have"):  # Keras's, of what stays
        outer.quantize("int8")
    assert len(model.backbone.quantization()) == 15
    layer = model.lm_head
    layer.quantize("int4", config=keras.quantizers.Int4QuantizationConfig(block_size=64))
    assert model.quantization()["lm_head"].group_size == 64
    with pytest.raises(ConfigError, match="already quantized"):
        layer.quantize("int8")


def test_kerass_float8_training_is_refused():
    model = tiny_model(**SHAPE)
    config = keras.quantizers.Float8QuantizationConfig()
    for call in (model.quantize, model.lm_head.quantize):
        with pytest.raises(ConfigError, match="which trains with scales of its own"):
            call("float8", config=config)
    assert not model.quantization()
    for policy in ("float8_from_mixed_bfloat16", "int8_from_float32"):
        with pytest.raises(ConfigError, match=f"'{policy}', of Keras's own quantization"):
            tiny_model(dtype=policy, **SHAPE)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float8_from_mixed_bfloat16")
    try:
        with pytest.raises(ConfigError, match="of Keras's own quantization"):
            Llama3Backbone(config=model.backbone.config)
    finally:
        keras.config.set_dtype_policy(before)


def test_a_weight_that_is_no_number_is_named():
    model = tiny_model(**SHAPE)
    model.backbone.transformer_layers[1].mlp.up_proj.weight.assign(np.full((96, 64), np.nan))
    with pytest.raises(ConfigError, match=r"layers_1/mlp/up_proj holds NaN"):
        model.quantize("int4")


@each_scheme
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_quantizes_to_the_same(tmp_path, scheme, dtype):
    model = tiny_model(dtype=dtype, **SHAPE)
    model.save_to_preset(tmp_path)
    loaded = CausalLM.from_preset(tmp_path, quantization=scheme)
    backbone = Llama3Backbone.from_preset(tmp_path, quantization=scheme)
    model.quantize(config=scheme)
    assert_same(loaded, model)
    assert_same(backbone, model.backbone)
    assert loaded.quantization() == model.quantization()
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_loading_with_other_widths_and_without_weights(tmp_path):
    model = tiny_model(tie_word_embeddings=True, **SHAPE)
    model.save_to_preset(tmp_path)
    loaded = CausalLM.from_preset(tmp_path, quantization={"mlp": "int4", "embed": "int8"})
    assert len(loaded.quantization()) == 7
    for name in ("int4", "float8"):
        empty = CausalLM.from_preset(tmp_path, load_weights=False, quantization=name)
        assert np.isfinite(logits(empty)).all()
        layer = empty.matrices()["model.layers.0.mlp.up_proj"]
        spread = dequantize(packed_of(layer)).std()
        assert spread == pytest.approx(layer.initializer_range, rel=0.1)
    with pytest.raises(ConfigError, match="'int5'"):
        CausalLM.from_preset(tmp_path, quantization="int5")


def test_a_checkpoint_with_numbers_that_are_none_is_refused(tmp_path):
    model = tiny_model(**SHAPE)
    model.lm_head.weight.assign(np.full(model.lm_head.weight.shape, np.inf))
    model.save_to_preset(tmp_path)
    with pytest.raises(PresetError, match=r"lm_head\.weight holds NaN or infinite"):
        CausalLM.from_preset(tmp_path, quantization="int8")


def test_a_keras_file_holds_it_too(tmp_path):
    model = tiny_model(dtype="bfloat16", **SHAPE)
    others = {"q_proj": "int8", "k_proj|embed": "float8", "up_proj": None}
    model.quantize("int4", symmetric=False, overrides=others)
    model.save(tmp_path / "model.keras")
    loaded = puna.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    assert loaded.quantization() == model.quantization()
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_what_is_not_quantized_can_be_trained():
    model = tiny_model(**SHAPE)
    model.quantize("int4", symmetric=False)
    before = {name: array(variable) for name, variable in model.tensors().items()}
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    losses = model.fit(["Hello there the world"] * 4, batch_size=2, epochs=6, verbose=0)
    assert losses.history["loss"][-1] < 0.8 * losses.history["loss"][0]
    for name, variable in model.tensors().items():
        trained = name.endswith(("norm.weight", "q_proj.bias", "v_proj.bias"))
        changed = not np.array_equal(before[name], array(variable))
        assert changed == trained or name.endswith("bias"), name
