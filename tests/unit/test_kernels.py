"""The native kernels against NumPy in float64, and against the backends' own products."""

import ctypes
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.backend.kernels import library as kernels
from puna.backend.packed import Packed
from tests.native import FLOATS, LIBRARY, weight

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels are not built, or off")

# Of the sum of the products' sizes. Beside quantized weights, rows of half precision become 16-bit
# whole numbers.
FLOAT_BOUND, WHOLE_BOUND = 4e-6, 3e-5
SIZES = [
    (1, 1, 0),
    (3, 5, 0),
    (33, 64, 32),
    (50, 257, 0),
    (97, 608, 32),
    (130, 640, 64),
    (9, 1153, 0),
    (5, 8930, 0),
    (3, 8928, 96),
]
# Groups of 16, as some blocks of GGUF have them: 8 bits without minima.
SIXTEENS = [(33, 64, 16), (10, 1200, 16)]


def multiply(x, weights, in_features, group=0, dtype="float32", gated=False, threads=2):
    assert LIBRARY is not None
    matrices = [kernels.matrix_of(arrays, in_features, group or in_features) for arrays in weights]
    outs = [arrays[0].shape[0] for arrays in weights[: 1 if gated else None]]
    results = [np.full((len(x), out), 7, FLOATS[dtype]) for out in outs]
    why = LIBRARY.puna_linear(
        ctypes.byref(kernels.Threads(None, None, threads)), x.ctypes.data,
        kernels.KINDS[x.dtype.name], len(x), (kernels.Matrix * len(matrices))(*matrices),
        len(matrices), (ctypes.c_void_p * len(outs))(*(y.ctypes.data for y in results)),
        kernels.KINDS[dtype], int(gated),
    )  # fmt: skip
    assert why is None, why
    return results


def multiply_back(dy, arrays, in_features, group=0):
    assert LIBRARY is not None
    dx = np.full((len(dy), in_features), 7, np.float32)
    matrix = kernels.matrix_of(arrays, in_features, group or in_features)
    why = LIBRARY.puna_linear_transposed(
        ctypes.byref(kernels.Threads(None, None, 2)), dy.ctypes.data, kernels.KINDS[dy.dtype.name],
        len(dy), ctypes.byref(matrix), dx.ctypes.data, 0,
    )  # fmt: skip
    assert why is None, why
    return dx


@pytest.mark.backend_free
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4", "float8"])
def test_products_and_their_gradients_equal_float64(kind, each_instruction_set):
    rng = np.random.default_rng(len(kind))
    quantized = kind in ("int8", "int4")
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 17, 100, 130):
        for out, in_features, group in SIZES + (SIXTEENS if kind == "int8" else []):
            group = 0 if kind == "float8" else group
            for low in (False, True) if quantized and group != 16 else (False,):
                half = list(FLOATS)[rng.integers(3)]
                arrays, values = weight(rng, kind, out, in_features, group, low, half)
                sizes = np.abs(values)
                if quantized:  # the parts that `low` adds, or 8 takes away, are summed apart
                    sizes = sizes + np.abs(values).max()
                x = rng.standard_normal((rows, in_features)).astype(FLOATS[half])
                exact = x.astype(np.float64)
                (found,) = multiply(x, [arrays], in_features, group)
                whole = quantized and half != "float32"
                bound = WHOLE_BOUND if whole else FLOAT_BOUND
                error = np.abs(found - exact @ values.T)
                assert (error <= bound * (np.abs(exact) @ sizes.T) + 1e-30).all()
                dy = rng.standard_normal((rows, out)).astype(FLOATS[half])
                exact = dy.astype(np.float64)
                error = np.abs(multiply_back(dy, arrays, in_features, group) - exact @ values)
                # A scale of some inputs alone leaves the transposed product to floats.
                whole = whole and kind == "int8" and not low and not group
                bound = WHOLE_BOUND if whole else FLOAT_BOUND
                assert (error <= bound * (np.abs(exact) @ sizes) + 1e-30).all()


