"""A training step on torch whose gradients are summed over the parts of its batch."""

from __future__ import annotations

from typing import Any

import keras
import torch


def accumulated_step(model: Any, parts: int, data: Any) -> Any:
    """See `BackendOps.accumulated_step`."""
    given: Any = keras.tree.map_structure(
        lambda a: None if a is None else keras.ops.convert_to_tensor(a),
        keras.utils.unpack_x_y_sample_weight(data),
    )
    x, y, weights = given
    weights = torch.ones_like(y, dtype=torch.float32) if weights is None else weights.float()
    total, rows = weights.sum().clamp(min=1e-7), y.shape[0]
    whole = torch.zeros_like(total)
    model.zero_grad()
    for part in range(min(parts, rows)):
        pieces: Any = keras.tree.map_structure(lambda a, part=part: a[part::parts], (x, y, weights))
        some_x, some_y, some = pieces
        y_pred = model(some_x, training=True)
        loss = model._compute_loss(some_x, some_y, y_pred, some, training=True)
        loss = loss * (some.sum() / total)
        whole += loss.detach()
        model.optimizer.scale_loss(loss).backward()  # adds to what earlier parts left
    trained = model.trainable_weights
    with torch.no_grad():
        model.optimizer.apply([v.value.grad for v in trained], trained)
    model._loss_tracker.update_state(whole, sample_weight=rows)
    return model.get_metrics_result()
