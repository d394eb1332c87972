"""Ids, start tokens, templates and padding equal those of the reference implementations."""

import json
import os

import numpy as np
import pytest

from puna.text.preprocessor import CausalLMPreprocessor
from puna.text.tokenizer import Tokenizer
from tests.hard_strings import SCRIPTS, hard_strings
from tests.parity import make_llama_cpp_golden as llama_cpp_golden
from tests.tiny_tokenizers import LLAMA3_TEMPLATE, byte_level, sentencepiece_metadata

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

# Only those that both names of Llama 3's tokens (3.0 and 3.1) know.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
MESSAGES = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": "Hello é 你好 👨‍👩‍👧, 12345!\n\nAnd?"},
    {"role": "assistant", "content": "\n\nYes."},
    {"role": "user", "content": ""},
]


@pytest.fixture(scope="module")
def strings():
    return hard_strings(10_000, special_tokens=LLAMA3_SPECIAL)


def _assert_equal_ids(ours, theirs, texts):
    assert len(ours) == len(theirs) == len(texts)
    for mine, other, text in zip(ours, theirs, texts, strict=True):
        assert list(mine) == list(other), ascii(text)


def test_hard_strings_cover_every_script(strings):
    own = strings[7 : 7 + len(SCRIPTS)]
    for string, runs in zip(own, SCRIPTS.values(), strict=True):
        assert any(first <= ord(char) <= last for char in string for first, last in runs)
    assert len(strings) == len(hard_strings(10_000)) == 10_000
    assert strings == hard_strings(10_000, special_tokens=LLAMA3_SPECIAL)


def test_the_article(llama3):
    assert llama3("Hello").tolist() == [9906]
    x, y, weight = CausalLMPreprocessor(llama3, sequence_length=6)("Hello")
    assert x["token_ids"].tolist() == [128000, 9906, 128009, 0, 0, 0]
    assert x["padding_mask"].tolist() == [True, True, True, False, False, False]
    assert y.tolist() == [9906, 128009, 0, 0, 0, 0]
    assert weight.tolist() == [True, True, False, False, False, False]
    assert (llama3.start_token_id, llama3.end_token_id, llama3.pad_token_id) == (128000, 128009, 0)
    assert llama3.stop_token_ids == (128001, 128009)
    assert llama3.vocabulary_size() == 128256


@pytest.mark.parametrize("loader", ["PreTrainedTokenizerFast", "AutoTokenizer", "file"])
def test_llama3_is_transformers(llama3, llama3_tokenizer_dir, strings, loader):
    if loader == "file":
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(llama3_tokenizer_dir / "tokenizer.json")
        )
    else:
        reference = getattr(transformers, loader).from_pretrained(str(llama3_tokenizer_dir))
    for start in (True, False):
        theirs = reference(strings, add_special_tokens=start)["input_ids"]
        if start:  # ours does not repeat a start token that the text begins with
            theirs = [ids[1:] if ids[:2] == [128000] * 2 else ids for ids in theirs]
        _assert_equal_ids(llama3(strings, add_special_tokens=start), theirs, strings)


def test_llama3_round_trip(llama3, strings):
    assert llama3.detokenize(llama3(strings)) == strings
    plain = llama3(strings, parse_special=False)
    assert llama3.detokenize(plain) == strings
    assert max(ids.max(initial=0) for ids in plain) < 128_000


def test_llama3_streams(llama3, strings):
    for text in strings[::7]:
        decoder = llama3.stream_decoder()
        pieces = [*(decoder.push(i) for i in llama3(text).tolist()), decoder.flush()]
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_any_ids_stream_as_they_decode(llama3, smollm2):
    rng = np.random.default_rng(0)
    for tokenizer in (llama3, smollm2):
        byte_ids = [i for i in range(260) if len(tokenizer.token_bytes(i)) == 1]
        for _ in range(300):
            ids = rng.integers(0, tokenizer.vocabulary_size(), 20).tolist()
            ids += rng.choice(byte_ids, 30).tolist()
            decoder = tokenizer.stream_decoder()
            text = "".join([*(decoder.push(i) for i in ids), decoder.flush()])
            assert text == tokenizer.detokenize(ids)


def test_metas_tokenizer_model_is_tokenizer_json(llama3, meta_tokenizer_model, strings):
    """Also the merges, which Meta's file does not hold, come out one for one."""
    meta = Tokenizer.from_directory(meta_tokenizer_model.parent)
    for special in (True, False):
        ours = meta(strings, parse_special=special)
        _assert_equal_ids(ours, llama3(strings, parse_special=special), strings)
    ours, theirs = (json.loads(t._backend.to_str())["model"] for t in (meta, llama3))
    assert ours["vocab"] == theirs["vocab"]
    assert ours["merges"] == theirs["merges"]
    assert meta.vocabulary_size() == 128256
    assert meta.stop_token_ids == (128001, 128008, 128009)
    assert meta("Hello", add_special_tokens=True).tolist() == [128000, 9906]
    assert meta.id_to_token(128255) == "<|reserved_special_token_247|>"


def test_smollm2_is_llama_cpp(smollm2):
    texts = llama_cpp_golden.strings()
    golden = json.loads(llama_cpp_golden.GOLDEN.read_text())
    rows = smollm2(texts)
    assert len(rows) == golden["count"] == 10_000
    _assert_equal_ids(rows[: len(golden["ids"])], golden["ids"], texts[: len(golden["ids"])])
    assert llama_cpp_golden.digests(rows) == golden["sha256"]


