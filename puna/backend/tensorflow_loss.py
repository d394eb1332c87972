"""The loss of a head on TensorFlow, without the logits of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

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
    """See `BackendOps.head_loss`."""
    labels_N, weights_N = tf.cast(labels_N, tf.int32), tf.cast(weights_N, tf.float32)
    N = tf.shape(x_ND)[0]
    # Rows without a weight come last, and whole pieces of them are left out.
    order_N = tf.argsort(tf.cast(weights_N == 0, tf.int32), stable=True)
    x_ND, labels_N, weights_N = (tf.gather(a, order_N) for a in (x_ND, labels_N, weights_N))
    pieces = -(-tf.math.count_nonzero(weights_N, dtype=tf.int32) // rows)
    padding = -(-N // rows) * rows - N
    rest: Any = [[0, padding]]
    x_ND = tf.pad(x_ND, [*rest, [0, 0]])
    labels_N, weights_N = tf.pad(labels_N, rest), tf.pad(weights_N, rest)
    trained = [v.value for v in variables if v.trainable]

    def totals(x_ND: Tensor, gradients: bool):
        """Loss, right guesses, and if they are asked for the gradients by x and by variables."""

        def body(piece, loss, right, dx_ND, *changes):
            places_R = piece * rows + tf.range(rows)
            x_RD, labels_R, weights_R = (
                tf.gather(a, places_R) for a in (x_ND, labels_N, weights_N)
            )
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([x_RD, *trained])
                logits_RV = tf.cast(head(x_RD), tf.float32)
            more, more_right, d_RV = _cross_entropy(logits_RV, labels_R, weights_R)
            if gradients:
                zero, wanted = tf.UnconnectedGradients.ZERO, [x_RD, *trained]
                found: Any = tape.gradient(logits_RV, wanted, d_RV, unconnected_gradients=zero)
                dx_RD, *new = found
                dx_ND = tf.tensor_scatter_nd_update(dx_ND, places_R[:, None], dx_RD)
                changes = [
                    old + tf.cast(tf.convert_to_tensor(change), tf.float32)
                    for old, change in zip(changes, new, strict=True)
                ]
            return piece + 1, loss + more, right + more_right, dx_ND, *changes

        state = [tf.constant(0), tf.constant(0.0), tf.constant(0.0)]
        state.append(tf.zeros_like(x_ND) if gradients else tf.zeros([], x_ND.dtype))
        state += [tf.zeros(v.shape, tf.float32) for v in trained] if gradients else []
        _, loss, right, *found = tf.while_loop(
            lambda piece, *_: piece < pieces, body, state, parallel_iterations=1
        )
        return loss, right, found

    if not training:
        return totals(x_ND, gradients=False)[:2]

    @tf.custom_gradient
    def loss_of(x_ND):
        loss, right, (dx_ND, *changes) = totals(x_ND, gradients=True)

        def backward(by, _, variables=None):
            known = {v.ref(): change for v, change in zip(trained, changes, strict=True)}
            scaled = tf.cast(tf.cast(dx_ND, tf.float32) * by, dx_ND.dtype)
            if variables is None:
                return scaled
            # Variables that Keras has frozen are trainable to TensorFlow.
            found = ((v, known.get(v.ref())) for v in variables)
            return scaled, [None if c is None else tf.cast(c * by, v.dtype) for v, c in found]

        return (loss, right), backward

    return loss_of(x_ND)


def _cross_entropy(logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor):
    """Weighted sums of losses and of right guesses, and the gradient by the logits."""
    highest_R = tf.reduce_max(logits_RV, axis=-1)
    label_R = tf.gather(logits_RV, labels_R, batch_dims=1)
    right = tf.reduce_sum(tf.cast(label_R >= highest_R, tf.float32) * weights_R)
    total_R = tf.reduce_logsumexp(logits_RV, axis=-1)
    loss = tf.reduce_sum((total_R - label_R) * weights_R)
    guess_RV = tf.exp(logits_RV - total_R[:, None])
    is_label_RV = tf.one_hot(labels_R, tf.shape(logits_RV)[1], dtype=tf.float32)
    return loss, right, (guess_RV - is_label_RV) * weights_R[:, None]
