"""A tokenizer's files: directories, GGUF metadata, saving and configs."""

import json
import pickle

import pytest

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer
from tests.hard_strings import hard_strings
from tests.tiny_tokenizers import (
    LLAMA3_SPECIAL,
    LLAMA3_TEMPLATE,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
)

HARD = hard_strings(600, special_tokens=[*LLAMA3_SPECIAL, "<think>"], seed=1)
BYTE_LEVEL = byte_level()
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "spm"])


def _save(directory, **files):
    for name, value in files.items():
        name = name.replace("__", ".")
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name).write_text(text)


def test_directory_gives_every_setting(tmp_path):
    BYTE_LEVEL._backend.save(str(tmp_path / "tokenizer.json"))
    _save(
        tmp_path,
        tokenizer_config__json={
            "bos_token": {"content": "<|begin_of_text|>", "special": True},
            "chat_template": [
                {"name": "default", "template": "A"},
                {"name": "rag", "template": "R"},
            ],
            "added_tokens_decoder": {"268": {"content": "<|extra|>", "special": True}},
        },
        special_tokens_map__json={"eos_token": "<|eot_id|>", "pad_token": {"content": "<|extra|>"}},
        generation_config__json={"eos_token_id": [263, 3, 99_999], "pad_token_id": 5},
        config__json={"eos_token_id": 4, "bos_token_id": 1},
        chat_template__jinja="B\n",
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.chat_templates == {"default": "B\n", "rag": "R", "tool_use": "T"}
    assert tokenizer.start_token == "<|begin_of_text|>"
    assert tokenizer.end_token == "<|eot_id|>"
    assert tokenizer.pad_token_id == 268
    assert tokenizer.stop_token_ids == (3, 4, 263, 266)
    assert tokenizer("<|extra|>").tolist() == [268]
    assert tokenizer.apply_chat_template([], tools=[{"x": 1}]) == "T"


def test_ids_in_configs_name_tokens_where_names_are_missing(tmp_path):
    BYTE_LEVEL._backend.save(str(tmp_path / "tokenizer.json"))
    _save(
        tmp_path, config__json={"bos_token_id": 262, "eos_token_id": [266, 263], "pad_token_id": -1}
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (
        262,
        266,
        0,
    )
    assert tokenizer.stop_token_ids == (263, 266)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither tokenizer.json nor"),
        ({"tokenizer__json": "{"}, "cannot be read"),
        ({"tokenizer__model": "\x0a\x0b sentencepiece"}, "SentencePiece"),
        ({"tokenizer__model": "IQ== 0\nnot a line\n"}, "line 2"),
        ({"tokenizer__model": "IQ== 0\nIg== 5\n"}, "ranks"),
        ({"tokenizer__model": "IQ== 0\n", "config__json": "]"}, "not valid JSON"),
        ({"tokenizer__model": "IQ== 0\n", "config__json": "[]"}, "expected a JSON object"),
    ],
)
def test_broken_directories_say_what_to_do(tmp_path, files, message):
    _save(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_files_of_two_models_are_refused(tmp_path):
    BYTE_LEVEL._backend.save(str(tmp_path / "tokenizer.json"))
    decoder = {"5": {"content": "<|eot_id|>", "special": True}}
    _save(tmp_path, tokenizer_config__json={"added_tokens_decoder": decoder})
    with pytest.raises(TokenizerError, match="not of one model"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(TokenizerError, match="not a directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@BOTH
def test_save_and_reload(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text("of another model")
    for name in ("a", "b"):
        tokenizer.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ("chat_template.jinja" in files) == (tokenizer is BYTE_LEVEL)
    again = Tokenizer.from_directory(tmp_path / "a")
    assert again.chat_templates == tokenizer.chat_templates
    assert again.stop_token_ids == tokenizer.stop_token_ids
    assert again.add_start_token is tokenizer.add_start_token
    for options in ({}, {"add_special_tokens": True}, {"parse_special": False}):
        for ours, theirs in zip(again(HARD, **options), tokenizer(HARD, **options), strict=True):
            assert ours.tolist() == theirs.tolist()


@BOTH
def test_config_and_pickle(tokenizer):
    config = json.loads(json.dumps(tokenizer.get_config()))
    for again in (Tokenizer.from_config(config), pickle.loads(pickle.dumps(tokenizer))):
        assert again.get_config() == tokenizer.get_config()
        assert [r.tolist() for r in again(HARD[:50])] == [r.tolist() for r in tokenizer(HARD[:50])]


# GGUF


def test_gguf_gives_every_setting():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.ggml.eot_token_id": 3})
    assert tokenizer.chat_templates == {"default": LLAMA3_TEMPLATE, "rag": "{{ documents }}"}
    assert tokenizer.add_start_token is True
    assert set(tokenizer.stop_token_ids) == {3, *BYTE_LEVEL.stop_token_ids}
    assert [r.tolist() for r in tokenizer(HARD)] == [r.tolist() for r in BYTE_LEVEL(HARD)]
    off = Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.ggml.add_bos_token": False})
    assert off.add_start_token is False
    assert off("Hi", add_special_tokens=True).tolist() == off("Hi").tolist()


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["a", "123", "45", " b", "\n\n", "c"]),
        ("smollm", ["a", "1", "2", "3", "4", "5", " b", "\n", "\n", "c"]),
        ("gpt-2", ["a", "12345", " b", "\n", "\n", "c"]),
        ("qwen2", ["a", "1", "2", "3", "4", "5", " b", "\n\n", "c"]),
        ("tekken", ["a", "1", "2", "3", "4", "5", " b", "\n\n", "c"]),
        ("default", ["a", "123", "45", " b", "\n", "\n", "c"]),
        (None, ["a", "123", "45", " b", "\n", "\n", "c"]),
    ],
)
def test_gguf_splits_by_its_own_rule(pre, pieces):
    backend = Tokenizer.from_gguf(byte_level_metadata(pre))._backend
    found = backend.pre_tokenizer.pre_tokenize_str("a12345 b\n\nc")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found] == pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "new-rule"}, "'new-rule'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, "do not fit together"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "more than once"),
    ],
)
def test_gguf_that_is_not_known_is_refused(change, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(byte_level_metadata() | change)
