import json

import numpy as np
import pytest

from puna.errors import ContextLengthError, TokenizerError
from puna.text.preprocessor import CausalLMPreprocessor
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
BOS, EOS = TOKENIZER.start_token_id, TOKENIZER.end_token_id
HELLO = TOKENIZER("Hello").tolist()


def _preprocessor(length=6, **options):
    return CausalLMPreprocessor(TOKENIZER, sequence_length=length, **options)


def test_one_string():
    x, y, weight = _preprocessor()("Hello")
    assert x["token_ids"].tolist() == [BOS, *HELLO, EOS, 0, 0]
    assert x["padding_mask"].tolist() == [True] * 4 + [False] * 2
    assert y.tolist() == [*HELLO, EOS, 0, 0, 0]
    assert weight.tolist() == [True] * 3 + [False] * 3
    assert x["token_ids"].dtype == y.dtype == np.int32
    assert x["padding_mask"].dtype == weight.dtype == bool


@pytest.mark.parametrize(
    "batch",
    [
        ["Hello", ""],
        ("Hello", ""),
        np.array(["Hello", ""]),
        np.array([b"Hello", b""], dtype=object),
        [b"Hello", np.str_("")],
    ],
    ids=["list", "tuple", "str array", "bytes array", "mixed"],
)
def test_batches(batch):
    x, y, weight = _preprocessor()(batch)
    assert x["token_ids"].tolist() == [[BOS, *HELLO, EOS, 0, 0], [BOS, EOS, 0, 0, 0, 0]]
    assert x["padding_mask"].shape == y.shape == weight.shape == (2, 6)


def test_empty_batch():
    x, y, _ = _preprocessor()([])
    assert x["token_ids"].shape == y.shape == (0, 6)
    assert _preprocessor().generate_preprocess([])["token_ids"].shape == (0, 6)
    assert _preprocessor().generate_postprocess(x) == []


def test_scalar_arrays_are_one_string():
    for text in (np.str_("Hello"), np.array("Hello"), b"Hello", np.array(b"Hello", dtype=object)):
        assert _preprocessor()(text)[0]["token_ids"].shape == (6,)


def test_labels_and_weights_are_ignored_as_in_keras_hub():
    assert _preprocessor()("Hello", y=1, sample_weight=2)[1].tolist()[:2] == HELLO


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 9])
def test_every_length(start, end, length):
    preprocessor = _preprocessor(length, add_start_token=start, add_end_token=end)
    x, y, weight = preprocessor("Hello!!!")
    body = [BOS] * start + TOKENIZER("Hello!!!").tolist()
    packed = body[: length + 1 - end] + [EOS] * end
    mask = [True] * len(packed) + [False] * (length + 1 - len(packed))
    packed += [0] * (length + 1 - len(packed))
    assert x["token_ids"].tolist() == packed[:-1]
    assert y.tolist() == packed[1:]
    assert x["padding_mask"].tolist() == mask[:-1]
    assert weight.tolist() == mask[1:]
    assert preprocessor.truncated_count == (len(body) + end > length + 1)


def test_truncation_is_counted():
    preprocessor = _preprocessor(4)
    preprocessor(["Hello" * 9, "Hello", "Hello!" * 2])
    preprocessor("Hello" * 9)
    assert preprocessor.truncated_count == 3


def test_start_token_once():
    for text in ("Hello", "<|begin_of_text|>Hello"):
        assert _preprocessor()(text)[0]["token_ids"].tolist()[:3] == [BOS, *HELLO]
        assert _preprocessor().generate_preprocess(text)["token_ids"].tolist()[:3] == [BOS, *HELLO]


def test_start_token_as_the_tokenizer_has_it():
    tokenizer = byte_level(add_start_token=False)
    assert CausalLMPreprocessor(tokenizer).add_start_token is False
    assert CausalLMPreprocessor(tokenizer, add_start_token=True).add_start_token is True
    assert _preprocessor().add_start_token is True


