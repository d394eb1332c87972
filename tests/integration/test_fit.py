"""Training and evaluation through Keras, on strings and on arrays, and loops of the user's own."""

import keras
import numpy as np
import pytest

from puna.errors import ConfigError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model

TEXTS = ["Hello world", "Hi there, how are you?", "the system", "Hello Hello"]

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.data is TensorFlow's"
)


@pytest.fixture
def model():
    return tiny_model(sequence_length=24)


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


def token_losses(model, x, y):
    """-log p of each label, `[B, T]`, in float64 with NumPy."""
    logits = numpy(model(x)).astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return log_sum - np.take_along_axis(logits, y[..., None], -1)[..., 0]


def expected_loss(model, texts):
    x, y, weight = model.preprocessor(texts)
    return token_losses(model, x, y)[weight].mean()


def loss_of(model, x, **kwargs):
    return model.evaluate(x, verbose=0, return_dict=True, **kwargs)["loss"]


# The loss


def test_the_loss_is_the_mean_over_the_real_tokens(model):
    expected = expected_loss(model, TEXTS)
    assert loss_of(model, TEXTS, batch_size=4) == pytest.approx(expected, rel=1e-5)
    # A mean of the texts' means, or one over padding too, would be another number.
    lone = [expected_loss(model, [text]) for text in TEXTS]
    assert np.mean(lone) != pytest.approx(expected, rel=1e-3)


def test_the_accuracy_is_the_share_of_real_tokens(model):
    x, y, weight = model.preprocessor(TEXTS)
    right = (numpy(model(x)).argmax(-1) == y)[weight].mean()
    result = model.evaluate(TEXTS, batch_size=4, verbose=0, return_dict=True)
    assert result["accuracy"] == pytest.approx(right, abs=1e-6)


def test_the_loss_does_not_depend_on_the_padding(model):
    losses = []
    for length in (12, 24, 100):
        model.preprocessor.sequence_length = length
        losses.append(loss_of(model, model.preprocessor(TEXTS)[0], **arrays(model, TEXTS)))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def arrays(model, texts):
    _, y, weight = model.preprocessor(texts)
    return {"y": y, "sample_weight": weight, "batch_size": len(texts)}


def test_a_step_weighs_every_token_of_a_batch_the_same():
    # One step of plain gradient descent on a batch is the step along the tokens' mean gradient:
    # the batch of two texts moves as far as their own steps, each weighted by its tokens.
    def moved(texts):
        model = tiny_model(sequence_length=24)
        before = numpy(model.backbone.norm.weight)
        model.compile(optimizer=keras.optimizers.SGD(1.0))
        model.fit(texts, batch_size=len(texts), verbose=0)
        return numpy(model.backbone.norm.weight) - before

    short, long = TEXTS[0], TEXTS[1]
    counts = tiny_model(sequence_length=24).preprocessor([short, long])[2].sum(axis=1)
    assert counts[0] != counts[1]
    expected = (counts[0] * moved([short]) + counts[1] * moved([long])) / counts.sum()
    np.testing.assert_allclose(moved([short, long]), expected, rtol=1e-3, atol=1e-6)


# What texts may come in


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        lambda texts: np.array(texts, object),
        lambda texts: [text.encode() for text in texts],
    ],
    ids=["list", "tuple", "array", "object array", "bytes"],
)
def test_texts_come_in_every_sequence(model, kind):
    assert loss_of(model, kind(TEXTS), batch_size=4) == pytest.approx(
        expected_loss(model, TEXTS), rel=1e-5
    )


class Batches(keras.utils.PyDataset):
    """Texts, two at a time."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return TEXTS[2 * index : 2 * index + 2]


def pairs_loss(model):
    """What Keras makes of batches of two: each batch's loss, weighted by its rows."""
    return (expected_loss(model, TEXTS[:2]) + expected_loss(model, TEXTS[2:])) / 2


def test_a_py_dataset_of_text_batches(model):
    assert loss_of(model, Batches()) == pytest.approx(pairs_loss(model), rel=1e-5)
    history = model.fit(Batches(), epochs=2, verbose=0, validation_data=Batches())
    assert len(history.history["val_loss"]) == 2
    assert model.predict(Batches(), verbose=0).shape == (4, 24, 307)


@on_tensorflow
def test_a_tf_data_set_of_text_batches(model):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    assert loss_of(model, dataset) == pytest.approx(pairs_loss(model), rel=1e-5)
    history = model.fit(dataset, epochs=2, verbose=0, validation_data=dataset)
    assert len(history.history["val_loss"]) == 2
    assert model.predict(dataset, verbose=0).shape == (4, 24, 307)


def test_a_generator_of_arrays(model):
    def batches():
        for texts in (TEXTS[:2], TEXTS[2:]):
            yield model.preprocessor(texts)

    assert loss_of(model, batches()) == pytest.approx(pairs_loss(model), rel=1e-5)


def test_a_generator_of_text_batches(model):
    def batches():
        yield TEXTS[:2]
        yield TEXTS[2:]

    assert loss_of(model, batches()) == pytest.approx(pairs_loss(model), rel=1e-5)
    history = model.fit(batches(), verbose=0, validation_data=batches())
    assert history.history["val_loss"][0] > 0
    assert model.predict(batches(), verbose=0).shape == (4, 24, 307)


