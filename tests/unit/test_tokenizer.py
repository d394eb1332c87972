import doctest
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from puna.errors import TokenizerError
from puna.text import inputs, streaming, template, tiktoken
from puna.text.streaming import WindowStream
from puna.text.tokenizer import Tokenizer
from tests.hard_strings import hard_strings
from tests.tiny_tokenizers import (
    LLAMA3_SPECIAL,
    byte_level,
    sentencepiece_metadata,
)

HARD = hard_strings(600, special_tokens=[*LLAMA3_SPECIAL, "<think>"], seed=1)
BYTE_LEVEL = byte_level()
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "spm"])


def _pieces_of_stream(tokenizer, ids, **options):
    decoder = tokenizer.stream_decoder(**options)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def test_call_gives_int32_without_start_token():
    ids = BYTE_LEVEL("Hello")
    assert isinstance(ids, np.ndarray)
    assert ids.dtype == np.int32
    assert [BYTE_LEVEL.id_to_token(i) for i in ids] == ["Hell", "o"]


@pytest.mark.parametrize(
    "batch",
    [
        ["Hello", "two"],
        ("Hello", "two"),
        np.array(["Hello", "two"]),
        np.array([b"Hello", b"two"], dtype=object),
    ],
    ids=["list", "tuple", "str array", "bytes array"],
)
def test_batches(batch):
    rows = BYTE_LEVEL(batch)
    assert [row.tolist() for row in rows] == [
        BYTE_LEVEL("Hello").tolist(),
        BYTE_LEVEL("two").tolist(),
    ]


def test_empty_inputs():
    assert BYTE_LEVEL("").shape == (0,)
    assert BYTE_LEVEL("").dtype == np.int32
    assert BYTE_LEVEL([]) == []
    assert BYTE_LEVEL.detokenize([]) == ""
    assert BYTE_LEVEL.detokenize([[], []]) == ["", ""]


@pytest.mark.parametrize("text", [5, None, ["a", 3], {"a": 1}, b"\xff", "\ud800", ["\ud800", "a"]])
def test_what_is_not_text_is_refused(text):
    with pytest.raises(TokenizerError):
        BYTE_LEVEL(text)


def test_start_token_once():
    start = BYTE_LEVEL.start_token_id
    expected = [start, *BYTE_LEVEL("Hi")]
    for text in ("Hi", "<|begin_of_text|>Hi"):
        assert BYTE_LEVEL(text, add_special_tokens=True).tolist() == expected
    plain = BYTE_LEVEL("<|begin_of_text|>Hi", add_special_tokens=True, parse_special=False)
    assert plain.tolist().count(start) == 1
    assert len(plain) > len(expected)
    rows = BYTE_LEVEL(["Hi", "<|begin_of_text|>Hi"], add_special_tokens=True)
    assert [row.tolist() for row in rows] == [expected, expected]


def test_start_token_as_asked_for():
    without = byte_level(add_start_token=False)
    assert without("Hi", add_special_tokens=True).tolist() == without("Hi").tolist()
    assert without._backend.encode("Hi").ids == without("Hi").tolist()
    again = Tokenizer(
        without._backend, start_token="<|begin_of_text|>", end_token=None, add_start_token=True
    )
    assert again("Hi", add_special_tokens=True)[0] == again.start_token_id


@BOTH
@pytest.mark.parametrize("batched", [False, True])
def test_plain_text_never_gives_special_tokens(tokenizer, batched):
    special = {*tokenizer.special_token_ids, *tokenizer.stop_token_ids} - {0}
    texts = [*HARD, "".join(LLAMA3_SPECIAL), "a</s>b<s>", "</s>", "<|eot_id|>"]
    texts = [text for text in texts if text]
    rows = (
        tokenizer(texts, parse_special=False)
        if batched
        else [tokenizer(text, parse_special=False) for text in texts]
    )
    assert not special.intersection(i for row in rows for i in row.tolist())
    if tokenizer is BYTE_LEVEL:
        assert tokenizer.detokenize(rows) == texts
        think = tokenizer.token_to_id("<think>")
        assert think in tokenizer("<think>")
        assert think not in tokenizer("<think>", parse_special=False)


