"""A Hugging Face config from Meta's `params.json`.

Source: Meta's `llama_models/llama3/{args,model}.py` (version 0.3.0 of `llama-models`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.checkpoint.json_file import read_json
from puna.errors import PresetError
from puna.text.tiktoken import is_tiktoken_file

# What Meta's code computes where `use_scaled_rope` is set, whatever the model: no file says it.
_SCALED_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (dim, n_layers) of Llama 3.2's text models, which Hugging Face runs with a factor of 32.
_LLAMA_3_2 = {(2048, 16), (3072, 28)}

# Of another function; any value is refused.
_REFUSED = (
    "quantization_args", "lora_args", "vision_model", "vision_chunk_size", "moe_args", "qk_norm",
    "use_qk_norm", "nope_layer_interval", "attention_chunk_size", "sliding_window",
)  # fmt: skip
# How Meta's program allocates, and what it does not read itself.
_IGNORED = ("max_batch_size", "max_seq_len", "model_parallel_size", "vision_max_num_chunks")


@dataclass(frozen=True, kw_only=True)
class Params:
    """What `params.json` says, with the defaults of Meta's code.

    Args:
        path: the file, for messages.
        dim, n_layers, n_heads, n_kv_heads: width, blocks, query heads, key and value heads.
        vocab_size: -1 where only the weights tell.
        multiple_of, ffn_dim_multiplier: they give the feed-forward width.
        norm_eps: added to the mean square in every norm.
        rope_theta: the base of the frequencies; files without it are of Llama 1 and 2: 10,000.
        use_scaled_rope: whether Llama 3.1's scaling is on.
        rope_scaling_factor: its factor, where another than Meta's code has is wanted.
    """

    path: Path
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None

    @classmethod
    def read(cls, path: Path) -> Params:
        """Read the file.

        Raises:
            PresetError: it is missing or malformed, or asks for what is not computed here.
        """
        values = read_json(path)
        for name in _REFUSED:
            if values.get(name):
                raise PresetError(
                    f"{path} has {name}={values[name]!r:.80}, which changes what the model "
                    "computes, and which is not read; expected a plain text model"
                )
        kwargs: dict[str, Any] = {}
        for name, kind in _KINDS.items():
            value = values.get(name)
            if value is None:
                continue
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise PresetError(
                    f"{path} has {name}={value!r:.80}, expected a {kind.__name__}; fetch it again"
                )
            kwargs[name] = value
        unknown = sorted(set(values) - set(_KINDS) - set(_REFUSED) - set(_IGNORED))
        if unknown:
            warnings.warn(
                f"{path} has fields that Puna does not know and ignores: {', '.join(unknown)}",
                stacklevel=2,
            )
        kwargs.setdefault("n_kv_heads", kwargs.get("n_heads", cls.n_heads))
        params = cls(path=path, **kwargs)
        params._check()
        return params

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.dim // self.n_heads

    @property
    def intermediate_size(self) -> int:
        """The feed-forward width: two thirds of 4 * dim, times the multiplier, rounded up."""
        size = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            size = int(self.ffn_dim_multiplier * size)
        return -(-size // self.multiple_of) * self.multiple_of

    def hf_config(self, *, vocab_size: int, dtype: str, is_tied: bool) -> dict[str, Any]:
        """The model's `config.json` as transformers 4 would have written it.

        Args:
            vocab_size: rows of the embedding, which must be what the file says, if it says it.
            dtype: the embedding's.
            is_tied: whether the head is the embedding.

        Raises:
            PresetError: the sizes differ.
        """
        if self.vocab_size > 0 and vocab_size != self.vocab_size:
            raise PresetError(
                f"{self.path} has vocab_size {self.vocab_size}, and the embedding has {vocab_size} "
                "rows; they are of different models: fetch them together again"
            )
        bos, eos = self._token_ids()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "hidden_size": self.dim,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "max_position_embeddings": self._context(),
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": is_tied,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "torch_dtype": dtype,
        }

    def _check(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
        }
        for name, value in sizes.items():
            if not 0 < value < 2**31:
                raise PresetError(f"{self.path} has {name}={value}, expected a number above 0")
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise PresetError(
                f"{self.path} has dim={self.dim}, n_heads={self.n_heads} and n_kv_heads="
                f"{self.n_kv_heads}; expected each to be a multiple of the next"
            )
        multiplier = self.ffn_dim_multiplier
        if multiplier is not None and not 0 < multiplier < 1e6:
            raise PresetError(
                f"{self.path} has ffn_dim_multiplier={multiplier}, expected a number above 0"
            )

    def _rope_scaling(self) -> dict[str, Any] | None:
        if not self.use_scaled_rope:
            return None
        if self.rope_scaling_factor is not None:
            return _SCALED_ROPE | {"factor": float(self.rope_scaling_factor)}
        if (self.dim, self.n_layers) in _LLAMA_3_2:
            warnings.warn(
                f"{self.path} does not say the factor of its RoPE scaling, and Meta's code "
                "computes 8, but Hugging Face's Llama 3.2 of this shape 32; 8 is used: write "
                '"rope_scaling_factor": 32 into the file for the other',
                stacklevel=2,
            )
        return dict(_SCALED_ROPE)

    def _context(self) -> int:
        """The context that each generation of Llama was made for, told by its RoPE and epsilon."""
        if self.use_scaled_rope:
            return 131072
        if self.rope_theta >= 1e6:  # Code Llama
            return 16384
        if self.rope_theta > 1e4:
            return 8192
        return 2048 if self.norm_eps < 1e-5 else 4096  # Llama 1 and 2

    def _token_ids(self) -> tuple[int, int]:
        """Where a text begins and ends: Llama 3 has it after the ranks, the others first."""
        tokenizer = self.path.with_name("tokenizer.model")
        if not tokenizer.is_file() or not is_tiktoken_file(tokenizer):
            return 1, 2
        ranks = sum(1 for line in tokenizer.read_bytes().splitlines() if line)
        return ranks, ranks + 1


_KINDS: dict[str, type] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "use_scaled_rope": bool,
    "rope_scaling_factor": float,
}
