"""PyTorch: eager steps without gradients, caches written in place, weights that alias files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from keras.src.backend.common.global_state import GLOBAL_STATE_TRACKER
from keras.src.backend.torch.core import get_device
from torch.nn import functional

from puna.backend import generic
from puna.backend.generic import (
    assign,
    call_block,
    gathered,
    initialize_at_random,
    whole_logits,
)
from puna.backend.kernels import torch_calls
from puna.backend.kernels.library import FEW_TOKENS
from puna.backend.kernels.torch_attention import full_attention
from puna.backend.memory import aligned_copy, numpy_dtype
from puna.backend.packed import Packed
from puna.backend.protocol import BlockWeights, Place, Tensor
from puna.backend.torch_accumulate import accumulated_step
from puna.backend.torch_linear import gated, linear, linears, multiplies_slowly
from puna.backend.torch_loss import head_loss

__all__ = [
    "accumulated_step", "assign", "attend", "attention", "cache_dtype", "cache_write", "call_block",
    "call_blocks", "compile_step", "cond", "embed", "gated", "gather_rows", "gathered", "head_loss",
    "initialize", "initialize_at_random", "keeps", "linear", "linears", "merge_heads", "place",
    "prepare", "rms_norm", "rotate", "silu", "split_heads", "to_device", "to_numpy", "value",
    "whole_logits", "zeros",
]  # fmt: skip

# NumPy knows these only through ml_dtypes, which torch does not: their bits travel as integers.
_BY_BITS = {
    "bfloat16": (torch.bfloat16, torch.uint16, np.uint16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8, np.uint8),
    "float8_e5m2": (torch.float8_e5m2, torch.uint8, np.uint8),
}


# From so many queries on, half precision on a CPU without units for it is attended in float32.
_WIDE_QUERIES = 16

TOKENS_PER_CALL = 1
RUNS_AHEAD = False
BLOCKS_CALL_TOKENS = FEW_TOKENS


def value(variable: Any, dtype: str | None = None) -> Tensor:
    """See `BackendOps.value`.

    A step reads hundreds of variables, and Keras's own way to a value takes 5 µs, to find out that
    none of its scopes is open.
    """
    tensor = variable._value
    if tensor is None or _is_scoped():
        tensor = variable.value
    wanted = tensor.dtype if dtype is None else getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.to(wanted)


def _is_scoped() -> bool:
    """Whether one of Keras's scopes may give variables another value than their own."""
    return (
        getattr(GLOBAL_STATE_TRACKER, "stateless_scope", None) is not None
        or getattr(GLOBAL_STATE_TRACKER, "autocast_scope", None) is not None
        or getattr(GLOBAL_STATE_TRACKER, "torch_device", None) is not None
    )


