"""`generate`: what goes in and comes out, lengths, stops, and rows that do not disturb others."""

import keras
import numpy as np
import pytest

import puna
from puna.errors import ConfigError, ContextLengthError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model
from tests.greedy import greedy_by_hand

PROMPTS = ["Hello", "Hi there, how are you?", "the system and the user are in the world"]


@pytest.fixture(scope="module")
def model():
    model = tiny_model(sequence_length=48)
    model.compile(sampler="greedy")
    return model


@pytest.fixture(scope="module")
def bare(model):
    """The same model without a preprocessor."""
    bare = Llama3CausalLM(model.backbone)
    bare.lm_head.weight.assign(model.lm_head.weight)
    bare.compile(sampler="greedy")
    return bare


def ids_of(model, text):
    return np.array([model.tokenizer.start_token_id, *model.tokenizer(text)], np.int32)


# In and out


def test_a_string_gives_a_string_that_begins_with_it(model):
    text = model.generate("Hello", max_new_tokens=5)
    assert isinstance(text, str)
    assert text.startswith("Hello")
    assert len(text) > len("Hello")


def test_a_list_of_strings_gives_a_list(model):
    for prompts in (PROMPTS, tuple(PROMPTS), np.array(PROMPTS), PROMPTS[:1]):
        texts = model.generate(prompts, max_new_tokens=4)
        assert isinstance(texts, list)
        assert all(text.startswith(p) for text, p in zip(texts, prompts, strict=True))
    assert model.generate([], max_new_tokens=4) == []


def test_ids_give_ids(model):
    ids = ids_of(model, "Hello")
    for prompt in (ids, ids.tolist(), ids.astype(np.int64)):
        out = model.generate(prompt, max_new_tokens=4)
        assert out.dtype == np.int32
        assert out.shape == (len(ids) + 4,)
        np.testing.assert_array_equal(out[: len(ids)], ids)


def test_rows_of_ids_of_any_lengths_give_a_list(model):
    rows = [ids_of(model, text) for text in PROMPTS]
    out = model.generate([row.tolist() for row in rows], max_new_tokens=4)
    assert isinstance(out, list)
    for row, finished in zip(rows, out, strict=True):
        np.testing.assert_array_equal(finished[: len(row)], row)
    two = model.generate(np.stack([rows[0], rows[0]]), max_new_tokens=4)
    np.testing.assert_array_equal(two[0], two[1])


def test_a_dict_gives_a_dict_with_its_mask(model):
    batch = model.preprocessor.generate_preprocess(PROMPTS)
    out = model.generate(batch, max_new_tokens=4)
    rows = model.generate(PROMPTS, max_new_tokens=4)
    assert out["token_ids"].shape == out["padding_mask"].shape
    assert out["token_ids"].shape[1] == out["padding_mask"].sum(axis=1).max()
    assert model.preprocessor.generate_postprocess(out) == rows
    one = model.generate(model.preprocessor.generate_preprocess("Hello"), max_new_tokens=4)
    assert one["token_ids"].ndim == 1


def test_a_model_without_a_preprocessor_takes_ids_and_refuses_text(model, bare):
    ids = ids_of(model, "Hello")
    expected = model.generate(ids, max_new_tokens=4)
    np.testing.assert_array_equal(bare.generate(ids, max_new_tokens=4), expected)
    with pytest.raises(TokenizerError, match="has no preprocessor"):
        bare.generate("Hello")


def test_the_start_token_is_added_once(model):
    begin = model.tokenizer.start_token
    assert model.generate(begin + "Hello", max_new_tokens=4) == model.generate(
        "Hello", max_new_tokens=4
    )


def test_strip_prompt_leaves_the_completion(model):
    ids = ids_of(model, "Hello")
    whole = model.generate(ids, max_new_tokens=5)
    alone = model.generate(ids, max_new_tokens=5, strip_prompt=True)
    np.testing.assert_array_equal(alone, whole[len(ids) :])
    text = model.generate("Hello", max_new_tokens=5, strip_prompt=True)
    assert text == model.tokenizer.detokenize(alone, skip_special_tokens=True)


# The tokens themselves


