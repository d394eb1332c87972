"""The rules of a layout map: which of them says where a variable lies."""

from __future__ import annotations

import re
from typing import Any

from puna.errors import ConfigError

# What is in keras-hub's rules, and the rule of ours that means the same.
_KERAS_HUB = {
    "reverse_embeddings": '".*lm_head/weight": ("model", None)',
    "token_embedding": '".*embed_tokens/weight": ("model", None)',
    "attention_output": '".*self_attn/o_proj/weight": (None, "model")',
    "query|key|value": '".*self_attn/(q|k|v)_proj/weight": ("model", None)',
    "output_dense": '".*mlp/down_proj/weight": (None, "model")',
    "gate_dense|intermediate_dense|feedforward": '".*mlp/(gate|up)_proj/weight": ("model", None)',
    "kernel": '".*/weight": (axis of outputs, axis of inputs)',
}


class Rules:
    """The rules of a layout map, looked up by paths of variables.

    A rule that says something of a whole path goes before one whose pattern is only found in it.

    Args:
        layouts: a `keras.distribution.LayoutMap`.
    """

    def __init__(self, layouts: Any):
        self._axes = {key: tuple(layouts[key].axes) for key in layouts}

    def of(self, path: str, rank: int) -> tuple[str | None, ...] | None:
        """The axes for a variable; None if no rule says any.

        Raises:
            ConfigError: several rules do, or the rule is for another number of axes.
        """
        for match in (re.fullmatch, re.search):
            keys = [path] if path in self._axes else []
            keys = keys or [key for key in self._axes if match(key, path)]
            if keys:
                break
        else:
            return None
        if len(keys) > 1:
            raise ConfigError(
                f"the layout map has {len(keys)} rules for {path}: {', '.join(map(repr, keys))}; "
                "expected one: make the patterns narrower"
            )
        axes = self._axes[keys[0]]
        if len(axes) != rank:
            self._refuse_keras_hub(keys[0])
            raise ConfigError(
                f"layout_map[{keys[0]!r}] is {axes}, and {path} has {rank} axes; expected as many: "
                "matrices are (out, in)"
            )
        return axes

    def unused(self, model: Any) -> list[str]:
        """The rules that say nothing of a model's variables, nor of a head's or an adapter's.

        Raises:
            ConfigError: one of them is in keras-hub's words.
        """
        layers = model.matrices().values()
        paths = {variable.path for variable in model.variables} | {"lm_head/weight"}
        paths |= {f"{layer.path or layer.name}/weight" for layer in layers}
        found = [k for k in self._axes if not any(re.search(k, path) for path in paths)]
        for key in found:
            self._refuse_keras_hub(key)
        return [key for key in found if "lora_" not in key]

    def _refuse_keras_hub(self, key: str) -> None:
        axes = self._axes[key]
        ours = [rule for words, rule in _KERAS_HUB.items() if re.search(words, key)]
        if ours and (len(axes) > 2 or "kernel" in key or "embeddings" in key):
            raise ConfigError(
                f"layout_map[{key!r}] = {axes} is a rule for keras-hub's variables. Puna's have "
                f"Hugging Face's names and the shape (out, in): write {ours[0]}, or take "
                "Llama3Backbone.get_layout_map(device_mesh), which has all of them"
            )
