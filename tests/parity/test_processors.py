"""What samplers do to logits is what transformers' own classes do, and OpenAI's formula says.

What narrows a choice is compared by the tokens that remain possible: each is chosen when the
random number falls into its share, so a fine grid of numbers finds all of them.
"""

import numpy as np
import pytest
import torch
from keras import ops
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from puna import backend
from puna.decoding.choose import Changes, Settings, change, choose
from puna.errors import ConfigError
from puna.samplers import Sampler

V, PROMPT, LENGTH, CAPACITY = 50, 4, 11, 16
STOPS = [7, 31]
CASES = 5  # of 24 rows each

CHOOSE, CHANGE = (backend.ops.compile_step(function, ()) for function in (choose, change))

# Logits within one of these are no different: float32, sums in another order.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def case(seed, rows=24):
    """Logits [rows, V] and the tokens so far [rows, LENGTH]; few tokens, so that many repeat."""
    numbers = np.random.default_rng(seed)
    logits = numbers.normal(0, 3, (rows, V)).astype(np.float32)
    return logits, numbers.integers(0, 12, (rows, LENGTH)).astype(np.int32)


def ours(sampler, logits, ids, prompt=PROMPT, stops=STOPS):
    """What `change` makes of the logits; the history has noise in its unused places."""
    rows, length = ids.shape
    history = np.full((rows, CAPACITY), 3, np.int32)
    history[:, :length] = ids
    changes = Changes.of(sampler, sampler.bad_words, rows, V)
    padded = np.array([*stops, -1, -1], np.int32)
    each = [np.full(rows, number, np.int32) for number in (length, prompt)]
    arrays = map(ops.convert_to_tensor, (logits, history, *each, padded))
    changed = CHANGE(*arrays, Changes(*map(ops.convert_to_tensor, changes)))
    return ops.convert_to_numpy(changed)


def theirs(processors, logits, ids):
    scores = LogitsProcessorList(processors)(torch.tensor(ids).long(), torch.tensor(logits))
    return scores.numpy()


def counted(logits, ids, presence, frequency):
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence: OpenAI's API."""
    counts = np.stack([np.bincount(row[PROMPT:], minlength=V) for row in ids])
    return logits - counts * np.float32(frequency) - (counts > 0) * np.float32(presence)


def words(numbers):
    """Bad words, some of which end what is in `case`, some longer than it."""
    sizes = [1, 1, 2, 2, 2, 3, LENGTH, LENGTH + 1, LENGTH + 5]
    return [numbers.integers(0, 12, size).tolist() for size in sizes]