def test_id_zero_is_a_token_and_not_padding():
    text = TOKENIZER.detokenize([0])
    x, _, weight = _preprocessor()(text)
    assert x["token_ids"].tolist()[:3] == [BOS, 0, EOS]
    assert x["padding_mask"].tolist()[:4] == [True, True, True, False]
    assert weight.tolist()[:3] == [True, True, False]
    assert _preprocessor().generate_postprocess(x) == text


def test_sequence_length_may_be_set():
    preprocessor = _preprocessor()
    preprocessor.sequence_length = 9
    assert preprocessor("Hello")[0]["token_ids"].shape == (9,)
    assert preprocessor("Hello", sequence_length=3)[0]["token_ids"].shape == (3,)
    assert preprocessor.generate_preprocess("Hello", 4)["token_ids"].shape == (4,)
    for bad in (1, 0, -3, 2.5, True, "8", None):
        with pytest.raises(TokenizerError, match="sequence_length"):
            preprocessor.sequence_length = bad
    assert preprocessor.sequence_length == 9


def test_prompts():
    preprocessor = _preprocessor()
    out = preprocessor.generate_preprocess(["Hello", "!"])
    assert out["token_ids"].tolist() == [[BOS, *HELLO, 0, 0, 0], [BOS, *TOKENIZER("!"), 0, 0, 0, 0]]
    assert out["padding_mask"].sum(axis=1).tolist() == [3, 2]
    assert preprocessor.generate_postprocess(out) == ["Hello", "!"]
    assert preprocessor.generate_postprocess(preprocessor.generate_preprocess("Hello")) == "Hello"
    assert (
        preprocessor.generate_postprocess(out, strip_special=False)[0] == "<|begin_of_text|>Hello"
    )
    assert preprocessor.prompt_ids("Hello") == ([[BOS, *HELLO]], False)


@pytest.mark.parametrize(
    ("ids", "rows", "batched"),
    [
        ([1, 2], [[1, 2]], False),
        (np.array([1, 2]), [[1, 2]], False),
        ([[1, 2], [3]], [[1, 2], [3]], True),
        (np.array([[1, 2]]), [[1, 2]], True),
        ([np.array([1, 2]), [3]], [[1, 2], [3]], True),
    ],
)
def test_ids_are_taken_as_they_are(ids, rows, batched):
    assert _preprocessor().prompt_ids(ids) == (rows, batched)
    first = _preprocessor().generate_preprocess(ids)["token_ids"]
    assert (first[0] if batched else first).tolist() == [*rows[0], 0, 0, 0, 0]


def test_dicts_are_taken_by_their_mask():
    given = {"token_ids": np.array([[7, 0, 8]]), "padding_mask": np.array([[1, 1, 0]])}
    assert _preprocessor().prompt_ids(given) == ([[7, 0]], True)
    assert _preprocessor().prompt_ids({"token_ids": [7, 0]}) == ([[7, 0]], False)
    for bad in ({"ids": [1]}, {"token_ids": [1, 2], "padding_mask": [True]}):
        with pytest.raises(TokenizerError, match="token_ids"):
            _preprocessor().prompt_ids(bad)


def test_a_prompt_that_does_not_fit_is_refused():
    assert _preprocessor(3).generate_preprocess("Hello")["padding_mask"].all()
    with pytest.raises(ContextLengthError, match="3 tokens, and sequence_length is 2"):
        _preprocessor(2).generate_preprocess("Hello")


def test_missing_tokens_are_refused():
    with pytest.raises(TokenizerError, match="end token"):
        CausalLMPreprocessor(byte_level(end_token=None))
    with pytest.raises(TokenizerError, match="start token"):
        CausalLMPreprocessor(byte_level(start_token=None), add_start_token=True)
    CausalLMPreprocessor(byte_level(start_token=None, end_token=None), add_end_token=False)


def test_config():
    preprocessor = _preprocessor(5, add_end_token=False)
    config = json.loads(json.dumps(preprocessor.get_config()))
    again = CausalLMPreprocessor.from_config(config)
    assert again.get_config() == preprocessor.get_config()
    assert again("Hello")[0]["token_ids"].tolist() == [BOS, *HELLO, 0, 0]
    assert (
        CausalLMPreprocessor.from_config({**config, "tokenizer": TOKENIZER}).tokenizer is TOKENIZER
    )
