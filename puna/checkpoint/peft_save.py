"""Writing LoRA adapters as PEFT does.

Source: PEFT 0.21's `utils/save_and_load.py` and `tuners/lora/config.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puna import backend
from puna.checkpoint.peft import PREFIX, WEIGHTS
from puna.checkpoint.peft_config import CONFIG
from puna.checkpoint.safetensors import TensorSpec, write_safetensors
from puna.errors import PresetError
from puna.layers.lora import Adapter

_PLAIN_NAME = frozenset({"lora_magnitude_vector"})  # in files it has no ".weight"


def write_adapter(
    directory: Path | None,
    adapters: Mapping[str, Adapter],
    modules: Collection[str],
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; each file is there whole or not.

    Args:
        directory: where to; it is made. None writes nothing, as in `write_safetensors`.
        adapters: the adapter's part beside each matrix, under names such as
            `model.layers.0.self_attn.q_proj`.
        modules: the names of all matrices that could have had one.
        base: what the adapter was trained on.
        revision: the base's branch, tag or commit.

    Raises:
        PresetError: the directory cannot be written.
    """
    config = to_config(adapters, modules) | {
        "base_model_name_or_path": base,
        "revision": revision,
    }
    specs = []
    for module, adapter in adapters.items():
        for part, variable in adapter.variables().items():
            name = f"{PREFIX}{module}.{part}{'' if part in _PLAIN_NAME else '.weight'}"
            specs.append(TensorSpec(name, tuple(variable.shape), np.float32, _reader(variable)))
    if directory is None:
        write_safetensors(None, specs)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / WEIGHTS[0], specs)
        temporary = directory / f".{CONFIG}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, directory / CONFIG)
    except OSError as error:
        raise PresetError(
            f"{directory} cannot be written: {error.strerror or error}; give another directory"
        ) from error


def to_config(adapters: Mapping[str, Adapter], modules: Collection[str]) -> dict[str, Any]:
    """What `adapter_config.json` says; see `write_adapter`."""
    found = {module: adapter.settings for module, adapter in adapters.items()}
    ranks = {module: settings.rank for module, settings in found.items()}
    alphas = {module: _whole(settings.alpha) for module, settings in found.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    settings = next(iter(found.values()))
    return {
        "alpha_pattern": {m: value for m, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {m: value for m, value in ranks.items() if value != rank},
        "target_modules": _targets([*adapters], modules),
        "task_type": "CAUSAL_LM",
        "use_dora": settings.dora,
        "use_rslora": settings.rslora,
    }


def _targets(adapted: Sequence[str], modules: Collection[str]) -> list[str]:
    """Ends of names such as "q_proj", where all matrices that end so are adapted; else names."""
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    meant = {name for name in modules if name.rpartition(".")[2] in ends}
    return ends if meant == set(adapted) else sorted(adapted)


def _whole(number: float | None) -> float | None:
    return int(number) if number is not None and number == int(number) else number


def _reader(variable: Any) -> Callable[[], np.ndarray]:
    return lambda: backend.ops.to_numpy(variable)