@pytest.mark.parametrize("seed", range(CASES))
def test_repetition_penalty(seed):
    logits, ids = case(seed)
    penalty = float(np.random.default_rng(seed).uniform(0.5, 2))
    np.testing.assert_allclose(
        ours(Sampler(repetition_penalty=penalty), logits, ids),
        theirs([hf.RepetitionPenaltyLogitsProcessor(penalty)], logits, ids),
        **TOLERANCE,
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_logit_bias(seed):
    logits, ids = case(seed)
    numbers = np.random.default_rng(seed)
    bias = {int(token): float(numbers.normal(0, 20)) for token in numbers.integers(0, V, 9)}
    sequences = {(token,): value for token, value in bias.items()}
    np.testing.assert_allclose(
        ours(Sampler(logit_bias=bias), logits, ids),
        theirs([hf.SequenceBiasLogitsProcessor(sequences)], logits, ids),
        **TOLERANCE,
    )


@pytest.mark.parametrize("length", [1, 2, 5, LENGTH])
@pytest.mark.parametrize("seed", range(CASES))
def test_bad_words(seed, length):
    logits, ids = case(seed)
    bad = words(np.random.default_rng(seed))
    # Words that do end what there is, in one token and in all but one of the history's.
    bad += [[*ids[0, length - 1 : length].tolist(), 40], [*ids[1, :length].tolist(), 41]]
    changed = ours(Sampler(bad_words=bad), logits, ids[:, :length], prompt=1)
    assert np.isinf(changed[0, 40])
    assert np.isinf(changed[1, 41])
    expected = theirs([hf.NoBadWordsLogitsProcessor(bad)], logits, ids[:, :length])
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("minimum", [0, 1, LENGTH - PROMPT, LENGTH - PROMPT + 1, 30])
def test_min_new_tokens(minimum):
    logits, ids = case(minimum)
    np.testing.assert_array_equal(
        ours(Sampler(min_new_tokens=minimum), logits, ids),
        theirs([hf.MinNewTokensLengthLogitsProcessor(PROMPT, minimum, STOPS)], logits, ids),
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_presence_and_frequency_penalty(seed):
    logits, ids = case(seed)
    presence, frequency = np.random.default_rng(seed).uniform(-2, 2, 2)
    sampler = Sampler(presence_penalty=float(presence), frequency_penalty=float(frequency))
    np.testing.assert_allclose(
        ours(sampler, logits, ids), counted(logits, ids, presence, frequency), **TOLERANCE
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_all_changes_together(seed):
    logits, ids = case(seed)
    numbers = np.random.default_rng(seed)
    bias = {int(token): float(numbers.normal(0, 3)) for token in numbers.integers(0, V, 9)}
    penalty, presence, frequency = numbers.uniform(0.5, 2, 3).tolist()
    bad = [*words(numbers), [*ids[0, -2:].tolist(), 40]]
    sampler = Sampler(
        logit_bias=bias,
        repetition_penalty=penalty,
        presence_penalty=presence,
        frequency_penalty=frequency,
        bad_words=bad,
        min_new_tokens=LENGTH,
    )
    first = [
        hf.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        hf.RepetitionPenaltyLogitsProcessor(penalty),
    ]
    then = [
        hf.NoBadWordsLogitsProcessor(bad),
        hf.MinNewTokensLengthLogitsProcessor(PROMPT, LENGTH, STOPS),
    ]
    # Transformers has no presence and frequency penalties; bans hold wherever they come.
    expected = theirs(first, logits, ids)
    expected = theirs(then, counted(expected, ids, presence, frequency), ids)
    np.testing.assert_allclose(ours(sampler, logits, ids), expected, **TOLERANCE)


def test_a_stop_token_that_is_a_bad_word_is_banned():
    # Transformers' generate drops such a word without a word; who bans a token means it.
    logits, ids = case(0)
    changed = ours(Sampler(bad_words=[[STOPS[0]]]), logits, ids)
    assert np.isinf(changed[:, STOPS[0]]).all()
    kept = theirs([hf.NoBadWordsLogitsProcessor([[STOPS[0]], [1]], STOPS)], logits, ids)
    assert np.isfinite(kept[:, STOPS[0]]).all()


@pytest.mark.parametrize("wrong", [V, -1])
def test_tokens_that_the_model_does_not_have(wrong):
    logits, ids = case(0)
    for sampler in (Sampler(logit_bias={wrong: 1.0}), Sampler(bad_words=[[1, wrong]])):
        with pytest.raises(ConfigError, match=rf"\[{wrong}\]; expected ids from 0 to {V - 1}"):
            ours(sampler, logits, ids)
    # A stop token may be one that only the tokenizer has; no other row is touched by it.
    np.testing.assert_array_equal(
        ours(Sampler(min_new_tokens=30), logits, ids, stops=[V + 3, 7]),
        ours(Sampler(min_new_tokens=30), logits, ids, stops=[7]),
    )


# What narrows the choice


def warpers(sampler):
    """As `generate` makes them, in its order."""
    made = [hf.TemperatureLogitsWarper(sampler.temperature)]
    if sampler.top_k is not None:
        made.append(hf.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        made.append(hf.TopPLogitsWarper(sampler.top_p))
    if sampler.min_p > 0:
        made.append(hf.MinPLogitsWarper(sampler.min_p))
    if sampler.typical_p < 1:
        made.append(hf.TypicalLogitsWarper(sampler.typical_p))
    return made


NARROWED = [
    {"temperature": 0.6},
    {"top_k": 1, "temperature": 2.0},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 90},
    {"top_p": 0.2},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"typical_p": 0.99, "temperature": 4.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    {"temperature": 1.5, "top_k": 80, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    {"min_p": 0.1, "typical_p": 0.6},
    {"top_p": 0.9, "typical_p": 0.5},
]


@pytest.mark.parametrize("wide", [50, 200])
@pytest.mark.parametrize("settings", NARROWED, ids=str)
def test_each_token_has_its_share(settings, wide):
    sampler = Sampler(**settings)
    grid = np.linspace(0, 1, 4_000, endpoint=False, dtype=np.float32)
    tensors = Settings(*map(ops.convert_to_tensor, Settings.of(sampler, len(grid))))
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(0, 2, (1, wide)).astype(np.float32)
        expected = torch.tensor(theirs(warpers(sampler), logits, np.zeros((1, 1), np.int32)))
        expected = expected.double().softmax(-1).numpy()[0]
        repeated = ops.convert_to_tensor(np.repeat(logits, len(grid), 0))
        tokens = ops.convert_to_numpy(CHOOSE(repeated, ops.convert_to_tensor(grid), tensors))
        shares = np.bincount(tokens, minlength=wide) / len(grid)
        assert shares[expected == 0].sum() == 0
        # The grid counts a token's share to within a point.
        np.testing.assert_allclose(shares, expected, atol=1.5 / len(grid))
        assert (shares[expected > 1.5 / len(grid)] > 0).all()
