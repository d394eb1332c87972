"""`fit`, `evaluate` and `predict` on rows of every kind, from every source."""

import json
import pathlib

import keras
import numpy as np
import pytest

from puna.errors import DataError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model
from puna.tuning import TextData, read_rows

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello world"}
ROWS = [
    {"prompt": "Hello", "completion": " world"},
    {"prompt": "Hi there, how are", "completion": " you?"},
    {"prompt": "the", "completion": " system"},
    {"prompt": "Hello", "completion": " Hello"},
]
MIXED = [
    "Hi there",
    {"text": "the world"},
    ROWS[0],
    {"messages": [HI, HELLO]},
    {"instruction": "Hi", "input": "", "output": "Hello world"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello world"}]},
]

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.data is TensorFlow's"
)


@pytest.fixture
def model():
    return tiny_model(sequence_length=32)


def loss_of(model, x, **kwargs):
    return model.evaluate(x, verbose=0, return_dict=True, **kwargs)["loss"]


def expected_loss(model, rows, **options):
    """-log p of what is learned, a mean over the tokens, with NumPy."""
    losses = []
    for example in TextData(rows, **options).examples(model.preprocessor).examples:
        logits = keras.ops.convert_to_numpy(model(example.ids[None, :-1]))[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_p, example.ids[1:, None], axis=-1)[:, 0]
        losses.append(-picked[example.learned[1:]])
    return np.concatenate(losses).mean()


# Rows in memory


def test_rows_of_every_kind_in_one_list(model):
    expected = expected_loss(model, MIXED)
    assert loss_of(model, MIXED, batch_size=len(MIXED)) == pytest.approx(expected, rel=1e-5)
    # of completions and chats only what the model says is learned
    everything = expected_loss(model, MIXED, loss_on="all")
    assert everything != pytest.approx(expected, rel=1e-3)
    data = TextData(MIXED, loss_on="all")
    assert loss_of(model, data, batch_size=len(MIXED)) == pytest.approx(everything, rel=1e-5)


