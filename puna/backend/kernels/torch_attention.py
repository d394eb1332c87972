"""Attention of all tokens at once, for training on torch, by the native library."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from puna.backend.kernels.library import FullAttention
from puna.backend.kernels.torch_calls import KINDS_OF, run, takes, wants_gradients


class _Ranges(NamedTuple):
    """The places [firsts, lasts) that each token looks at, int32 [B, T]."""

    firsts: torch.Tensor
    lasts: torch.Tensor


def full_attention(
    query_BNTH: torch.Tensor,
    key_BKSH: torch.Tensor,
    value_BKSH: torch.Tensor,
    mask_B1TS: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
    """Heads [B, N, T, H], of which gradients are wanted; None where torch shall do it.

    A token that the mask lets look at nothing gets zeros.
    """
    arrays = query_BNTH, key_BKSH, value_BKSH
    if mask_B1TS is None or not wants_gradients(*arrays) or not takes(*arrays):
        return None
    if len({array.dtype for array in arrays}) > 1 or (ranges := _ranges_of(mask_B1TS)) is None:
        return None
    B, _, T, _ = query_BNTH.shape
    firsts_BT, lasts_BT = (a.expand(B, T).contiguous() for a in ranges)
    return _Attention.apply(*arrays, firsts_BT, lasts_BT, scale)


def _ranges_of(mask_B1TS: torch.Tensor) -> _Ranges | None:
    """What a mask says, if each of its rows is one range; kept with it, as all blocks share it."""
    known = getattr(mask_B1TS, "_puna_ranges", None)
    if known is None:
        mask_BTS = mask_B1TS[:, 0].to(torch.uint8)
        counts = mask_BTS.sum(-1, dtype=torch.int32)
        firsts = mask_BTS.argmax(-1).to(torch.int32)
        ends = mask_BTS.shape[-1] - mask_BTS.flip(-1).argmax(-1).to(torch.int32)
        is_range = bool(((counts == 0) | (ends - firsts == counts)).all())
        known = (_Ranges(firsts, firsts + counts) if is_range else None,)
        mask_B1TS._puna_ranges = known  # type: ignore[attr-defined]
    return known[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, firsts_BT, lasts_BT, scale: float):
        arrays = [a.contiguous() for a in (query, key, value)]
        out = torch.empty_like(arrays[0])
        sums_BNT = torch.empty(out.shape[:3], dtype=torch.float32)
        run("puna_full_attention", _call(arrays, firsts_BT, lasts_BT, out, sums_BNT, scale))
        ctx.save_for_backward(*arrays, firsts_BT, lasts_BT, out, sums_BNT)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor):
        *arrays, firsts_BT, lasts_BT, out, sums_BNT = ctx.saved_tensors
        found = [torch.empty_like(a) for a in arrays]
        given = [changes[0].contiguous(), *found]
        call = _call(arrays, firsts_BT, lasts_BT, out, sums_BNT, ctx.scale, given)
        run("puna_full_attention_back", call)
        return *found, None, None, None


def _call(
    arrays: list[torch.Tensor],
    firsts_BT: torch.Tensor,
    lasts_BT: torch.Tensor,
    out: torch.Tensor,
    sums_BNT: torch.Tensor,
    scale: float,
    changes: list[torch.Tensor] | None = None,
) -> Any:
    (B, N, T, H), (_, K, S, _) = arrays[0].shape, arrays[1].shape
    given = [*arrays, firsts_BT, lasts_BT, out, sums_BNT]
    pointers = [a.data_ptr() for a in given]
    pointers += [None] * 4 if changes is None else [a.data_ptr() for a in changes]
    kind = KINDS_OF[out.dtype]
    return ctypes.byref(FullAttention(*pointers, B, T, N, K, H, S, scale, kind))
