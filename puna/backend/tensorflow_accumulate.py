"""A training step on TensorFlow whose gradients are summed over the parts of its batch."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import unscale_loss_for_distribution


def accumulated_step(model: Any, parts: int, data: Any) -> Any:
    """See `BackendOps.accumulated_step`."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    weights = tf.ones_like(y, tf.float32) if weights is None else tf.cast(weights, tf.float32)
    total, rows = tf.maximum(tf.reduce_sum(weights), 1e-7), tf.shape(y)[0]
    trained = model.trainable_weights

    def body(part, whole, *gradients):
        some_x, some_y, some = tf.nest.map_structure(lambda a: a[part::parts], (x, y, weights))
        with tf.GradientTape() as tape:
            y_pred = model(some_x, training=True)
            loss = model._compute_loss(some_x, some_y, y_pred, some, training=True)
            loss *= tf.reduce_sum(some) / total
            scaled = model.optimizer.scale_loss(loss)
        wanted = [v.value for v in trained]
        new: Any = tape.gradient(scaled, wanted, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        gradients = [old + more for old, more in zip(gradients, new, strict=True)]
        return part + 1, whole + loss, *gradients

    state = [tf.constant(0), tf.constant(0.0), *(tf.zeros(v.shape, v.dtype) for v in trained)]
    _, whole, *gradients = tf.while_loop(
        lambda part, *_: part < tf.minimum(parts, rows), body, state, parallel_iterations=1
    )
    model.optimizer.apply_gradients(zip(gradients, trained, strict=True))
    model._loss_tracker.update_state(unscale_loss_for_distribution(whole), sample_weight=rows)
    return model.get_metrics_result()
