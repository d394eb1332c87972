"""The native kernels on torch tensors, on torch's own threads, with gradients."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from puna.backend.kernels.library import (
    FLOATS,
    KINDS,
    Attention,
    Block,
    Blocks,
    Matrix,
    Threads,
    library,
)
from puna.backend.packed import Packed
from puna.backend.protocol import BlockWeights, Place
from puna.errors import BackendError

KINDS_OF = {getattr(torch, name): kind for name, kind in KINDS.items()}
_POINTERS = [ctypes.c_void_p * count for count in range(9)]
_FLOATS = tuple(getattr(torch, name) for name in FLOATS)


class _Prepared(NamedTuple):
    """Weights as the library takes them, and the tensors' addresses that this is true for."""

    addresses: tuple[int, ...]
    matrices: Any  # of ctypes
    out_features: tuple[int, ...]


def takes(*tensors: torch.Tensor) -> bool:
    """Whether kernels can look at these; not where torch compiles or transforms what it runs."""
    return (
        all(tensor.is_cpu and tensor.dtype in _FLOATS for tensor in tensors)
        and library() is not None
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    )


def run(function: str, *arguments: Any) -> None:
    """Call a function of the library on torch's threads.

    Raises:
        BackendError: the library says why it cannot do it.
    """
    why = getattr(library(), function)(_threads(torch.get_num_threads()), *arguments)
    if why is not None:
        raise BackendError(why.decode())


def _prepare(weights: Sequence[torch.Tensor | Packed]) -> _Prepared | None:
    """Kept with the first weight's tensor for as long as all have the same memory."""
    first = weights[0]
    owner = first.data if isinstance(first, Packed) else first
    addresses = tuple(a.data_ptr() for weight in weights for a in _arrays(weight))
    prepared = getattr(owner, "_puna_prepared", None)
    if prepared is not None and prepared.addresses == addresses:
        return prepared
    kinds = {_kind(weight) for weight in weights}
    if len(kinds) > 1 or None in kinds:
        return None
    matrices = (Matrix * len(weights))(*map(_matrix, weights))
    prepared = _Prepared(addresses, matrices, tuple(int(weight.shape[0]) for weight in weights))
    owner._puna_prepared = prepared  # type: ignore[union-attr]
    return prepared


def _arrays(weight: torch.Tensor | Packed) -> tuple[torch.Tensor, ...]:
    return weight.arrays if isinstance(weight, Packed) else (weight,)


def _kind(weight: torch.Tensor | Packed) -> tuple[torch.dtype, int, bool] | None:
    """What weights of one call have in common; None for what no kernel takes."""
    if not all(a.is_cpu and a.is_contiguous() for a in _arrays(weight)):
        return None
    if isinstance(weight, Packed):
        return weight.data.dtype, weight.group, weight.low is None
    return (weight.dtype, 0, True) if weight.dtype in _FLOATS else None


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: torch.dtype
) -> tuple[torch.Tensor, ...] | None:
    """`x` [..., in] times the transpose of each weight [out, in]; None where torch shall do it."""
    if (prepared := _usable(x, weights, out_dtype)) is None:
        return None
    if not wants_gradients(x, *weights):
        return _call(x, prepared, out_dtype)
    if wants_gradients(*weights):
        return tuple(_Linear.apply(x, weight, out_dtype) for weight in weights)
    return _Frozen.apply(x, out_dtype, weights)


def gated(
    x: torch.Tensor,
    gate: torch.Tensor | Packed,
    up: torch.Tensor | Packed,
    out_dtype: torch.dtype,
) -> torch.Tensor | None:
    """`silu(x · gate) · (x · up)`, in one call where no gradient is wanted; else as `linears`."""
    if (prepared := _usable(x, (gate, up), out_dtype)) is None:
        return None
    if not wants_gradients(x, gate, up):
        return _call(x, prepared, out_dtype, gated=True)[0]
    results = linears(x, (gate, up), out_dtype)
    assert results is not None  # `_usable` has seen it
    return _Gated.apply(*results)


def _usable(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: torch.dtype
) -> _Prepared | None:
    """The weights for a call, where the kernels take this product."""
    return _prepare(weights) if out_dtype in _FLOATS and takes(x) else None


def wants_gradients(*tensors: torch.Tensor | Packed) -> bool:
    """Whether a gradient by one of these is to be known."""
    return torch.is_grad_enabled() and any(
        not isinstance(tensor, Packed) and tensor.requires_grad for tensor in tensors
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype):
        ctx.save_for_backward(x, weight)
        return _products(x, (weight,), out_dtype)[0]

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


