"""Beam search finds what transformers' finds, whatever the settings and however searches end."""

import functools
import warnings

import numpy as np
import pytest
import torch

from puna.errors import ConfigError
from puna.models import Llama3CausalLM
from puna.samplers import BeamSampler
from puna.testing import tiny_model
from tests import references

PROMPTS = [[1, 7, 20, 33], [5], [9, 9, 2, 50, 41, 17, 3, 60, 11], [30, 12]]
# Every third token ends a beam, so that few searches come to their bound.
STOPS = list(range(2, references.VOCABULARY, 3))
FEW_STOPS = [2, 45]


@pytest.fixture(scope="module")
def reference():
    return references.make(seed=3)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    directory = references.save(reference, tmp_path_factory.mktemp("beams"))
    return Llama3CausalLM.from_preset(directory, dtype="float32", preprocessor=None)


def theirs(reference, prompt, *, num_beams, stops, returned, new_tokens, **settings):
    """Transformers' beams after one prompt, without the padding of those that end before others."""
    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=returned,
            max_new_tokens=new_tokens,
            eos_token_id=stops or None,
            pad_token_id=0,
            **settings,
        )
    beams = [row[len(prompt) :].tolist() for row in rows]
    ends = [[i for i, token in enumerate(beam) if token in stops] for beam in beams]
    return [beam[: end[0] + 1] if end else beam for beam, end in zip(beams, ends, strict=True)]


def ours(model, prompts, *, num_beams, stops, returned, new_tokens, **settings):
    names = {"length_penalty", "early_stopping"}
    beam = BeamSampler(num_beams=num_beams, **{n: v for n, v in settings.items() if n in names})
    rows = model.generate(
        prompts,
        sampler=beam,
        stop_token_ids=stops,
        max_new_tokens=new_tokens,
        num_return_sequences=returned,
        strip_prompt=True,
        **{name: value for name, value in settings.items() if name not in names},
    )
    if returned == 1:
        return [[row.tolist()] for row in rows]
    return [[row.tolist() for row in beams] for beams in rows]


def check(model, reference, *, changed=None, **settings):
    """All prompts in one batch of ours, each alone in transformers.

    Args:
        changed: transformers' settings that have another name with us.
    """
    found = ours(model, PROMPTS, **settings)
    renamed = {"bad_words": "bad_words_ids"}
    settings = {renamed.get(name, name): value for name, value in settings.items()}
    settings |= changed or {}
    for prompt, beams in zip(PROMPTS, found, strict=True):
        assert beams == theirs(reference, prompt, **settings)


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "stops"),
    [
        (1.0, False, STOPS),
        (1.0, True, FEW_STOPS),
        (0.0, "never", STOPS),
        (-1.0, False, STOPS),
        (2.5, True, STOPS),
        (2.5, "never", FEW_STOPS),
    ],
)
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_all_beams_of_several_prompts(
    model, reference, num_beams, length_penalty, early_stopping, stops
):
    check(
        model,
        reference,
        num_beams=num_beams,
        returned=num_beams,
        stops=stops,
        new_tokens=12,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )


@pytest.mark.parametrize("returned", [1, 2])
def test_the_best_of_them(model, reference, returned):
    check(model, reference, num_beams=4, returned=returned, stops=STOPS, new_tokens=8)


@pytest.mark.parametrize("new_tokens", [1, 2, 30])
def test_without_stop_tokens_the_bound_ends_them(model, reference, new_tokens):
    check(model, reference, num_beams=3, returned=3, stops=[], new_tokens=new_tokens)


def test_one_beam_is_greedy(model, reference):
    check(model, reference, num_beams=1, returned=1, stops=FEW_STOPS, new_tokens=12)
    greedy = model.generate(PROMPTS[0], sampler="greedy", max_new_tokens=9, stop_token_ids=None)
    beam = BeamSampler(num_beams=1)
    found = model.generate(PROMPTS[0], sampler=beam, max_new_tokens=9, stop_token_ids=None)
    np.testing.assert_array_equal(found, greedy)


def test_more_beams_than_a_power_of_two(model, reference):
    check(model, reference, num_beams=7, returned=7, stops=STOPS, new_tokens=10)


