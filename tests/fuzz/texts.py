"""Files of JSON, broken: `tokenizer.json` and what is beside it, and the configurations."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np

from puna.checkpoint.preset import Preset
from puna.config import LlamaConfig
from puna.text.tokenizer import Tokenizer
from tests.fuzz.mutate import mutate_json
from tests.fuzz.weights import write_arrays
from tests.tiny_tokenizers import byte_level

TEXTS = ("Hello  the world\n\n", "<|eot_id|>é🦙 12345", "", "a" * 200)
_COMPONENTS = (
    '{"type": "Prepend", "prepend": "aaaaaaaa"}', '{"type": "NFC"}', '{"type": "Lowercase"}',
    '{"type": "Replace", "pattern": {"String": ""}, "content": "x"}',
    '{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}',
    '{"type": "Replace", "pattern": {"String": "a"}, "content": "' + "a" * 50 + '"}',
    '{"type": "Sequence", "normalizers": [' + ", ".join(
        ['{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}'] * 12) + "]}",
    '{"type": "Split", "pattern": {"Regex": "(a|aa)+b"}, "behavior": "Isolated", "invert": false}',
    '{"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": true}',
    '{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}',
    '{"type": "Strip", "strip_left": true, "strip_right": true}', '{"type": "Fuse"}',
    '{"type": "Strip", "content": " ", "start": 9223372036854775807, "stop": 9}',
    '{"type": "Precompiled", "precompiled_charsmap": "AAAA/w=="}', '{"type": "ByteFallback"}',
    '{"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}',
    '{"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": true}',
    '{"type": "Sequence", "pretokenizers": []}', '{"type": "Sequence", "decoders": []}',
    '{"type": "FixedLength", "length": 0}', '{"type": "Digits", "individual_digits": true}',
    '{"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}',
    '{"type": "BertProcessing", "sep": ["x", 4000000000], "cls": ["y", 1]}',
    '{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}',
    '{"strategy": {"Fixed": 99999999999}, "direction": "Left", "pad_to_multiple_of": 0, '
    '"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}',
    '{"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]], "byte_fallback": true}',
    '{"type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "", '
    '"max_input_chars_per_word": 0, "vocab": {"a": 0}}',
    '{"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "zz"}',
    '{"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a", "aa aa"]}',
    '{"type": "BPE", "dropout": 2.0, "vocab": {}, "merges": []}',
    '{"id": 0, "content": "", "single_word": true, "lstrip": true, "rstrip": true, '
    '"normalized": true, "special": true}',
)  # fmt: skip


class TokenizerJson:
    """A tokenizer's files, of which one is broken."""

    name = "tokenizer"

    def write(self, directory: Path) -> None:
        byte_level().save(directory)
        tokens = {str(i): vars_of(token) for i, token in byte_level_added().items()}
        path = directory / "tokenizer_config.json"
        more = {"added_tokens_decoder": tokens, "add_bos_token": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        ids = {"bos_token_id": 262, "eos_token_id": [263, 266]}
        (directory / "generation_config.json").write_text(json.dumps(ids))
        (directory / "config.json").write_text(json.dumps(ids | {"vocab_size": 512}))
        (directory / "special_tokens_map.json").write_text('{"bos_token": {"content": "Hello"}}')

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        shutil.copytree(originals, case, dirs_exist_ok=True)
        others = ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
        name = "tokenizer.json" if rng.random() < 0.7 else rng.choice([*others, "config.json"])
        (case / name).write_bytes(mutate_json(rng, (originals / name).read_text(), _COMPONENTS))
        if rng.random() < 0.05:
            (case / "chat_template.jinja").write_bytes(rng.randbytes(20))
        if rng.random() < 0.02:
            (case / name).unlink()

    def load(self, case: Path) -> None:
        tokenizer = Tokenizer.from_directory(case)
        for text in TEXTS:
            for special in (True, False):
                ids = tokenizer(text, parse_special=special, add_special_tokens=special)
                assert ids.ndim == 1
                tokenizer.detokenize(ids)
        decoder = tokenizer.stream_decoder()
        for token in tokenizer("Hello é").tolist():
            decoder.push(token)
        decoder.flush()
        tokenizer.vocabulary_size()
        if tokenizer.chat_template is not None:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True)


def byte_level_added() -> dict[int, object]:
    """The added tokens of the tokenizer that is broken."""
    return byte_level()._backend.get_added_tokens_decoder()


def vars_of(token: object) -> dict[str, object]:
    """An added token as `tokenizer_config.json` writes it."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


class Config:
    """`config.json` of either layout, with `generation_config.json` and `puna.json`."""

    name = "config"

    def write(self, directory: Path) -> None:
        scaling = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, head_dim=8).to_hf()
        config = config | {"rope_scaling": scaling, "intermediate_size": 64, "head_dim": 8}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["x"]}
        del config["rope_parameters"]
        (directory / "config.json").write_text(json.dumps(config))
        ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9}
        (directory / "generation_config.json").write_text(json.dumps(ids))
        settings = {"preprocessor": {"sequence_length": 64, "add_start_token": True}}
        (directory / "puna.json").write_text(json.dumps(settings))
        layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
                 "post_attention_layernorm")  # fmt: skip
        tensors = {f"model.layers.0.{n}.weight": np.zeros((32, 32), np.float32) for n in layer}
        tensors["model.embed_tokens.weight"] = np.zeros((64, 32), np.float32)
        write_arrays(directory / "model.safetensors", tensors)

    def mutate(self, rng: random.Random, originals: Path, case: Path) -> None:
        shutil.copytree(originals, case, dirs_exist_ok=True)
        name = rng.choice(["config.json"] * 6 + ["generation_config.json", "puna.json"])
        values = [
            '"llama"', '"gelu"', '"bfloat16"', '"float8_e4m3fn"', '"auto"', '"torch.float16"',
            '"yarn"', '"linear"', '"dynamic"', '"default"', '{"type": "linear", "factor": 2}',
            '{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}',
            '{"rope_type": "dynamic", "factor": 1e308}', '{"rope_type": "yarn", "factor": NaN}',
            '{"rope_type": "yarn", "factor": 2, "mscale": 1e308, "mscale_all_dim": 1e-308}',
        ]  # fmt: skip
        text = (originals / name).read_text()
        if name == "config.json" and rng.random() < 0.3:
            config = json.loads(text)
            config |= {"rope_scaling": json.loads(rng.choice(values[11:13]))}
            text = json.dumps(config)
        (case / name).write_bytes(mutate_json(rng, text, values))

    def load(self, case: Path) -> None:
        opened = Preset(case)
        config = LlamaConfig.from_hf(opened.config)
        source = opened.tensors()
        source.close()
        opened.default_dtype(source)
        # As building a model asks it; the file's tensors bound what that may cost.
        assert config.num_hidden_layers * config.head_size <= 10 * case_size(case)
        config.rope.inverse_frequencies(config.head_size)
        float(config.rope.attention_scaling)
        assert config.context_length > 0
        assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def case_size(case: Path) -> int:
    """Bytes of a case's files."""
    return sum(file.stat().st_size for file in case.iterdir())