@BOTH
def test_plain_and_parsed_agree_where_nothing_is_special(tokenizer):
    texts = [
        t for t in hard_strings(300, seed=2) if not any(s in t for s in tokenizer._encoder.added)
    ]
    for parsed, plain in zip(tokenizer(texts), tokenizer(texts, parse_special=False), strict=True):
        assert parsed.tolist() == plain.tolist()


def test_plain_text_is_safe_while_other_threads_parse():
    def work(place):
        return BYTE_LEVEL("x<|eot_id|>y", parse_special=bool(place % 2)).tolist()

    expected = [work(0), work(1)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(400)))
    assert found == expected * 200


def test_a_vocabulary_that_merges_a_special_token_is_cut_open():
    vocabulary = {"<s>": 0, "<": 1, "s": 2, ">": 3, "<s": 4, "x": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "s"), ("<s", ">")]))
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, start_token="<s>")
    assert tokenizer("x<s>").tolist() == [5, 0]
    assert tokenizer("x<s>", parse_special=False).tolist() == [5, 1, 2, 3]


def test_detokenize_takes_what_users_have():
    ids = BYTE_LEVEL("Hello<|eot_id|>").tolist()
    assert BYTE_LEVEL.detokenize(ids) == "Hello<|eot_id|>"
    assert BYTE_LEVEL.detokenize(tuple(np.int64(i) for i in ids)) == "Hello<|eot_id|>"
    assert BYTE_LEVEL.detokenize(np.array([ids, ids])) == ["Hello<|eot_id|>"] * 2
    assert BYTE_LEVEL.detokenize([ids, ids[:1]]) == ["Hello<|eot_id|>", "Hell"]
    assert BYTE_LEVEL.detokenize([np.array(ids), []]) == ["Hello<|eot_id|>", ""]
    assert BYTE_LEVEL.detokenize(ids, skip_special_tokens=True) == "Hello"
    assert BYTE_LEVEL.detokenize([*ids, 99_999]) == "Hello<|eot_id|>"


