"""The loss of a head on JAX, without the logits of all rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from puna.backend import jax_shards
from puna.backend.protocol import Tensor


def head_loss(
    head: Callable[[Tensor], Tensor],
    variables: Sequence[Any],
    x_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    rows: int,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """See `BackendOps.head_loss`; `grad` itself says whether gradients are wanted.

    Where a mesh's devices share out the rows, each has `rows` of its own in a piece.
    """
    del training
    N = x_ND.shape[0]
    G = jax_shards.groups_of_rows(N)
    pieces = -(-N // (G * rows))
    # Rows without a weight come last, and whole pieces of them are left out.
    weights_GN = weights_N.reshape(G, -1)
    order_GN = jnp.argsort(weights_GN == 0, axis=1, stable=True)
    used = jnp.count_nonzero(weights_GN, axis=1).max()

    def piecewise(array: Tensor) -> Tensor:
        array = array.reshape(G, N // G, *array.shape[1:])
        array = jax.vmap(lambda its, order: its[order])(array, order_GN)
        padding = [(0, 0), (0, pieces * rows - N // G)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, padding).reshape(G, pieces, rows, *array.shape[2:])
        array = array.swapaxes(0, 1).reshape(pieces, G * rows, *array.shape[3:])
        return jax_shards.by_rows(array, axis=1)

    trained = [v for v in variables if v.trainable]
    frozen = [v for v in variables if not v.trainable]

    def apply(x_RD: Tensor, trained_values: list, frozen_values: list) -> Tensor:
        values = [*zip(trained, trained_values, strict=True)]
        with keras.StatelessScope([*values, *zip(frozen, frozen_values, strict=True)]):
            return head(x_RD)

    return _loss(
        apply,
        piecewise(x_ND),
        [jnp.asarray(v.value) for v in trained],
        [jnp.asarray(v.value) for v in frozen],
        piecewise(labels_N.astype(jnp.int32)),
        piecewise(weights_N.astype(jnp.float32)),
        -(-used // rows),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(apply, x_PRD, trained, frozen, labels_PR, weights_PR, used):
    def body(totals, piece):
        i, x_RD, labels_R, weights_R = piece

        def computed():
            loss, right, _ = _cross_entropy(apply(x_RD, trained, frozen), labels_R, weights_R)
            return totals[0] + loss, totals[1] + right

        return jax.lax.cond(i < used, computed, lambda: totals), None

    pieces = (jnp.arange(x_PRD.shape[0]), x_PRD, labels_PR, weights_PR)
    totals, _ = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), pieces)
    return totals


def _forward(apply, x_PRD, trained, frozen, labels_PR, weights_PR, used):
    """The loss with its gradients, whose logits need not be computed twice so."""

    def body(carry, piece):
        i, x_RD, labels_R, weights_R = piece

        def computed():
            loss, right, changes = carry
            logits_RV, back = jax.vjp(lambda x, w: apply(x, w, frozen), x_RD, trained)
            more, more_right, d_RV = _cross_entropy(logits_RV, labels_R, weights_R)
            dx_RD, new = back(d_RV.astype(logits_RV.dtype))
            changes = [old + part.astype(old.dtype) for old, part in zip(changes, new, strict=True)]
            return (loss + more, right + more_right, changes), dx_RD

        return jax.lax.cond(i < used, computed, lambda: (carry, jnp.zeros_like(x_RD)))

    pieces = (jnp.arange(x_PRD.shape[0]), x_PRD, labels_PR, weights_PR)
    none = [jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)) for w in trained]
    carry, dx_PRD = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0), none), pieces)
    loss, right, changes = carry
    changes = [change.astype(w.dtype) for change, w in zip(changes, trained, strict=True)]
    return (loss, right), (dx_PRD, changes)


def _backward(apply, kept, by):
    del apply
    dx_PRD, changes = kept
    scaled = (dx_PRD.astype(jnp.float32) * by[0]).astype(dx_PRD.dtype)
    return (
        scaled,
        [change * by[0].astype(change.dtype) for change in changes],
        None,
        None,
        None,
        None,
    )


_loss.defvjp(_forward, _backward)


def _cross_entropy(logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor):
    """Weighted sums of losses and of right guesses, and the gradient by the logits."""
    logits_RV = logits_RV.astype(jnp.float32)
    highest_R = logits_RV.max(axis=-1)
    shifted_RV = logits_RV - highest_R[:, None]
    total_R = jnp.exp(shifted_RV).sum(axis=-1)
    label_R = jnp.take_along_axis(shifted_RV, labels_R[:, None], axis=-1)[:, 0]
    loss = ((jnp.log(total_R) - label_R) * weights_R).sum()
    right = ((label_R >= 0) * weights_R).sum()
    is_label_RV = jnp.arange(logits_RV.shape[1], dtype=jnp.int32) == labels_R[:, None]
    d_RV = jnp.exp(shifted_RV) * (weights_R / total_R)[:, None]
    return loss, right, d_RV - is_label_RV * weights_R[:, None]
