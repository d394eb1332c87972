"""Products with a weight matrix on torch, also on a CPU that cannot multiply half precision."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch.nn import functional

from puna.backend.generic import dequantize
from puna.backend.kernels import torch_calls
from puna.backend.packed import Packed

# Where only float32 is multiplied fast, weights are converted block by block, into memory that
# stays in the processor's cache. From so many rows on, that costs less than it saves
# (docs/log.md, "Products on torch").
_LEAST_ROWS = 4
_BLOCK_ELEMENTS = 1 << 19
_LEAST_BLOCK_ROWS = 128


class _Scratch(threading.local):
    """Each thread's own block of float32, kept between calls."""

    block: torch.Tensor | None = None

    def rows(self, count: int, width: int) -> torch.Tensor:
        """Uninitialised memory `[count, width]`."""
        if self.block is None or self.block.numel() < count * width:
            # A tensor made in inference mode could not be used outside it.
            with torch.inference_mode(False):
                self.block = torch.empty(count * width, dtype=torch.float32)
        return self.block[: count * width].view(count, width)


_scratch = _Scratch()


def linear(x: torch.Tensor, weight: torch.Tensor | Packed, out_dtype: str) -> torch.Tensor:
    """See `BackendOps.linear`."""
    return linears(x, (weight,), out_dtype)[0]


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor | Packed], out_dtype: str
) -> tuple[torch.Tensor, ...]:
    """See `BackendOps.linears`; on a CPU by native kernels."""
    dtype, x = getattr(torch, out_dtype), _like_weight(x, weights[0])
    if (results := torch_calls.linears(x, weights, dtype)) is not None:
        return results
    return tuple(_linear(x, weight, dtype) for weight in weights)


def gated(
    x: torch.Tensor, gate: torch.Tensor | Packed, up: torch.Tensor | Packed, out_dtype: str
) -> torch.Tensor:
    """See `BackendOps.gated`; on a CPU by a native kernel."""
    dtype, x = getattr(torch, out_dtype), _like_weight(x, gate)
    if (result := torch_calls.gated(x, gate, up, dtype)) is not None:
        return result
    return functional.silu(_linear(x, gate, dtype)) * _linear(x, up, dtype)


def _like_weight(x: torch.Tensor, weight: torch.Tensor | Packed) -> torch.Tensor:
    return x if isinstance(weight, Packed) or x.dtype == weight.dtype else x.to(weight.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor | Packed, dtype: torch.dtype) -> torch.Tensor:
    """`linear` as torch computes it."""
    if isinstance(weight, Packed):
        unpacked: torch.Tensor = dequantize(weight, str(x.dtype).removeprefix("torch."))
        return _linear(x, unpacked, dtype)
    if multiplies_slowly(weight) and _is_worth_converting(x, weight):
        y = _linear_by_blocks(x.reshape(-1, x.shape[-1]).float(), weight)
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])
    y = functional.linear(x, weight)
    return y if y.dtype == dtype else y.to(dtype)


def multiplies_slowly(tensor: torch.Tensor) -> bool:
    """Whether this is half precision on a CPU that has no instructions for it."""
    dtype = tensor.dtype
    if dtype is torch.float32 or not tensor.is_cpu:
        return False
    return (dtype is torch.bfloat16 or dtype is torch.float16) and not _has_units_for(dtype)


@functools.cache
def _has_units_for(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _is_worth_converting(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.numel() < _LEAST_ROWS * x.shape[-1] or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _linear_by_blocks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [rows, in] in float32, times some rows of `weight` [out, in] after the others."""
    weight = weight.detach()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    count = min(weight.shape[0], max(_LEAST_BLOCK_ROWS, _BLOCK_ELEMENTS // weight.shape[1]))
    block = _scratch.rows(count, weight.shape[1])
    with torch.no_grad():
        for start in range(0, weight.shape[0], count):
            some = weight[start : start + count]
            wide = block[: some.shape[0]].copy_(some)
            torch.mm(x, wide.t(), out=y[:, start : start + count])
    return y
