"""How likely a model finds texts, against its own logits in one piece."""

import numpy as np
import pytest
from keras import ops

from puna.errors import ConfigError, ContextLengthError
from puna.testing import tiny_model

TEXTS = ["Hello there, how are you? the system and the user are in the world", "Hi", "the " * 60]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ids_of(model, text):
    return np.array([model.tokenizer.start_token_id, *model.tokenizer(text)], np.int32)


def exact(model, ids):
    """Log-probabilities [T - 1, V] from the logits of the whole text, in float64."""
    inputs = {"token_ids": ids[None], "padding_mask": np.ones((1, len(ids)), bool)}
    logits = np.asarray(model.predict(inputs, verbose=0))[0, :-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("text", TEXTS)
def test_log_probabilities_of_a_text_and_of_the_likeliest_tokens(model, text):
    ids = ids_of(model, text)
    expected = exact(model, ids)
    found = model.token_logprobs(text, top=3)
    assert [token.token_id for token in found] == ids[1:].tolist()
    own = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([token.logprob for token in found], own, atol=1e-5)
    for token, row in zip(found, expected, strict=True):
        assert len(token.top) == 3
        best = np.sort(row)[::-1][:3]
        np.testing.assert_allclose([logprob for _, logprob in token.top], best, atol=1e-5)
        for place, logprob in token.top:
            np.testing.assert_allclose(row[place], logprob, atol=1e-5)


def test_several_texts_and_ids(model):
    found = model.token_logprobs(TEXTS[:2])
    assert found[1] == model.token_logprobs(TEXTS[1])
    assert found[0] == model.token_logprobs(ids_of(model, TEXTS[0]))
    assert found[0][0].top == ()


def test_what_generate_tells_of_its_tokens_is_what_the_text_scores(model):
    made = model.generate("Hello", max_new_tokens=12, logprobs=2, sampler="random", seed=4)
    whole = np.concatenate([ids_of(model, "Hello"), made.token_ids])
    scored = model.token_logprobs(whole, top=2)[-len(made.token_ids) :]
    np.testing.assert_allclose(
        [token.logprob for token in made.logprobs], [t.logprob for t in scored], atol=1e-5
    )


def test_perplexity_counts_every_token_once_and_the_same(model):
    rows = [
        exact(model, ids)[np.arange(len(ids) - 1), ids[1:]]
        for ids in (ids_of(model, text) for text in TEXTS)
    ]
    expected = np.exp(-np.concatenate(rows).mean())
    np.testing.assert_allclose(model.perplexity(TEXTS), expected, rtol=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 7, 20])
def test_perplexity_of_long_texts_goes_window_by_window(model, stride):
    ids = ids_of(model, TEXTS[2])
    window, done, begin, found = 20, 1, 0, []
    while done < len(ids):
        piece = ids[begin : begin + window]
        own = exact(model, piece)[np.arange(len(piece) - 1), piece[1:]]
        found += own[done - begin - 1 :].tolist()
        done = begin + len(piece)
        begin = min(begin + (stride or window), done - 1)
    assert len(found) == len(ids) - 1
    perplexity = model.perplexity(ids, max_length=window, stride=stride)
    np.testing.assert_allclose(perplexity, np.exp(-np.mean(found)), rtol=1e-5)


def test_what_cannot_be_scored_is_refused(model):
    context = model.config.context_length
    with pytest.raises(ContextLengthError, match=f"context is {context}"):
        model.token_logprobs(np.ones(context + 1, np.int32))
    with pytest.raises(ConfigError, match="nothing to predict"):
        model.perplexity([np.array([3])])
    with pytest.raises(ConfigError, match="max_length is 1 and stride 1"):
        model.perplexity("Hello", max_length=1)
    with pytest.raises(ConfigError, match="stride 30"):
        model.perplexity("Hello", max_length=20, stride=30)


# `score`, as keras-hub has it


def test_score_gives_logits_and_losses(model):
    ids = np.array([[1, 5, 9, 2, 7], [3, 3, 4, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    logits = ops.convert_to_numpy(model.score(ids, mask))
    whole = model({"token_ids": ids, "padding_mask": mask})
    np.testing.assert_allclose(logits, ops.convert_to_numpy(whole), atol=1e-6)
    targets = np.roll(ids, -1, axis=1)
    losses = model.score(ids, mask, scoring_mode="loss", target_ids=targets)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(logprobs, targets[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(ops.convert_to_numpy(losses), expected, atol=1e-5)


def test_score_lets_hidden_states_be_seen_and_changed(model):
    ids = np.array([[1, 5, 9]])
    seen = []

    def note(x, place):
        seen.append((place, tuple(x.shape)))
        return x

    plain = ops.convert_to_numpy(model.score(ids, layer_intercept_fn=note))
    shape = (1, 3, model.config.hidden_size)
    assert seen == [(place, shape) for place in range(-1, model.config.num_hidden_layers)]
    changed = model.score(ids, layer_intercept_fn=lambda x, place: x * 2 if place == 0 else x)
    assert np.abs(ops.convert_to_numpy(changed) - plain).max() > 1e-3


def test_score_refuses_what_it_does_not_know(model):
    with pytest.raises(ConfigError, match="scoring_mode is 'logit'"):
        model.score(np.array([[1]]), scoring_mode="logit")
    with pytest.raises(ConfigError, match="needs target_ids"):
        model.score(np.array([[1]]), scoring_mode="loss")
