"""TensorBoard and Weights & Biases, as Keras callbacks; each is imported if it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import keras

from puna.errors import ConfigError
from puna.runs.folder import RunFolder
from puna.runs.settings import FinetuneSettings

# What is told of a step, and what it is called there.
_NAMES = {
    "step_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "tokens_per_second": "train/tokens_per_second",
    "val_loss": "eval/loss",
}


def trackers(settings: FinetuneSettings, folder: RunFolder) -> list[keras.callbacks.Callback]:
    """The callbacks that `log` asks for.

    Raises:
        ConfigError: what one needs is not installed.
    """
    return [_MAKERS[name](settings, folder) for name in settings.log]


class TensorBoardTracker(keras.callbacks.Callback):
    """Writes scalars for TensorBoard, by the run's own steps.

    Keras's callback of that name needs TensorFlow, and begins at step 0 in a run that goes on.
    """

    def __init__(self, settings: FinetuneSettings, folder: RunFolder):
        super().__init__()
        del settings
        summary = _imported("tensorboard.summary", "tensorboard")
        self._writer = summary.Writer(str(folder.tensorboard))

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        for name, value in _told(logs or {}).items():
            self._writer.add_scalar(name, value, step=(logs or {})["step"])

    def on_train_end(self, logs: Any = None) -> None:
        self._writer.close()


class WandbTracker(keras.callbacks.Callback):
    """Tells Weights & Biases, which goes on with the same page where a run goes on.

    `WANDB_PROJECT` and the like are heeded.
    """

    def __init__(self, settings: FinetuneSettings, folder: RunFolder):
        super().__init__()
        wandb = _imported("wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "puna"),
            name=folder.root.resolve().name,
            dir=str(folder.root),
            config=settings.to_dict(),
            id=folder.identity,
            resume="allow",
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._run.log(_told(logs or {}), step=(logs or {})["step"])

    def on_train_end(self, logs: Any = None) -> None:
        self._run.finish()


_MAKERS = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def _told(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(logs[key]) for key, name in _NAMES.items() if key in logs}


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"log names {package}, which cannot be imported ({error}); pip install {package}, or "
            "leave it out"
        ) from error