def test_smollm2_is_llama_cpp_as_installed(smollm2, smollm2_gguf):
    pytest.importorskip("llama_cpp")
    texts = llama_cpp_golden.strings()
    _assert_equal_ids(smollm2(texts), llama_cpp_golden.llama_cpp_ids(smollm2_gguf, texts), texts)


def test_smollm2_round_trip(smollm2):
    """Exact but for characters with one of the 21 bytes that its vocabulary has no token for.

    They are dropped, as by llama.cpp and transformers: controls such as U+0004, and the unassigned
    and private characters from U+40000 on, whose UTF-8 begins with 0xF1 or 0xF2.
    """
    known = {smollm2.token_bytes(i) for i in range(smollm2.vocabulary_size())}
    missing = {byte for byte in range(256) if bytes([byte]) not in known}
    assert missing == {*b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2", *range(0xF5, 0x100)}
    texts = [t for t in llama_cpp_golden.strings() if not missing.intersection(t.encode())]
    assert len(texts) > 9_000
    assert smollm2.detokenize(smollm2(texts)) == texts


def test_smollm2_settings(smollm2):
    assert (smollm2.start_token, smollm2.end_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.pad_token_id == 2
    assert smollm2.stop_token_ids == (2,)
    assert smollm2.add_start_token is False
    assert CausalLMPreprocessor(smollm2).prompt_ids("Hello")[0] == [smollm2("Hello").tolist()]


@pytest.mark.parametrize("which", ["llama3", "smollm2", "meta", "bytes", "spm"])
def test_transformers_opens_what_we_save(which, request, tmp_path, strings):
    if which in ("llama3", "smollm2"):
        tokenizer = request.getfixturevalue(which)
    elif which == "meta":
        file = request.getfixturevalue("meta_tokenizer_model")
        tokenizer = Tokenizer.from_directory(file.parent, chat_template=LLAMA3_TEMPLATE)
    elif which == "bytes":
        tokenizer = byte_level()
    else:
        source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(), chat_template=source)
    tokenizer.save(tmp_path)
    texts = strings[:2000]
    start = tokenizer.start_token_id
    # with a config.json AutoTokenizer goes by the model's type
    for loader, config in [
        (transformers.AutoTokenizer, None),
        (transformers.AutoTokenizer, '{"model_type": "llama"}'),
        (transformers.PreTrainedTokenizerFast, None),
    ]:
        if config is not None and which in ("meta", "smollm2"):
            continue  # the same as of llama3, and slow
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        reference = loader.from_pretrained(str(tmp_path))
        for special in (True, False):
            theirs = reference(texts, add_special_tokens=special)["input_ids"]
            if special and tokenizer.add_start_token:
                theirs = [ids[1:] if ids[:2] == [start] * 2 else ids for ids in theirs]
            _assert_equal_ids(tokenizer(texts, add_special_tokens=special), theirs, texts)
        assert reference.bos_token_id == start
        assert reference.eos_token_id == tokenizer.end_token_id
        assert reference.chat_template == tokenizer.chat_template
        for prompt in (False, True):
            theirs = reference.apply_chat_template(
                MESSAGES, tokenize=False, add_generation_prompt=prompt
            )
            ours = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=prompt)
            assert ours == theirs
            ids = reference.apply_chat_template(
                MESSAGES, tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
            mine = tokenizer.apply_chat_template(
                MESSAGES, tokenize=True, add_generation_prompt=prompt
            )
            assert mine.tolist() == ids
    again = Tokenizer.from_directory(tmp_path)
    _assert_equal_ids(again(texts), tokenizer(texts), texts)
    assert again.stop_token_ids == tokenizer.stop_token_ids


def test_what_transformers_saves_we_open(llama3, llama3_tokenizer_dir, tmp_path, strings):
    transformers.AutoTokenizer.from_pretrained(str(llama3_tokenizer_dir)).save_pretrained(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    texts = strings[:1000]
    _assert_equal_ids(again(texts), llama3(texts), texts)
    assert again.chat_template == llama3.chat_template
    assert again.stop_token_ids == llama3.stop_token_ids
    assert again("Hi", add_special_tokens=True).tolist() == [128000, 13347]


def test_packing_is_keras_hubs():
    """keras-hub's `StartEndPacker`, where it is installed."""
    keras_hub = pytest.importorskip("keras_hub")
    tokenizer = byte_level()
    texts = ["", "a", "Hello", "Hello the", "Hello the Hello", "x" * 40]
    for length in (2, 3, 5, 8):
        for start in (True, False):
            for end in (True, False):
                packer = keras_hub.layers.StartEndPacker(
                    sequence_length=length + 1,
                    start_value=tokenizer.start_token_id,
                    end_value=tokenizer.end_token_id,
                    pad_value=0,
                    return_padding_mask=True,
                )
                rows = [ids.tolist() for ids in tokenizer(texts)]
                ids, mask = packer(rows, add_start_value=start, add_end_value=end)
                ids, mask = np.asarray(ids), np.asarray(mask)
                ours = CausalLMPreprocessor(tokenizer, length, start, end)
                x, y, weight = ours(texts)
                np.testing.assert_array_equal(x["token_ids"], ids[:, :-1])
                np.testing.assert_array_equal(x["padding_mask"], mask[:, :-1])
                np.testing.assert_array_equal(y, ids[:, 1:])
                np.testing.assert_array_equal(weight, mask[:, 1:])
