"""What layers need, in plain `keras.ops`, for backends and cases without a better one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from puna.backend.packed import Packed
from puna.backend.protocol import BlockWeights, Place, Tensor


def value(variable: Any, dtype: str | None = None) -> Tensor:
    """See `BackendOps.value`."""
    return ops.convert_to_tensor(variable) if dtype is None else ops.cast(variable, dtype)


def dequantize(packed: Packed, dtype: str) -> Tensor:
    """The matrix [out, in] that a packed one stands for; computed in float32."""
    numbers, in_features = packed.data, packed.in_features
    if packed.is_4_bit:
        halves = (ops.bitwise_and(numbers, 15), ops.right_shift(numbers, 4))
        numbers = ops.reshape(ops.stack(halves, axis=-1), (packed.data.shape[0], -1))
    numbers = ops.cast(numbers[:, :in_features], "float32")
    scale, low = (_spread(array, packed) for array in (packed.scale, packed.low))
    if low is None:
        numbers, low = (numbers - 8.0 if packed.is_4_bit else numbers), 0.0
    return ops.cast(numbers * scale + low, dtype)


def _spread(array: Tensor | None, packed: Packed) -> Any:
    """A number for each group, repeated for each input."""
    if array is None or packed.group >= packed.in_features:
        return None if array is None else ops.cast(array, "float32")
    return ops.repeat(ops.cast(array, "float32"), packed.group, axis=1)[:, : packed.in_features]


def embed_packed(packed: Packed, token_ids: Tensor) -> Tensor:
    """`BackendOps.embed` of a packed table: only the rows that are asked for are dequantized."""
    flat_ids = ops.reshape(token_ids, (-1,))

    def take(array: Tensor | None) -> Tensor | None:
        return None if array is None else ops.take(array, flat_ids, axis=0)

    data, scale, low = map(take, (packed.data, packed.scale, packed.low))
    rows = dequantize(packed._replace(data=data, scale=scale, low=low), "float32")
    return ops.reshape(rows, (*ops.shape(token_ids), packed.in_features))


def initialize_at_random(variable: Any) -> None:
    """See `BackendOps.initialize_at_random`."""
    variable._deferred_initialize()


def gathered(tensor: Tensor) -> np.ndarray:
    """See `BackendOps.gathered`."""
    return ops.convert_to_numpy(tensor)


def whole_logits(logits: Tensor) -> Tensor:
    """See `BackendOps.whole_logits`: there is one device."""
    return logits


def assign(variable: Any, array: Any) -> None:
    """See `BackendOps.assign`."""
    variable.assign(array)


def while_loop(
    goes_on: Callable[..., Tensor], body: Callable[..., Any], state: tuple[Any, ...]
) -> tuple[Any, ...]:
    """See `BackendOps.while_loop`."""
    return ops.while_loop(goes_on, body, state)


def cond(predicate: Tensor, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """See `BackendOps.cond`."""
    return ops.cond(predicate, if_true, if_false)


def switch(index: Tensor, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """See `BackendOps.switch`."""
    return ops.switch(index, branches, *operands)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `BackendOps.rms_norm`."""
    return ops.rms_normalization(x, scale=weight, axis=-1, epsilon=epsilon)


def silu(x: Tensor) -> Tensor:
    """See `BackendOps.silu`."""
    return ops.silu(x)


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """See `BackendOps.rotate`."""
    wide_BNTH = ops.cast(x_BNTH, "float32")
    first, second = ops.split(wide_BNTH, 2, axis=-1)
    exchanged_BNTH = ops.concatenate((second, first), axis=-1)
    return ops.cast(wide_BNTH * cos_B1TH + exchanged_BNTH * sin_B1TH, x_BNTH.dtype)


def split_heads(x_BTF: Tensor, head_size: int) -> Tensor:
    """See `BackendOps.split_heads`."""
    B, T, F = ops.shape(x_BTF)
    return ops.transpose(ops.reshape(x_BTF, (B, T, F // head_size, head_size)), (0, 2, 1, 3))


def merge_heads(x_BNTH: Tensor) -> Tensor:
    """See `BackendOps.merge_heads`."""
    B, N, T, H = ops.shape(x_BNTH)
    return ops.reshape(ops.transpose(x_BNTH, (0, 2, 1, 3)), (B, T, N * H))


def place(start_B: Tensor, T: int, capacity: int) -> Place:
    """See `BackendOps.place`; in a compiled step nobody knows how far the rows are."""
    positions_BT = start_B[:, None] + ops.arange(T, dtype="int32")
    mask_BTS = ops.arange(capacity, dtype="int32") <= positions_BT[:, :, None]
    return Place(start_B, capacity, mask_BTS[:, None], start_B)


def call_block(
    block: Any,
    like: Any,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Any,
    place: Place,
) -> tuple[Tensor, Any]:
    """See `BackendOps.call_block`."""
    del like
    return block.call(x_BTD, rotary, place.mask_B1TS, cache, place)


def call_blocks(
    blocks: Callable[[], Sequence[BlockWeights] | None],
    epsilon: float,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Sequence[tuple[Tensor, Tensor]],
    place: Place,
) -> None:
    """See `BackendOps.call_blocks`: there is no such call."""
    del blocks, epsilon, x_BTD, rotary, cache, place


def attention(
    query_BNTH: Tensor,
    key_BKSH: Tensor,
    value_BKSH: Tensor,
    mask_B1TS: Tensor | None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Grouped-query attention that never repeats a key or value head."""
    B, N, T, H = ops.shape(query_BNTH)
    K = key_BKSH.shape[1]
    query_BKGTH = ops.reshape(ops.cast(query_BNTH, key_BKSH.dtype), (B, K, N // K, T, H))
    scores_BKGTS = ops.einsum("bkgth,bksh->bkgts", query_BKGTH, key_BKSH)
    scores_BKGTS = ops.cast(scores_BKGTS, "float32") * scale
    if mask_B1TS is not None:
        # A large finite number, not -inf: no row may become NaN, in the gradient neither.
        scores_BKGTS = ops.where(mask_B1TS[:, :, None], scores_BKGTS, -1e30)
    weights_BKGTS = ops.softmax(scores_BKGTS, axis=-1)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    weights_BKGTS = ops.cast(weights_BKGTS, value_BKSH.dtype)
    out_BKGTH = ops.einsum("bkgts,bksh->bkgth", weights_BKGTS, value_BKSH)
    return ops.cast(ops.reshape(out_BKGTH, (B, N, T, H)), query_BNTH.dtype)
