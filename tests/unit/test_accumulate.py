"""A step whose gradients are computed in parts is the step of the whole batch."""

from typing import Any

import keras
import numpy as np
import pytest

from puna.errors import ConfigError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model
from tests.adapters import TEXTS
from tests.unit.test_loss import PLAIN, made, step
from tests.weights import array

LENGTHS = (30, 3, 17, 24, 9)  # no two parts have as many tokens, and five rows no three alike


@pytest.fixture
def batch():
    random = np.random.default_rng(4)
    ids = random.integers(0, 250, (5, 30), np.int32)
    mask = np.arange(30) < np.array(LENGTHS)[:, None]
    weights = (mask & (random.random(ids.shape) < 0.7)).astype("float32")
    return {"token_ids": ids, "padding_mask": mask}, np.roll(ids, -1, 1), weights


def packed(batch):
    """The same rows, each of them two texts."""
    x, labels, weights = batch
    segments = np.where(x["padding_mask"], np.arange(30) // 8 + 1, 0).astype("int32")
    positions = np.broadcast_to(np.arange(30, dtype="int32") % 8, segments.shape)
    return x | {"segment_ids": segments, "positions": positions}, labels, weights


def assert_same(ours, theirs, relative=1e-4):
    (loss, changes), (expected, others) = ours, theirs
    assert loss == pytest.approx(expected, rel=1e-5)
    assert any(np.abs(change).max() > 0 for change in changes)
    for change, other in zip(changes, others, strict=True):
        np.testing.assert_allclose(change, other, atol=relative * np.abs(other).max() + 1e-9)


@pytest.mark.parametrize("kind", ["full", "tied", "lora_on_head", "frozen_int8"])
def test_loss_and_gradients_are_the_whole_batchs(kind, batch):
    assert_same(step(made(kind, accumulate=3), batch), step(made(kind), batch))


def test_with_blocks_that_are_computed_again_and_packed_rows(batch):
    ours = step(made("lora", accumulate=2, remat=True), packed(batch))
    assert_same(ours, step(made("lora"), packed(batch)))


def test_more_parts_than_rows_are_as_many_as_rows(batch):
    assert_same(step(made("lora", accumulate=64), batch), step(made("lora"), batch))


def test_rows_without_weights_count_as_whole(batch):
    x, labels, _ = batch
    whole = (x, labels, None)
    assert_same(step(made("lora", accumulate=3), whole), step(made("lora"), whole))


def test_a_batch_without_weights_changes_nothing(batch):
    x, labels, weights = batch
    loss, changes = step(made("lora", accumulate=2), (x, labels, np.zeros_like(weights)))
    assert loss == 0
    assert not any(change.any() for change in changes)


def test_loss_scaling_is_the_whole_batchs(batch):
    ours, theirs = (made("full", "mixed_float16", accumulate=parts) for parts in (3, 1))
    # Products in half precision are rounded, to about three digits.
    assert_same(step(ours, batch), step(theirs, batch), 1e-2)
    scales = [array(model.optimizer.dynamic_scale) for model in (ours, theirs)]
    assert scales[0] == scales[1]


def test_a_step_that_overflows_is_left_out(batch):
    model = made("full", "mixed_float16", accumulate=2)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(1e30)
    _, changes = step(model, batch)
    assert not any(change.any() for change in changes)
    assert array(model.optimizer.dynamic_scale) == pytest.approx(5e29)


def trained(accumulate, **options):
    keras.utils.set_random_seed(2)
    model = tiny_model(sequence_length=24, seed=3)
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=0.5)
    model.compile(optimizer=optimizer, accumulate=accumulate, **options)
    history = model.fit(TEXTS * 2, batch_size=5, epochs=2, shuffle=False, verbose=0).history
    return model, history


def test_fit_learns_the_same():
    (ours, history), (theirs, others) = trained(2), trained(1)
    assert history["loss"] == pytest.approx(others["loss"], rel=1e-4)
    assert history["accuracy"] == pytest.approx(others["accuracy"], rel=1e-5)
    assert history["loss"][-1] < history["loss"][0]
    assert array(ours.optimizer.iterations) == array(theirs.optimizer.iterations) == 4


def test_parts_drop_at_random_each_by_itself(batch):
    """Were the same dropped in all parts, equal rows would do together what one of them does."""
    x, labels, weights = batch

    def change(rows, accumulate):
        keras.utils.set_random_seed(2)
        model = tiny_model()
        model.enable_lora(4, target_modules=["q_proj", "lm_head"], dropout=0.5)
        model.compile(optimizer=keras.optimizers.SGD(1.0), accumulate=accumulate)
        alike = [np.repeat(a[:1], rows, axis=0) for a in (*x.values(), labels, weights)]
        return step(model, (dict(zip(x, alike, strict=False)), *alike[-2:]))[1]

    together, one = change(4, 4), change(1, 1)
    assert any(part.any() for part in together)
    assert not all(np.allclose(a, b, 1e-3) for a, b in zip(together, one, strict=True))


def test_a_part_at_a_time_goes_through_the_model(batch, monkeypatch):
    rows = []
    call = Llama3CausalLM.call

    def seen(self, inputs, **options):
        rows.append(inputs["token_ids"].shape[0])
        return call(self, inputs, **options)

    monkeypatch.setattr(Llama3CausalLM, "call", seen)
    model = made("lora", accumulate=3)
    step(model, batch)
    # Keras's own look at the whole batch's shapes, before the first step, computes nothing.
    assert set(rows) - {5, None} <= {1, 2}
    assert {1, 2, None} & set(rows)


@pytest.mark.backend_free
@pytest.mark.parametrize("parts", [0, -1, 1.5, True, "2"])
def test_parts_are_counted_from_1(parts):
    with pytest.raises(ConfigError, match="expected a whole number from 1 on"):
        tiny_model().compile(accumulate=parts)


@pytest.mark.backend_free
@pytest.mark.parametrize("own", [PLAIN, {"metrics": ["accuracy"]}, {"weighted_metrics": []}])
def test_losses_and_metrics_of_ones_own_are_refused(own: dict[str, Any]):
    with pytest.raises(ConfigError, match="accumulate is 2 beside a loss or metric of your own"):
        tiny_model().compile(accumulate=2, **own)


@pytest.mark.backend_free
def test_parts_are_kept_when_saved(tmp_path):
    model = made("full", accumulate=2)
    model.fit(TEXTS, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_compile_config()["accumulate"] == 2
