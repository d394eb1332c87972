"""A fine-tuning run, from its settings to what it leaves."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from puna import distribution
from puna.backend import hosts
from puna.backend.step_loss import tell_step_loss
from puna.checkpoint.fingerprint import fingerprint
from puna.checkpoint.json_file import read_json
from puna.errors import ConfigError, StoppedError
from puna.models import CausalLM
from puna.models.presets import open_preset
from puna.runs import checkpoints, curve, data
from puna.runs.callbacks import OneTraining, Recorder, RunState
from puna.runs.folder import RunFolder, write_json
from puna.runs.progress import ProgressDisplay
from puna.runs.report import card_of, report
from puna.runs.schedule import Schedule
from puna.runs.settings import FinetuneSettings
from puna.runs.stopping import Stop
from puna.runs.trackers import trackers
from puna.tuning.batches import TokenBatches
from puna.tuning.text_data import TextData


@dataclass
class Finished:
    """What a run leaves.

    Args:
        directory: of the adapter or model: a preset.
        report: what `run.json` says.
    """

    directory: Path
    report: dict[str, Any]
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model as it was saved; loaded where the run had come to its end before."""
        if self._model is None:
            self._model = CausalLM.from_preset(self.directory)
        return self._model


@dataclass
class _Parts:
    """What a run is made of, once its model is there."""

    model: Any
    batches: TokenBatches
    held_out: TokenBatches | None
    total: int
    schedule: Schedule
    rows: dict[str, Any]


class Run:
    """A run; `puna.finetune` says what it does.

    Args:
        settings: all that it is told.
        callbacks: of Keras.
        restart: whether to begin anew.
    """

    def __init__(self, settings: FinetuneSettings, callbacks: Sequence[Any], restart: bool):
        self._settings = settings
        self._callbacks = callbacks
        self._restart = restart
        self._folder = RunFolder(settings)
        self._stop = Stop()

    def go(self) -> Finished:
        """Train, and write what is to be left; or go on with it."""
        with _devices(self._settings), hosts.together(), self._folder.claimed(self._restart):
            return self._go(self._folder, ProgressDisplay())

    def _go(self, folder: RunFolder, display: ProgressDisplay) -> Finished:
        rows = data.read(self._settings)
        facts = {"backend": keras.backend.backend(), "data": data.digests(self._settings)}
        if folder.is_finished:
            folder.identify(facts)
            told: Any = read_json(folder.report) if hosts.is_first() else None
            return Finished(folder.result, hosts.told(told))
        with display.waiting(f"Loading {self._settings.preset}"):
            model = _load(self._settings)
        folder.identify(facts | {"weights": fingerprint(model.config, model.tensors())})
        with display.waiting("Reading the rows"):
            parts = self._prepared(model, *rows)
        state = self._state(model)
        self._train(parts, state, display)
        return self._finish(parts, state, display)

    def _prepared(self, model: Any, rows: TextData, held_out_rows: TextData | None) -> _Parts:
        """The model with its adapter, compiled, and the batches."""
        settings = self._settings
        keras.utils.set_random_seed(settings.seed)
        if not settings.trains_all:
            targets = settings.target_modules
            model.enable_lora(
                settings.rank,
                settings.alpha,
                targets[0] if targets == ("all-linear",) else targets,
                settings.dropout,
                settings.rslora,
                settings.method == "dora",
            )
            if settings.save == "merged":
                model.check_mergeable()
        preprocessor, size = model.preprocessor, settings.batch_size
        batches = rows.batches(preprocessor, size, shuffle=True)
        told: dict[str, Any] = {
            "files": data.rows_by_file(rows),
            "train": data.facts(rows, batches),
        }
        held_out = None
        if held_out_rows is not None:
            held_out = held_out_rows.batches(preprocessor, size)
            told["files"] = data.rows_by_file(rows, held_out_rows)
            told["eval"] = data.facts(held_out_rows, held_out)
        total = settings.steps(len(batches))
        schedule = Schedule.of(settings, total)
        model.compile(
            optimizer=_optimizer(settings, schedule),
            remat=settings.remat,
            accumulate=settings.accumulate,
        )
        model.optimizer.build(model.trainable_variables)
        tell_step_loss(model)
        return _Parts(model, batches, held_out, total, schedule, told)

    def _state(self, model: Any) -> RunState:
        """Where the run is: at its beginning, or at its newest checkpoint."""
        folder, state = self._folder, RunState()
        newest = folder.checkpoints.latest()
        found = None if newest is None else (str(newest), checkpoints.read_state(newest))
        found = hosts.told(found)  # as the first process finds it
        if found is not None:
            state = RunState(**found[1])
            checkpoints.restore(model, Path(found[0]))
        if hosts.is_first():
            for file in (folder.metrics, folder.samples):
                file.cut(after=state.step if found is not None else -1)
        return state

    def _train(self, parts: _Parts, state: RunState, display: ProgressDisplay) -> None:
        """All steps that are left."""
        settings, model, batches = self._settings, parts.model, parts.batches
        recorder = Recorder(
            settings,
            self._folder,
            model,
            state,
            total=parts.total,
            schedule=parts.schedule,
            batches=batches,
            held_out=parts.held_out,
            display=display,
            stop=self._stop,
        )
        epochs = math.ceil(parts.total / len(batches))
        told = trackers(settings, self._folder) if hosts.is_first() else []
        everyone = [recorder, *told, *self._callbacks]
        callbacks = OneTraining(everyone, model, epochs, len(batches))
        _introduce(parts, state, display)
        display.begin(parts.total)
        try:
            with self._stop.listening():
                if state.step == 0:
                    recorder.begin()
                self._stop.agree()
                while state.step < parts.total and not state.ended:
                    if self._stop.asked:
                        raise self._stopped(state)
                    self._train_epoch(parts, state, callbacks)
        finally:
            callbacks.close()
            display.close()

    def _train_epoch(self, parts: _Parts, state: RunState, callbacks: OneTraining) -> None:
        """What is left of an epoch, or as much as there is time for."""
        epoch, callbacks.start = divmod(state.step, len(parts.batches))
        parts.model.fit(
            data.EpochBatches(parts.batches, epoch, callbacks.start),
            initial_epoch=epoch,
            epochs=epoch + 1,
            callbacks=callbacks,
            shuffle=False,  # they have an order
            verbose=0,
        )
        state.ended |= parts.model.stop_training and not self._stop.asked

    def _stopped(self, state: RunState) -> StoppedError:
        if state.step == 0:
            return StoppedError("stopped before the first step; the same command begins again")
        return StoppedError(
            f"stopped after step {state.step}, with a checkpoint in {self._folder.root}; the same "
            "command goes on from there"
        )

    def _finish(self, parts: _Parts, state: RunState, display: ProgressDisplay) -> Finished:
        """Save, draw and tell."""
        settings, folder, model = self._settings, self._folder, parts.model
        if settings.early_stopping and state.best_step not in (None, state.step):
            checkpoints.restore_weights(model, folder.checkpoints.at(state.best_step))
        told: Any = None
        if hosts.is_first():
            lines = folder.metrics.read()
            if curve.can_draw():
                curve.draw(lines, folder.curve)
            else:
                display.say("no loss.png: matplotlib is not installed; pip install 'puna[train]'")
            told = report(settings, folder, parts, state, lines)
        told = hosts.told(told)
        model.card = card_of(model.card, told)
        if settings.trains_all:
            model.save_to_preset(folder.result)
        else:
            wanted = "only" if settings.save == "adapter" else "merged"
            model.save_to_preset(folder.result, adapter=wanted)
        if hosts.is_first():
            if told["curve"]:
                shutil.copy(folder.curve, folder.result / folder.curve.name)
            write_json(folder.report, told)
        return Finished(folder.result, told, model)


