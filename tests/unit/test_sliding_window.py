"""A completion that goes on beyond the context, because the oldest tokens are forgotten."""

import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.decoding.programs import Rows
from puna.errors import ConfigError, ContextLengthError
from puna.layers.cache import empty_cache
from puna.testing import tiny_model

WITHOUT_END = {"stop_token_ids": None, "strip_prompt": True, "sampler": "random"}


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=64)


def test_a_completion_may_be_longer_than_the_context(model):
    settings = {"logprobs": 0, "seed": 1, **WITHOUT_END}

    def made(**more):
        found = model.generate(np.arange(1, 11), **settings, **more)
        return found.token_ids, np.array([token.logprob for token in found.logprobs])

    token_ids, logprobs = made(max_new_tokens=200, sliding_window=20)
    assert token_ids.shape == (200,)
    whole_ids, whole = made(max_new_tokens=54)
    # Until the window is full, nothing is forgotten; from then on the model knows less.
    np.testing.assert_array_equal(token_ids[:10], whole_ids[:10])
    np.testing.assert_allclose(logprobs[:10], whole[:10], atol=1e-6)
    assert abs(logprobs[10] - whole[10]) > 1e-4


def test_rows_forget_each_at_its_own_time(model):
    prompts = [np.arange(1, 31), np.array([7])]
    settings = {"max_new_tokens": 100, "sliding_window": 40, **WITHOUT_END}
    together = model.generate(prompts, seed=[5, 6], **settings)
    for prompt, made, seed in zip(prompts, together, (5, 6), strict=True):
        alone = model.generate(prompt, seed=[seed], **settings)
        np.testing.assert_array_equal(made, alone)


def test_what_is_kept_is_as_if_the_rest_had_never_been():
    model = tiny_model(num_hidden_layers=1)  # deeper layers keep what they saw of the forgotten
    programs = model._decoder.programs

    def cache_of(ids):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return programs.fill(padded, 0, empty_cache(model.config, 1, 256, "float32"), len(ids))

    ids = np.arange(3, 35, dtype=np.int32)
    history = np.zeros((1, 256), np.int32)
    history[0, :32] = ids
    numbers = (history, np.array([32], np.int32), np.array([5], np.int32))
    rows, cache = programs.shift(
        Rows(*map(backend.ops.to_device, numbers)),
        cache_of(ids),
        backend.ops.to_device(np.array([10], np.int32)),
        backend.ops.to_device(np.array(4, np.int32)),
    )
    kept = np.concatenate([ids[:4], ids[14:]])
    assert ops.convert_to_numpy(rows.length_B).tolist() == [22]
    np.testing.assert_array_equal(ops.convert_to_numpy(rows.history_BS)[0, :22], kept)
    for found, expected in zip(cache[0], cache_of(kept)[0], strict=True):
        found, expected = (ops.convert_to_numpy(a)[:, :, :22] for a in (found, expected))
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sliding_window": 48}, ConfigError, "it has no end"),
        ({"sliding_window": 5, "max_new_tokens": 3}, ConfigError, "at least 2 tokens more"),
        ({"sliding_window": 48, "attention_sinks": -1}, ConfigError, "expected sinks ≥ 0"),
        ({"sliding_window": 100, "max_new_tokens": 3}, ContextLengthError, "context is 64"),
        ({"sliding_window": 19, "max_new_tokens": 3}, ContextLengthError, "has 20 tokens"),
        ({"max_length": 100}, ContextLengthError, "with a sliding_window it may be more"),
    ],
)
def test_what_makes_no_sense_is_refused(model, settings, error, message):
    with pytest.raises(error, match=message):
        model.generate(np.arange(1, 21), **settings)
