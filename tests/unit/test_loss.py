"""The model's own loss, which never has all logits, against the loss that does."""

from typing import Any

import keras
import numpy as np
import pytest

from puna.models import training
from puna.testing import tiny_model
from tests.adapters import TEXTS
from tests.weights import array

PLAIN: dict[str, Any] = {
    "loss": keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    ),
    "weighted_metrics": [],
}
CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {"tie_word_embeddings": True},
    "lora": {},
    "lora_on_head": {},
    "frozen_int8": {},
}


@pytest.fixture
def batch():
    random = np.random.default_rng(3)
    ids = random.integers(0, 250, (3, 20), np.int32)
    mask = np.arange(20) < np.array([[20], [9], [14]])
    weights = (mask & (random.random((3, 20)) < 0.6)).astype("float32") * random.random((3, 20))
    return {"token_ids": ids, "padding_mask": mask}, np.roll(ids, -1, 1), weights.astype("float32")


@pytest.fixture
def small_pieces(monkeypatch):
    """Sixteen rows at a time: of 60 rows, some pieces have weights and one has none."""
    monkeypatch.setattr(training, "_LOGITS_BYTES", 1)


def made(kind, dtype: str = "float32", **options: Any):
    keras.utils.set_random_seed(5)
    model = tiny_model(dtype=dtype, **CHANGES[kind])
    if kind == "frozen_int8":
        model.quantize("int8")
    if kind.startswith("lora") or kind == "frozen_int8":
        targets = ["q_proj", "down_proj"] + ["lm_head"] * (kind == "lora_on_head")
        model.enable_lora(4, target_modules=targets)
        random = np.random.default_rng(0)
        for variable in model.trainable_variables:
            variable.assign(random.normal(0, 0.1, variable.shape).astype("float32"))
    model.compile(optimizer=keras.optimizers.SGD(1.0), **options)
    return model


def step(model, batch):
    """The loss of a step, and by how much each variable changes."""
    before = [array(v).astype("float64") for v in model.trainable_variables]
    x, y, weights = batch
    loss = model.train_on_batch(x, y, sample_weight=weights)
    after = [array(v).astype("float64") for v in model.trainable_variables]
    return np.ravel(loss)[0], [new - old for new, old in zip(after, before, strict=True)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", CHANGES)
def test_loss_and_gradients_are_those_of_all_logits(kind, batch):
    loss, changes = step(made(kind), batch)
    expected, theirs = step(made(kind, **PLAIN), batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert changes
    for ours, their in zip(changes, theirs, strict=True):
        np.testing.assert_allclose(ours, their, rtol=1e-4, atol=1e-5 * np.abs(their).max() + 1e-9)


def test_blocks_that_are_computed_again_have_the_same_gradients(batch):
    loss, changes = step(made("lora", remat=True), batch)
    expected, theirs = step(made("lora"), batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, their in zip(changes, theirs, strict=True):
        np.testing.assert_allclose(ours, their, rtol=1e-4, atol=1e-6)


def test_a_step_is_as_long_as_it_is_clipped_to(batch):
    """Tokens that occur several times have one gradient, whose length counts."""
    model = made("full")
    model.compile(optimizer=keras.optimizers.SGD(1.0, global_clipnorm=0.25))
    x, labels, weights = batch
    _, changes = step(model, (x | {"token_ids": x["token_ids"] % 3}, labels, weights))
    assert np.sqrt(sum(np.square(c).sum() for c in changes)) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns_in_float32(dtype, batch):
    model = made("full", dtype)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    loss, changes = step(model, batch)
    _, exact = step(made("full"), batch)
    assert np.isfinite(loss)
    # One step at the scale that loss scaling starts with need not overflow, or changes nothing.
    ours, theirs = (np.concatenate([c.ravel() for c in some]) for some in (changes, exact))
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.99


def test_a_batch_without_weights_changes_nothing(batch):
    x, y, weights = batch
    loss, changes = step(made("lora"), (x, y, np.zeros_like(weights)))
    assert loss == 0
    assert not any(change.any() for change in changes)


def test_evaluation_and_accuracy_are_those_of_all_logits(batch):
    x, y, weights = batch
    own = made("full").evaluate(x, y, sample_weight=weights, return_dict=True, verbose=0)
    metric = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    plain = made("full", "float32", **PLAIN | {"weighted_metrics": metric})
    theirs = plain.evaluate(x, y, sample_weight=weights, return_dict=True, verbose=0)
    assert own == pytest.approx(theirs, rel=1e-5)


def test_a_loss_of_ones_own_gets_logits(batch):
    seen = []

    class Own(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen.append(tuple(y_pred.shape))
            return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    model = made("full", loss=Own())
    model.fit(TEXTS, batch_size=4, verbose=0)
    assert seen[-1][-1] == model.config.vocab_size


def test_a_loop_of_ones_own_gets_logits(batch):
    model = made("full")
    model.fit(TEXTS, batch_size=4, verbose=0)
    assert model(batch[0]).shape == (3, 20, model.config.vocab_size)
    assert model.predict(batch[0], verbose=0).shape == (3, 20, model.config.vocab_size)


@pytest.mark.backend_free
def test_defaults_stay_defaults_when_saved(tmp_path):
    model = made("full", remat=True)
    model.fit(TEXTS, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    config = again.get_compile_config()
    assert (config["loss"], config["weighted_metrics"], config["remat"]) == ("auto", "auto", True)
    assert again.fit(TEXTS, batch_size=4, verbose=0).history["accuracy"]