def test_one_string_is_a_batch_of_one(model):
    expected = expected_loss(model, TEXTS[:1])
    assert loss_of(model, TEXTS[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_validation_texts_are_all_used(model, kind):
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    history = model.fit(TEXTS[:1], validation_data=kind(TEXTS), verbose=0)
    assert history.history["val_loss"][0] == pytest.approx(expected_loss(model, TEXTS), rel=1e-5)


def test_validation_arrays_stay_arrays_beside_texts(model):
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    history = model.fit(TEXTS[:1], validation_data=model.preprocessor(TEXTS), verbose=0)
    assert history.history["val_loss"][0] == pytest.approx(expected_loss(model, TEXTS), rel=1e-5)


def test_validation_split_takes_the_last_texts(model):
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    history = model.fit(TEXTS, validation_split=0.25, verbose=0)
    expected = expected_loss(model, TEXTS[3:])
    assert history.history["val_loss"][0] == pytest.approx(expected, rel=1e-5)


# What is said and refused


def test_texts_that_are_cut_are_counted_and_reported(model, capsys):
    model.preprocessor.sequence_length = 5
    model.fit(["Hello", "Hi there, how are you?", "the system and the user"], verbose=0)
    told = " ".join(capsys.readouterr().err.split())
    assert "2 texts were longer than the preprocessor's sequence_length of 5 tokens" in told


def test_texts_that_fit_are_not_reported(model, capsys):
    model.fit(TEXTS, verbose=0)
    assert "longer than" not in capsys.readouterr().err


def test_validation_labels_beside_texts_are_refused(model):
    with pytest.raises(ValueError, match="bring their own"):
        model.fit(TEXTS, validation_data=(TEXTS, np.zeros((4, 24))), verbose=0)


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_labels_beside_texts_are_refused(model, name):
    with pytest.raises(ValueError, match=f"{name} was given beside texts"):
        model.fit(TEXTS, **{name: np.zeros((4, 24))})


def test_texts_without_a_preprocessor_are_refused(model):
    bare = Llama3CausalLM(model.backbone)
    with pytest.raises(TokenizerError, match="the model has no preprocessor"):
        bare.fit(TEXTS, verbose=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_half_precision_weights_is_refused_with_the_way_out(dtype):
    model = tiny_model(dtype=dtype)
    with pytest.raises(ConfigError, match=f"dtype='mixed_{dtype}'"):
        model.fit(TEXTS, verbose=0)
    model.trainable = False
    assert np.isfinite(loss_of(model, TEXTS))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(dtype):
    model = tiny_model(dtype=dtype)
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    losses = model.fit(TEXTS, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# Keras's own ways


def test_early_stopping_and_model_checkpoint(model, tmp_path):
    path = tmp_path / "best.weights.h5"
    model.compile(optimizer=keras.optimizers.SGD(1000.0))  # it only gets worse
    start = loss_of(model, TEXTS)
    stop = keras.callbacks.EarlyStopping(
        "val_loss", baseline=start, patience=2, restore_best_weights=False
    )
    keep = keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True)
    history = model.fit(
        TEXTS, validation_data=TEXTS, epochs=20, verbose=0, callbacks=[stop, keep]
    ).history["val_loss"]
    assert len(history) < 20
    other = tiny_model(seed=1, sequence_length=24)
    other.load_weights(path)
    assert loss_of(other, TEXTS) == pytest.approx(np.nanmin(history), rel=1e-4)


def test_train_on_batch_lowers_the_loss(model):
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    x, y, weight = model.preprocessor(TEXTS)
    losses = [model.train_on_batch(x, y, weight, return_dict=True)["loss"] for _ in range(4)]
    assert float(losses[-1]) < float(losses[0])
    assert np.isfinite(float(model.test_on_batch(x, y, weight, return_dict=True)["loss"]))


def test_gradient_accumulation_is_taken(model):
    model.compile(optimizer=keras.optimizers.Adam(3e-3, gradient_accumulation_steps=2))
    before = numpy(model.lm_head.weight)
    model.fit(TEXTS, batch_size=2, verbose=0)
    assert np.abs(numpy(model.lm_head.weight) - before).max() > 0


def test_a_training_loop_by_hand(model):
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    x, y, weight = model.preprocessor(TEXTS)

    def loss_of_logits(logits):
        losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        weights = keras.ops.cast(weight, "float32")
        return keras.ops.sum(losses * weights) / keras.ops.sum(weights)

    step = {"jax": _jax_step, "torch": _torch_step, "tensorflow": _tensorflow_step}
    take = step[keras.backend.backend()]
    losses = [float(take(model, optimizer, x, loss_of_logits)) for _ in range(5)]
    assert losses[0] == pytest.approx(
        expected_loss(tiny_model(sequence_length=24), TEXTS), rel=1e-5
    )
    assert losses[-1] < losses[0]
    assert model.generate("Hello", max_new_tokens=2).startswith("Hello")


def _jax_step(model, optimizer, x, loss_of_logits):
    import jax

    def compute(trainable, fixed):
        logits, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return loss_of_logits(logits), fixed

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    (loss, fixed), gradients = jax.value_and_grad(compute, has_aux=True)(trainable, fixed)
    state = [v.value for v in optimizer.variables]
    trainable, state = optimizer.stateless_apply(state, gradients, trainable)
    for variables, values in (
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, fixed),
        (optimizer.variables, state),
    ):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    return loss


def _torch_step(model, optimizer, x, loss_of_logits):
    import torch

    model.zero_grad()
    loss = loss_of_logits(model(x, training=True))
    loss.backward()
    gradients = [v.value.grad for v in model.trainable_variables]
    with torch.no_grad():
        optimizer.apply(gradients, model.trainable_variables)
    return loss


def _tensorflow_step(model, optimizer, x, loss_of_logits):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = loss_of_logits(model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    return loss
