"""Tokens are added to the tokenizer and the model, trained, saved, and opened by transformers."""

import keras
import numpy as np
import pytest

from puna.errors import ConfigError, TokenizerError
from puna.models import CausalLM, Llama3CausalLMPreprocessor
from puna.testing import tiny_model, tiny_tokenizer

NEW = ["<|pirate|>", " ahoy", "Hello", "<|pirate|>"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


def vocabulary_weights(model):
    weights = [model.backbone.embed_tokens.weight]
    return weights if model.lm_head is None else [*weights, model.lm_head.weight]


# The tokenizer


@pytest.mark.backend_free
@pytest.mark.parametrize("special", [True, False])
def test_new_tokens_follow_the_largest_id_and_the_old_ones_stay(special):
    tokenizer, old = tiny_tokenizer(), tiny_tokenizer()
    size = old.vocabulary_size()
    assert tokenizer.add_tokens(NEW, special=special) == 2
    assert tokenizer.vocabulary_size() == size + 2
    assert tokenizer("a<|pirate|>b ahoy").tolist() == [
        *old("a").tolist(), size, *old("b").tolist(), size + 1,
    ]  # fmt: skip
    for name in ("start_token_id", "end_token_id", "pad_token_id", "stop_token_ids"):
        assert getattr(tokenizer, name) == getattr(old, name)
    assert tokenizer.special_token_ids == [*old.special_token_ids, *[size, size + 1][: 2 * special]]
    # in plain text neither kind is a token
    plain = tokenizer("<|pirate|>", parse_special=False)
    assert plain.tolist() == old("<|pirate|>").tolist()
    assert tokenizer.detokenize([size], skip_special_tokens=True) == ("" if special else NEW[0])
    decoder = tokenizer.stream_decoder(skip_special_tokens=True)
    assert decoder.push(size) == ("" if special else NEW[0])
    assert tokenizer.stream_decoder(skip_special_tokens=True, keep=NEW).push(size) == NEW[0]
    assert tokenizer.add_tokens(NEW) == tokenizer.add_tokens([]) == 0
    assert tokenizer.add_tokens("one") == 1


@pytest.mark.backend_free
@pytest.mark.parametrize("bad", [["good", ""], ["good", 3], ["good", "\ud800"], [None]])
def test_what_is_no_token_adds_nothing(bad):
    tokenizer = tiny_tokenizer()
    size = tokenizer.vocabulary_size()
    with pytest.raises(TokenizerError, match="nothing was added"):
        tokenizer.add_tokens(bad)
    assert tokenizer.vocabulary_size() == size


@pytest.mark.backend_free
def test_a_chat_template_may_write_a_new_token_and_no_message_can():
    tokenizer = tiny_tokenizer(chat_template="<|pirate|>{{ messages[0].content }}")
    tokenizer.add_tokens("<|pirate|>", special=True)
    ids = tokenizer.apply_chat_template([{"content": "<|pirate|>"}], tokenize=True).tolist()
    assert ids.count(tokenizer.token_to_id("<|pirate|>")) == 1


@pytest.mark.backend_free
def test_the_config_lists_new_tokens_where_it_lists_the_old(tmp_path):
    tokenizer = tiny_tokenizer(config={"added_tokens_decoder": {}})
    tokenizer.add_tokens("<|pirate|>", special=True)
    listed = tokenizer.config["added_tokens_decoder"]
    assert listed[str(tokenizer.vocabulary_size() - 1)]["content"] == "<|pirate|>"
    tokenizer.save(tmp_path)
    again = type(tokenizer).from_directory(tmp_path)
    assert again("<|pirate|>").tolist() == tokenizer("<|pirate|>").tolist()


# The model


@TIED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_rows_are_added_and_the_rest_stays(tied, dtype):
    model = tiny_model(tie_word_embeddings=tied, dtype=dtype)
    tensors = {name: (v.path, v.dtype) for name, v in model.tensors().items()}
    old = [numpy(weight) for weight in vocabulary_weights(model)]
    ids = np.array([[300, 5, 261]], np.int32)
    logits = numpy(model(ids))
    before = model.generate("Hello", max_new_tokens=4, sampler="greedy")
    V = len(old[0])
    assert model.add_tokens(NEW, special=True) == 2
    assert model.config.vocab_size == model.tokenizer.vocabulary_size() == V + 2
    assert {name: (v.path, v.dtype) for name, v in model.tensors().items()} == tensors
    for weight, rows in zip(vocabulary_weights(model), old, strict=True):
        now = numpy(weight)
        np.testing.assert_array_equal(now[:V], rows)
        mean = rows.mean(0, dtype=np.float64)
        np.testing.assert_allclose(
            now[V:], [mean, mean], rtol=1e-6 if dtype != "bfloat16" else 1e-2
        )
    now = numpy(model(ids))
    assert now.shape == (1, 3, V + 2)
    np.testing.assert_allclose(now[..., :V], logits, rtol=1e-5, atol=1e-5)
    assert model.generate("Hello", max_new_tokens=4, sampler="greedy") == before
    model.generate("Hello<|pirate|> ahoy", max_new_tokens=2)


def test_growing_padding_and_shrinking():
    model = tiny_model(tie_word_embeddings=False)
    V = model.config.vocab_size
    weights = [numpy(weight) for weight in vocabulary_weights(model)]
    assert model.resize_token_embeddings(multiple_of=64) == 320 == model.config.vocab_size
    assert model.add_tokens(["a new one"], multiple_of=64) == 1
    assert model.config.vocab_size == 320  # there was room
    model.preprocessor = None
    assert model.resize_token_embeddings(V) == V
    for weight, old in zip(vocabulary_weights(model), weights, strict=True):
        np.testing.assert_array_equal(numpy(weight), old)
    assert model.lm_head.output_dim == model.backbone.embed_tokens.vocabulary_size == V
    assert model.generate([1, 2], max_new_tokens=2).shape == (4,)


def test_what_cannot_be():
    model = tiny_model()
    for given in ({"vocabulary_size": 0}, {"vocabulary_size": 2.5}, {"multiple_of": 0}):
        with pytest.raises(ConfigError, match="1 or more"):
            model.resize_token_embeddings(**given)
    with pytest.raises(ConfigError, match="at least as many rows"):
        model.resize_token_embeddings(10)
    with pytest.raises(ConfigError, match="multiple_of"):
        model.add_tokens("new", multiple_of=-1)
    assert model.config.vocab_size == model.tokenizer.vocabulary_size() == 307
    model.preprocessor = None
    with pytest.raises(TokenizerError, match="no tokenizer"):
        model.resize_token_embeddings()


def test_what_is_frozen_stays_frozen():
    model = tiny_model(tie_word_embeddings=False)
    model.backbone.embed_tokens.trainable = False
    model.lm_head.weight.trainable = False
    count = len(model.trainable_variables)
    model.add_tokens(NEW)
    assert len(model.trainable_variables) == count
    assert not any(weight.trainable for weight in vocabulary_weights(model))
    model.backbone.embed_tokens.trainable = True
    assert len(model.trainable_variables) == count + 1


@TIED
def test_training_asks_for_a_new_optimizer_and_trains_the_new_rows(tied):
    model = tiny_model(tie_word_embeddings=tied, sequence_length=8)
    texts = ["Hello the", "you are"]
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    model.fit(texts, batch_size=2, verbose=0)
    model.evaluate(texts, batch_size=2, verbose=0)
    model.add_tokens(["<|pirate|>"])
    model.evaluate(texts, batch_size=2, verbose=0)
    with pytest.raises(ConfigError, match="call compile again with a new optimizer"):
        model.fit(texts, batch_size=2, verbose=0)
    old = [numpy(weight) for weight in vocabulary_weights(model)]
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    model.fit(["Hello<|pirate|>", "<|pirate|>you"], batch_size=2, verbose=0)
    for weight, before in zip(vocabulary_weights(model), old, strict=True):
        assert np.abs(numpy(weight)[-1] - before[-1]).max() > 0


# Saved


@TIED
def test_transformers_opens_what_was_added(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = tiny_model(tie_word_embeddings=tied)
    model.add_tokens(["<|pirate|>"], special=True)
    model.add_tokens([" ahoy"], multiple_of=8)
    model.save_to_preset(tmp_path)
    text = "Hello<|pirate|> the ahoy"
    ids = model.tokenizer(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert theirs.decode(ids, skip_special_tokens=True) == "Hello the ahoy"
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(torch.tensor(ids[None].astype("int64"))).logits.numpy()
    again = CausalLM.from_preset(tmp_path)
    assert again.config.vocab_size == model.config.vocab_size == 312
    for ours in (model, again):
        assert ours.tokenizer(text).tolist() == ids.tolist()
        difference = np.abs(numpy(ours(ids[None])) - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max()


def test_keras_own_file_has_them_too(tmp_path):
    model = tiny_model()
    model.add_tokens(NEW)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.config.vocab_size == model.config.vocab_size
    assert again.tokenizer("<|pirate|>").tolist() == model.tokenizer("<|pirate|>").tolist()
    ids = model.tokenizer("Hello<|pirate|>")[None]
    np.testing.assert_allclose(numpy(again(ids)), numpy(model(ids)), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_that_has_more_than_the_model_says_what_to_do(tmp_path):
    model = tiny_model()
    model.tokenizer.add_tokens(NEW)
    model.save_to_preset(tmp_path)
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        CausalLM.from_preset(tmp_path)
    again = CausalLM.from_preset(tmp_path, preprocessor=None)
    again.preprocessor = Llama3CausalLMPreprocessor.from_preset(tmp_path)
    assert again.resize_token_embeddings() == model.tokenizer.vocabulary_size()
    again.generate("<|pirate|>", max_new_tokens=2)