def test_alpaca_and_sharegpt_are_the_chats_they_stand_for(model):
    losses = [expected_loss(model, [row]) for row in MIXED[3:]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_plain_texts_are_what_they_were(model):
    texts = ["Hi there", "the world"]
    as_rows = [{"text": text} for text in texts]
    assert loss_of(model, texts) == pytest.approx(loss_of(model, as_rows), rel=1e-6)
    assert loss_of(model, TextData(texts)) == pytest.approx(loss_of(model, texts), rel=1e-6)


class Batches(keras.utils.PyDataset):
    """Rows, two at a time."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[2 * index : 2 * index + 2]


class Streamed:
    """As the streams of Hugging Face and grain: it can be gone through, and has no length."""

    def __iter__(self):
        yield from ROWS


def sources(directory: pathlib.Path):
    lines = directory / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    table = directory / "rows.csv"
    table.write_text(
        "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in ROWS)
    )
    return {
        "list": ROWS,
        "tuple": tuple(ROWS),
        "array": np.array(ROWS),
        "columns": {name: [row[name] for row in ROWS] for name in ("prompt", "completion")},
        "path": lines,
        "paths": [table],
        "rows": read_rows(lines),
        "stream": Streamed(),
    }


def test_sources_in_memory(model, tmp_path):
    expected = expected_loss(model, ROWS)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    for name, source in sources(tmp_path).items():
        assert loss_of(model, source, batch_size=4) == pytest.approx(expected, rel=1e-5), name
        history = model.fit(source, batch_size=4, validation_data=source, verbose=0).history
        assert history["loss"][0] == pytest.approx(expected, rel=1e-5), name
        assert history["val_loss"][0] == pytest.approx(expected, rel=1e-5), name
        assert model.predict(source, verbose=0).shape[0] == len(ROWS)


def pairs_loss(model):
    """What Keras makes of batches of two: each batch's loss, weighted by its rows."""
    return (expected_loss(model, ROWS[:2]) + expected_loss(model, ROWS[2:])) / 2


def test_data_sets_of_batches(model):
    expected = pairs_loss(model)
    assert loss_of(model, Batches()) == pytest.approx(expected, rel=1e-5)
    assert loss_of(model, (batch for batch in (ROWS[:2], ROWS[2:]))) == pytest.approx(expected)
    history = model.fit(Batches(), epochs=2, verbose=0, validation_data=Batches())
    assert len(history.history["val_loss"]) == 2
    assert model.predict(Batches(), verbose=0).shape == (4, 32, 307)


def test_a_generator_of_rows_is_made_into_batches(model):
    assert loss_of(model, (row for row in ROWS), batch_size=2) == pytest.approx(pairs_loss(model))
    assert model.predict((row for row in ROWS), batch_size=3, verbose=0).shape == (4, 32, 307)


def test_with_steps_a_stream_is_read_again_and_again(model):
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    history = model.fit(Streamed(), batch_size=2, steps_per_epoch=3, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2


@on_tensorflow
def test_tf_data(model):
    import tensorflow as tf

    columns = {name: [row[name] for row in ROWS] for name in ("prompt", "completion")}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    assert loss_of(model, dataset.batch(2)) == pytest.approx(pairs_loss(model), rel=1e-5)
    expected = expected_loss(model, ROWS)
    assert loss_of(model, dataset, batch_size=4) == pytest.approx(expected, rel=1e-5)
    assert model.predict(dataset.batch(2), verbose=0).shape == (4, 32, 307)
    with pytest.raises(DataError, match="has no end"):
        model.fit(dataset.repeat(), verbose=0)


# TextData


def test_text_data_is_trained_and_validated_on(model, capsys):
    data = TextData(MIXED * 5, packing=True, seed=3)
    model.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = model.fit(data, batch_size=2, epochs=3, validation_data=TextData(ROWS), verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert len(history.history["val_loss"]) == 3
    assert capsys.readouterr().err == ""
    model.fit(data, batch_size=2, verbose=2)
    told = " ".join(capsys.readouterr().err.split())
    assert "30 rows with" in told
    assert "packed into" in told


def test_rows_of_several_lengths_train_in_several_shapes(model):
    rows = [" ".join(["Hello"] * n) for n in (1, 2, 3, 20, 21, 22, 4, 5, 28, 29)]
    made = TextData(rows).batches(model.preprocessor, batch_size=2)
    assert len({made[i][1].shape for i in range(len(made))}) == 3
    first = model.fit(TextData(rows), batch_size=2, epochs=2, verbose=0).history["loss"]
    again = tiny_model(sequence_length=32).fit(TextData(rows), batch_size=2, epochs=2, verbose=0)
    assert again.history["loss"] == pytest.approx(first, rel=1e-5)


def test_evaluate_on_packed_rows_is_evaluate_on_the_same_rows(model):
    packed = loss_of(model, TextData(MIXED, packing=True), batch_size=100)
    assert packed == pytest.approx(loss_of(model, TextData(MIXED), batch_size=100), rel=1e-5)


def test_predict_has_a_result_for_each_row_in_order(model):
    rows = [*MIXED, {"messages": [HI]}]
    found = model.predict(TextData(rows, packing=True), verbose=0)
    assert found.shape[0] == len(rows)
    lone = model.predict([rows[1]], verbose=0)[0]
    np.testing.assert_allclose(found[1, : len(lone)][:3], lone[:3], rtol=1e-5, atol=1e-5)


def test_long_rows_are_counted_even_where_it_is_quiet(model, capsys):
    rows = [*ROWS, {"prompt": "Hello", "completion": " Hello" * 50}]
    model.fit(TextData(rows), verbose=0)
    assert "1 cut" in " ".join(capsys.readouterr().err.split())
    model.fit(TextData(ROWS), validation_data=TextData(rows, long="drop"), verbose=0)
    told = " ".join(capsys.readouterr().err.split())
    assert "Validation: 4 rows with" in told
    assert "1 left out because they are too long" in told
    with pytest.raises(DataError, match="row 4: it has 53 tokens"):
        model.fit(TextData(rows, long="refuse"), verbose=0)
    with pytest.raises(DataError, match="predict has a result for every row"):
        model.predict(TextData(rows, long="drop"), verbose=0)
    model.fit(rows, verbose=0)
    assert "1 texts were longer than" in " ".join(capsys.readouterr().err.split())


# What is refused


def test_bad_rows_are_named(model):
    with pytest.raises(DataError, match="row 2: it has no turn of the assistant's"):
        model.fit([*ROWS[:2], {"messages": [HI]}], verbose=0)
    with pytest.raises(DataError, match=r"row 1: it has the keys \['no'\]"):
        model.fit([ROWS[0], {"no": 1}], verbose=0)
    with pytest.raises(DataError, match=r"row 0: it has the keys \['no'\]"):
        model.fit([{"no": 1}], verbose=0)


@pytest.mark.parametrize("text", ["train.jsonl", ["data/train.parquet"]])
def test_the_name_of_a_file_is_not_taken_for_a_text(model, text):
    with pytest.raises(DataError, match="is a text, and would be learned as one"):
        model.fit(text, verbose=0)


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_labels_beside_rows_are_refused(model, name):
    for rows in (ROWS, TextData(ROWS)):
        with pytest.raises(ValueError, match=f"{name} was given beside texts"):
            model.fit(rows, **{name: np.zeros((4, 32))})


def test_rows_without_a_preprocessor_are_refused(model):
    bare = Llama3CausalLM(model.backbone)
    for rows in (ROWS, TextData(ROWS), (row for row in ROWS)):
        with pytest.raises(TokenizerError, match="the model has no preprocessor"):
            bare.fit(rows, verbose=0)
