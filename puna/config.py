"""What a Llama is: the fields of `config.json` that change the function it computes.

`LlamaConfig` is read from and written to Hugging Face's `config.json` (the layouts of transformers
4 and 5). A field that we do not know is warned of once; a field that asks for what we do not
compute raises by name, so that a checkpoint never runs as something else than what it is.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puna.errors import ConfigError
from puna.rope import RopeConfig

# What `hidden_act` may say, under the names that checkpoints use.
ACTIVATIONS = frozenset(
    {
        "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python",
        "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "mish", "sigmoid", "tanh", "linear",
    }
)  # fmt: skip

# Fields of config.json that do not change what we compute. Each reason is for the reader.
IGNORED_FIELDS: dict[str, str] = {
    "_name_or_path": "where transformers last loaded it from",
    "architectures": "checked by model_type",
    "attn_implementation": "chosen by the backend",
    "auto_map": "names Python code; we run none",
    "chunk_size_feed_forward": "trades memory for speed, same function",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "num_labels": "for classifiers",
    "output_attentions": "what transformers returns besides the logits",
    "output_hidden_states": "what transformers returns besides the logits",
    "pretraining_tp": "splits a product into parts, same function",
    "problem_type": "for classifiers",
    "return_dict": "how transformers returns its outputs",
    "return_dict_in_generate": "how transformers returns its outputs",
    "task_specific_params": "defaults of pipelines",
    "tokenizer_class": "the tokenizer's files say it",
    "torchscript": "an export setting",
    "transformers_version": "who wrote the file",
    "transformers.js_config": "for another runtime",
    "unsloth_fixed": "a mark of another tool",
    "unsloth_version": "a mark of another tool",
    "use_cache": "generate always uses a cache, a plain call never",
    "is_llama_config": "a mark of another tool",
    "rope_interleaved": "read by no Llama code; weights are half-split",
    "original_max_position_embeddings": "read into the RoPE settings",
    "rope_theta": "read into the RoPE settings",
    "rope_scaling": "read into the RoPE settings",
    "rope_parameters": "read into the RoPE settings",
    "torch_dtype": "read into dtype",
    "model_type": "checked",
}

# Fields that change the function when they differ from the value given here.
_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
}

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama and the constants of its layers, in `config.json`'s words.

    Args:
        vocab_size: rows of the embedding, V.
        hidden_size: model width, D.
        intermediate_size: feed-forward width, F.
        num_hidden_layers: blocks, L.
        num_attention_heads: query heads, N.
        num_key_value_heads: key and value heads, K; None means N.
        head_dim: head size, H; None means D / N.
        hidden_act: the gate's activation, a name that `transformers` knows.
        max_position_embeddings: the context that the model was made for, in tokens.
        rms_norm_eps: added to the mean square in every norm.
        rope: the rotary embedding's settings.
        tie_word_embeddings: whether the head is the embedding.
        attention_bias: whether q, k, v and o have biases.
        mlp_bias: whether gate, up and down have biases.
        attention_dropout: share of attention weights dropped while training.
        initializer_range: standard deviation of freshly made weights.
        bos_token_id, eos_token_id, pad_token_id: as in the file; several eos ids are a tuple.
        dtype: the checkpoint's dtype, or None where the file does not say.

    Raises:
        ConfigError: where the numbers do not fit each other.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            self._check_positive("hidden_size", "num_attention_heads")
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._check()

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, K, always a number."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Head size, H, always a number."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The longest sequence that the model takes, in tokens, its RoPE scaling counted in."""
        return self.rope.context_length(self.max_position_embeddings)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence, as a tuple."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """The configuration that a Hugging Face `config.json` describes.

        Args:
            hf: the parsed file, in the layout of transformers 4 (`rope_theta`, `rope_scaling`,
                `torch_dtype`) or 5 (`rope_parameters`, `dtype`).

        Raises:
            ConfigError: where the file is not of a Llama, or asks for what we do not compute.

        >>> LlamaConfig.from_hf({"model_type": "llama", "rms_norm_eps": 1e-5}).rms_norm_eps
        1e-05
        """
        model_type = hf.get("model_type", "llama")
        if model_type != "llama":
            raise ConfigError(f"config.json has model_type {model_type!r}; Puna reads 'llama' only")
        _refuse_unsupported(hf)
        names = {f.name for f in dataclasses.fields(cls)} - {"rope", "dtype"}
        kwargs = {name: hf[name] for name in names if name in hf and hf[name] is not None}
        kwargs |= {
            name: None
            for name in ("bos_token_id", "eos_token_id")
            if name in hf and hf[name] is None
        }
        dtype = hf.get("dtype") or hf.get("torch_dtype")
        max_positions = kwargs.get("max_position_embeddings", cls.max_position_embeddings)
        return cls(
            **kwargs,
            rope=RopeConfig.from_hf(hf, max_position_embeddings=max_positions),
            dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
        )

    def to_hf(self) -> dict[str, Any]:
        """The configuration as `config.json` holds it, readable by transformers 4 and 5."""
        fields = dataclasses.asdict(self)
        del fields["rope"]
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        if fields["dtype"] is None:
            del fields["dtype"]
        else:
            fields["torch_dtype"] = fields["dtype"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            **self.rope.to_hf(),
            "use_cache": True,
        }

    @classmethod
    def from_keras_hub(
        cls,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_key_value_heads: int,
        rope_max_wavelength: float = 10000,
        rope_position_scaling_factor: float = 1.0,
        rope_frequency_adjustment_factor: float | None = None,
        rope_low_freq_factor: float | None = None,
        rope_high_freq_factor: float | None = None,
        rope_pretraining_sequence_length: int | None = None,
        layer_norm_epsilon: float = 1e-6,
        dropout: float = 0,
        tie_word_embeddings: bool = False,
    ) -> LlamaConfig:
        """The configuration that keras-hub's `Llama3Backbone` arguments describe.

        The arguments are keras-hub's (0.32); `rope_position_scaling_factor` above 1 is linear
        scaling, `rope_frequency_adjustment_factor` Llama 3.1's.
        """
        rope = RopeConfig.from_keras_hub(
            theta=rope_max_wavelength,
            position_scaling_factor=rope_position_scaling_factor,
            frequency_adjustment_factor=rope_frequency_adjustment_factor,
            low_freq_factor=rope_low_freq_factor,
            high_freq_factor=rope_high_freq_factor,
            pretraining_sequence_length=rope_pretraining_sequence_length,
        )
        # keras-hub knows no context length; Llama 3's is the smallest that never refuses.
        return cls(
            vocab_size=vocabulary_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_query_heads,
            hidden_size=hidden_dim,
            intermediate_size=intermediate_dim,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=131072,
            rms_norm_eps=layer_norm_epsilon,
            attention_dropout=dropout,
            tie_word_embeddings=tie_word_embeddings,
            rope=rope,
        )

    def _check(self):
        self._check_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        )  # fmt: skip
        if self.num_attention_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is not known; known: {sorted(ACTIVATIONS)}"
            )
        for name in ("rms_norm_eps", "attention_dropout", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; expected a number")
        if not self.rms_norm_eps >= 0 or math.isinf(self.rms_norm_eps):
            raise ConfigError(f"rms_norm_eps {self.rms_norm_eps} is not a number ≥ 0")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout {self.attention_dropout} is not in [0, 1)")
        if not 0 <= self.initializer_range <= 1:
            raise ConfigError(f"initializer_range {self.initializer_range} is not in [0, 1]")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; known: {sorted(_DTYPES)}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false")
        for name in ("bos_token_id", "pad_token_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_token_ids:
            self._check_token("eos_token_id", token)

    def _check_token(self, name: str, token: Any):
        # A pad or eos id of -1, or one past the vocabulary, is how some files say "none"; no
        # embedding is ever looked up for it, so only the type is checked.
        if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
            raise ConfigError(f"{name} is {token!r}; expected a whole number or null")

    def _check_positive(self, *names: str):
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ConfigError(f"{name} is {value!r:.80}; expected a whole number above 0")


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Raise for fields that ask for another function, and warn once of those that nobody knows."""
    known = {f.name for f in dataclasses.fields(LlamaConfig)}
    unknown = []
    for name, value in hf.items():
        allowed = _REFUSED_UNLESS.get(name)
        if allowed is not None and value not in allowed:
            raise ConfigError(
                f"config.json has {name}={value!r}, which changes what the model computes; "
                f"Puna computes it only with {' or '.join(map(repr, allowed))}"
            )
        if allowed is None and name not in known and name not in IGNORED_FIELDS:
            unknown.append(name)
    if unknown:
        warnings.warn(
            "config.json has fields that Puna does not know and ignores: "
            + ", ".join(name if name.isprintable() else repr(name) for name in unknown),
            stacklevel=3,
        )
