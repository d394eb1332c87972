"""The native attention of whole sequences, and its gradients, against float64."""

import ctypes

import keras
import numpy as np
import pytest

from puna import backend
from puna.backend.kernels import library as kernels
from tests.native import FLOATS, LIBRARY

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels are not built, or off")

THREADS = ctypes.byref(kernels.Threads(None, None, 2))
# Of the greatest number: float32 and the halves, in which weights of attention are rounded too.
BOUNDS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 2e-3}
# Rows, heads of queries and of keys, tokens, size of a head, length of what is packed together.
SHAPES = [
    (1, 1, 1, 1, 4, 0),
    (2, 4, 2, 5, 16, 0),
    (1, 9, 3, 130, 64, 0),
    (2, 8, 8, 131, 40, 37),
    (1, 4, 1, 300, 128, 100),
]


def ranges(rows, tokens, packed):
    """What each token looks at: itself and those before it, or before it in its part."""
    places = np.arange(tokens, dtype=np.int32)
    firsts = places - places % packed if packed else np.zeros_like(places)
    firsts, lasts = (np.tile(a, (rows, 1)) for a in (firsts, places + 1))
    if tokens > 2:
        lasts[0, :2] = firsts[0, :2]  # they look at nothing
        firsts[0, 2:] = np.maximum(firsts[0, 2:], 2)
    return np.ascontiguousarray(firsts), np.ascontiguousarray(lasts)


def exact(query, key, value, firsts, lasts, scale, change):
    """The result and the gradients, in float64."""
    query, key, value, change = (a.astype(np.float64) for a in (query, key, value, change))
    B, N, _, H = query.shape
    K, S = key.shape[1:3]
    keys, values = (np.repeat(a, N // K, axis=1) for a in (key, value))
    places = np.arange(S)
    looks = (places >= firsts[:, :, None]) & (places < lasts[:, :, None])
    scores = np.where(looks[:, None], query @ keys.swapaxes(2, 3) * scale, -np.inf)
    most = np.where(looks.any(-1)[:, None], scores.max(-1), 0)
    weights = np.exp(scores - most[..., None])
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = weights @ values
    by_weights = change @ values.swapaxes(2, 3)
    by_scores = weights * (by_weights - (change * out).sum(-1, keepdims=True)) * scale

    def of_keys(a):
        return a.reshape(B, K, N // K, S, H).sum(2)

    return [
        out,
        by_scores @ keys,
        of_keys(by_scores.swapaxes(2, 3) @ query),
        of_keys(weights.swapaxes(2, 3) @ change),
    ]


def call(arrays, firsts, lasts, scale, change):
    query, key, value = arrays
    B, N, T, H = query.shape
    K, S = key.shape[1:3]
    out, sums = np.full_like(query, 7), np.full((B, N, T), 7, np.float32)
    changes = [np.full_like(a, 7) for a in arrays]
    given = [query, key, value, firsts, lasts, out, sums, change, *changes]
    attention = kernels.FullAttention(
        *[a.ctypes.data for a in given], B, T, N, K, H, S, scale, kernels.KINDS[query.dtype.name]
    )
    assert LIBRARY is not None
    for function in (LIBRARY.puna_full_attention, LIBRARY.puna_full_attention_back):
        if why := function(THREADS, ctypes.byref(attention)):
            return why.decode()
    return [out, *changes]


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_float64(shape, dtype, each_instruction_set):
    B, N, K, T, H, packed = shape
    rng = np.random.default_rng(T)
    query, key, value, change = (
        rng.standard_normal((B, heads, T, H)).astype(FLOATS[dtype]) for heads in (N, K, K, N)
    )
    firsts, lasts = ranges(B, T, packed)
    found = call((query, key, value), firsts, lasts, H**-0.5, change)
    wanted = exact(query, key, value, firsts, lasts, H**-0.5, change)
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(a.astype(np.float64) - b).max() <= BOUNDS[dtype] * np.abs(b).max() + 1e-7


@pytest.mark.backend_free
def test_scores_that_are_far_apart(each_instruction_set):
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((1, 2, 70, 16)).astype(np.float32) for _ in range(3))
    query[:, :, ::2] *= 1e4  # one place has all the weight, and the others' powers vanish
    firsts, lasts = ranges(1, 70, 0)
    found = call((query, key, value), firsts, lasts, 1.0, value)
    wanted = exact(query, key, value, firsts, lasts, 1.0, value)
    assert np.abs(found[0] - wanted[0]).max() < 1e-5
    for a in found:
        assert np.isfinite(a).all()


@pytest.mark.backend_free
def test_places_that_are_none_are_told(each_instruction_set):
    arrays = [np.zeros((1, 1, 3, 16), np.float32)] * 3
    firsts, lasts = ranges(1, 3, 0)
    said = "a token looks at places that are none"
    assert call(arrays, firsts, lasts + 1, 1.0, arrays[0]) == said
    assert call(arrays, firsts - 1, lasts, 1.0, arrays[0]) == said


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's training uses it")
@pytest.mark.parametrize("mask", ["causal", "padded", "packed", "holes", "none"])
def test_torch_takes_it_where_a_mask_has_ranges(mask):
    import torch

    from puna.backend import generic
    from puna.backend.kernels.torch_attention import full_attention

    torch.manual_seed(0)
    looks = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    if mask == "padded":
        looks[0, :, :, :5] = False
        looks[0, :, :5, :5] = torch.eye(5, dtype=torch.bool)
    elif mask == "packed":
        looks[:, :, 20:, :20] = False
    elif mask == "holes":
        looks[1, :, :, 3] = False
    arrays = [torch.randn(2, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2)]
    given = None if mask == "none" else looks
    taken = full_attention(*arrays, given, 0.25)
    assert (taken is None) == (mask in ("holes", "none"))
    ours = backend.ops.attention(*arrays, given, 0.25)
    wanted = generic.attention(*arrays, given, 0.25)
    seen = [torch.autograd.grad(out.square().sum(), arrays) for out in (ours, wanted)]
    for a, b in zip((ours, *seen[0]), (wanted, *seen[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
