"""The native kernels as calls inside programs that JAX compiles, with gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from puna.backend.kernels.library import FLOATS, library
from puna.backend.packed import Packed
from puna.backend.protocol import BlockWeights, Tensor

Weight = Tensor | Packed
Arrays = tuple[Any, ...]  # of a weight: itself, or a packed one's data, scale and perhaps low


class _Call(NamedTuple):
    """What is fixed when a product is compiled."""

    out_dtype: str
    in_features: int
    group: int  # 0 where the weight is not packed


@functools.cache
def _registered() -> bool:
    """Whether there are kernels for JAX's default device, known to XLA from here on."""
    if jax.default_backend() != "cpu" or (loaded := library()) is None:
        return False
    for call in ("linear", "linear_transposed", "attention", "blocks"):
        name = f"puna_xla_{call}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def usable(x: Tensor, weights: Sequence[Weight], out_dtype: str) -> bool:
    """Whether the kernels take this product.

    Not where Keras distributes arrays: XLA cannot cut a call into one for each device.
    """
    kinds = {_kind(weight) for weight in weights}
    return (
        len(kinds) == 1
        and None not in kinds
        and x.dtype.name in FLOATS
        and out_dtype in FLOATS
        and x.size > 0
        and keras.distribution.distribution() is None
        and _registered()
    )


def _kind(weight: Weight) -> tuple[str, int, bool] | None:
    """What weights of one call have in common; None for what no kernel takes."""
    if isinstance(weight, Packed):
        return (weight.data.dtype.name, weight.group, weight.low is None)
    return (weight.dtype.name, 0, True) if weight.dtype.name in FLOATS else None


def linears(x: Tensor, weights: Sequence[Weight], out_dtype: str) -> tuple[Tensor, ...]:
    """`x` [..., in] times the transpose of each weight [out, in]."""
    return _linears(x, tuple(map(_arrays, weights)), _call(x, weights[0], out_dtype))


def gated(x: Tensor, gate: Weight, up: Weight, out_dtype: str) -> Tensor:
    """`silu(x · gate) · (x · up)`, in one call."""
    return _gated(x, (_arrays(gate), _arrays(up)), _call(x, gate, out_dtype))


def _arrays(weight: Weight) -> Arrays:
    return weight.arrays if isinstance(weight, Packed) else (weight,)


def _call(x: Tensor, weight: Weight, out_dtype: str) -> _Call:
    return _Call(out_dtype, x.shape[-1], weight.group if isinstance(weight, Packed) else 0)


