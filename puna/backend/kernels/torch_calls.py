"""The native kernels on torch tensors, on torch's own threads, with gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from puna.backend.kernels.library import FLOATS, KINDS, Attention, Matrix, Threads, library
from puna.backend.packed import Packed
from puna.backend.protocol import Place
from puna.errors import BackendError

_KINDS = {getattr(torch, name): kind for name, kind in KINDS.items()}
_FLOATS = tuple(getattr(torch, name) for name in FLOATS)


def usable(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: torch.dtype
) -> bool:
    """Whether the kernels take this product; a program that torch compiles cannot look inside."""
    kind = _kind(weights[0])
    return (
        kind is not None
        and x.is_cpu
        and x.dtype in _FLOATS
        and out_dtype in _FLOATS
        and all(_kind(weight) == kind for weight in weights)
        and library() is not None
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    )


def _kind(weight: torch.Tensor | Packed) -> tuple[torch.dtype, int, bool] | None:
    """What weights of one call have in common; None for what no kernel takes."""
    if isinstance(weight, Packed):
        return (weight.data.dtype, weight.group, weight.low is None) if weight.data.is_cpu else None
    if weight.dtype not in _FLOATS or not weight.is_cpu or not weight.is_contiguous():
        return None
    return weight.dtype, 0, True


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """`x` [..., in] times the transpose of each weight [out, in]."""
    if _wants_gradients(x, *weights):
        return tuple(_apply(x, weight, out_dtype) for weight in weights)
    return _call(x, weights, out_dtype)


def gated(
    x: torch.Tensor,
    gate: torch.Tensor | Packed,
    up: torch.Tensor | Packed,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`silu(x · gate) · (x · up)`, in one call where no gradient is wanted."""
    if _wants_gradients(x, gate, up):
        gate_out, up_out = linears(x, (gate, up), out_dtype)
        return torch.nn.functional.silu(gate_out) * up_out
    return _call(x, (gate, up), out_dtype, gated=1)[0]


def _wants_gradients(*tensors: torch.Tensor | Packed) -> bool:
    return torch.is_grad_enabled() and any(
        not isinstance(tensor, Packed) and tensor.requires_grad for tensor in tensors
    )


def _apply(x: torch.Tensor, weight: torch.Tensor | Packed, out_dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, Packed):
        return _PackedLinear.apply(x, weight, out_dtype)
    return _Linear.apply(x, weight, out_dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype):
        ctx.save_for_backward(x, weight)
        return _call(x, (weight,), out_dtype)[0]

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor):
        x, weight = ctx.saved_tensors
        dy = changes[0].contiguous()
        dx = _transposed(dy, weight, x.dtype) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1]).float()
            dw = (dy.reshape(-1, dy.shape[-1]).float().t() @ rows).to(weight.dtype)
        return dx, dw, None


