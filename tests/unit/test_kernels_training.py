"""The native kernels of training against NumPy in float64."""

import ctypes
from typing import Any

import numpy as np
import pytest

from puna.backend.kernels import library as kernels
from tests.native import FLOATS, LIBRARY

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="the kernels are not built, or off"),
    pytest.mark.backend_free,
]

THREADS = ctypes.byref(kernels.Threads(None, None, 2))
WIDTHS = (1, 7, 16, 33, 600)


def call(name: str, *arguments: Any) -> None:
    """Arrays are given by their addresses."""
    assert LIBRARY is not None
    given = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    why = getattr(LIBRARY, name)(THREADS, *given)
    assert why is None, why


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits, labels, weights, gradient=True):
    changed, losses, highest = logits.copy(), *np.zeros((2, len(logits)), np.float32)
    call(
        "puna_cross_entropy", changed, *logits.shape, labels, weights, int(gradient), losses,
        highest,
    )  # fmt: skip
    return losses, highest, changed


@pytest.mark.parametrize("width", [*WIDTHS, 50_000])
def test_cross_entropy_equals_float64(width, each_instruction_set):
    rng = np.random.default_rng(width)
    logits = (rng.standard_normal((9, width)) * 10).astype(np.float32)
    logits[1, width // 2 :] = -np.inf
    labels = rng.integers(0, max(1, width // 2), 9)
    weights = rng.random(9).astype(np.float32)
    weights[2] = 0
    shares = softmax(logits.astype(np.float64)) if width > 1 else np.ones((9, 1))
    if width == 1:
        logits[1] = 3
    expected = -np.log(shares[np.arange(9), labels]) * weights

    for gradient in (True, False):
        losses, highest, changed = cross_entropy(logits, labels, weights, gradient)
        np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=4e-6)
        assert (highest == logits.max(axis=1)).all()
        if gradient:
            shares[np.arange(9), labels] -= 1
            np.testing.assert_allclose(changed, shares * weights[:, None], rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 36])
def test_a_row_that_is_not_finite_has_no_loss(bad, place, each_instruction_set):
    logits, labels = np.zeros((2, 37), np.float32), np.array([5, 5])
    logits[1, place] = bad
    losses, highest, changed = cross_entropy(logits, labels, np.ones(2, np.float32))
    for found in (losses, highest, changed.sum(axis=1)):
        assert np.isfinite(found[0])
        assert np.isnan(found[1])


def test_a_label_beyond_the_logits_is_told():
    with pytest.raises(AssertionError, match="label"):
        cross_entropy(np.zeros((1, 4), np.float32), np.array([4]), np.ones(1, np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradients_of_gate_and_up_equal_float64(dtype, each_instruction_set):
    rng = np.random.default_rng(1)
    gate, up, dy = rng.standard_normal((3, 40_001)).astype(FLOATS[dtype])
    gate[:3] = 90, -90, 0
    d_gate, d_up = np.zeros_like(gate), np.zeros_like(up)
    call("puna_gate_back", gate, up, dy, kernels.KINDS[dtype], gate.size, d_gate, d_up)

    gate, up, dy = (a.astype(np.float64) for a in (gate, up, dy))
    sigmoid = 1 / (1 + np.exp(-gate))
    error = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(
        d_gate.astype(np.float64), dy * up * sigmoid * (1 + gate * (1 - sigmoid)), error, error
    )
    np.testing.assert_allclose(d_up.astype(np.float64), dy * gate * sigmoid, error, error)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_and_its_gradient_equal_float64(width, dtype, each_instruction_set):
    rng = np.random.default_rng(width)
    x, dy = rng.standard_normal((2, 70, width)).astype(FLOATS[dtype])
    weight = rng.standard_normal(width).astype(np.float32)
    y, dx = np.zeros_like(x), np.zeros_like(x)
    norm = (x, kernels.KINDS[dtype], weight, kernels.KINDS["float32"], 0.1, len(x), width)
    call("puna_rms_norm", *norm, y)
    call("puna_rms_norm_back", *norm, dy, dx)

    x, dy = x.astype(np.float64), dy.astype(np.float64)
    root = np.sqrt((x**2).mean(axis=1, keepdims=True) + np.float32(0.1))
    error = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(y.astype(np.float64), x / root * weight, error, error)
    along = (x / root * weight * dy).mean(axis=1, keepdims=True)
    expected = (weight * dy - x / root * along) / root
    size = np.abs(weight * dy / root).max(axis=1, keepdims=True)
    assert (np.abs(dx.astype(np.float64) - expected) <= error * (np.abs(expected) + size)).all()
