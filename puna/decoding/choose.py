"""The arithmetic of `puna.samplers`: logits and a random number to a token."""

from __future__ import annotations

from keras import ops

from puna.backend.protocol import Tensor
from puna.samplers import CANDIDATES, Form, SamplingValues


def choose(form: Form, logits_BV: Tensor, uniform_B: Tensor, values: SamplingValues) -> Tensor:
    """One token per row.

    Args:
        form: which way, `Sampler.form`; a constant of the compiled step.
        logits_BV: float32 [B, V].
        uniform_B: float32 [B] in [0, 1), the only randomness.
        values: temperature, top-k and top-p of each row.

    Returns:
        int32 [B].
    """
    if form == "greedy":
        return ops.cast(ops.argmax(logits_BV, axis=-1), "int32")
    scaled_BV = logits_BV / values.temperature_B[:, None]
    if form == "all":
        return _pick(ops.softmax(scaled_BV, axis=-1), uniform_B)
    V = logits_BV.shape[-1]
    sorted_BC, ids_BC = ops.top_k(scaled_BV, min(CANDIDATES, V) if form == "candidates" else V)
    rank_C = ops.arange(sorted_BC.shape[-1], dtype="int32")
    sorted_BC = ops.where(rank_C < values.top_k_B[:, None], sorted_BC, -1e30)
    probability_BC = ops.softmax(sorted_BC, axis=-1)
    before_BC = ops.cumsum(probability_BC, axis=-1) - probability_BC
    # The first is always kept: nothing is before it.
    probability_BC = ops.where(before_BC < values.top_p_B[:, None], probability_BC, 0.0)
    place_B1 = _pick(probability_BC, uniform_B)[:, None]
    return ops.cast(ops.take_along_axis(ids_BC, place_B1, axis=-1)[:, 0], "int32")


def _pick(weights_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """The place where the running sum of the weights passes the uniform share of their total."""
    running_BC = ops.cumsum(weights_BC, axis=-1)
    threshold_B1 = (uniform_B * running_BC[:, -1])[:, None]
    place_B = ops.sum(ops.cast(running_BC <= threshold_B1, "int32"), axis=-1)
    # Rounding may carry the threshold to the total itself; the last place with weight is meant.
    last_B = ops.sum(ops.cast(running_BC < running_BC[:, -1:], "int32"), axis=-1)
    return ops.minimum(place_B, last_B)