@pytest.mark.parametrize("ids", [[-1], [0.5], ["a"], np.zeros((1, 1, 1), int), [[1], [-2]]])
def test_what_is_not_ids_is_refused(ids):
    with pytest.raises(TokenizerError, match="non-negative integers"):
        BYTE_LEVEL.detokenize(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_round_trip(text):
    assert BYTE_LEVEL.detokenize(BYTE_LEVEL(text)) == text
    assert BYTE_LEVEL.detokenize(BYTE_LEVEL(text, parse_special=False)) == text
    assert "".join(_pieces_of_stream(BYTE_LEVEL, BYTE_LEVEL(text).tolist())) == text


@BOTH
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids_is_their_text(tokenizer, data):
    """Also of ids that are no valid UTF-8, as a model may well generate."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size() + 1), max_size=40))
    for skip in (False, True):
        pieces = _pieces_of_stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.detokenize(ids, skip_special_tokens=skip)


@BOTH
def test_stream_gives_whole_characters_and_starts_anew(tokenizer):
    text = "ab é 你好 👨‍👩‍👧 c"
    ids = tokenizer(text).tolist()
    decoder = tokenizer.stream_decoder()
    for _ in range(2):
        pieces = [*(decoder.push(i) for i in ids), decoder.flush()]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_gives_a_character_as_soon_as_it_is_whole():
    ids = BYTE_LEVEL("é!").tolist()
    assert _pieces_of_stream(BYTE_LEVEL, ids) == ["", "é", "!", ""]


def test_window_stream_for_other_decoders():
    stream = WindowStream(BYTE_LEVEL.detokenize)
    text = "Hello 你好 👨‍👩‍👧, the end"
    pieces = [*(stream.push(i) for i in BYTE_LEVEL(text).tolist()), stream.flush()]
    assert "".join(pieces) == text


def test_sentencepiece_pieces_and_prefix_space():
    assert [SENTENCEPIECE.id_to_token(i) for i in SENTENCEPIECE("ab")] == ["▁ab"]
    assert [SENTENCEPIECE.id_to_token(i) for i in SENTENCEPIECE("aé中")] == [
        *("▁a", "é", "<0xE4>", "<0xB8>", "<0xAD>")
    ]
    assert SENTENCEPIECE.detokenize(SENTENCEPIECE("  ab")) == "  ab"
    assert SENTENCEPIECE("ab", add_special_tokens=True)[0] == SENTENCEPIECE.start_token_id
    bare = Tokenizer.from_gguf(
        sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    )
    assert [bare.id_to_token(i) for i in bare("ab")] == ["ab"]
    assert bare.detokenize(bare("ab")) == "ab"


def test_segments_after_the_first_get_no_prefix_space():
    """Llama 2 in transformers 5: `▁` goes before the text, not after each special token."""
    vocabulary = {"<s>": 0, "▁a": 1, "a": 2, "▁": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    tokenizer = Tokenizer(backend, start_token="<s>")
    segments = [("a", False), ("<s>", True), ("a", False)]
    assert tokenizer.encode_segments(segments).tolist() == tokenizer("a<s>a").tolist() == [1, 0, 2]


def test_tokens_that_take_the_space_beside_them():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, " ": 1}, merges=[]))
    backend.add_special_tokens([AddedToken("<r>", rstrip=True), AddedToken("<l>", lstrip=True)])
    tokenizer = Tokenizer(backend)
    text = "a <r> a <l> a"
    segments = [("a ", False), ("<r>", True), (" a ", False), ("<l>", True), (" a", False)]
    assert tokenizer.encode_segments(segments).tolist() == tokenizer(text).tolist()


def test_vocabulary():
    assert BYTE_LEVEL.vocabulary_size() == 256 + 6 + 6
    for i in (0, 100, 267):
        assert BYTE_LEVEL.token_to_id(BYTE_LEVEL.id_to_token(i)) == i
    for bad in (268, -1):
        with pytest.raises(TokenizerError, match="0 to 267"):
            BYTE_LEVEL.id_to_token(bad)
    with pytest.raises(TokenizerError, match="no 'Hello'"):
        BYTE_LEVEL.token_to_id("Hello")
    assert BYTE_LEVEL.count_tokens("Hello") == 2
    assert BYTE_LEVEL.pieces("Hello é") == ["Hell", "o", " ", r"\xc3", r"\xa9"]
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.token_to_id("Ġt")) == b" t"


def test_named_ids():
    assert BYTE_LEVEL.start_token == "<|begin_of_text|>"
    assert BYTE_LEVEL.id_to_token(BYTE_LEVEL.end_token_id) == "<|eot_id|>"
    assert BYTE_LEVEL.pad_token_id == 0
    assert byte_level(pad_token="<|end_of_text|>").pad_token_id == 263
    assert [BYTE_LEVEL.id_to_token(i) for i in BYTE_LEVEL.stop_token_ids] == [
        *("<|end_of_text|>", "<|eot_id|>")
    ]
    assert byte_level(stop_token_ids=[7]).stop_token_ids == (7, *BYTE_LEVEL.stop_token_ids)
    with pytest.raises(TokenizerError, match="nope"):
        byte_level(end_token="nope")
    with pytest.raises(TokenizerError, match="9999"):
        byte_level(stop_token_ids=[9999])


def test_truncation_and_padding_in_the_file_do_nothing():
    backend = byte_level()._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert Tokenizer(backend)("Hello Hello").size == BYTE_LEVEL("Hello Hello").size


def test_other_decoders_still_stream():
    backend = byte_level()._backend
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    assert "".join(_pieces_of_stream(tokenizer, tokenizer("Hello é!").tolist())) == "Hello é!"


@pytest.mark.parametrize("module", [inputs, streaming, template, tiktoken])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_a_character_that_is_itself_special_is_refused_in_plain_text():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "§": 1}, merges=[]))
    backend.add_special_tokens(["§"])
    tokenizer = Tokenizer(backend)
    assert tokenizer("a§").tolist() == [0, 1]
    with pytest.raises(TokenizerError, match="§"):
        tokenizer("a§", parse_special=False)