def embed(weight: Tensor | Packed, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    if isinstance(weight, Packed):
        return generic.embed_packed(weight, token_ids)
    return functional.embedding(token_ids, weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `BackendOps.rms_norm`."""
    if (y := torch_calls.rms_norm(x, weight, epsilon)) is not None:
        return y
    if x.dtype == weight.dtype:  # computed in float32, whatever they are
        return functional.rms_norm(x, weight.shape, weight, epsilon)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), epsilon).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """See `BackendOps.silu`."""
    return functional.silu(x)


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """See `BackendOps.rotate`."""
    wide_BNTH = x_BNTH.float()
    exchanged_BNTH = wide_BNTH.roll(wide_BNTH.shape[-1] // 2, -1)
    return torch.addcmul(wide_BNTH * cos_B1TH, exchanged_BNTH, sin_B1TH).to(x_BNTH.dtype)


def split_heads(x_BTF: Tensor, head_size: int) -> Tensor:
    """See `BackendOps.split_heads`."""
    B, T, F = x_BTF.shape
    return x_BTF.view(B, T, F // head_size, head_size).transpose(1, 2)


def merge_heads(x_BNTH: Tensor) -> Tensor:
    """See `BackendOps.merge_heads`."""
    return x_BNTH.transpose(1, 2).flatten(2)


def attention(
    query_BNTH: Tensor,
    key_BKSH: Tensor,
    value_BKSH: Tensor,
    mask_B1TS: Tensor | None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See `BackendOps.attention`; fused, unless the weights themselves are needed.

    The queries that share a key head go as so many queries of it: torch would repeat the keys.
    """
    if dropout is not None:
        return generic.attention(query_BNTH, key_BKSH, value_BKSH, mask_B1TS, scale, dropout)
    done = full_attention(query_BNTH, key_BKSH, value_BKSH, mask_B1TS, scale)
    if done is not None:
        return done
    B, N, T, H = query_BNTH.shape
    K = key_BKSH.shape[1]
    G = N // K
    if mask_B1TS is not None and G > 1 and T > 1:
        mask_B1TS = mask_B1TS.repeat(1, 1, G, 1)
    query = query_BNTH.reshape(B, K, G * T, H)
    if T >= _WIDE_QUERIES and multiplies_slowly(query):
        query, key_BKSH, value_BKSH = query.float(), key_BKSH.float(), value_BKSH.float()
    out = functional.scaled_dot_product_attention(
        query, key_BKSH, value_BKSH, attn_mask=mask_B1TS, scale=scale
    )
    return out.reshape(B, N, T, H).to(query_BNTH.dtype)


class _Memory:
    """What a compiled step has prepared, and the memory of the variables for which it did."""

    addresses: tuple[int, ...] = ()
    blocks: torch_calls.PreparedBlocks | None = None


class _Step(threading.local):
    """The step that runs."""

    memory: _Memory | None = None


_step = _Step()


def _remembered(
    blocks: Callable[[], Sequence[BlockWeights] | None],
) -> torch_calls.PreparedBlocks | None:
    """The blocks as the native call takes them, which a compiled step prepares once."""
    memory = _step.memory
    if memory is not None and memory.blocks is not None:
        return memory.blocks
    weights = blocks()
    prepared = None if weights is None else torch_calls.prepare_blocks(weights)
    if memory is not None:
        memory.blocks = prepared
    return prepared


def call_blocks(
    blocks: Callable[[], Sequence[BlockWeights] | None],
    epsilon: float,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Sequence[tuple[Tensor, Tensor]],
    place: Place,
) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]] | None:
    """See `BackendOps.call_blocks`; the caches are written to."""
    out = torch_calls.call_blocks(
        lambda: _remembered(blocks), epsilon, x_BTD, rotary, cache, place.start_B
    )
    return None if out is None else (out, cache)


