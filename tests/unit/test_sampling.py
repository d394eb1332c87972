"""Samplers: their settings, and that what they choose has the distribution that they promise."""

import dataclasses
import json

import numpy as np
import pytest
from keras import ops

from puna import backend, samplers
from puna.decoding.choose import Settings, UniformNumbers, choose
from puna.errors import ConfigError
from puna.samplers import (
    FORMS,
    BeamSampler,
    GreedySampler,
    MinPSampler,
    RandomSampler,
    Sampler,
    TopKSampler,
    TopPSampler,
    TypicalSampler,
)
from puna.testing import tiny_model

DRAWS = 20_000
CHOOSE = backend.ops.compile_step(choose, ())
# The logits of a small vocabulary, not in the order of their size.
LOGITS = np.array([0.3, -1.2, 2.0, 0.9, 1.4, -3.0, 0.0, 1.1], np.float32)


WIDE = np.random.default_rng(4).normal(0, 1, 200).astype(np.float32)


def tokens_of(sampler, logits_BV, uniform_B, form=None):
    settings = Settings.of(sampler, len(logits_BV))
    if form is not None:
        settings = settings._replace(form=np.array(FORMS.index(form), np.int32))
    tensors = Settings(*map(ops.convert_to_tensor, settings))
    logits, uniform = ops.convert_to_tensor(logits_BV), ops.convert_to_tensor(uniform_B)
    return ops.convert_to_numpy(CHOOSE(logits, uniform, tensors))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def exact(sampler, logits):
    """The probabilities that a sampler promises, in float64 and in the plainest way."""
    logits = logits.astype(np.float64)
    if sampler.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    logits = logits / sampler.temperature
    if sampler.top_k is not None:
        logits[np.argsort(-logits)[sampler.top_k :]] = -np.inf
    order = np.argsort(-logits)
    before = 0.0
    for token, probability in zip(order, softmax(logits)[order], strict=True):
        if before >= sampler.top_p:
            logits[token] = -np.inf
        before += probability
    probabilities = softmax(logits)
    logits[probabilities < sampler.min_p * probabilities.max()] = -np.inf
    if sampler.typical_p < 1:
        probabilities = softmax(logits)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probabilities)
            expected = np.nansum(probabilities * surprise)
        before = 0.0
        for token in np.argsort(np.abs(surprise - expected)):
            if before >= sampler.typical_p:
                logits[token] = -np.inf
            before += probabilities[token]
    return softmax(logits)