def test_the_cached_tokens_are_those_of_whole_passes(model):
    for text in PROMPTS:
        ids = ids_of(model, text)
        out = model.generate(ids, max_new_tokens=8, stop_token_ids=None)
        np.testing.assert_array_equal(out, greedy_by_hand(model, ids, 8))


def test_rows_of_an_uneven_batch_are_the_rows_alone(model):
    prompts = [*PROMPTS, " ".join(PROMPTS), "Hi"]
    together = model.generate(prompts, max_new_tokens=8, stop_token_ids=None)
    assert together == [model.generate(p, max_new_tokens=8, stop_token_ids=None) for p in prompts]


def test_sampled_rows_do_not_depend_on_each_others_lengths(model):
    sampler = puna.samplers.TopKSampler(k=5, seed=3)
    together = model.generate(PROMPTS, max_new_tokens=8, sampler=sampler)
    # Row 0 draws from the same stream, whoever is beside it.
    assert together[0] == model.generate(PROMPTS[0], max_new_tokens=8, sampler=sampler)


def test_a_prompt_longer_than_a_chunk_is_taken_in_several(monkeypatch):
    from puna.decoding import ladder

    model = tiny_model(sequence_length=48)
    ids = np.arange(1, 71, dtype=np.int32)
    expected = model.generate(ids, max_new_tokens=4, sampler="greedy", stop_token_ids=None)
    monkeypatch.setattr(ladder, "CHUNKS", (16, 32))
    rows = [ids, ids[:10], ids[:33]]
    out = model.generate(rows, max_new_tokens=4, sampler="greedy", stop_token_ids=None)
    np.testing.assert_array_equal(out[0], expected)
    for row, finished in zip(rows[1:], out[1:], strict=True):
        np.testing.assert_array_equal(finished, greedy_by_hand(model, row, 4))


def test_changed_weights_are_used_at_once(model):
    model = tiny_model()
    before = model.generate([5, 6], max_new_tokens=4, sampler="greedy")
    model.lm_head.weight.assign(-model.lm_head.weight)
    after = model.generate([5, 6], max_new_tokens=4, sampler="greedy")
    assert before.tolist() != after.tolist()


# Lengths


def test_max_new_tokens_counts_the_completion_alone(model):
    for text in PROMPTS:
        ids = ids_of(model, text)
        out = model.generate(ids, max_new_tokens=6, stop_token_ids=None)
        assert len(out) == len(ids) + 6


def test_max_length_counts_the_prompt(model):
    rows = [ids_of(model, text) for text in PROMPTS]
    out = model.generate(rows, max_length=20, stop_token_ids=None)
    assert [len(row) for row in out] == [20, 20, 20]


def test_of_max_length_and_max_new_tokens_the_shorter_holds(model):
    ids = ids_of(model, "Hello")
    options = {"stop_token_ids": None}
    assert len(model.generate(ids, max_length=6, max_new_tokens=30, **options)) == 6
    assert len(model.generate(ids, max_length=30, max_new_tokens=3, **options)) == len(ids) + 3


def test_without_either_the_preprocessors_length_holds(model, bare):
    ids = ids_of(model, "Hello")
    assert len(model.generate(ids, stop_token_ids=None)) == 48
    assert len(bare.generate(ids, stop_token_ids=None)) == bare.config.context_length == 256


def test_nothing_asked_for_gives_the_prompt(model):
    ids = ids_of(model, "Hello")
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=0), ids)
    np.testing.assert_array_equal(model.generate(ids, max_length=len(ids)), ids)
    assert model.generate("Hello", max_new_tokens=0, strip_prompt=True) == ""


