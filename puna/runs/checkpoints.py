"""Checkpoints of a run: all that it takes to go on as if nothing had happened.

A checkpoint is a directory that appears whole, by being renamed, and goes by being renamed first.
It holds the adapter as PEFT has it, or the model as a Hugging Face directory, so that it can be
loaded like any other; beside that `training.safetensors`, the optimizer's state and the seeds of
dropout, and `state.json`, how far the run has come.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna import backend
from puna.backend import hosts
from puna.backend.memory import numpy_dtype
from puna.checkpoint.json_file import read_json
from puna.checkpoint.safetensors import SafetensorsSource, TensorSpec, write_safetensors
from puna.errors import PresetError
from puna.models.adapter_files import restore_adapter

STATE, TRAINING = "state.json", "training.safetensors"
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they are; it is made with the first.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def all(self) -> dict[int, Path]:
        """The checkpoints by their steps, the oldest first."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        steps = {int(m[1]): path for path in found if (m := _NAME.fullmatch(path.name))}
        return dict(sorted(steps.items()))

    def latest(self) -> Path | None:
        """The newest one."""
        return next(reversed(self.all().values()), None)

    def at(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"step-{step:08d}"

    def save(self, model: Any, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, unless there is one of this step.

        Of several processes the first writes, and the others wait until it is there.

        Args:
            model: a compiled causal LM whose optimizer is built.
            state: what goes into `state.json`; its `step` names the checkpoint.

        Raises:
            PresetError: it cannot be written; what was there before stays.
            HostError: another process has failed, or could not write it.
        """
        target = self.at(state["step"])
        if not hosts.told(target.exists()):
            with hosts.together():
                self._write(model, state, target)
        return target

    def _write(self, model: Any, state: Mapping[str, Any], target: Path) -> None:
        work = target.with_name(f".{target.name}.{os.getpid()}.new")
        is_first = hosts.is_first()
        try:
            if is_first:
                self.directory.mkdir(parents=True, exist_ok=True)
            if model.adapters():
                model.save_adapter(work)
            else:
                model.save_to_preset(work)
            write_safetensors(work / TRAINING if is_first else None, _to_write(model))
            if not is_first:
                return
            (work / STATE).write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")
            _sync(work / STATE)
            _sync(work)
            os.rename(work, target)
            _sync(self.directory)
        except OSError as error:
            raise PresetError(
                f"the checkpoint {target} cannot be written ({error.strerror or error}); the ones "
                "before it are unchanged: make room, and start the run again to go on"
            ) from error
        finally:
            if is_first:
                shutil.rmtree(work, ignore_errors=True)

    def prune(self, keep: int, also: int | None = None) -> None:
        """Delete all but the newest.

        Args:
            keep: how many stay.
            also: the step whose checkpoint stays too.
        """
        if not hosts.is_first():
            return
        found = self.all()
        for step in [*found][:-keep]:
            if step != also:
                gone = found[step].with_name(f".{found[step].name}.{os.getpid()}.old")
                os.rename(found[step], gone)
                shutil.rmtree(gone, ignore_errors=True)

    def clean(self) -> None:
        """Delete what a kill has left of checkpoints that were being written or deleted."""
        if self.directory.is_dir():
            for path in self.directory.glob(".*step-*"):
                shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """How far the run had come.

    Raises:
        PresetError: it cannot be read.
    """
    return read_json(checkpoint / STATE)


def restore(model: Any, checkpoint: Path) -> None:
    """Give a model, its optimizer and its dropout the state that they had.

    Args:
        model: compiled, its optimizer built, with the same adapter if it has one.
        checkpoint: the directory.

    Raises:
        PresetError: a file is broken, or is of another model or optimizer.
    """
    restore_weights(model, checkpoint)
    variables = _training_variables(model)
    source = SafetensorsSource(checkpoint / TRAINING)
    try:
        names = set(source.names())
        if names != variables.keys():
            some = sorted(names ^ variables.keys())[:3]
            raise PresetError(
                f"{checkpoint} is of another optimizer or model ({', '.join(some)} …); start the "
                "run anew, with --restart or in another directory"
            )
        for name, variable in variables.items():
            backend.ops.assign(variable, source.read(name))
    finally:
        source.close()


def restore_weights(model: Any, checkpoint: Path) -> None:
    """Give a model the weights that it had, and nothing else.

    Raises:
        PresetError: a file is broken, or is of another model.
    """
    if model.adapters():
        restore_adapter(model, checkpoint)
        return
    source = SafetensorsSource(checkpoint)
    try:
        for name, variable in model.tensors().items():
            backend.ops.assign(variable, source.read(name))
            source.release(name)
    finally:
        source.close()


def _to_write(model: Any) -> list[TensorSpec]:
    return [
        TensorSpec(name, tuple(v.shape), numpy_dtype(v._dtype), lambda v=v: backend.ops.to_numpy(v))
        for name, v in _training_variables(model).items()
    ]


def _training_variables(model: Any) -> dict[str, Any]:
    """The variables of the optimizer and the seeds.

    Keras counts its objects, and names them by it; so their places are the names here, and what
    the optimizer says of each is there to tell one from the other.
    """
    named = {}
    for place, variable in enumerate(model.optimizer.variables):
        named[f"optimizer.{place:05d}.{variable.path.partition('/')[2]}"] = variable
    seeds = [v for v in model.non_trainable_variables if v.name == "seed_generator_state"]
    return named | {f"seed.{place:05d}": variable for place, variable in enumerate(seeds)}


def _sync(path: Path) -> None:
    """Let a file or directory reach the disk, where the system can wait for that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