def attend(
    projected: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Place,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """See `BackendOps.attend`; in place."""
    out = torch_calls.attend(projected, rotary, cache, place)
    return None if out is None else (out, cache)


def cache_dtype(compute_dtype: str, wanted: str | None = None) -> str:
    """See `BackendOps.cache_dtype`."""
    return wanted or compute_dtype


def cache_read(cache_BKSH: Tensor, dtype: str) -> Tensor:
    """See `BackendOps.cache_read`."""
    return cache_BKSH.to(getattr(torch, dtype))


def place(start_B: Tensor, T: int, capacity: int) -> Place:
    """See `BackendOps.place`; on a CPU, where looking costs nothing, no more than is live."""
    B, device = start_B.shape[0], start_B.device
    starts = start_B.tolist() if device.type == "cpu" else None
    live = capacity if starts is None else max(starts) + T
    alike = B == 1 if starts is None else len(set(starts)) == 1
    ahead_T = torch.arange(T, device=device)
    positions_BT = (start_B[:1] if alike else start_B)[:, None] + ahead_T
    # Rows that stand alike are written together, others place by place.
    rows_B1 = torch.arange(B, device=device)[:, None]
    write = positions_BT[0] if alike else (rows_B1, positions_BT)
    if starts is not None and alike and T == 1:
        return Place(write, live, None, start_B)
    mask_BTS = torch.arange(live, device=device) <= positions_BT[:, :, None]
    return Place(write, live, mask_BTS[:, None], start_B)


def cache_write(
    cache_BKSH: Tensor, new_BKTH: Tensor, write: Tensor | tuple[Tensor, Tensor]
) -> Tensor:
    """See `BackendOps.cache_write`; in place."""
    if new_BKTH.dtype != cache_BKSH.dtype:
        new_BKTH = new_BKTH.to(cache_BKSH.dtype)
    if isinstance(write, torch.Tensor):
        return cache_BKSH.index_copy_(2, write, new_BKTH)
    rows_B1, positions_BT = write
    # Indices in axes 0 and 2 with a slice between them put the indexed axes first: [B, T, K, H].
    cache_BKSH[rows_B1, :, positions_BT] = new_BKTH.transpose(1, 2)
    return cache_BKSH


def while_loop(
    goes_on: Callable[..., Tensor], body: Callable[..., Any], state: tuple[Any, ...]
) -> tuple[Any, ...]:
    """See `BackendOps.while_loop`."""
    while goes_on(*state):
        state = body(*state)
    return state


def cond(predicate: Tensor, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """See `BackendOps.cond`; Keras's own takes 100 µs, to find out that nothing is symbolic."""
    return if_true() if predicate else if_false()


def switch(index: Tensor, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """See `BackendOps.switch`."""
    return branches[int(index)](*operands)


def to_device(array: np.ndarray) -> Tensor:
    """See `BackendOps.to_device`."""
    return _from_numpy(array).to(get_device())


def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """See `BackendOps.zeros`."""
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=get_device())


def gather_rows(
    sources: Sequence[tuple[Tensor, int] | None], shape: tuple[int, int, int, int]
) -> Tensor:
    """See `BackendOps.gather_rows`."""
    like = next(source[0] for source in sources if source is not None)
    gathered = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for row, source in zip(gathered, sources, strict=True):
        if source is not None:
            old = source[0][source[1], :, : shape[2]]
            row[:, : old.shape[1]] = old
    return gathered


def keeps(prepared: np.ndarray, array: np.ndarray) -> bool:
    """See `BackendOps.keeps`."""
    return prepared is array and get_device() == "cpu"


def prepare(variable: Any, array: np.ndarray) -> np.ndarray:
    """See `BackendOps.prepare`."""
    dtype = numpy_dtype(variable._dtype)
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable:
        return array
    return aligned_copy(array, dtype)


def initialize(variable: Any, prepared: np.ndarray) -> None:
    """See `BackendOps.initialize`; the array's own memory becomes the parameter's on a CPU."""
    variable._initialize(_from_numpy(prepared))


def to_numpy(variable: Any) -> np.ndarray:
    """See `BackendOps.to_numpy`."""
    tensor = variable.value.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _BY_BITS:
        return tensor.view(_BY_BITS[name][1]).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()


def compile_step(
    function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    """See `BackendOps.compile_step`; torch runs the function as it is."""
    del donate
    memory = _Memory()

    def step(*args: Any) -> Any:
        addresses = _addresses(variables)
        if addresses != memory.addresses:
            memory.addresses, memory.blocks = addresses, None
        before, _step.memory = _step.memory, memory
        try:
            with torch.inference_mode():
                return function(*args)
        finally:
            _step.memory = before

    return step


def _addresses(variables: Sequence[Any]) -> tuple[int, ...]:
    if _is_scoped() or any(variable._value is None for variable in variables):
        return tuple([value(variable).data_ptr() for variable in variables])
    return tuple([variable._value.data_ptr() for variable in variables])


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    bits = _BY_BITS.get(array.dtype.name)
    if bits is None:
        return torch.from_numpy(array)
    torch_dtype, _, numpy_bits = bits
    return torch.from_numpy(array.view(numpy_bits)).view(torch_dtype)
