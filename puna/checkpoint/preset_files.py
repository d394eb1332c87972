"""What the files of a Hugging Face directory are called: a checkpoint's, and those beside it."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from puna.checkpoint.model_card import CARD
from puna.checkpoint.peft import WEIGHTS as ADAPTER_WEIGHTS
from puna.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from puna.checkpoint.readers import CONFIG, GENERATION_CONFIG, SETTINGS_FILE
from puna.checkpoint.safetensors import INDEX, SINGLE

WEIGHTS: tuple[str, ...] = (SINGLE, INDEX, "model-*-of-*.safetensors")
TOKENIZER: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
# What a save writes, and replaces: a reader would take an older file for a part of the newer model.
CHECKPOINT: tuple[str, ...] = (
    CONFIG,
    GENERATION_CONFIG,
    *WEIGHTS,
    *TOKENIZER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS[0],
    SETTINGS_FILE,
)
# What is published with a checkpoint if it is there.
BESIDE: tuple[str, ...] = (
    CARD,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.png",
    "*.svg",
    "*.jpg",
    "*.jpeg",
)


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether the path of a file, or the folder that it is in, is called as a pattern says.

    >>> matches("additional_chat_templates/tool_use.jinja", CHECKPOINT), matches(".a.png", BESIDE)
    (True, False)
    """
    first = name.split("/")[0]
    return not first.startswith(".") and any(fnmatch.fnmatchcase(first, p) for p in patterns)
