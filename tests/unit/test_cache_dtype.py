"""Keys and values kept in fewer bits."""

import numpy as np
import pytest
from keras import ops

from puna.errors import ConfigError
from puna.layers.cache import Int8LayerCache, empty_cache
from puna.testing import tiny_model

PROMPT = "Hello there, how are you? the system and the user"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def logprobs(model, **settings):
    """Of the likeliest tokens after the prompt, in the order of their ids."""
    made = model.generate(PROMPT, max_new_tokens=1, logprobs=64, **settings)
    return dict(made.logprobs[0].top)


def largest_difference(found, exact):
    both = found.keys() & exact.keys()
    assert len(both) > 55
    return max(abs(found[token] - exact[token]) for token in both)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 1e-6), ("bfloat16", 0.01), ("float16", 0.002), ("int8", 0.02)]
)
def test_a_narrower_cache_is_nearly_as_good(model, dtype, error):
    found = largest_difference(logprobs(model, cache_dtype=dtype), logprobs(model))
    assert found <= error
    assert (found > 0) == (dtype != "float32")  # it is really kept otherwise


def test_a_bfloat16_model_with_an_int8_cache():
    half = tiny_model(dtype="bfloat16")
    assert largest_difference(logprobs(half, cache_dtype="int8"), logprobs(half)) < 0.1


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("int8", 8)])
def test_it_takes_as_many_bits_as_it_says(model, dtype, bits):
    cache = empty_cache(model.config, 2, 256, "float32", dtype)
    numbers = sum(np.prod(layer.key_BKSH.shape) * 2 for layer in cache)
    kept = sum(ops.convert_to_numpy(array).nbytes for layer in cache for array in layer[:2])
    assert kept * 8 == numbers * bits
    assert isinstance(cache[0], Int8LayerCache) == (dtype == "int8")


def test_it_slides_and_batches_as_any(model):
    settings = {"max_new_tokens": 60, "sliding_window": 30, "stop_token_ids": None, "seed": [1, 2]}
    for dtype in ("int8", "bfloat16"):
        together = model.generate(["Hello", "Hi there"], cache_dtype=dtype, **settings)
        assert len(together) == 2


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ConfigError, match="cache_dtype is 'int4'"):
        model.generate(PROMPT, cache_dtype="int4")
    with pytest.raises(ConfigError, match="do not go together"):
        model.generate(PROMPT, cache_dtype="int8", prompt_cache=model.prompt_cache(PROMPT))
