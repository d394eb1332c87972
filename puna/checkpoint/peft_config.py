"""PEFT's `adapter_config.json` for LoRA: which modules are adapted, and by how much.

Source: PEFT 0.21's `tuners/lora/config.py` and `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.checkpoint.json_file import read_json
from puna.errors import PresetError

CONFIG = "adapter_config.json"

# Fields that change the function unless they have one of these values.
_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "alora_invocation_string": (None, ""),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The others change the base's weights, or B's meaning, while the adapter is made: it fits only
    # the base that PEFT changes in the same way when it loads it. PEFT can convert such an adapter.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Fields that say nothing of the function of a trained adapter.
_IGNORED = frozenset(
    {
        "auto_mapping", "inference_mode", "peft_version", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_core",
        "qalora_group_size", "runtime_config", "parent_library",
        "fan_in_fan_out",  # PEFT takes it as false on a Linear, and a Llama has no other
    }
)  # fmt: skip
_HONOURED = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
        "use_dora", "lora_bias", "bias", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "modules_to_save",
        "trainable_token_indices", "ensure_weight_tying", "base_model_name_or_path", "revision",
    }
)  # fmt: skip

_MAX_PATTERN, _MAX_REPEATS = 4000, 6
_HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an `adapter_config.json` says, in its own words.

    Args:
        path: the file, for messages.
        r, lora_alpha: rank and strength where no pattern says otherwise.
        lora_dropout: share of the inputs that A did not see in training.
        rank_pattern, alpha_pattern: other ranks and strengths, by a module's name or the end of it,
            as regular expressions.
        use_rslora: the scale is alpha / √r instead of alpha / r.
        use_dora: rows have magnitudes of their own.
        lora_bias: B has a bias.
        bias: "none", "all" or "lora_only", the base's biases that were trained.
        target_modules: names or ends of names; or a regular expression, or "all-linear".
        exclude_modules: the same, of modules that are not adapted.
        layers_to_transform, layers_pattern: the only layers that are adapted.
        modules_to_save: ends of names of modules that were trained in full.
        token_indices: rows that were trained, by the end of an embedding's name.
        ensure_weight_tying: whether what is done to the embedding is done to a tied head too.
        base_model_name_or_path, revision: what the adapter was trained on.
    """

    path: Path
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """Read the file.

        Raises:
            PresetError: it is missing or malformed, or asks for what is not computed here.
        """
        values = read_json(path)
        for name, allowed in _REFUSED_UNLESS.items():
            if name in values and not any(
                values[name] is one or values[name] == one for one in allowed
            ):
                raise PresetError(
                    f"{path} has {name}={values[name]!r:.80}, which changes what the adapter "
                    f"computes; it is read with {' or '.join(map(repr, allowed))}: merge it with "
                    "PEFT's merge_and_unload, or save it as plain LoRA"
                )
        unknown = sorted(set(values) - set(_REFUSED_UNLESS) - _IGNORED - _HONOURED)
        if unknown:
            warnings.warn(
                f"{path} has fields that Puna does not know and ignores: {', '.join(unknown)}",
                stacklevel=2,
            )
        return _Reader(values, path).config()

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        """The strength of a module's adapter."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """What B @ A is multiplied by."""
        rank, alpha = self.rank(module), self.alpha(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a module of the base."""
        if self._matches(self.exclude_modules, module) or self.saves(module):
            return False
        if self.target_modules == "all-linear":
            return module != _HEAD and module.endswith("_proj")
        if self.target_modules is None:  # PEFT's choice for a Llama
            return module.endswith((".q_proj", ".v_proj"))
        if not self._matches(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        names = "|".join(f"(?:{pattern})" for pattern in self.layers_pattern) or r"[^.]*"
        layer = re.match(rf"(?:.*?\.)??(?:{names})\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether a module was trained in full."""
        return module.endswith(self.modules_to_save) if self.modules_to_save else False

    def trained_tokens(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that were trained, or None."""
        for name, indices in self.token_indices.items():
            if module == name or module.endswith(f".{name}"):
                return indices
        return None

    @staticmethod
    def _matches(names: str | tuple[str, ...] | None, module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names or ())


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class _Reader:
    """The values of the file, looked up with types."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path

    def config(self) -> AdapterConfig:
        bias = self.values.get("bias") or "none"
        if bias not in ("none", "all", "lora_only"):
            raise self.wrong("bias", '"none", "all" or "lora_only"')
        return AdapterConfig(
            path=self.path,
            r=self.number("r", self.values.get("r", 8), int),
            lora_alpha=self.number("lora_alpha", self.values.get("lora_alpha", 8)),
            lora_dropout=self.share("lora_dropout"),
            rank_pattern=self.patterns("rank_pattern", int),
            alpha_pattern=self.patterns("alpha_pattern"),
            use_rslora=self.flag("use_rslora"),
            use_dora=self.flag("use_dora"),
            lora_bias=self.flag("lora_bias"),
            bias=bias,
            target_modules=self.modules("target_modules"),
            exclude_modules=self.modules("exclude_modules"),
            layers_to_transform=self.integers("layers_to_transform"),
            layers_pattern=self.expressions("layers_pattern"),
            modules_to_save=self.strings("modules_to_save"),
            token_indices=self.tokens(),
            ensure_weight_tying=self.flag("ensure_weight_tying"),
            base_model_name_or_path=self.text("base_model_name_or_path"),
            revision=self.text("revision"),
        )

    def wrong(self, name: str, expected: str) -> PresetError:
        return PresetError(
            f"{self.path} has {name}={self.values.get(name)!r:.80}, expected {expected}; "
            "fetch the adapter again"
        )

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value not in (None, False, True):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string or null")
        return value or None

    def number(self, name: str, value: Any, kind: type = float) -> Any:
        is_number = type(value) is int or (kind is float and type(value) is float)
        if not is_number or not 0 < value < 2**31:
            raise self.wrong(name, "a number above 0")
        return value

    def share(self, name: str) -> float:
        value = self.values.get(name) or 0.0
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.wrong(name, "a number from 0 to below 1")
        return float(value)

    def patterns(self, name: str, kind: type = float) -> dict[str, Any]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object of numbers")
        return {
            self.expression(name, pattern): self.number(name, number, kind)
            for pattern, number in value.items()
        }

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "strings")
        return tuple(value)

    def expressions(self, name: str) -> tuple[str, ...]:
        return tuple(self.expression(name, item) for item in self.strings(name))

    def modules(self, name: str) -> str | tuple[str, ...] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            return value if value == "all-linear" else self.expression(name, value)
        return self.strings(name)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        value = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < 2**31 for item in value):
            raise self.wrong(name, "whole numbers")
        return tuple(value)

    def tokens(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value = self.values.get(name)
        named = (
            value if isinstance(value, dict) else {} if value is None else {"embed_tokens": value}
        )
        return {
            module: _Reader({name: indices}, self.path).integers(name)
            for module, indices in named.items()
        }

    def expression(self, name: str, pattern: str) -> str:
        """A regular expression that cannot take forever: no repeat in a repeat, and few of them."""
        is_slow = len(pattern) > _MAX_PATTERN or _repeats(pattern) > _MAX_REPEATS
        try:
            if not is_slow:
                re.compile(pattern)
                return pattern
            why = f"it is too long, or repeats in a repeat or more than {_MAX_REPEATS} times"
        except (re.error, RecursionError, OverflowError) as error:
            why = str(error)
        raise PresetError(
            f"{self.path} has the pattern {pattern!r:.200} in {name}, which is not matched "
            f"({why}); write the modules out"
        )


def _repeats(pattern: str) -> int:
    """How many unbounded repeats a pattern has; as good as infinite where they are nested."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    counts = [0]
    for place, character in enumerate(plain):
        if character == "(":
            counts.append(0)
        elif character == ")" and len(counts) > 1:
            inner = counts.pop()
            repeated = plain[place + 1 : place + 2] in ("*", "+", "{")
            counts[-1] += _MAX_REPEATS + 1 if inner and repeated else inner
        elif character in "*+{":
            counts[-1] += 1
    return sum(counts)
