"""What a preset is, as data: from its configuration and headers, without Keras."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.checkpoint import compressed_tensors
from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.preset import Preset
from puna.checkpoint.source import TensorSource
from puna.checkpoint.variable_names import NO_PARAMETERS
from puna.cli.conversion import parameter_count
from puna.config import LlamaConfig
from puna.errors import TemplateError, TokenizerError
from puna.quantization.arrays import WEIGHT, held_bytes
from puna.text.template import ChatTemplate
from puna.text.tokenizer import Tokenizer

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

# By what a template's source holds, how the field calls its way of writing turns.
_STYLES = (
    ("<|start_header_id|>", "llama3"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "llama2"),
    ("<start_of_turn>", "gemma"),
    ("<|user|>", "zephyr"),
    ("<｜User｜>", "deepseek"),
)
_PROBE = "puna probe"


def describe(
    opened: Preset, tokenizer: Tokenizer | None, contexts: Sequence[int], dtype: str | None
) -> dict[str, Any]:
    """Everything that `puna info` says of a preset.

    Args:
        opened: the preset; only its headers are read.
        tokenizer: its tokenizer, if it has one.
        contexts: lengths, in tokens, for which memory is worked out; none means 4096 and the
            model's own context.
        dtype: the dtype to run in; None means the one that `from_preset` would take.

    Raises:
        PresetError, ConfigError: the files are broken, or ask for what is not computed.
    """
    hf, quantized = compressed_tensors.split(opened.config)
    config = LlamaConfig.from_hf(hf)
    source = opened.tensors()
    try:
        run_as = dtype or opened.default_dtype(source)
        names = _parameters(source, config)
        count = sum(math.prod(source.info(name).shape) for name in names)
        weights = count * BYTES.get(run_as, 4)
        if quantized is not None:  # they are held as they are stored
            count = parameter_count(config)
            weights = sum(source.info(name).nbytes for name in names)
        elif opened.gguf is not None and not opened.adapters:
            weights += _more_by_packing(opened.gguf, BYTES.get(run_as, 4))
        return {
            "format": opened.format,
            "architecture": _architecture(config),
            "parameters": count,
            "stored": _stored(source),
            "files": _files(opened.path, source),
            "context_length": config.context_length,
            "rope": _rope(config),
            "memory": _memory(config, weights, run_as, contexts),
            "template": None if tokenizer is None else _template(tokenizer),
            "stop_tokens": [] if tokenizer is None else _stop_tokens(tokenizer),
            "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        }
    finally:
        source.close()


def _more_by_packing(source: GGUFSource, size: int) -> int:
    """By how many bytes the matrices that stay packed take more than as floats; mostly below 0."""
    difference = 0
    for name, scheme in source.schemes().items():
        out, in_features = source.info(f"{name}.{WEIGHT}").shape
        difference += held_bytes((out, in_features), scheme) - out * in_features * size
    return difference


def _architecture(config: LlamaConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "query_heads": config.num_attention_heads,
        "key_value_heads": config.num_kv_heads,
        "head_size": config.head_size,
        "vocabulary_size": config.vocab_size,
        "activation": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "tied_embeddings": config.tie_word_embeddings,
        "biases": config.attention_bias or config.mlp_bias,
    }


def _parameters(source: TensorSource, config: LlamaConfig) -> list[str]:
    """The tensors that become variables: no tables, and a tied head only once."""
    return [
        name
        for name in source.names()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in NO_PARAMETERS)
        and not (config.tie_word_embeddings and name == "lm_head.weight")
    ]


def _stored(source: TensorSource) -> dict[str, dict[str, int]]:
    """How many tensors, numbers and bytes the files hold in each type, most bytes first."""
    kinds: dict[str, dict[str, int]] = {}
    for name in source.names():
        info = source.info(name)
        kind = kinds.setdefault(info.stored, {"tensors": 0, "parameters": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["parameters"] += math.prod(info.shape)
        kind["bytes"] += info.nbytes
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"]))


def _files(path: Path, source: TensorSource) -> list[dict[str, Any]]:
    """The preset's files and their sizes, the largest first."""
    found = {source.info(name).file for name in source.names()}
    if path.is_dir():
        found |= {file for file in path.iterdir() if file.is_file() and file.name[0] != "."}
    sized = [(file.name, file.stat().st_size) for file in found]
    ordered = sorted(sized, key=lambda item: (-item[1], item[0]))
    return [{"name": name, "bytes": size} for name, size in ordered]


def _rope(config: LlamaConfig) -> dict[str, Any]:
    return config.rope.to_hf()["rope_parameters"]


def _memory(
    config: LlamaConfig, weights: int, dtype: str, contexts: Sequence[int]
) -> dict[str, Any]:
    """Bytes of the weights and of the KV cache of one conversation."""
    size = BYTES.get(dtype, 4)
    a_token = 2 * config.num_hidden_layers * config.num_kv_heads * config.head_size * size
    lengths = contexts or [n for n in (4096,) if n < config.context_length] + [
        config.context_length
    ]
    return {
        "dtype": dtype,
        "weights_bytes": weights,
        "kv_cache_bytes_per_token": a_token,
        "contexts": [
            {"tokens": n, "kv_cache_bytes": n * a_token, "total_bytes": weights + n * a_token}
            for n in lengths
        ],
    }


def _template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What the chat template is, and what it does when tried."""
    templates = tokenizer.chat_templates
    if not templates:
        return None
    name = "default" if "default" in templates else next(iter(templates))
    source = templates[name]
    tools = templates.get("tool_use", source)
    return {
        "names": list(templates),
        "style": next((style for mark, style in _STYLES if mark in source), "its own"),
        "characters": len(source),
        "supports_system": _writes(tokenizer, source, [{"role": "system", "content": _PROBE}]),
        "supports_tools": _writes(tokenizer, tools, [], [_tool()]),
    }


def _writes(
    tokenizer: Tokenizer,
    source: str,
    before: list[dict[str, str]],
    tools: list[dict[str, Any]] | None = None,
) -> bool:
    """Whether the template puts a system message, or a tool, into the text."""
    try:
        text = ChatTemplate(source).render(
            [*before, {"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            tools=tools,
            bos_token=tokenizer.start_token or "",
            eos_token=tokenizer.end_token or "",
        )
    except TemplateError:
        return False
    return _PROBE in text


def _tool() -> dict[str, Any]:
    function = {
        "name": "probe",
        "description": _PROBE,
        "parameters": {"type": "object", "properties": {}, "required": []},
    }
    return {"type": "function", "function": function}


def _stop_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [{"id": i, "token": tokenizer.id_to_token(i)} for i in tokenizer.stop_token_ids]


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    kinds = {
        "byte_level": "byte-level BPE",
        "byte_fallback": "SentencePiece BPE with byte fallback",
    }
    kind = tokenizer._decoding.kind
    return {
        "kind": kinds.get(kind, "BPE"),
        "size": tokenizer.vocabulary_size(),
        "special_tokens": len(tokenizer.special_token_ids),
        "start_token": tokenizer.start_token,
        "adds_start_token": tokenizer.add_start_token,
    }


def tokenizer_or_reason(read: Any) -> tuple[Tokenizer | None, str | None]:
    """A tokenizer, or why there is none: a model may be looked into without one."""
    try:
        return read(), None
    except TokenizerError as error:
        return None, str(error)
