"""Attention in plain `keras.ops`, for backends and cases without a better one."""

from __future__ import annotations

from collections.abc import Callable

from keras import ops

from puna.backend.protocol import Tensor


def attention(
    query_BNTH: Tensor,
    key_BKSH: Tensor,
    value_BKSH: Tensor,
    mask_B1TS: Tensor,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Grouped-query attention that never repeats a key or value head."""
    B, N, T, H = ops.shape(query_BNTH)
    K = key_BKSH.shape[1]
    query_BKGTH = ops.reshape(ops.cast(query_BNTH, key_BKSH.dtype), (B, K, N // K, T, H))
    scores_BKGTS = ops.einsum("bkgth,bksh->bkgts", query_BKGTH, key_BKSH)
    scores_BKGTS = ops.cast(scores_BKGTS, "float32") * scale
    # A large finite number, not -inf: no row may become NaN, in the gradient neither.
    scores_BKGTS = ops.where(mask_B1TS[:, :, None], scores_BKGTS, -1e30)
    weights_BKGTS = ops.softmax(scores_BKGTS, axis=-1)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    weights_BKGTS = ops.cast(weights_BKGTS, value_BKSH.dtype)
    out_BKGTH = ops.einsum("bkgts,bksh->bkgth", weights_BKGTS, value_BKSH)
    return ops.cast(ops.reshape(out_BKGTH, (B, N, T, H)), query_BNTH.dtype)