class _PackedLinear(torch.autograd.Function):
    """The weights are frozen: only the gradient by the rows is needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Packed, out_dtype: torch.dtype):
        ctx.weight, ctx.dtype = weight, x.dtype
        return _call(x, (weight,), out_dtype)[0]

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor):
        return _transposed(changes[0].contiguous(), ctx.weight, ctx.dtype), None, None


def _call(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | Packed],
    out_dtype: torch.dtype,
    gated: int = 0,
) -> tuple[torch.Tensor, ...]:
    loaded = library()
    assert loaded is not None
    x = x.contiguous()
    width, leading = x.shape[-1], x.shape[:-1]
    results = tuple(
        torch.empty((*leading, weight.shape[0]), dtype=out_dtype)
        for weight in (weights[:1] if gated else weights)
    )
    matrices = (Matrix * len(weights))(*map(_matrix, weights))
    pointers = (ctypes.c_void_p * len(results))(*(y.data_ptr() for y in results))
    why = loaded.puna_linear(
        ctypes.byref(_threads(torch.get_num_threads())), x.data_ptr(), _KINDS[x.dtype],
        x.numel() // width, matrices, len(weights), pointers, _KINDS[out_dtype], gated,
    )  # fmt: skip
    if why is not None:
        raise BackendError(why.decode())
    return results


def _transposed(
    dy: torch.Tensor, weight: torch.Tensor | Packed, dtype: torch.dtype
) -> torch.Tensor:
    """`dy` [..., out] times the weight [out, in]."""
    loaded = library()
    assert loaded is not None
    dx = torch.empty((*dy.shape[:-1], weight.shape[1]), dtype=dtype)
    why = loaded.puna_linear_transposed(
        ctypes.byref(_threads(torch.get_num_threads())), dy.data_ptr(), _KINDS[dy.dtype],
        dy.numel() // dy.shape[-1], ctypes.byref(_matrix(weight)), dx.data_ptr(), _KINDS[dtype],
    )  # fmt: skip
    if why is not None:
        raise BackendError(why.decode())
    return dx


def _matrix(weight: torch.Tensor | Packed) -> Matrix:
    """The weight as the library takes it; kept with its tensor while that has the same memory."""
    packed = isinstance(weight, Packed)
    owner = weight.data if packed else weight
    data = owner.data_ptr()
    matrix = getattr(owner, "_puna_matrix", None)
    if matrix is not None and matrix.data == data and not packed:
        return matrix
    out_features, in_features = weight.shape
    if packed:
        low = None if weight.low is None else weight.low.data_ptr()
        return Matrix(
            data, weight.scale.data_ptr(), low, out_features, in_features, weight.group,
            _KINDS[owner.dtype], _KINDS[weight.scale.dtype],
        )  # fmt: skip
    matrix = Matrix(
        data, None, None, out_features, in_features, in_features, _KINDS[owner.dtype], 0
    )
    weight._puna_matrix = matrix  # type: ignore[attr-defined]
    return matrix


# Up to so many numbers are normalised here; more, by torch's threads.
_MOST_NUMBERS = 1 << 15


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor | None:
    """See `BackendOps.rms_norm`; None where torch shall do it."""
    if (
        x.numel() > _MOST_NUMBERS
        or not x.is_cpu
        or x.dtype not in _FLOATS
        or weight.dtype not in _FLOATS
        or not x.is_contiguous()
        or (loaded := library()) is None
        or torch.compiler.is_compiling()
        or _wants_gradients(x, weight)
    ):
        return None
    y, width = torch.empty_like(x), x.shape[-1]
    loaded.puna_rms_norm(
        x.data_ptr(), _KINDS[x.dtype], weight.data_ptr(), _KINDS[weight.dtype], epsilon,
        x.numel() // width, width, y.data_ptr(),
    )  # fmt: skip
    return y


# Up to so many new tokens of a row are attended to by the kernel; more, as torch does it.
_MOST_TOKENS = 8


def attend(
    projected: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    place: Place,
) -> torch.Tensor | None:
    """See `BackendOps.attend`; the cache is written to."""
    query, (keys, values) = projected[0], cache
    B, T, features = query.shape
    if (
        T > _MOST_TOKENS
        or not query.is_cpu
        or query.dtype not in _FLOATS
        or keys.dtype not in _FLOATS
        or keys.shape[3] % 16
        or (loaded := library()) is None
        or torch.compiler.is_compiling()
        or _wants_gradients(*projected)
    ):
        return None
    K, S, H = keys.shape[1:]
    # All of them are kept alive until the call is over.
    query, key, value = (array.contiguous() for array in projected)
    cos, sin = (table.expand(B, 1, T, H).contiguous() for table in rotary)
    starts = place.start_B.to(torch.int32).contiguous()
    out = torch.empty_like(query)
    attention = Attention(
        *(a.data_ptr() for a in (query, key, value, cos, sin, starts, keys, values, out)),
        B, T, features // H, K, H, S, H**-0.5, _KINDS[query.dtype], _KINDS[keys.dtype],
    )  # fmt: skip
    threads = ctypes.byref(_threads(torch.get_num_threads()))
    if (why := loaded.puna_attention(threads, ctypes.byref(attention))) is not None:
        raise BackendError(why.decode())
    return out


@functools.cache
def _threads(count: int) -> Threads:
    """Torch's own threads, where they are GNU OpenMP's; others of ours would fight them."""
    loaded = library()
    assert loaded is not None
    for folder in (
        Path(torch.__file__).parent / "lib",
        Path(torch.__file__).parents[1] / "torch.libs",
    ):
        for path in folder.glob("libgomp*.so*"):
            openmp = ctypes.CDLL(str(path))
            run, parallel = loaded.puna_run_gomp, openmp.GOMP_parallel
            return Threads(
                ctypes.cast(run, ctypes.c_void_p), ctypes.cast(parallel, ctypes.c_void_p), count
            )
    return Threads(None, None, count)
