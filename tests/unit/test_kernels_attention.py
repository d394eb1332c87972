"""Attention in one native call, and torch's native norm, against what they stand for."""

import keras
import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.backend.kernels.library import library
from puna.layers.cache import LayerCache

pytestmark = [
    pytest.mark.skipif(library() is None, reason="the kernels are not built, or off"),
    pytest.mark.skipif(backend.name == "tensorflow", reason="there its cache cannot be written to"),
]
B, K, S, H = 3, 2, 64, 32


def random(rng, *shape):
    return ops.convert_to_tensor(rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("T", [1, 4])
def test_attention_equals_the_plain_one(T, group, cache_dtype):
    rng = np.random.default_rng(T)
    projected = [random(rng, B, T, heads * H) for heads in (group * K, K, K)]
    rotary = (random(rng, B, 1, T, H), random(rng, B, 1, T, H))
    old = [rng.standard_normal((B, K, S, H)).astype(np.float32) for _ in range(2)]
    starts = np.array([0, 17, S - T], np.int32)
    stored = backend.ops.cache_dtype("float32", cache_dtype)

    def cache():
        empty = LayerCache(*(backend.ops.zeros((B, K, S, H), stored) for _ in range(2)))
        zero = backend.ops.place(ops.zeros(B, "int32"), S, S)
        return empty.write(*map(ops.convert_to_tensor, old), zero)

    def native(start_B, *arrays):
        place = backend.ops.place(start_B, T, S)
        attended = backend.ops.attend(projected, rotary, arrays, place)
        assert attended is not None
        return attended

    def plain(start_B, *arrays):
        place = backend.ops.place(start_B, T, S)
        query, key, value = (backend.ops.split_heads(x, H) for x in projected)
        query, key = (backend.ops.rotate(x, *rotary) for x in (query, key))
        new = LayerCache(*arrays).write(key, value, place)
        out = backend.ops.attention(
            query, *new.read(place.live, "float32"), place.mask_B1TS, H**-0.5
        )
        return backend.ops.merge_heads(out), tuple(new)

    results = []
    for function in (native, plain):
        step = backend.ops.compile_step(function, [])
        out, new = step(backend.ops.to_device(starts), *cache())
        results.append([numpy(a) for a in (out, *LayerCache(*new).read(S, "float32"))])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(
            found, expected, rtol=1e-2, atol=2e-2 if "16" in cache_dtype else 2e-5
        )
    if cache_dtype == "float32":
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-5, atol=2e-5)


def numpy(array):
    return ops.convert_to_numpy(ops.cast(array, "float32"))


def test_scores_far_apart_are_as_good():
    """Weights that vanish, and ones that are all there is."""
    query = ops.convert_to_tensor(np.full((1, 1, 32), 30.0, np.float32))
    rotary = tuple(ops.convert_to_tensor(np.full((1, 1, 1, 32), x, np.float32)) for x in (1.0, 0.0))
    keys = np.zeros((1, 1, 16, 32), np.float32)
    keys[0, 0, 1], keys[0, 0, 2] = 30.0, -30.0
    values = np.arange(16, dtype=np.float32)[None, None, :, None] * np.ones((1, 1, 16, 32))

    def native(start_B, keys, values):
        zero = ops.zeros((1, 1, 32))
        place = backend.ops.place(start_B, 1, 16)
        return backend.ops.attend([query, zero, zero], rotary, (keys, values), place)

    arrays = [ops.convert_to_tensor(a.astype(np.float32)) for a in (keys, values)]
    start = backend.ops.to_device(np.array([9], np.int32))
    out, _ = backend.ops.compile_step(native, [])(start, *arrays)
    np.testing.assert_allclose(numpy(out), np.ones((1, 1, 32)), rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [7, 64, 577])
def test_torchs_norm(width, dtype):
    from puna.backend.kernels import torch_calls

    rng = np.random.default_rng(0)
    x, weight = (ops.cast(random(rng, *shape), dtype) for shape in ((2, 3, width), (width,)))
    found = torch_calls.rms_norm(x, weight, 1e-5)
    assert found is not None
    expected = ops.rms_normalization(
        ops.cast(x, "float32"), ops.cast(weight, "float32"), epsilon=1e-5
    )
    tolerance = 2**-8 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(numpy(found), numpy(expected), rtol=tolerance, atol=1e-6)
