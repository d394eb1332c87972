"""Puna: Llama in Keras 3, on JAX, PyTorch or TensorFlow.

Importing `puna` imports nothing else: each public name is fetched when it is first used, and the
Keras backend is chosen then (see `puna.backend`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from puna import distribution, models, samplers, tuning
    from puna.chat import ChatState
    from puna.checkpoint.upload import upload_preset
    from puna.config import LlamaConfig
    from puna.models import load_model
    from puna.runs import FinetuneSettings, finetune

# Each public name and the module that it comes from; a module stands for itself.
_PUBLIC = {
    "ChatState": "puna.chat",
    "FinetuneSettings": "puna.runs",
    "LlamaConfig": "puna.config",
    "distribution": "puna.distribution",
    "errors": "puna.errors",
    "finetune": "puna.runs",
    "load_model": "puna.models",
    "models": "puna.models",
    "samplers": "puna.samplers",
    "tuning": "puna.tuning",
    "upload_preset": "puna.checkpoint.upload",
}

__all__ = [
    "ChatState",
    "FinetuneSettings",
    "LlamaConfig",
    "__version__",
    "distribution",
    "finetune",
    "load_model",
    "models",
    "samplers",
    "tuning",
    "upload_preset",
]


def __getattr__(name: str) -> Any:
    module_name = _PUBLIC.get(name)
    if module_name is None:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    module = importlib.import_module(module_name)
    return module if module_name == f"puna.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