@contextlib.contextmanager
def _devices(settings: FinetuneSettings) -> Iterator[None]:
    """A scope in which a run computes on the devices that it is told."""
    if settings.mesh_shape is not None:
        with distribution.on_mesh(settings.mesh_shape):
            yield
    elif hosts.count() < hosts.processes():
        raise ConfigError(
            f"there are {hosts.processes()} processes and no mesh, so each would train by itself; "
            "give --mesh, such as 2x4: devices for sequences, and for weights"
        )
    else:
        yield


def _load(settings: FinetuneSettings) -> Any:
    """The model; from a local directory, it knows where that is from anywhere."""
    preset = settings.preset
    if Path(preset).expanduser().exists():
        preset = str(Path(preset).expanduser().resolve())
    dtype = settings.dtype
    if dtype is None and settings.trains_all:
        dtype = _dtype_to_train_all(preset)
    return CausalLM.from_preset(preset, dtype=dtype, quantization=settings.quantization)


def _dtype_to_train_all(preset: str) -> str | None:
    """The checkpoint's dtype, with the weights in float32: what a step changes needs its digits."""
    opened = open_preset(preset)
    source = opened.tensors()
    try:
        dtype = opened.default_dtype(source)
    finally:
        source.close()
    return f"mixed_{dtype}" if dtype in ("bfloat16", "float16") else None


def _optimizer(settings: FinetuneSettings, schedule: Schedule) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.AdamW(
        schedule,  # type: ignore[arg-type]
        weight_decay=settings.weight_decay,
        global_clipnorm=settings.clip_norm or None,
    )
    optimizer.exclude_from_weight_decay(var_names=["norm", "bias"])
    return optimizer


def _introduce(parts: _Parts, state: RunState, display: ProgressDisplay) -> None:
    trained = sum(math.prod(v.shape) for v in parts.model.trainable_variables)
    display.say(str(parts.batches.report))
    if parts.held_out is not None:
        display.say(f"Held out: {parts.held_out.report}")
    display.say(f"{trained:,} numbers are trained, in {parts.total:,} steps.")
    if state.step:
        display.say(f"Going on after step {state.step:,}.")