def test_max_new_tokens_may_pass_the_preprocessors_length_up_to_the_context(model):
    ids = ids_of(model, "Hello")
    out = model.generate(ids, max_new_tokens=256 - len(ids), stop_token_ids=None)
    assert len(out) == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 257}, "max_length is 257; the model's context is 256 tokens"),
        (
            {"max_length": 9},
            r"prompt 1 has 12 tokens, and max_length \(which counts the prompt\) is 9",
        ),
        ({"max_new_tokens": 245}, "prompt 1 has 12 tokens and max_new_tokens is 245; together"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(model, options, message):
    with pytest.raises(ContextLengthError, match=message):
        model.generate([[1, 2], list(range(12))], **options)


def test_a_prompt_longer_than_the_preprocessors_length_says_what_to_pass(model):
    with pytest.raises(
        ContextLengthError, match=r"sequence_length is 48; shorten .* max_new_tokens"
    ):
        model.generate(list(range(49)))
    assert len(model.generate(list(range(49)), max_new_tokens=2, stop_token_ids=None)) == 51


@pytest.mark.parametrize("options", [{"max_length": -1}, {"max_new_tokens": -1}])
def test_negative_lengths_are_refused(model, options):
    with pytest.raises(ValueError, match="-1"):
        model.generate("Hello", **options)


# Several completions, and how likely they were


SAMPLED = {"max_new_tokens": 6, "sampler": "random", "seed": 3, "stop_token_ids": None}


def test_several_completions_of_each_prompt(model):
    texts = model.generate(PROMPTS, num_return_sequences=3, **SAMPLED)
    assert [len(each) for each in texts] == [3, 3, 3]
    assert all(t.startswith(p) for p, each in zip(PROMPTS, texts, strict=True) for t in each)
    assert len(set(texts[0])) == 3
    assert model.generate("Hello", num_return_sequences=3, **SAMPLED) == texts[0]
    rows = model.generate(ids_of(model, "Hello"), num_return_sequences=2, **SAMPLED)
    assert [row.dtype for row in rows] == [np.int32] * 2
    assert model.generate([], num_return_sequences=2) == []


def test_several_completions_of_a_dict_are_more_rows(model):
    one = {"token_ids": ids_of(model, "Hello")}
    two = model.preprocessor.generate_preprocess(PROMPTS[:2])
    for batch, rows in ((one, 1), (two, 2)):
        out = model.generate(batch, num_return_sequences=3, **SAMPLED)
        assert out["token_ids"].shape == out["padding_mask"].shape
        assert len(out["token_ids"]) == 3 * rows


def test_log_probabilities_are_the_models_own(model):
    ids = ids_of(model, "Hello")
    found = model.generate(ids, logprobs=3, repetition_penalty=5.0, **SAMPLED)
    whole = np.concatenate([ids, found.token_ids])
    logits = np.asarray(keras.ops.convert_to_numpy(model(whole[None])))[0, len(ids) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for one, token, row in zip(found.logprobs, found.token_ids, expected, strict=True):
        assert one.token_id == token
        np.testing.assert_allclose(one.logprob, row[token], atol=1e-4)
        assert [best for best, _ in one.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in one.top], np.sort(row)[:-4:-1], atol=1e-4)


def test_completions_come_in_the_shape_of_their_prompts(model):
    text = model.generate("Hello", logprobs=0, **SAMPLED)
    assert text.text == model.generate("Hello", **SAMPLED)
    assert text.finish_reason == "length"
    assert all(one.top == () for one in text.logprobs)
    listed = model.generate(PROMPTS, logprobs=0, num_return_sequences=2, **SAMPLED)
    assert [len(each) for each in listed] == [2, 2, 2]
    # Ids, and those of a dict, have a text too.
    for given in (ids_of(model, "Hello"), {"token_ids": ids_of(model, "Hello")}):
        one = model.generate(given, logprobs=0, **SAMPLED)
        assert (one.text, one.token_ids.tolist()) == (text.text, text.token_ids.tolist())
    batch = model.preprocessor.generate_preprocess(PROMPTS)
    many = model.generate(batch, logprobs=0, num_return_sequences=2, **SAMPLED)
    assert [[one.text for one in each] for each in many] == [[o.text for o in e] for e in listed]
    nothing = model.generate("Hello", logprobs=2, max_new_tokens=0)
    assert (nothing.text, nothing.logprobs, len(nothing.token_ids)) == ("Hello", (), 0)


def test_without_a_tokenizer_completions_have_no_text(bare):
    assert bare.generate([5, 6], logprobs=1, max_new_tokens=2).text is None


@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 0}, {"logprobs": -1}, {"logprobs": 65}]
)
def test_numbers_that_make_no_sense_are_refused(model, options):
    with pytest.raises(ConfigError, match="expected"):
        model.generate("Hello", **options)


# Stops