class _Frozen(torch.autograd.Function):
    """Products with weights that are not trained: only the gradient by the rows is needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out_dtype: torch.dtype, weights: Any):
        ctx.weights, ctx.dtype = weights, x.dtype
        return _products(x, weights, out_dtype)

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor | None):
        dx = None
        for dy, weight in zip(changes, ctx.weights, strict=True):
            if dy is None:
                continue
            if isinstance(weight, Packed):  # as the rows were: of float32, it would be more work
                dy = dy.to(ctx.dtype)
            more = _transposed(dy.contiguous(), weight, ctx.dtype)
            dx = more if dx is None else dx.add_(more)
        return dx, None, None


class _Gated(torch.autograd.Function):
    """`silu(gate) · up`, whose gradients need no more than these two."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor):
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor):
        gate, up = ctx.saved_tensors
        dy = changes[0].contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        run(
            "puna_gate_back", gate.data_ptr(), up.data_ptr(), dy.data_ptr(), KINDS_OF[gate.dtype],
            gate.numel(), d_gate.data_ptr(), d_up.data_ptr(),
        )  # fmt: skip
        return d_gate, d_up


def _products(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    prepared = _prepare(weights)
    assert prepared is not None  # `_usable` has seen it
    return _call(x, prepared, out_dtype)


def _call(
    x: torch.Tensor, prepared: _Prepared, out_dtype: torch.dtype, gated: bool = False
) -> tuple[torch.Tensor, ...]:
    x = x.contiguous()
    width, leading = x.shape[-1], x.shape[:-1]
    outs = prepared.out_features[:1] if gated else prepared.out_features
    results = tuple([torch.empty((*leading, out), dtype=out_dtype) for out in outs])
    pointers = _POINTERS[len(outs)](*[y.data_ptr() for y in results])
    run(
        "puna_linear", x.data_ptr(), KINDS_OF[x.dtype], x.numel() // width, prepared.matrices,
        len(prepared.matrices), pointers, KINDS_OF[out_dtype], gated,
    )  # fmt: skip
    return results


def _transposed(
    dy: torch.Tensor, weight: torch.Tensor | Packed, dtype: torch.dtype
) -> torch.Tensor:
    """`dy` [..., out] times the weight [out, in]."""
    dx = torch.empty((*dy.shape[:-1], weight.shape[1]), dtype=dtype)
    run(
        "puna_linear_transposed", dy.data_ptr(), KINDS_OF[dy.dtype], dy.numel() // dy.shape[-1],
        ctypes.byref(_matrix(weight)), dx.data_ptr(), KINDS_OF[dtype],
    )  # fmt: skip
    return dx


def _matrix(weight: torch.Tensor | Packed) -> Matrix:
    out_features, in_features = weight.shape
    data, *others = (a.data_ptr() for a in _arrays(weight))
    scale, low = (*others, None, None)[:2]
    if not isinstance(weight, Packed):
        kind = KINDS_OF[weight.dtype]
        return Matrix(data, None, None, out_features, in_features, in_features, kind, 0)
    kinds = KINDS_OF[weight.data.dtype], KINDS_OF[weight.scale.dtype]
    return Matrix(data, scale, low, out_features, in_features, weight.group, *kinds)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor | None:
    """See `BackendOps.rms_norm`; None where torch shall do it."""
    if not takes(x, weight) or not x.is_contiguous() or wants_gradients(weight):
        return None
    if wants_gradients(x):
        return _Norm.apply(x, weight, epsilon)
    return _norm(x, weight, epsilon)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, dy: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` normalised, or with a change `dy` of that, what it asks of `x`."""
    result, width = torch.empty_like(x), x.shape[-1]
    arguments = (
        x.data_ptr(), KINDS_OF[x.dtype], weight.data_ptr(), KINDS_OF[weight.dtype], epsilon,
        x.numel() // width, width,
    )  # fmt: skip
    if dy is None:
        run("puna_rms_norm", *arguments, result.data_ptr())
    else:
        run("puna_rms_norm_back", *arguments, dy.data_ptr(), result.data_ptr())
    return result


class _Norm(torch.autograd.Function):
    """`rms_norm` with a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor):
        x, weight = ctx.saved_tensors
        return _norm(x, weight, ctx.epsilon, changes[0].contiguous()), None, None


def cross_entropy(
    logits_RV: torch.Tensor, labels_R: torch.Tensor, weights_R: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Each row's loss times its weight, and its greatest logit; None where torch shall do it.

    With `gradient`, the float32 logits become the losses' gradients; else they are lost.
    """
    if (
        not takes(logits_RV)
        or logits_RV.dtype is not torch.float32
        or not logits_RV.is_contiguous()
    ):
        return None
    R, V = logits_RV.shape
    labels_R, weights_R = labels_R.long().contiguous(), weights_R.float().contiguous()
    losses_R, highest_R = (torch.empty(R, dtype=torch.float32) for _ in range(2))
    run(
        "puna_cross_entropy", logits_RV.data_ptr(), R, V, labels_R.data_ptr(),
        weights_R.data_ptr(), gradient, losses_R.data_ptr(), highest_R.data_ptr(),
    )  # fmt: skip
    return losses_R, highest_R


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
        or not takes(query, keys)
        or keys.shape[3] % 16
        or wants_gradients(*projected)
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
        B, T, features // H, K, H, S, H**-0.5, KINDS_OF[query.dtype], KINDS_OF[keys.dtype],
    )  # fmt: skip
    run("puna_attention", ctypes.byref(attention))
    return out


class PreparedBlocks(NamedTuple):
    """All blocks as the library takes them."""

    weights: Sequence[BlockWeights]  # kept alive
    blocks: Any  # of ctypes
    norm_kind: int


def prepare_blocks(blocks: Sequence[BlockWeights]) -> PreparedBlocks | None:
    """What `call_blocks` takes; None for what no kernel takes."""
    norms = {(norm.dtype, norm.is_contiguous()) for block in blocks for norm in block.norms}
    dtype, contiguous = next(iter(norms))
    if len(norms) > 1 or not contiguous or dtype not in _FLOATS:
        return None
    if any(_kind(matrix) is None for block in blocks for matrix in block.matrices):
        return None
    made = [
        Block(*(norm.data_ptr() for norm in block.norms), *map(_matrix, block.matrices))
        for block in blocks
    ]
    return PreparedBlocks(blocks, (Block * len(made))(*made), KINDS_OF[dtype])


def call_blocks(
    prepare: Callable[[], PreparedBlocks | None],
    epsilon: float,
    x_BTD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: Sequence[tuple[torch.Tensor, torch.Tensor]],
    start_B: torch.Tensor,
) -> torch.Tensor | None:
    """What comes out of the last block; None where torch shall do it. The caches are written to."""
    keys = cache[0][0]
    if (
        not takes(x_BTD, keys)
        or keys.shape[3] % 16
        or torch.is_grad_enabled()
        or (prepared := prepare()) is None
    ):
        return None
    (B, T, D), (_, K, S, H) = x_BTD.shape, keys.shape
    x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
    cos, sin = (table.expand(B, 1, T, H).contiguous() for table in rotary)
    starts = start_B.to(torch.int32).contiguous()
    pointers = ctypes.c_void_p * len(cache)
    caches = [pointers(*[layer[i].data_ptr() for layer in cache]) for i in (0, 1)]
    call = Blocks(
        prepared.blocks, *map(ctypes.addressof, caches),
        *(a.data_ptr() for a in (x_BTD, cos, sin, starts)),
        len(cache), B, T, D, prepared.blocks[0].query.out_features // H, K, H, S,
        H**-0.5, epsilon, KINDS_OF[x_BTD.dtype], prepared.norm_kind, KINDS_OF[keys.dtype],
    )  # fmt: skip
    run("puna_blocks", ctypes.byref(call))
    return x_BTD


@functools.cache
def _threads(count: int) -> Any:
    """A pointer to torch's own threads, where they are GNU OpenMP's: others would fight them."""
    loaded = library()
    assert loaded is not None
    for folder in (
        Path(torch.__file__).parent / "lib",
        Path(torch.__file__).parents[1] / "torch.libs",
    ):
        for path in folder.glob("libgomp*.so*"):
            openmp = ctypes.CDLL(str(path))
            run, parallel = loaded.puna_run_gomp, openmp.GOMP_parallel
            pointers = (ctypes.cast(f, ctypes.c_void_p) for f in (run, parallel))
            return ctypes.pointer(Threads(*pointers, count))
    return ctypes.pointer(Threads(None, None, count))
