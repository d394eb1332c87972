"""A Hugging Face config from the metadata of a GGUF file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from puna.checkpoint.source import TensorSource
from puna.errors import PresetError

# Metadata that would change the function: only these values, which do nothing, are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# Metadata that is honoured below, or says nothing of the function.
_KNOWN = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "tensor_data_layout",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Metadata:
    """The metadata of a GGUF file of architecture "llama", looked up with types.

    Args:
        values: all key-value pairs.
        where: the file, for messages.

    Raises:
        PresetError: the architecture is another.
    """

    def __init__(self, values: Mapping[str, Any], where: object) -> None:
        self.values = values
        self.where = where
        architecture = values.get("general.architecture")
        if architecture != "llama":
            raise PresetError(
                f"{where}: the architecture is {architecture!r:.80}, expected 'llama'; only models "
                "of the Llama architecture can be loaded"
            )

    def has(self, key: str) -> bool:
        """Whether there is a value for `llama.<key>`."""
        return f"llama.{key}" in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1; a list of the same one for each layer is taken as one."""
        value = self.values.get(f"llama.{key}", default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(
                f"llama.{key}", value, "a whole number from 1, the same in all layers"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(f"llama.{key}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(f"llama.{key}", value, "a positive number")
        return float(value)

    def token(self, key: str) -> int | None:
        """The id of a special token, if there is one."""
        value = self.values.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (type(value) is not int or value < 0):
            raise self._wrong(f"tokenizer.ggml.{key}_token_id", value, "a token's id")
        return value

    def check_function(self) -> None:
        """Refuse metadata that asks for another function, and warn of what is not known.

        Raises:
            PresetError: a value asks for what the Llama architecture here does not compute.
        """
        unknown: list[str] = []
        for full, value in self.values.items():
            if not full.startswith("llama."):
                continue
            key = full.removeprefix("llama.")
            if key in _NEUTRAL:
                if value not in _NEUTRAL[key]:
                    raise self._wrong(full, value, f"one of {_NEUTRAL[key]}, which change nothing")
            elif key not in _KNOWN:
                unknown.append(full)
        if unknown:
            warnings.warn(
                f"{self.where}: metadata not known and not used: {', '.join(unknown)}", stacklevel=4
            )

    def _wrong(self, key: str, value: Any, expected: str) -> PresetError:
        found = "is missing" if value is None else f"is {value!r:.80}"
        return PresetError(
            f"{self.where}: {key} {found}, expected {expected}; use another file of this model"
        )


def hf_config(
    values: Mapping[str, Any],
    source: TensorSource,
    rope_freqs: np.ndarray | None,
    where: object,
) -> dict[str, Any]:
    """A `config.json` as transformers 4 writes it, for a GGUF file of architecture "llama".

    Args:
        values: the file's metadata.
        source: its tensors, for what only their names and shapes tell.
        rope_freqs: the divisors of the rotary frequencies, `(head_dim / 2,)` float32, if any.
        where: the file, for messages.

    Raises:
        PresetError: a field is missing, or asks for what is not computed here.
    """
    meta = Metadata(values, where)
    meta.check_function()
    names = source.names()
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := meta.integer(key, head_dim)) != head_dim:
            raise PresetError(
                f"{where}: llama.{key} is {other} and the heads are {head_dim} wide; expected the "
                "same: this model is not of the plain Llama architecture"
            )
    embedding = "model.embed_tokens.weight"
    if embedding not in names:
        raise PresetError(f"{where}: the tensor token_embd.weight is missing; fetch the file again")
    ends = [meta.token(key) for key in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(token for token in ends if token is not None))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": source.info(embedding).shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, rope_freqs, head_dim),
        "attention_bias": any(".self_attn." in n and n.endswith(".bias") for n in names),
        "mlp_bias": any(".mlp." in n and n.endswith(".bias") for n in names),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": meta.token("bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": meta.token("padding"),
        "torch_dtype": _torch_dtype(source),
    }


def _torch_dtype(source: TensorSource) -> str:
    """The one type of all matrices if it is a float16 or bfloat16, else float32."""
    infos = [source.info(name) for name in source.names()]
    stored = {info.stored for info in infos if len(info.shape) > 1}
    return _TORCH.get(stored.pop(), "float32") if len(stored) == 1 else "float32"


def _rope_scaling(
    meta: Metadata, divisors: np.ndarray | None, head_dim: int
) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 has it, or None."""
    kind = meta.values.get("llama.rope.scaling.type", "none")
    linear = "rope.scaling.factor"
    if meta.has("rope.scale_linear") and not meta.has("rope.scaling.type"):  # before 2023-10
        kind, linear = "linear", "rope.scale_linear"
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": meta.number(linear)}
        return _alone(scaling, meta, divisors)
    if kind == "yarn":
        original = meta.integer(
            "rope.scaling.original_context_length", meta.integer("context_length")
        )
        scaling = {
            "rope_type": "yarn",
            "factor": meta.number("rope.scaling.factor"),
            "original_max_position_embeddings": original,
            "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
        }
        return _alone(scaling, meta, divisors)
    if kind != "none":
        raise PresetError(
            f"{meta.where}: llama.rope.scaling.type is {kind!r:.80}, expected none, linear or "
            "yarn; use another file of this model"
        )
    if divisors is None:
        return None
    return _llama3_scaling(meta, divisors.astype(np.float64), head_dim)


def _alone(scaling: dict[str, Any], meta: Metadata, divisors: np.ndarray | None) -> dict[str, Any]:
    """Refuse a second scaling on top of the first."""
    if divisors is not None and np.any(divisors != 1):
        raise PresetError(
            f"{meta.where}: rope scaling {scaling['rope_type']!r} and the tensor rope_freqs.weight "
            "are both there; expected one: use another file of this model"
        )
    return scaling


def _llama3_scaling(meta: Metadata, divisors: np.ndarray, head_dim: int) -> dict[str, Any] | None:
    """The llama3 parameters that give these divisors, which are all that a GGUF file keeps.

    Meta's values are tried first (factor 8 for 3.1, 32 for 3.2, trained at 8192); then any factor
    and any power of two. Two that pass give the same function on every frequency of the model.
    """
    if divisors.shape == (head_dim // 2,) and np.all(np.isfinite(divisors)):
        if np.all(divisors == 1):
            return None
        frequencies = meta.number("rope.freq_base", 10000.0) ** (
            -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        )
        largest = float(f"{divisors.max():.4g}")
        for original in (8192, *(2**i for i in range(4, 21))):
            for factor in (8.0, 32.0, largest):
                if np.allclose(_divisors(frequencies, factor, original), divisors, 1e-5, 0):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": original,
                    }
    raise PresetError(
        f"{meta.where}: no llama3 rope scaling (low 1, high 4) gives the divisors in "
        f"rope_freqs.weight, {divisors.shape} from {divisors.min(initial=np.inf):.6g} to "
        f"{divisors.max(initial=-np.inf):.6g}, to 1e-5; load this model from safetensors, whose "
        "config.json has the parameters"
    )


def _divisors(frequencies: np.ndarray, factor: float, original: int) -> np.ndarray:
    """What llama3 scaling with low 1 and high 4 divides each frequency by.

    Source: `apply_scaling` in Meta's llama-models package.
    """
    turns = original * frequencies / (2 * np.pi)  # whole turns within the trained context
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
