"""Rotary position embedding: how far each pair of features turns per position.

The settings and the frequencies, in NumPy, with no Keras: `layers/rope.py` applies them.
Sources: RoPE, Su et al. 2021 (arXiv:2104.09864); dynamic NTK and YaRN, Peng et al. 2023
(arXiv:2309.00071); Llama 3.1's scaling, Meta's reference code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.errors import ConfigError

# The settings of each type besides `rope_theta` and `rope_type`: required, then optional.
_SETTINGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {
                "factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings",
            }
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset(
            {
                "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The settings of the rotary embedding, in the words of `config.json`.

    Args:
        rope_type: "default", "linear", "dynamic", "llama3" or "yarn".
        rope_theta: the base of the frequencies.
        factor: how many times longer the context is meant to be than in pre-training.
        low_freq_factor, high_freq_factor: the bounds of llama3's band, in turns per context.
        original_max_position_embeddings: the context of pre-training, in tokens (llama3, yarn).
        attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: YaRN's.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in _SETTINGS:
            raise ConfigError(
                f"RoPE type {self.rope_type!r} is not known; known: {sorted(_SETTINGS)}"
            )
        self._check_types()
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}; expected a number above 0")
        required, optional = _SETTINGS[self.rope_type]
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        given -= {"rope_type", "rope_theta"}
        if missing := sorted(required - given):
            raise ConfigError(f"RoPE type {self.rope_type!r} lacks {', '.join(missing)}")
        if foreign := sorted(given - required - optional):
            raise ConfigError(f"RoPE type {self.rope_type!r} does not take {', '.join(foreign)}")
        if self.factor is not None and not self.factor > 0:
            raise ConfigError(f"the RoPE factor is {self.factor!r}; expected a number above 0")
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError("RoPE's low_freq_factor equals high_freq_factor; expected a band")
        self._check_computes()

    def _check_types(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "rope_type" or value is None:
                continue
            is_bool = isinstance(value, bool)
            if field.name == "truncate" and not is_bool:
                raise ConfigError(f"RoPE's truncate is {value!r}; expected true or false")
            if field.name != "truncate" and (is_bool or not isinstance(value, int | float)):
                raise ConfigError(f"RoPE's {field.name} is {value!r:.80}; expected a number")
            if not 0 <= value < 1e30:  # neither NaN nor what float32 cannot hold
                raise ConfigError(f"RoPE's {field.name} is {value!r:.80}; expected 0 to 1e30")

    def _check_computes(self):
        """Refuse numbers that are fine one by one, and together divide by zero or overflow."""
        try:
            with np.errstate(all="ignore"):
                numbers = [*self.inverse_frequencies(8), self.attention_scaling]
            fits = bool(np.isfinite(numbers).all()) and self.context_length(1) > 0
        except (ArithmeticError, ValueError):
            fits = False
        if not fits:
            given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
            raise ConfigError(f"the RoPE settings {given!r:.300} give no finite frequencies")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, max_position_embeddings: int) -> RopeConfig:
        """Read transformers 5's `rope_parameters`, or 4's `rope_theta` and `rope_scaling`.

        Args:
            hf: the parsed `config.json`.
            max_position_embeddings: stands in for a missing pre-training context, in tokens.

        Raises:
            ConfigError: for a type or a setting that we do not compute.
        """
        given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"the RoPE settings are {given!r:.80}; expected an object")
        settings = dict(given)
        old_name = settings.pop("type", None)
        settings.setdefault("rope_type", old_name or "default")
        settings.setdefault("rope_theta", hf.get("rope_theta") or cls.rope_theta)
        if settings.pop("partial_rotary_factor", None) not in (None, 1.0):
            raise ConfigError("partial_rotary_factor: a Llama rotates every feature of a head")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(f"unknown RoPE settings: {unknown!r:.300}")
        if settings["rope_type"] in ("llama3", "yarn"):
            outer = hf.get("original_max_position_embeddings")
            inner = settings.get("original_max_position_embeddings")
            settings["original_max_position_embeddings"] = outer or inner or max_position_embeddings
        return cls(**settings)

    @classmethod
    def from_keras_hub(
        cls,
        *,
        theta: float,
        position_scaling_factor: float,
        frequency_adjustment_factor: float | None,
        low_freq_factor: float | None,
        high_freq_factor: float | None,
        pretraining_sequence_length: int | None,
    ) -> RopeConfig:
        """The settings that keras-hub's `rope_*` arguments describe."""
        numbers = (int, float)  # what is none is refused below, where it is named
        theta = float(theta) if type(theta) in numbers and theta < 1e30 else theta
        if frequency_adjustment_factor is None:
            if position_scaling_factor == 1.0:
                return cls(rope_theta=theta)
            return cls(rope_type="linear", rope_theta=theta, factor=position_scaling_factor)
        if position_scaling_factor != 1.0:
            raise ConfigError(
                "rope_position_scaling_factor and rope_frequency_adjustment_factor are both set; "
                "expected one kind of scaling"
            )
        return cls(
            rope_type="llama3",
            rope_theta=theta,
            factor=frequency_adjustment_factor,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            original_max_position_embeddings=pretraining_sequence_length,
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of `config.json`, in the layouts of both transformers 4 and 5."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        scaling = {k: v for k, v in given.items() if k != "rope_theta"}
        return {
            "rope_parameters": given,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_type == "default" else scaling,
        }

    def context_length(self, max_position_embeddings: int) -> int:
        """The longest sequence that these settings serve, in tokens.

        Linear and dynamic scaling stretch the context that the file names; the files of llama3
        and YaRN models name the stretched one, or YaRN's pre-training context beside the factor.
        """
        factor = self.factor or 1.0
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * max(factor, 1.0))
        if self.rope_type == "yarn":
            original = self.original_max_position_embeddings or max_position_embeddings
            return max(max_position_embeddings, int(original * factor))
        return max_position_embeddings

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by; 1 but for YaRN."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or 1.0
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(factor, self.mscale) / _yarn_mscale(factor, self.mscale_all_dim)
        return _yarn_mscale(factor, 1.0)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of features.

        Args:
            head_dim: head size, H.

        Returns:
            float32 [H / 2]. For "dynamic", those of a context within the model's own; longer ones
            are stretched by `layers/rope.py`, which knows the length.
        """
        # Rounded to float32 where the code that models were trained with rounds: the exact numbers
        # are another angle at position 6,000, by enough to show in the logits. NumPy's power
        # of float32 is another one where there is AVX-512, so one of float64 is rounded.
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = np.float64(np.float32(self.rope_theta)) ** exponents.astype(np.float64)
        frequencies = 1 / powers.astype(np.float32)
        return self._scaled(frequencies, head_dim).astype(np.float32)

    def _scaled(self, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
        if self.rope_type == "linear":
            return frequencies / (self.factor or 1.0)
        if self.rope_type == "llama3":
            return self._llama3(frequencies)
        if self.rope_type == "yarn":
            return self._yarn(frequencies, head_dim)
        return frequencies

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        """Slow the pairs that turn fewer than `low_freq_factor` times, and ramp to the others."""
        low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
        turns = (self.original_max_position_embeddings or 0) / (2 * math.pi / frequencies)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - keep) * frequencies / (self.factor or 1.0) + keep * frequencies

    def _yarn(self, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
        """Keep the pairs that turn often, slow those that do not, and ramp between (section 3)."""
        original = self.original_max_position_embeddings or 0

        def pair_that_turns(times: float) -> float:
            return (
                head_dim
                * math.log(original / (times * 2 * math.pi))
                / (2 * math.log(self.rope_theta))
            )

        first = pair_that_turns(self.beta_fast or 32)
        last = pair_that_turns(self.beta_slow or 1)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = (last - first) or 0.001  # the reference avoids a division by zero in this way
        slow = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0.0, 1.0)
        return frequencies * (1 - slow) + frequencies / (self.factor or 1.0) * slow


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
