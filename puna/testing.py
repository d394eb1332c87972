"""Tiny models, tokenizers and presets, for tests and examples: made in code, nothing is fetched.

Everything here is deterministic and the same on every backend. The widths are a few numbers and
the vocabulary a few hundred tokens, so a model is made in milliseconds; what it says is noise.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

import puna.models as _models
from puna.checkpoint.model_card import CARD, is_free
from puna.config import LlamaConfig
from puna.text.streaming import byte_alphabet
from puna.text.tiktoken import LLAMA3_PATTERN

# The special tokens of Llama 3 that have a use, in the order of their ids.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)

# The words that have a token of their own, with and without a space before them.
WORDS = ("Hello", "Hi", "there", "the", "world", "you", "are", "system", "user", "assistant")

# Llama 3's own way of writing a conversation, without its tools and dates.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# What an instruct model's `generation_config.json` says beside its ids.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def tiny_tokenizer(**changes: Any) -> _models.Llama3Tokenizer:
    """A byte-level BPE tokenizer that splits, marks and chats as Llama 3's does.

    It has the 256 bytes, `WORDS` and `SPECIAL_TOKENS`, so that any text survives the round trip.

    Args:
        changes: arguments of `Tokenizer` other than the ones taken here.

    Raises:
        TokenizerError: a change names a token that is not in the vocabulary.

    >>> tiny_tokenizer()("Hello world").tolist()
    [259, 273]
    """
    # As in Llama 3 the id 0 is a real token, "!".
    vocabulary = {character: place for place, character in enumerate(byte_alphabet())}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for right in word[1:]:
            merges.append((left, right))
            left += right
        merges.append(("Ġ", word))
    merges = list(dict.fromkeys(merges))
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    settings: dict[str, Any] = {
        "start_token": "<|begin_of_text|>",
        "end_token": "<|eot_id|>",
        "add_start_token": True,
        "chat_template": CHAT_TEMPLATE,
    }
    return _models.Llama3Tokenizer(backend, **(settings | changes))


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers with grouped heads, an untied head and three stop ids.

    Args:
        changes: arguments of `LlamaConfig` to have otherwise.

    Raises:
        ConfigError: the numbers do not fit each other.

    >>> tiny_config(num_hidden_layers=1).hidden_size
    16
    """
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.vocabulary_size(),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.start_token_id,
        "eos_token_id": tokenizer.stop_token_ids,
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(
    config: LlamaConfig | None = None,
    *,
    tokenizer: _models.Llama3Tokenizer | None = None,
    dtype: Any = "float32",
    sequence_length: int = 64,
    seed: int = 0,
    **changes: Any,
) -> _models.Llama3CausalLM:
    """A causal LM with its preprocessor; the same arguments give the same weights, always.

    Args:
        config: the shape; None means `tiny_config(**changes)`.
        tokenizer: the tokenizer; None means `tiny_tokenizer()`.
        dtype: a dtype's name or a Keras dtype policy, as models take it.
        sequence_length: the preprocessor's padded length, in tokens.
        seed: of the weights.
        changes: arguments of `LlamaConfig` to have otherwise.

    Raises:
        ConfigError: the numbers do not fit each other.
        TypeError: both a config and changes are given.

    >>> tiny_model().generate("Hello", max_new_tokens=3, sampler="greedy").startswith("Hello")
    True
    """
    if config is not None and changes:
        raise TypeError(f"beside config, these are not taken: {[*changes]}")
    config = config or tiny_config(**changes)
    backbone = _models.Llama3Backbone(config=config, dtype=dtype)
    preprocessor = _models.Llama3CausalLMPreprocessor(
        tokenizer or tiny_tokenizer(), sequence_length=sequence_length
    )
    model = _models.Llama3CausalLM(backbone, preprocessor)
    randomize(model, seed)
    return model


def randomize(model: Any, seed: int = 0) -> None:
    """Give every weight of a model new values, the same on every backend.

    Args:
        model: a causal LM or a backbone. Norms get values around 1, biases and matrices around 0,
            spread as the configuration's `initializer_range` says.
        seed: what the values depend on, beside the weights' order and shapes.
    """
    numbers = np.random.default_rng(seed)
    for name, variable in model.tensors().items():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        values = numbers.normal(center, model.config.initializer_range, tuple(variable.shape))
        variable.assign(values.astype("float32"))


def write_tiny_preset(
    directory: str | os.PathLike[str],
    *,
    tokenizer: _models.Llama3Tokenizer | None = None,
    dtype: Any = "float32",
    seed: int = 0,
    max_shard_size: int = 5_000_000_000,
    **changes: Any,
) -> Path:
    """Write what a publisher of a chat model puts on the Hub, tiny.

    These are `config.json`, `generation_config.json` with a list of eos ids and `SAMPLING`,
    `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Args:
        directory: where to; it is made.
        tokenizer: the tokenizer; None means `tiny_tokenizer()`.
        dtype: the weights' dtype.
        seed: of the weights.
        max_shard_size: bytes of a weights file at the most.
        changes: arguments of `LlamaConfig` to have otherwise, as in `tiny_config`.

    Returns:
        The directory.

    Raises:
        ConfigError: the numbers do not fit each other.
        PresetError: the directory cannot be written.
    """
    model = tiny_model(tokenizer=tokenizer, dtype=dtype, seed=seed, **changes)
    model.generation_config = dict(SAMPLING)
    path = Path(directory)
    model.save_to_preset(path, max_shard_size=max_shard_size)
    # Publishers know nothing of our own files.
    (path / "puna.json").unlink()
    if is_free(path):
        (path / CARD).unlink()
    return path