def test_every_stop_id_stops_and_is_kept_in_ids(model):
    ids = ids_of(model, "Hello")
    free = model.generate(ids, max_new_tokens=8, stop_token_ids=None)[len(ids) :].tolist()
    for stop in (free[2], free[4]):
        first = free.index(stop) + 1
        out = model.generate(ids, max_new_tokens=8, stop_token_ids=[1, stop, 2], strip_prompt=True)
        assert out.tolist() == free[:first]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_auto_stops_at_every_id_that_the_tokenizer_names(place):
    model = tiny_model()
    stop = model.tokenizer.stop_token_ids[place]
    # A head that only ever says this token.
    head = np.zeros(tuple(model.lm_head.weight.shape), np.float32)
    model.lm_head.weight.assign(head)
    free = model.generate("Hello", max_new_tokens=3, sampler="greedy")
    head[stop] = 100 * np.sign(np.asarray(_last_hidden(model, "Hello")))
    model.lm_head.weight.assign(head)
    out = model.generate(ids_of(model, "Hello"), max_new_tokens=9, sampler="greedy")
    assert out[-1] == stop
    assert len(out) == len(ids_of(model, "Hello")) + 1
    text = model.generate("Hello", max_new_tokens=9, sampler="greedy")
    assert text == "Hello" != free  # the stop token is left out of text


def _last_hidden(model, text):
    return keras.ops.convert_to_numpy(model.backbone(ids_of(model, text)[None]))[0, -1]


def test_a_row_that_stops_lets_the_others_go_on(model):
    rows = [ids_of(model, text) for text in PROMPTS]
    free = model.generate(rows, max_new_tokens=8, stop_token_ids=None, strip_prompt=True)
    stop = int(free[0][1])
    out = model.generate(rows, max_new_tokens=8, stop_token_ids=[stop], strip_prompt=True)
    for all_tokens, stopped in zip(free, out, strict=True):
        tokens = all_tokens.tolist()
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert stopped.tolist() == expected


def test_a_word_other_than_auto_is_no_stop(model):
    with pytest.raises(ValueError, match="'auto'"):
        model.generate("Hello", stop_token_ids="eos")


# Prompts that are none


@pytest.mark.parametrize("prompt", [[], [[1], []], np.zeros((1, 0), np.int32)])
def test_a_prompt_without_tokens_is_refused(bare, prompt):
    with pytest.raises(TokenizerError, match=r"no tokens|no preprocessor"):
        bare.generate(prompt, max_new_tokens=2)


def test_an_empty_string_is_its_start_token(model):
    out = model.generate("", max_new_tokens=3, stop_token_ids=None)
    ids = np.array([model.tokenizer.start_token_id])
    expected = model.generate(ids, max_new_tokens=3, stop_token_ids=None, strip_prompt=True)
    assert out == model.tokenizer.detokenize(expected, skip_special_tokens=True)


@pytest.mark.parametrize("ids", [[307], [-1], [5, 10_000]])
def test_ids_outside_the_vocabulary_are_refused(model, ids):
    with pytest.raises(TokenizerError):
        model.generate(ids, max_new_tokens=2)


# Which sampler


def test_the_calls_sampler_beats_compiles_which_beats_top_k_of_5():
    model = tiny_model()
    assert model.sampler == puna.samplers.TopKSampler(k=5)
    model.compile(sampler="greedy")
    greedy = model.generate("Hello", max_new_tokens=12)
    assert greedy == model.generate("Hello", max_new_tokens=12)
    hot = puna.samplers.RandomSampler(temperature=5.0, seed=0)
    assert model.generate("Hello", max_new_tokens=12, sampler=hot) != greedy
    assert model.generate("Hello", max_new_tokens=12) == greedy


def test_an_unknown_sampler_is_refused_with_the_known_ones(model):
    with pytest.raises(ConfigError, match="greedy, top_k, top_p, min_p, typical, random, beam"):
        model.generate("Hello", sampler="best")


def test_a_seed_repeats_and_no_seed_does_not(model):
    def text(seed):
        sampler = puna.samplers.RandomSampler(temperature=2.0, seed=seed)
        return model.generate(["Hello", "Hello"], max_new_tokens=12, sampler=sampler)

    assert text(3) == text(3) != text(4)
    assert text(3)[0] != text(3)[1]  # rows have streams of their own
    assert text(None) != text(None)
