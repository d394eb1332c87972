"""PyTorch: eager steps without gradients, caches written in place, weights that alias files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from keras.src.backend.torch.core import get_device

from puna.backend import generic
from puna.backend.memory import aligned_copy
from puna.backend.protocol import Tensor

# NumPy knows these only through ml_dtypes, which torch does not: their bits travel as integers.
_BY_BITS = {
    "bfloat16": (torch.bfloat16, torch.uint16, np.uint16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8, np.uint8),
    "float8_e5m2": (torch.float8_e5m2, torch.uint8, np.uint8),
}


def linear(x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`."""
    return torch.nn.functional.linear(x, weight).to(getattr(torch, out_dtype))


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    return torch.nn.functional.embedding(token_ids, weight)


def attention(
    query_BNTH: Tensor,
    key_BKSH: Tensor,
    value_BKSH: Tensor,
    mask_B1TS: Tensor,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See `BackendOps.attention`; fused, unless the weights themselves are needed."""
    if dropout is not None:
        return generic.attention(query_BNTH, key_BKSH, value_BKSH, mask_B1TS, scale, dropout)
    return torch.nn.functional.scaled_dot_product_attention(
        query_BNTH, key_BKSH, value_BKSH, attn_mask=mask_B1TS, scale=scale, enable_gqa=True
    )


def cache_dtype(compute_dtype: str) -> str:
    """See `BackendOps.cache_dtype`."""
    return compute_dtype


def cache_write(cache_BKSH: Tensor, new_BKTH: Tensor, start_B: Tensor) -> Tensor:
    """See `BackendOps.cache_write`; in place."""
    B, _, T, _ = new_BKTH.shape
    rows_B1 = torch.arange(B, device=cache_BKSH.device)[:, None]
    positions_BT = start_B[:, None] + torch.arange(T, device=cache_BKSH.device)
    # Indices in axes 0 and 2 with a slice between them put the indexed axes first: [B, T, K, H].
    cache_BKSH[rows_B1, :, positions_BT] = new_BKTH.transpose(1, 2).to(cache_BKSH.dtype)
    return cache_BKSH


def aliases(array: np.ndarray) -> bool:
    """See `BackendOps.aliases`."""
    del array
    return get_device() == "cpu"


def prepare(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """See `BackendOps.prepare`."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable:
        return array
    return aligned_copy(array, dtype)


def initialize(variable: Any, array: np.ndarray) -> None:
    """See `BackendOps.initialize`; the array's own memory becomes the parameter's on a CPU."""
    variable._initialize(_from_numpy(array))


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
    del variables, donate

    def step(*args: Any) -> Any:
        with torch.inference_mode():
            return function(*args)

    return step


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    bits = _BY_BITS.get(array.dtype.name)
    if bits is None:
        return torch.from_numpy(array)
    torch_dtype, _, numpy_bits = bits
    return torch.from_numpy(array.view(numpy_bits)).view(torch_dtype)
