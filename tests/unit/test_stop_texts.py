"""Stop texts: where a completion ends, wherever its tokens begin and end."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.decoding.text import RowText
from puna.errors import ConfigError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model

PROMPTS = ["Hello", "Hi there, how are you?", "the system"]
OPTIONS = {"max_new_tokens": 16, "sampler": "greedy", "stop_token_ids": None}


class Pieces:
    """A stream decoder whose tokens are texts; the last one comes with `flush`."""

    def __init__(self, last=""):
        self.last = last

    def push(self, token):
        return token

    def flush(self):
        return self.last


def said(tokens, stops, last=""):
    """What is given, token for token, and at the end; and the `RowText`."""
    text = RowText(Pieces(last), stops)
    given = []
    for token in tokens:
        given.append(text.push(token))
        if text.stopped:
            break
    given.append(text.flush())
    assert "".join(given) == text.text
    return given, text


# The text alone


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("tokens", "stops", "given"),
    [
        (["a", "b", "c"], ["x"], ["a", "b", "c", ""]),
        (["ab", "cd"], ["bc"], ["a", "", ""]),
        (["ab", "cd"], ["bx"], ["a", "bcd", ""]),  # held back, and then given
        (["a", "b"], ["bc"], ["a", "", "b"]),  # what was held comes at the end
        (["abcdef"], ["cd"], ["ab", ""]),  # in the middle of a token
        (["x", "ab", "c"], ["ab", "abc"], ["x", "", ""]),  # one is the beginning of the other
        (["abc"], ["ab", "abc"], ["", ""]),
        (["ab", "c", "d"], ["abcd", "bc"], ["", "a", ""]),  # the first that is complete
        (["abcd"], ["abcd", "bc"], ["a", ""]),
        (["zabc"], ["bc", "abc"], ["z", ""]),  # of two that end together the longer
        (["aa", "ab"], ["aab"], ["", "a", ""]),  # it begins within what was held
        (["Zürich ", "🦙🦙", "!"], ["🦙!"], ["Zürich ", "🦙", "", ""]),
        (["e", "\u0301", "f"], ["\u0301f"], ["e", "", "", ""]),  # a combining mark
    ],
)
def test_what_is_given_and_when(tokens, stops, given):
    assert said(tokens, stops)[0] == given


@pytest.mark.backend_free
def test_a_stop_text_may_end_with_what_the_decoder_held():
    given, text = said(["a"], ["b"], last="bc")
    assert (given, text.stopped, text.left_out) == (["a", ""], True, 2)


@pytest.mark.backend_free
@given(
    text=st.text("ab", max_size=20),
    cuts=st.lists(st.integers(0, 20)),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_it_does_not_matter_where_tokens_end(text, cuts, stops):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    tokens = [text[i:j] for i, j in itertools.pairwise(places)]
    _, row = said(tokens, stops)
    _, alone = said(list(text), stops)
    assert (row.text, row.stopped) == (alone.text, alone.stopped)
    # What may be shown is never taken back, and nothing of a stop text is shown.
    assert not any(stop in row.text for stop in stops)
    if not row.stopped:
        assert row.text == text


# In `generate` and `stream`


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_length=48)


@pytest.fixture(scope="module")
def free(model):
    """What the model says to each prompt without a stop text."""
    return [model.generate(prompt, strip_prompt=True, **OPTIONS) for prompt in PROMPTS]


def test_the_text_ends_before_a_stop_text(model, free):
    for prompt, text in zip(PROMPTS, free, strict=True):
        for stop in (text[:1], text[2:5], text[-3:]):
            expected = text[: text.index(stop)]
            options = OPTIONS | {"stop": ["not there", stop]}
            assert model.generate(prompt, **options) == prompt + expected
            assert model.generate(prompt, strip_prompt=True, **options) == expected
            stream = model.stream(prompt, **options)
            assert "".join(stream) == expected
            assert stream.finish_reason == "stop"


def test_each_row_of_a_batch_ends_on_its_own(model, free):
    stop = free[1][3:6]
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert expected != free
    assert model.generate(PROMPTS, strip_prompt=True, stop=stop, **OPTIONS) == expected


def test_ids_end_with_the_token_that_completed_it(model, free):
    ids = model.tokenizer(PROMPTS[0])
    every = model.generate(ids, strip_prompt=True, **OPTIONS)
    text = model.tokenizer.detokenize(every, skip_special_tokens=True)
    stop = text[3:6]
    made = model.generate(ids, strip_prompt=True, stop=stop, **OPTIONS).tolist()
    assert made == every[: len(made)].tolist()
    decode = model.tokenizer.detokenize
    assert stop in decode(made, skip_special_tokens=True)
    assert stop not in decode(made[:-1], skip_special_tokens=True)
    stream = model.stream(ids, stop=stop, **OPTIONS)
    assert "".join(stream) == text[: text.index(stop)]
    assert stream.token_ids.tolist() == made


def test_what_begins_in_the_prompt_does_not_count(model, free):
    for prompt, text in zip(PROMPTS, free, strict=True):
        stops = [prompt, prompt[-2:] + text[:1]]
        assert not any(stop in text for stop in stops)
        assert model.generate(prompt, strip_prompt=True, stop=stops, **OPTIONS) == text


def test_special_tokens_are_not_in_the_text_that_is_searched(model):
    special = model.tokenizer.stop_token_ids[0]
    spelled = model.tokenizer.id_to_token(special)
    bias = {"logit_bias": {special: 1000.0}}
    assert model.generate("Hi", stop=spelled, **OPTIONS, **bias) == "Hi"
    made = model.generate([5], stop=spelled, strip_prompt=True, **OPTIONS, **bias)
    assert made.tolist() == [special] * 16


def test_completions_say_that_a_text_stopped_them(model, free):
    stop = free[0][2:4]
    found = model.generate(PROMPTS[0], stop=stop, strip_prompt=True, logprobs=0, **OPTIONS)
    assert found.finish_reason == "stop"
    assert found.text == free[0][: free[0].index(stop)]
    assert len(found.logprobs) == len(found.token_ids) <= 16


def test_leading_spaces_that_a_decoder_drops_stay_within_the_whole_text(model, free, monkeypatch):
    # As SentencePiece has it: the completion alone loses a space that the whole text keeps.
    tokenizer = model.tokenizer
    detokenize, stream_decoder = tokenizer.detokenize, tokenizer.stream_decoder

    def stripped(rows, **options):
        return [text[1:] for text in detokenize(rows, **options)]

    class Stripping:
        def __init__(self, **options):
            self.decoder, self.begun = stream_decoder(**options), False

        def push(self, token):
            text = self.decoder.push(token)
            if text and not self.begun:
                self.begun, text = True, text[1:]
            return text

        def flush(self):
            return self.decoder.flush()

    monkeypatch.setattr(tokenizer, "detokenize", stripped)
    monkeypatch.setattr(tokenizer, "stream_decoder", Stripping)
    whole = PROMPTS[0] + free[0]
    stop = free[0][4:7]
    end = len(PROMPTS[0]) + free[0].index(stop, 1)
    assert model.generate(PROMPTS[0], stop=stop, **OPTIONS) == whole[1:end]


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3])
def test_stops_that_are_no_texts_are_refused(model, stop):
    with pytest.raises(ConfigError, match="stop is"):
        model.generate("Hello", stop=stop)


def test_no_stop_texts_may_be_said_in_three_ways(model, free):
    for stop in ((), None, []):
        assert model.generate(PROMPTS[0], strip_prompt=True, stop=stop, **OPTIONS) == free[0]


def test_without_a_tokenizer_there_is_no_text_to_search(model):
    bare = Llama3CausalLM(model.backbone)
    with pytest.raises(TokenizerError, match="stop texts need a tokenizer"):
        bare.generate(np.array([5, 6]), stop="a")
