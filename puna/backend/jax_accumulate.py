"""A training step on JAX whose gradients are summed over the parts of its batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras

from puna.backend.protocol import Tensor


def accumulated_step(model: Any, parts: int, state: Any, data: Any) -> Any:
    """See `BackendOps.accumulated_step`."""
    trained, others, of_optimizer, metrics = state
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    weights = jnp.ones(y.shape) if weights is None else weights
    weights = jnp.asarray(weights, jnp.float32)
    total, rows = jnp.maximum(weights.sum(), 1e-7), y.shape[0]

    def loss_of(trained, others, metrics, piece):
        x, y, weights = piece
        loss, (plain, _, others, metrics) = model.compute_loss_and_updates(
            trained, others, metrics, x, y, weights, training=True, optimizer_variables=of_optimizer
        )
        share = weights.sum() / total
        return loss * share, (plain * share, others, metrics)

    def body(carry, piece):
        whole, gradients, others, metrics = carry
        gradient_of = jax.grad(loss_of, has_aux=True)
        new, (loss, others, metrics) = gradient_of(trained, others, metrics, piece)
        gradients = [old + more for old, more in zip(gradients, new, strict=True)]
        return (whole + loss, gradients, others, metrics), None

    pieces = jax.tree.map(lambda array: _pieces(array, min(parts, rows)), (x, y, weights))
    start = (jnp.float32(0), [jnp.zeros_like(v) for v in trained], others, metrics)
    (whole, gradients, others, metrics), _ = jax.lax.scan(body, start, pieces)
    trained, of_optimizer = model.optimizer.stateless_apply(of_optimizer, gradients, trained)
    known = list(zip(model.metrics_variables, metrics, strict=True))
    with keras.StatelessScope(state_mapping=known) as scope:
        model._loss_tracker.update_state(whole, sample_weight=rows)
        logs = model.get_metrics_result()
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    return logs, (trained, others, of_optimizer, metrics)


def _pieces(array: Tensor, parts: int) -> Tensor:
    """Every so many rows a piece, with rows of zeros, which have no weight, to make them alike.

    Where rows are on several devices, each has some of every piece.
    """
    missing = -array.shape[0] % parts
    array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
