"""The native kernels as calls inside programs that JAX compiles, with gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import keras
import numpy as np

from puna.backend.kernels.library import KINDS, library
from puna.backend.protocol import Tensor

_FLOATS = ("float32", "bfloat16", "float16")


@functools.cache
def _registered() -> bool:
    """Whether there are kernels for JAX's default device, known to XLA from here on."""
    if jax.default_backend() != "cpu" or (loaded := library()) is None:
        return False
    for name in ("puna_xla_linear", "puna_xla_linear_transposed"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def usable(x: Tensor, weights: Sequence[Tensor], out_dtype: str) -> bool:
    """Whether the kernels take this product.

    Not where Keras distributes arrays: XLA cannot cut a call into one for each device.
    """
    dtype = weights[0].dtype.name
    return (
        dtype in _FLOATS
        and out_dtype in _FLOATS
        and x.size > 0
        and all(weight.dtype.name == dtype for weight in weights)
        and keras.distribution.distribution() is None
        and _registered()
    )


def linears(x: Tensor, weights: Sequence[Tensor], out_dtype: str) -> tuple[Tensor, ...]:
    """`x` [..., in] times the transpose of each weight [out, in]."""
    return _linears(x, tuple(weights), out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linears(x: Tensor, weights: tuple[Tensor, ...], out_dtype: str) -> tuple[Tensor, ...]:
    shapes = [jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[0]), out_dtype) for w in weights]
    call = jax.ffi.ffi_call("puna_xla_linear", shapes, vmap_method="sequential")
    return tuple(call(x, *weights, parts=np.int64(1), group=np.int64(0), gated=np.int64(0)))


def _forward(x: Tensor, weights: tuple[Tensor, ...], out_dtype: str):
    return _linears(x, weights, out_dtype), (x, weights)


def _backward(out_dtype: str, kept, changes: tuple[Tensor, ...]):
    del out_dtype
    x, weights = kept
    back = [_transposed(dy, weight) for dy, weight in zip(changes, weights, strict=True)]
    dx = functools.reduce(jnp.add, back).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    # Frozen weights' gradients are used by nobody: XLA leaves them out.
    dws = tuple(
        (dy.reshape(-1, dy.shape[-1]).astype(jnp.float32).T @ rows).astype(weight.dtype)
        for dy, weight in zip(changes, weights, strict=True)
    )
    return dx, dws


_linears.defvjp(_forward, _backward)


def _transposed(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy` [..., out] times the weight: float32 [..., in]."""
    shape = jax.ShapeDtypeStruct((*dy.shape[:-1], weight.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("puna_xla_linear_transposed", shape, vmap_method="sequential")
    return call(dy, weight, parts=np.int64(1), group=np.int64(0))


def gated(x: Tensor, gate: Tensor, up: Tensor, out_dtype: str) -> Tensor:
    """`silu(x · gate) · (x · up)`, in one call."""
    return _gated(x, gate, up, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated(x: Tensor, gate: Tensor, up: Tensor, out_dtype: str) -> Tensor:
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], gate.shape[0]), out_dtype)
    call = jax.ffi.ffi_call("puna_xla_linear", shape, vmap_method="sequential")
    return call(x, gate, up, parts=np.int64(1), group=np.int64(0), gated=np.int64(1))


def _gated_forward(x: Tensor, gate: Tensor, up: Tensor, out_dtype: str):
    # Where gradients are wanted, what they need is kept.
    gate_out, up_out = _linears(x, (gate, up), out_dtype)
    silu, silu_gradient = jax.vjp(jax.nn.silu, gate_out)
    return silu * up_out, (x, gate, up, silu_gradient, silu, up_out)


def _gated_backward(out_dtype: str, kept, dy: Tensor):
    x, gate, up, silu_gradient, silu, up_out = kept
    (d_gate,) = silu_gradient(dy * up_out)
    dx, (dw_gate, dw_up) = _backward(out_dtype, (x, (gate, up)), (d_gate, dy * silu))
    return dx, dw_gate, dw_up


_gated.defvjp(_gated_forward, _gated_backward)

assert all(name in KINDS for name in _FLOATS)
