"""Samplers: their settings, and that what they choose has the distribution that they promise."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from puna import samplers
from puna.decoding.choose import choose
from puna.errors import ConfigError
from puna.samplers import (
    GreedySampler,
    RandomSampler,
    Sampler,
    SamplingValues,
    TopKSampler,
    TopPSampler,
    UniformNumbers,
)

DRAWS = 20_000
# The logits of a small vocabulary, not in the order of their size.
LOGITS = np.array([0.3, -1.2, 2.0, 0.9, 1.4, -3.0, 0.0, 1.1], np.float32)


def tokens_of(sampler, logits_BV, uniform_B, form=None):
    values = SamplingValues(*map(ops.convert_to_tensor, sampler.values(len(logits_BV))))
    chosen = choose(
        form or sampler.form,
        ops.convert_to_tensor(logits_BV),
        ops.convert_to_tensor(uniform_B),
        values,
    )
    return ops.convert_to_numpy(chosen)


def exact(sampler, logits):
    """The probabilities that a sampler promises, in float64 and in the plainest way."""
    scaled = logits.astype(np.float64) / sampler.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: sampler.top_k] if sampler.top_k else order
    probabilities = np.exp(scaled[kept] - scaled[kept].max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    probabilities = np.where(before < sampler.top_p, probabilities, 0)
    result = np.zeros(len(logits))
    result[kept] = probabilities / probabilities.sum()
    return result


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(),
        RandomSampler(temperature=0.5),
        RandomSampler(temperature=3.0),
        TopKSampler(k=3),
        TopKSampler(k=5, temperature=2.0),
        TopKSampler(k=100),
        TopPSampler(p=0.7),
        TopPSampler(p=0.9, temperature=0.7),
        TopPSampler(p=0.8, k=3),
        TopPSampler(p=0.99, k=6, temperature=1.5),
    ],
    ids=repr,
)
def test_choices_have_the_exact_distribution(sampler):
    uniform = np.random.default_rng(20).random(DRAWS, dtype=np.float32)
    tokens = tokens_of(sampler, np.broadcast_to(LOGITS, (DRAWS, len(LOGITS))), uniform)
    expected = exact(sampler, LOGITS) * DRAWS
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # For n degrees of freedom: mean n, variance 2n. Five deviations never happen by chance.
    freedom = possible.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_the_streams_of_uniform_numbers_choose_as_they_promise():
    numbers = UniformNumbers(seed=5, rows=4)
    drawn = np.stack([numbers.next() for _ in range(2_000)])
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert ((counts - 800) ** 2 / 800).sum() < 9 + 5 * np.sqrt(18)
    correlation = np.corrcoef(drawn.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.1


def test_streams_repeat_by_seed_and_do_not_depend_on_the_number_of_rows():
    one, four = UniformNumbers(7, 1), UniformNumbers(7, 4)
    for _ in range(5):
        assert one.next()[0] == four.next()[0]
    assert UniformNumbers(7, 1).next() != UniformNumbers(8, 1).next()


def test_without_a_seed_numpys_global_generator_decides():
    def first():
        np.random.seed(11)
        return UniformNumbers(None, 2).next().tolist()

    assert first() == first()
    assert UniformNumbers(None, 1).next() != UniformNumbers(None, 1).next()


# The compiled forms are ways to compute one function


@pytest.mark.parametrize("sampler", [TopKSampler(k=5), TopPSampler(p=0.6, k=7)], ids=repr)
def test_candidates_and_the_full_sort_choose_the_same(sampler):
    numbers = np.random.default_rng(1)
    logits = numbers.normal(0, 3, (200, 300)).astype(np.float32)
    uniform = numbers.random(200, dtype=np.float32)
    np.testing.assert_array_equal(
        tokens_of(sampler, logits, uniform, "candidates"),
        tokens_of(sampler, logits, uniform, "sorted"),
    )


def test_a_full_sort_without_bounds_has_the_distribution_of_all():
    draws = np.linspace(0, 1, 5_000, endpoint=False, dtype=np.float32)
    logits = np.broadcast_to(LOGITS, (len(draws), len(LOGITS)))
    sampler = RandomSampler()
    plain = np.bincount(tokens_of(sampler, logits, draws, "all"), minlength=8)
    by_rank = np.bincount(tokens_of(sampler, logits, draws, "sorted"), minlength=8)
    np.testing.assert_allclose(plain, by_rank, atol=3)


@pytest.mark.parametrize(
    "sampler",
    [GreedySampler(), TopKSampler(k=1), RandomSampler(temperature=0), TopPSampler(p=1e-6)],
    ids=repr,
)
def test_every_way_to_say_greedy_takes_the_best(sampler):
    numbers = np.random.default_rng(2)
    logits = numbers.normal(0, 1, (50, 40)).astype(np.float32)
    uniform = numbers.random(50, dtype=np.float32)
    np.testing.assert_array_equal(tokens_of(sampler, logits, uniform), logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(np.float32(1), np.float32(0))])
@pytest.mark.parametrize("form", ["candidates", "sorted", "all"])
def test_the_ends_of_the_uniform_range_choose_possible_tokens(uniform, form):
    logits = np.full((1, 200), -np.inf, np.float32)
    logits[0, [20, 120]] = [1.0, 0.0]
    sampler = RandomSampler()
    (token,) = tokens_of(sampler, logits, np.array([uniform], np.float32), form)
    assert token == (20 if uniform == 0 else 120)


def test_rows_have_their_own_settings():
    values = SamplingValues(
        np.array([1, 1], np.float32), np.array([1, 8], np.int32), np.array([1, 1], np.float32)
    )
    tokens = choose(
        "candidates",
        ops.convert_to_tensor(np.stack([LOGITS, LOGITS])),
        ops.convert_to_tensor(np.array([0.999, 0.999], np.float32)),
        SamplingValues(*map(ops.convert_to_tensor, values)),
    )
    assert ops.convert_to_numpy(tokens).tolist() == [2, 5]


# Settings


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("sampler", "form"),
    [
        (GreedySampler(), "greedy"),
        (TopKSampler(k=1), "greedy"),
        (TopKSampler(k=64), "candidates"),
        (TopPSampler(p=0.5, k=64), "candidates"),
        (TopKSampler(k=65), "sorted"),
        (TopPSampler(p=0.5), "sorted"),
        (RandomSampler(), "all"),
        (TopPSampler(p=1.0), "all"),
    ],
    ids=repr,
)
def test_the_cheapest_form_is_taken(sampler, form):
    assert sampler.form == form


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSampler(k=0), "k is 0"),
        (lambda: TopKSampler(k=-3), "k is -3"),
        (lambda: TopPSampler(p=0), "p is 0"),
        (lambda: TopPSampler(p=1.1), "p is 1.1"),
        (lambda: TopPSampler(p=float("nan")), "p is nan"),
        (lambda: TopPSampler(p=0.5, k=0), "k is 0"),
        (lambda: RandomSampler(temperature=-1), "temperature is -1"),
        (lambda: RandomSampler(temperature=float("nan")), "temperature is nan"),
        (lambda: RandomSampler(temperature=float("inf")), "temperature is inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.backend_free
def test_names_stand_for_samplers_with_keras_hubs_defaults():
    assert samplers.get("top_k") == TopKSampler(k=5)
    assert samplers.get("top_p") == TopPSampler(p=0.1, k=None)
    assert samplers.get("greedy").form == "greedy"
    assert samplers.get("random") == RandomSampler()
    mine = TopKSampler(k=2)
    assert samplers.get(mine) is mine


@pytest.mark.backend_free
@pytest.mark.parametrize("wrong", ["best", None, 3])
def test_what_is_no_sampler_is_refused(wrong):
    with pytest.raises(ConfigError, match="is not known"):
        samplers.get(wrong)


@pytest.mark.backend_free
def test_keras_hubs_ways_to_write_a_sampler_are_taken():
    assert TopKSampler(3) == TopKSampler(k=3)
    assert TopKSampler(k=3, temperature=0.5, seed=1).seed == 1
    assert TopPSampler(0.5, 3) == TopPSampler(p=0.5, k=3)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "sampler",
    [GreedySampler(), TopKSampler(k=3, seed=1), TopPSampler(p=0.3, k=9), RandomSampler()],
    ids=repr,
)
def test_a_sampler_goes_through_json_and_cannot_be_changed(sampler):
    assert samplers.from_config(samplers.to_config(sampler)) == sampler
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.temperature = 2.0
    assert isinstance(sampler, Sampler)