def _run(x: Tensor, weights: tuple[Arrays, ...], call: _Call, gated: bool = False):
    outs = [arrays[0].shape[0] for arrays in weights[: 1 if gated else None]]
    shapes = [jax.ShapeDtypeStruct((*x.shape[:-1], out), call.out_dtype) for out in outs]
    flat = [array for arrays in weights for array in arrays]
    return jax.ffi.ffi_call("puna_xla_linear", shapes, vmap_method="sequential")(
        x, *flat, parts=np.int64(len(weights[0])), group=np.int64(call.group), gated=np.int64(gated)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linears(x: Tensor, weights: tuple[Arrays, ...], call: _Call) -> tuple[Tensor, ...]:
    return tuple(_run(x, weights, call))


def _forward(x: Tensor, weights: tuple[Arrays, ...], call: _Call):
    return _linears(x, weights, call), (x, weights)


def _backward(call: _Call, kept, changes: tuple[Tensor, ...]):
    x, weights = kept
    back = [_transposed(dy, arrays, call) for dy, arrays in zip(changes, weights, strict=True)]
    dx = functools.reduce(jnp.add, back).astype(x.dtype)
    pairs = zip(changes, weights, strict=True)
    return dx, tuple(_weight_gradients(x, dy, arrays) for dy, arrays in pairs)


def _weight_gradients(x: Tensor, dy: Tensor, arrays: Arrays) -> Arrays:
    """Of a float weight; XLA leaves it out where nobody uses it. Packed weights are frozen."""
    if len(arrays) > 1:
        data, *others = arrays
        return (np.zeros(data.shape, jax.dtypes.float0), *map(jnp.zeros_like, others))
    weight: Any = next(iter(arrays))
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    changes = dy.reshape(-1, dy.shape[-1]).astype(jnp.float32)
    return ((changes.T @ rows).astype(weight.dtype),)


def _transposed(dy: Tensor, arrays: Arrays, call: _Call) -> Tensor:
    """`dy` [..., out] times the weight: float32 [..., in]."""
    shape = jax.ShapeDtypeStruct((*dy.shape[:-1], call.in_features), jnp.float32)
    return jax.ffi.ffi_call("puna_xla_linear_transposed", shape, vmap_method="sequential")(
        dy, *arrays, parts=np.int64(len(arrays)), group=np.int64(call.group)
    )


_linears.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(x: Tensor, weights: tuple[Arrays, Arrays], call: _Call) -> Tensor:
    return _run(x, weights, call, gated=True)[0]


def _gated_forward(x: Tensor, weights: tuple[Arrays, Arrays], call: _Call):
    # Where gradients are wanted, what they need is kept.
    gate, up = _run(x, weights, call)
    return jax.nn.silu(gate) * up, (x, weights, gate, up)


def _gated_backward(call: _Call, kept, dy: Tensor):
    x, weights, gate, up = kept
    vjp: Any = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    return _backward(call, (x, weights), vjp[1](dy))


_gated.defvjp(_gated_forward, _gated_backward)


# Up to so many new tokens of a row are attended to by the kernel; more, as XLA does it.
_MOST_TOKENS = 8


def attends(projected: Sequence[Tensor], cache: Sequence[Tensor]) -> bool:
    """Whether the kernel takes these new tokens."""
    return (
        projected[0].shape[1] <= _MOST_TOKENS
        and projected[0].dtype.name in FLOATS
        and cache[0].dtype.name in ("float32", "uint16", "float16")
        and cache[0].shape[3] % 16 == 0
        and keras.distribution.distribution() is None
        and _registered()
    )


def takes_blocks(blocks: Sequence[BlockWeights]) -> bool:
    """Whether one call takes new tokens through all blocks, where `attends` says so too."""
    kinds = {norm.dtype.name for block in blocks for norm in block.norms}
    matrices = (matrix for block in blocks for matrix in block.matrices)
    return len(kinds) == 1 and kinds <= {*FLOATS} and all(_kind(m) is not None for m in matrices)


def call_blocks(
    blocks: Sequence[BlockWeights],
    epsilon: float,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Sequence[tuple[Tensor, Tensor]],
    start_B: Tensor,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """See `BackendOps.call_blocks`."""
    B, T, _ = x_BTD.shape
    tables = (jnp.broadcast_to(a[:, 0], (B, T, a.shape[-1])) for a in rotary)
    arguments = [x_BTD, *tables, start_B.astype(jnp.int32)]
    aliases, shapes = {0: 0}, [jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)]
    matrices = [matrix for block in blocks for matrix in block.matrices]
    for block, layer in zip(blocks, cache, strict=True):
        arguments += [*block.norms, *(a for matrix in block.matrices for a in _arrays(matrix))]
        for array in layer:
            aliases[len(arguments)] = len(shapes)
            arguments.append(array)
            shapes.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
    x_BTD, *new = jax.ffi.ffi_call("puna_xla_blocks", shapes, input_output_aliases=aliases)(
        *arguments,
        parts=np.array([len(_arrays(matrix)) for matrix in matrices], np.int64),
        groups=np.array([getattr(matrix, "group", 0) for matrix in matrices], np.int64),
        epsilon=np.float32(epsilon),
    )
    return x_BTD, list(zip(new[::2], new[1::2], strict=True))


def attend(
    projected: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    start_B: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `BackendOps.attend`."""
    query = projected[0]
    B, T, _ = query.shape
    tables = (jnp.broadcast_to(a[:, 0], (B, T, a.shape[-1])) for a in rotary)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (query, *cache)]
    call = jax.ffi.ffi_call("puna_xla_attention", shapes, input_output_aliases={6: 1, 7: 2})
    out, keys, values = call(*projected, *tables, start_B.astype(jnp.int32), *cache)
    return out, (keys, values)
