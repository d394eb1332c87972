"""What the layers ask of a backend, against NumPy, and what torch's own ways must keep to."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.layers.linear import Linear

# Of the largest value: sums are in float32, and a bfloat16 result is rounded once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}
on_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own way")


def random(*shape, dtype="float32", seed=0):
    """A tensor, and the same numbers in float64."""
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array = array.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
    return ops.cast(ops.convert_to_tensor(array), dtype), array.astype(np.float64)


def numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32")).astype(np.float64)


def assert_close(found, expected, dtype="float32", tolerance=None):
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    assert tuple(found.shape) == expected.shape
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    assert np.abs(numpy(found) - expected).max() <= tolerance * np.abs(expected).max()


def without_gradients(function, *args):
    return backend.ops.compile_step(function, [])(*args)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_linear(rows, dtype, out_dtype):
    x, x_array = random(1, rows, 40, dtype=dtype)
    weight, weight_array = random(300, 40, dtype=dtype, seed=1)
    found = without_gradients(lambda x, w: backend.ops.linear(x, w, out_dtype), x, weight)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[out_dtype]) * 2
    assert_close(found, x_array @ weight_array.T, out_dtype, tolerance)


def test_linear_takes_x_in_the_weights_dtype():
    x, x_array = random(2, 5, 16)
    weight, weight_array = random(8, 16, dtype="bfloat16", seed=1)
    rounded = x_array.astype(ml_dtypes.bfloat16).astype(np.float64)
    found = backend.ops.linear(x, weight, "bfloat16")
    assert_close(found, rounded @ weight_array.T, "bfloat16", 2 * TOLERANCE["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_has_gradients(dtype):
    layer = Linear(6, 5, dtype=dtype)
    layer.build()
    model = keras.Sequential([keras.Input((9, 6)), layer])
    x, x_array = random(2, 9, 6, dtype=dtype)
    target = np.zeros((2, 9, 5), np.float32)
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    weight = numpy(layer.weight.value)
    model.fit(ops.convert_to_numpy(x), target, batch_size=2, epochs=1, verbose=0, shuffle=False)
    y = x_array @ weight.T
    gradient = np.einsum("btf,btd->fd", 2 * y / y.size, x_array)
    found = weight - numpy(layer.weight.value)
    assert np.abs(found - gradient).max() <= (1e-6 if dtype == "float32" else 2e-3)


@on_torch
@pytest.mark.parametrize("width", [40, 600])
def test_linear_by_blocks_equals_the_whole(width):
    import torch

    from puna.backend import torch_linear

    for rows, out in ((1, 1), (5, 127), (130, 1000), (2, 2000)):
        x, x_array = random(rows, width)
        weight, weight_array = random(out, width, dtype="bfloat16", seed=1)
        assert_close(torch_linear._linear_by_blocks(x, weight), x_array @ weight_array.T)
    with torch.inference_mode():
        torch_linear._linear_by_blocks(*(random(300, 700)[0] for _ in range(2)))
    torch_linear._linear_by_blocks(*(random(300, 700)[0] for _ in range(2)))


@on_torch
def test_linear_by_blocks_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    from puna.backend import torch_linear

    def product(seed):
        x, x_array = random(5, 64, seed=seed)
        weight, weight_array = random(500, 64, dtype="bfloat16", seed=seed + 100)
        assert_close(torch_linear._linear_by_blocks(x, weight), x_array @ weight_array.T)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(product, range(32)))


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype, weight_dtype):
    x, x_array = random(2, 3, 24, dtype=dtype)
    weight, weight_array = random(24, dtype=weight_dtype, seed=1)
    mean = (x_array**2).mean(-1, keepdims=True)
    expected = x_array / np.sqrt(mean + 1e-3) * weight_array
    assert_close(backend.ops.rms_norm(x, weight, 1e-3), expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_silu(dtype):
    x, array = random(3, 50, dtype=dtype)
    assert_close(backend.ops.silu(x), array / (1 + np.exp(-array)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotate(dtype):
    x, array = random(2, 3, 5, 8, dtype=dtype)
    cos, cos_array = random(2, 1, 5, 8, seed=1)
    sin, sin_array = random(2, 1, 5, 8, seed=2)
    expected = array * cos_array + np.roll(array, 4, -1) * sin_array
    assert_close(backend.ops.rotate(x, cos, sin), expected, dtype)


def test_heads_are_split_and_merged():
    x, array = random(2, 3, 8)
    heads = backend.ops.split_heads(x, 2)
    assert_close(heads, array.reshape(2, 3, 4, 2).transpose(0, 2, 1, 3))
    assert_close(backend.ops.merge_heads(heads), array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_attention(T, K, masked, dtype):
    N, S, H = 4, 23, 8
    query, q = random(2, N, T, H, dtype=dtype)
    key, k = random(2, K, S, H, dtype=dtype, seed=1)
    value, v = random(2, K, S, H, dtype=dtype, seed=2)
    mask = np.random.default_rng(3).random((2, 1, T, S)) < 0.5
    mask[..., 0] = True
    k, v = (np.repeat(a, N // K, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) * 0.3
    weights = np.exp(np.where(mask, scores, -np.inf) if masked else scores)
    weights /= weights.sum(-1, keepdims=True)
    given = ops.convert_to_tensor(mask) if masked else None
    found = backend.ops.attention(query, key, value, given, 0.3)
    # In half precision, scores and weights may be rounded too.
    assert_close(found, weights @ v, dtype, 2**-5 if dtype == "bfloat16" else None)


@pytest.mark.parametrize(
    ("starts", "T"), [([0], 3), ([5], 1), ([2, 2], 1), ([2, 2], 4), ([0, 7], 1), ([6, 1, 3], 4)]
)
def test_place_and_cache_write(starts, T):
    B, K, S, H = len(starts), 2, 12, 4
    start_B = ops.convert_to_tensor(np.array(starts, np.int32))
    cache, expected = random(B, K, S, H)
    new, new_array = random(B, K, T, H, seed=1)
    place = backend.ops.place(start_B, T, S)
    may_look = np.arange(S) <= (np.array(starts)[:, None] + np.arange(T))[:, :, None]
    mask = place.mask_B1TS
    seen = np.ones((B, T, place.live), bool)
    if mask is not None:
        seen &= ops.convert_to_numpy(mask)[:, 0]
    assert not may_look[..., place.live :].any()
    assert (seen == may_look[..., : place.live]).all()
    written = backend.ops.cache_write(cache, new, place.write)
    for row, start in enumerate(starts):
        expected[row, :, start : start + T] = new_array[row]
    assert_close(written, expected)


def test_value_is_what_keras_says():
    variable = keras.Variable(np.arange(3, dtype=np.float32))
    assert_close(backend.ops.value(variable), np.arange(3.0))
    assert_close(backend.ops.value(variable, "bfloat16"), np.arange(3.0), "bfloat16")
    other = ops.convert_to_tensor(np.ones(3, np.float32))
    with keras.StatelessScope(state_mapping=[(variable, other)]):
        assert_close(backend.ops.value(variable), np.ones(3))
    with keras.src.backend.common.variables.AutocastScope("bfloat16"):
        assert_close(backend.ops.value(variable), np.arange(3.0), "bfloat16")
    variable.assign(np.zeros(3, np.float32) + 2)
    assert_close(backend.ops.value(variable), np.full(3, 2.0))
    variable._value = other  # as loading and resizing do
    assert_close(backend.ops.value(variable), np.ones(3))


@on_torch
def test_value_is_symbolic_where_keras_works_without_memory():
    import torch

    variable = keras.Variable(np.arange(3, dtype=np.float32))
    with keras.src.backend.torch.core.device_scope("meta"):
        assert backend.ops.value(variable).device == torch.device("meta")