@pytest.mark.backend_free
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4", "float8"])
def test_each_row_is_the_same_however_many_go_together(kind, each_instruction_set):
    rng = np.random.default_rng(1)
    group = 64 if "int" in kind else 0
    arrays, _ = weight(rng, kind, 97, 640, group)
    x = rng.standard_normal((8, 640)).astype(np.float32)
    (together,) = multiply(x, [arrays], 640, group)
    for row in range(8):
        (alone,) = multiply(x[row : row + 1], [arrays], 640, group, threads=1)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.backend_free
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4", "float8"])
def test_several_weights_in_one_call(kind, rows, each_instruction_set):
    rng = np.random.default_rng(2)
    (gate, gate_values), (up, up_values) = (weight(rng, kind, 97, 64) for _ in range(2))
    x = (rng.standard_normal((rows, 64)) * 0.1).astype(np.float32)
    gate_out, up_out = x @ gate_values.T, x @ up_values.T
    for found, expected in zip(multiply(x, [gate, up], 64), (gate_out, up_out), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    expected = gate_out / (1 + np.exp(-gate_out)) * up_out
    (found,) = multiply(x, [gate, up], 64, gated=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_to_the_nearest(dtype, each_instruction_set):
    rng = np.random.default_rng(3)
    arrays, _ = weight(rng, "float32", 64, 33)
    x = rng.standard_normal((3, 33)).astype(np.float32)
    x[2] = 1e-6  # subnormal results in float16
    (exact,) = multiply(x, [arrays], 33)
    (found,) = multiply(x, [arrays], 33, dtype=dtype)
    np.testing.assert_array_equal(found, exact.astype(FLOATS[dtype]))


@pytest.mark.backend_free
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(kind, bad, each_instruction_set):
    rng = np.random.default_rng(4)
    arrays, _ = weight(rng, kind, 5, 64, 32 if "int" in kind else 0)
    for rows in (2, 12):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        x[1, 3] = bad
        (found,) = multiply(x, [arrays], 64, 32)
        assert not np.isfinite(found[1]).any()
        assert np.isfinite(found[0]).all()


@pytest.mark.backend_free
def test_bad_arguments_are_told():
    rng = np.random.default_rng(5)
    arrays, _ = weight(rng, "int8", 5, 64, 32)
    with pytest.raises(AssertionError, match="multiple of 32"):
        multiply(np.ones((1, 64), np.float32), [arrays], 64, 48)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_equal_the_backends_own(kind, rows, monkeypatch):
    rng = np.random.default_rng(6)
    arrays, values = weight(rng, kind, 24, 64, 32 if "int" in kind else 0)
    x = ops.convert_to_tensor(rng.standard_normal((rows, 64)).astype(np.float32))
    if "int" in kind:
        matrix = Packed(*map(tensor, arrays), None, 64, 32)
    else:
        matrix = tensor(arrays[0])
        x = ops.cast(x, kind)
    dx, dw = gradients(x, matrix)
    size = np.abs(values).max()
    dy = 2 * (ops.convert_to_numpy(ops.cast(x, "float32")).astype(np.float64) @ values.T)
    # TensorFlow multiplies bfloat16 in it, and rounds what it goes on with.
    tolerance = 2**-6 if kind == "bfloat16" else 1e-4
    assert np.abs(dx - dy @ values).max() <= tolerance * np.abs(dy @ values).max() * size
    if dw is not None:
        expected = dy.T @ ops.convert_to_numpy(ops.cast(x, "float32")).astype(np.float64)
        assert np.abs(dw - expected).max() <= tolerance * np.abs(expected).max()


def tensor(array):
    made = ops.convert_to_tensor(array.astype(np.float32))
    return ops.cast(made, array.dtype.name)


def gradients(x, matrix):
    """Of the sum of the squares of `linear`, by x and by a float weight; float64 arrays."""

    def loss(x, w):
        return ops.sum(ops.square(backend.ops.linear(x, w, "float32")))

    packed = isinstance(matrix, Packed)
    if backend.name == "jax":
        import jax

        if packed:
            found = jax.jit(jax.grad(lambda x: loss(x, matrix)))(x), None
        else:
            found = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, matrix)
    elif backend.name == "torch":
        import torch

        x = x.detach().requires_grad_()
        if not packed:
            matrix = matrix.detach().requires_grad_()
        loss(x, matrix).backward()
        found = (x.grad, None if packed else matrix.grad)
        assert isinstance(x.grad, torch.Tensor)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            if not packed:
                tape.watch(matrix)
            value = loss(x, matrix)
        found = tape.gradient(value, [x] if packed else [x, matrix])
        found = (found[0], None) if packed else found
    return [
        None if g is None else ops.convert_to_numpy(ops.cast(g, "float32")).astype(np.float64)
        for g in found
    ]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("low", [False, True])
def test_packed_products_and_rows_equal_the_dequantized(kind, low):
    rng = np.random.default_rng(7)
    arrays, values = weight(rng, kind, 24, 96, 32, low)
    packed = Packed(*map(tensor, arrays), *(() if low else (None,)), 96, 32)
    x = rng.standard_normal((2, 5, 96)).astype(np.float32)
    step = backend.ops.compile_step(
        lambda x: (
            backend.ops.linear(x, packed, "float32"),
            backend.ops.gated(x, packed, packed, "float32"),
        ),
        [],
    )
    found, gated = map(ops.convert_to_numpy, step(ops.convert_to_tensor(x)))
    expected = x @ values.T
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max())
    silu = expected / (1 + np.exp(-expected))
    np.testing.assert_allclose(gated, silu * expected, atol=1e-4 * np.abs(expected).max() ** 2)
    ids = np.array([[3, 0, 23]], np.int32)
    rows = ops.convert_to_numpy(backend.ops.embed(packed, ops.convert_to_tensor(ids)))
    np.testing.assert_allclose(rows, values[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.backend_free
@pytest.mark.parametrize("wanted", ["off", "nonsense"])
def test_the_environment_decides(wanted):
    code = "from puna.backend.kernels.library import library; print(library())"
    environment = {"PUNA_KERNELS": wanted, "KERAS_BACKEND": keras.backend.backend()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if wanted == "off":
        assert done.stdout.split() == ["None"]
    else:
        assert "'nonsense' is not to be had here; expected avx512bf16, avx512, avx2" in done.stderr