CHANGES = {
    "repetition": {"repetition_penalty": 1.4},
    "min-new": {"min_new_tokens": 5},
    "bad-words": {"bad_words": [[4], [10, 11], [33, 8, 8]]},
    "all": {"repetition_penalty": 1.2, "min_new_tokens": 3, "bad_words": [[4], [33, 8]]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_penalties_and_bans_change_the_log_probabilities(model, reference, name):
    check(model, reference, num_beams=3, returned=3, stops=STOPS, new_tokens=10, **CHANGES[name])


def test_a_bias_changes_the_log_probabilities(model, reference):
    bias = dict.fromkeys(range(0, 60, 4), 1.5) | {20: -30.0}
    settings = {"num_beams": 3, "returned": 3, "stops": STOPS, "new_tokens": 10}
    found = ours(model, PROMPTS, logit_bias=bias, **settings)
    pairs = [[[token], value] for token, value in bias.items()]
    for prompt, beams in zip(PROMPTS, found, strict=True):
        assert beams == theirs(reference, prompt, sequence_bias=pairs, **settings)


def test_a_search_past_the_size_of_its_first_cache(tmp_path):
    long = references.make(seed=5, max_position_embeddings=1200, num_hidden_layers=1)
    model = Llama3CausalLM.from_preset(
        references.save(long, tmp_path), dtype="float32", preprocessor=None
    )
    prompt = references.token_ids(1, 1016, seed=8)[0].tolist()
    # What is left of the context makes the cache grow on the way.
    settings = {"num_beams": 2, "returned": 2, "stops": FEW_STOPS, "new_tokens": 20}
    settings |= {"length_penalty": 3.0, "early_stopping": "never"}
    assert ours(model, [prompt], **settings)[0] == theirs(long, prompt, **settings)


# What it gives and what it refuses


@pytest.fixture(scope="module")
def talking():
    return tiny_model(sequence_length=48)


def test_the_best_is_given_or_all(talking):
    generate = functools.partial(talking.generate, sampler="beam", num_beams=3, max_new_tokens=6)
    best = generate("Hello")
    assert isinstance(best, str)
    all_beams = generate("Hello", return_all_beams=True)
    assert len(all_beams) == 3
    assert all_beams[0] == best
    assert generate("Hello", num_return_sequences=2) == all_beams[:2]
    both = generate(["Hello", "Hi there"], return_all_beams=True)
    assert both[0] == all_beams
    assert [len(beams) for beams in both] == [3, 3]
    assert generate("Hello", num_beams=1, return_all_beams=True) == [generate("Hello", num_beams=1)]
    batch = generate({"token_ids": [[5, 6]], "padding_mask": [[1, 1]]}, return_all_beams=True)
    assert batch["token_ids"].shape[0] == 3
    assert generate("Hello", max_new_tokens=0) == "Hello"


def test_a_prompt_cache_serves_a_search(talking):
    cache = talking.prompt_cache("Hello there, you are")
    prompt, settings = "Hello there, you are the user", {"sampler": "beam", "max_new_tokens": 6}
    assert talking.generate(prompt, prompt_cache=cache, **settings) == talking.generate(
        prompt, **settings
    )


def test_what_a_search_cannot_do_is_refused(talking):
    with pytest.raises(ConfigError, match="takes no stop texts"):
        talking.generate("Hello", sampler="beam", stop="x")
    with pytest.raises(ConfigError, match="tells no logprobs"):
        talking.generate("Hello", sampler="beam", logprobs=1)
    with pytest.raises(ConfigError, match="no text to stream"):
        list(talking.stream("Hello", sampler="beam", max_new_tokens=3))
    with pytest.raises(ConfigError, match="num_return_sequences is 6; expected at most num_beams"):
        talking.generate("Hello", sampler="beam", num_return_sequences=6)
    with pytest.raises(ConfigError, match="there are 60 stop tokens"):
        talking.generate("Hello", sampler="beam", stop_token_ids=range(60), max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.backend_free
def test_smollm2(smollm2_gguf):
    from tests.parity.smollm2_reference import PROMPTS, reference_model

    model = Llama3CausalLM.from_preset(smollm2_gguf)
    reference = reference_model(smollm2_gguf)
    stops = model.tokenizer.stop_token_ids
    prompts = [model.tokenizer(prompt).tolist() for prompt in (PROMPTS[0], PROMPTS[4])]
    settings = {"num_beams": 3, "returned": 3, "stops": list(stops), "new_tokens": 16}
    found = ours(model, prompts, **settings)
    for prompt, beams in zip(prompts, found, strict=True):
        assert beams == theirs(reference, prompt, **settings)