@pytest.mark.parametrize("logits", [LOGITS, WIDE], ids=["8-tokens", "200-tokens"])
@pytest.mark.parametrize(
    "sampler",
    [
        GreedySampler(),
        RandomSampler(),
        RandomSampler(temperature=0.5),
        RandomSampler(temperature=3.0),
        TopKSampler(k=3),
        TopKSampler(k=5, temperature=2.0),
        TopKSampler(k=64),
        TopKSampler(k=100),
        TopPSampler(p=0.3),
        TopPSampler(p=0.9, temperature=0.7),
        TopPSampler(p=0.97, temperature=1.5),
        TopPSampler(p=0.8, k=3),
        TopPSampler(p=0.99, k=6, temperature=1.5),
        TopPSampler(p=0.9, k=150),
        MinPSampler(p=0.2),
        MinPSampler(p=0.3, temperature=2.0),
        MinPSampler(p=0.3, top_k=7),
        MinPSampler(p=0.25, top_p=0.8),
        TypicalSampler(p=0.4),
        TypicalSampler(p=0.9, temperature=1.5),
        Sampler(temperature=0.8, top_k=20, top_p=0.9, min_p=0.1, typical_p=0.7),
        Sampler(temperature=1.3, top_k=120, top_p=0.95, min_p=0.05, typical_p=0.8),
    ],
    ids=repr,
)
def test_choices_have_the_exact_distribution(sampler, logits):
    uniform = np.random.default_rng(20).random(DRAWS, dtype=np.float32)
    tokens = tokens_of(sampler, np.broadcast_to(logits, (DRAWS, len(logits))), uniform)
    expected = exact(sampler, logits) * DRAWS
    counts = np.bincount(tokens, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    # The rare ones are counted together, so that the sum has the distribution that it should.
    rare = (expected > 0) & (expected < 10)
    counts = np.append(counts[expected >= 10], counts[rare].sum())
    expected = np.append(expected[expected >= 10], expected[rare].sum())
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # For n degrees of freedom: mean n, variance 2n. Five deviations never happen by chance.
    freedom = possible.sum() - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


def test_typical_keeps_all_that_are_as_far():
    # A flat distribution has no token that is more typical than another.
    uniform = np.linspace(0, 1, 400, endpoint=False, dtype=np.float32)
    tokens = tokens_of(TypicalSampler(p=0.3), np.zeros((400, 10), np.float32), uniform)
    assert np.bincount(tokens, minlength=10).min() > 30


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


def test_a_seed_for_each_row_is_that_of_a_lone_row():
    several = UniformNumbers((3, 1, 2), 3)
    alone = [UniformNumbers(seed, 1) for seed in (3, 1, 2)]
    for _ in range(5):
        assert several.next().tolist() == [one.next()[0] for one in alone]
    with pytest.raises(ConfigError, match="there are 3 seeds and 2 rows"):
        UniformNumbers((3, 1, 2), 2)


def test_rows_with_their_own_seeds_do_not_depend_on_their_batch():
    model = tiny_model(sequence_length=48)
    prompts = ["Hello", "Hi there", "the system and you"]
    settings = {"sampler": "random", "max_new_tokens": 12, "stop_token_ids": None}
    together = model.generate(prompts, seed=[1, 2, 3], **settings)
    assert together[::-1] == model.generate(prompts[::-1], seed=[3, 2, 1], **settings)
    for prompt, seed, text in zip(prompts, (1, 2, 3), together, strict=True):
        assert model.generate(prompt, seed=seed, **settings) == text
    again = model.generate("Hello", seed=[1, 1, 4], num_return_sequences=3, **settings)
    assert again[0] == again[1] == together[0]
    assert again[2] != again[0]
    with pytest.raises(ConfigError, match="2 seeds and 3 rows"):
        model.generate(prompts, seed=[1, 2], **settings)


# The compiled forms are ways to compute one function


@pytest.mark.parametrize(
    "sampler",
    [
        TopKSampler(k=5),
        TopPSampler(p=0.6, k=7),
        Sampler(top_k=30, top_p=0.9, min_p=0.05, typical_p=0.8),
    ],
    ids=repr,
)
def test_candidates_and_the_full_sort_choose_the_same(sampler):
    numbers = np.random.default_rng(1)
    logits = numbers.normal(0, 3, (200, 300)).astype(np.float32)
    uniform = numbers.random(200, dtype=np.float32)
    np.testing.assert_array_equal(
        tokens_of(sampler, logits, uniform, "candidates"),
        tokens_of(sampler, logits, uniform, "sorted"),
    )


@pytest.mark.parametrize("sampler", [TopPSampler(p=0.8), TopPSampler(p=0.9, min_p=0.02)], ids=repr)
def test_a_top_p_among_the_best_64_is_that_of_the_full_sort(sampler):
    numbers = np.random.default_rng(3)
    logits = numbers.normal(0, 4, (200, 300)).astype(np.float32)
    uniform = numbers.random(200, dtype=np.float32)
    shares = [np.sort(softmax(row.astype(np.float64)))[-64:].sum() for row in logits]
    assert min(shares) > sampler.top_p
    # A flat row needs the sort, and has all rows sorted.
    flat = np.zeros((1, 300), np.float32)
    with_flat = tokens_of(sampler, np.concatenate([logits, flat]), np.append(uniform, uniform[:1]))
    np.testing.assert_array_equal(tokens_of(sampler, logits, uniform), with_flat[:-1])


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
    settings = Settings.of(TopKSampler(k=8), 2)._replace(top_k_B=np.array([1, 8], np.int32))
    tokens = choose(
        ops.convert_to_tensor(np.stack([LOGITS, LOGITS])),
        ops.convert_to_tensor(np.array([0.999, 0.999], np.float32)),
        Settings(*map(ops.convert_to_tensor, settings)),
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
        (lambda: TopKSampler(k=0), "top_k is 0"),
        (lambda: TopKSampler(k=-3), "top_k is -3"),
        (lambda: TopKSampler(k=2.5), "top_k is 2.5"),
        (lambda: TopPSampler(p=0), "top_p is 0"),
        (lambda: TopPSampler(p=1.1), "top_p is 1.1"),
        (lambda: TopPSampler(p=float("nan")), "top_p is nan"),
        (lambda: TopPSampler(p=0.5, k=0), "top_k is 0"),
        (lambda: MinPSampler(p=1.0), "min_p is 1.0"),
        (lambda: TypicalSampler(p=0), "typical_p is 0"),
        (lambda: RandomSampler(temperature=-1), "temperature is -1"),
        (lambda: RandomSampler(temperature=float("nan")), "temperature is nan"),
        (lambda: RandomSampler(temperature=float("inf")), "temperature is inf"),
        (lambda: Sampler(repetition_penalty=0), "repetition_penalty is 0"),
        (lambda: Sampler(presence_penalty=float("nan")), "presence_penalty is nan"),
        (lambda: Sampler(logit_bias={3: float("-inf")}), r"logit_bias\[3\] is -inf"),
        (lambda: Sampler(min_new_tokens=-1), "min_new_tokens is -1"),
        (lambda: Sampler(bad_words="cat"), "bad_words is 'cat'"),
        (lambda: Sampler(bad_words=["cat", ""]), "bad_words is"),
        (lambda: Sampler(bad_words=[1, 2]), "bad_words is"),
        (lambda: Sampler(seed=-1), "seed is -1"),
        (lambda: Sampler(seed=[1, 0.5]), "seed is"),
        (lambda: BeamSampler(num_beams=0), "num_beams is 0; expected a whole number from 1 to 32"),
        (lambda: BeamSampler(num_beams=33), "num_beams is 33"),
        (lambda: BeamSampler(early_stopping="soon"), "early_stopping is 'soon'"),
        (lambda: BeamSampler(length_penalty=float("nan")), "length_penalty is nan"),
        (lambda: BeamSampler(temperature=0.7), "temperature is 0.7; a beam search"),
        (lambda: BeamSampler(top_p=0.7), "top_p is 0.7; a beam search"),
        (lambda: Sampler().replace(num_beams=2), "num_beams is no setting of a Sampler"),
        (lambda: BeamSampler().replace(beams=2), "beams is no setting of a BeamSampler"),
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
    assert samplers.get("min_p") == MinPSampler(p=0.05)
    assert samplers.get("typical") == TypicalSampler(p=0.95)
    assert samplers.get("beam") == BeamSampler(num_beams=5)
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
    [
        GreedySampler(),
        TopKSampler(k=3, seed=1),
        TopPSampler(p=0.3, k=9),
        MinPSampler(p=0.1),
        TypicalSampler(p=0.5),
        RandomSampler(),
        BeamSampler(num_beams=3, early_stopping=True),
        Sampler(logit_bias={3: 1.5}, bad_words=["cat", [1, 2]], seed=[1, 2], presence_penalty=1.0),
    ],
    ids=repr,
)
def test_a_sampler_goes_through_json_and_cannot_be_changed(sampler):
    assert samplers.from_config(json.loads(json.dumps(samplers.to_config(sampler)))) == sampler
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.temperature = 2.0
    assert isinstance(sampler, Sampler)


@pytest.mark.backend_free
def test_a_sampler_shows_what_is_set():
    assert repr(Sampler()) == "Sampler()"
    assert repr(TopPSampler(p=0.5, seed=3)) == "TopPSampler(top_p=0.5, seed=3)"
    assert repr(BeamSampler(num_beams=3)) == "BeamSampler(num_beams=3)"


@pytest.mark.backend_free
def test_a_generation_config_is_read_as_transformers_reads_it():
    read = samplers.from_generation_config
    assert read({}) == GreedySampler()
    assert read({"temperature": 0.5, "bad_words_ids": [[3], [4, 5]]}) == GreedySampler(
        bad_words=[[3], [4, 5]]
    )
    assert read({"do_sample": True, "top_k": 0, "min_p": 0.1}) == Sampler(min_p=0.1)
    assert read({"num_beams": 4, "early_stopping": True}) == BeamSampler(
        num_beams=4, early_stopping=True
    )
    with pytest.raises(ConfigError, match="num_beams 4 with do_sample"):
        read({"num_beams": 4, "do_sample": True})
