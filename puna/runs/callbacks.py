"""What happens after each step of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from puna import backend
from puna.backend import hosts
from puna.backend.step_loss import STEP_LOSS
from puna.backend.step_seed import seed_step
from puna.chat import ChatState
from puna.errors import RunError
from puna.machine import peak_memory
from puna.runs.folder import RunFolder
from puna.runs.progress import ProgressDisplay
from puna.runs.schedule import Schedule
from puna.runs.settings import FinetuneSettings
from puna.runs.stopping import Stop
from puna.tuning.batches import TokenBatches


@dataclass
class RunState:
    """How far a run has come; a checkpoint keeps it.

    Args:
        step: steps that are done.
        tokens: tokens that they had, padding not counted.
        seconds: how long it took, measuring and saving included.
        eval_loss: the held-out loss when it was last measured.
        best_loss: the lowest held-out loss.
        best_step: after which step that was.
        waited: measurements since then.
        ended: whether the run ended before its last step, by itself.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    ended: bool = False


class OneTraining(keras.callbacks.CallbackList):
    """Callbacks for which several calls of `fit`, one for each epoch, are one training.

    Args:
        callbacks: the callbacks.
        model: the model.
        epochs: how many epochs there are in all.
        steps: steps of a whole epoch.
    """

    def __init__(self, callbacks: Sequence[Any], model: Any, epochs: int, steps: int):
        super().__init__(
            [*callbacks], add_history=True, model=model, epochs=epochs, steps=steps, verbose=0
        )
        self.start = 0  # the batches of the epoch that an earlier process has seen
        self._has_begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        if not self._has_begun:
            self._has_begun = True
            super().on_train_begin(logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Nothing yet: an epoch ends. See `close`."""

    def close(self) -> None:
        """End the training."""
        if self._has_begun:
            self._has_begun = False
            super().on_train_end()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(self.start + batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(self.start + batch, logs)


class Recorder(keras.callbacks.Callback):
    """Takes down each step, measures, answers prompts, and writes checkpoints when it is time.

    All of it is done at the end of a step, in this order, so that what a checkpoint says of the run
    is what the files beside it say.

    Args:
        settings: the run's.
        folder: its directory.
        model: what is trained.
        state: how far it has come; it is kept up to date.
        total: steps in all.
        schedule: of the learning rate.
        batches: what an epoch has.
        held_out: the batches to measure the loss on, or None.
        display: what people see.
        stop: whether the run is to end.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        folder: RunFolder,
        model: Any,
        state: RunState,
        *,
        total: int,
        schedule: Schedule,
        batches: TokenBatches,
        held_out: TokenBatches | None,
        display: ProgressDisplay,
        stop: Stop,
    ):
        super().__init__()
        self._settings = settings
        self._folder = folder
        self._trained = model
        self._state = state
        self._total = total
        self._schedule = schedule
        self._batches = batches
        self._held_out = held_out
        self._display = display
        self._stop = stop
        self._has_measured = False  # in this epoch
        self._before = state.seconds
        self._begun = self._mark = time.perf_counter()

    def begin(self) -> None:
        """Measure and answer before the first step."""
        self._look({})

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._mark = time.perf_counter()
        self._has_measured = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        seed_step(self._settings.seed, self._state.step + 1)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        state = self._state
        state.step += 1
        tokens = self._batches.tokens(batch)
        state.tokens += tokens
        self._take_down(tokens, logs)
        is_last = state.step == self._total
        if self._is_time(self._settings.eval_every or len(self._batches)):
            self._look(logs)
        self._stop.agree()
        if is_last or state.ended or self._stop.asked:
            self._trained.stop_training = True
        if hosts.any_of(self._trained.stop_training):  # other callbacks may have decided it
            self._trained.stop_training = True
        if self._trained.stop_training or self._is_time(self._settings.save_every):
            self.save()
        self._mark = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tell other callbacks of the held-out loss, as Keras would."""
        if logs is not None:
            logs.pop(STEP_LOSS, None)
            if self._has_measured:
                logs["val_loss"] = self._state.eval_loss

    def save(self) -> None:
        """Write a checkpoint of where the run is, and delete those that are not to be kept."""
        state, checkpoints = self._state, self._folder.checkpoints
        state.seconds = self._before + time.perf_counter() - self._begun
        checkpoints.save(self._whole, dataclasses.asdict(state))
        best = state.best_step if self._settings.early_stopping else None
        checkpoints.prune(self._settings.keep_checkpoints, also=best)

    @property
    def _whole(self) -> Any:
        """The model with all its state, which on JAX `fit` has until somebody asks for `model`."""
        return self.model

    def _is_time(self, every: int) -> bool:
        step = self._state.step
        return step % every == 0 or step == self._total

    def _take_down(self, tokens: int, logs: dict[str, Any]) -> None:
        """Write the step's line, and tell its figures to other callbacks."""
        step, loss = self._state.step, float(logs[STEP_LOSS])
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of step {step} is {loss}; lower the learning rate (it was "
                f"{self._schedule.at(step - 1):.3g}), or compute in float32. The checkpoints "
                "before are unchanged"
            )
        seconds = time.perf_counter() - self._mark
        line = {
            "step": step,
            "epoch": round(step / len(self._batches), 4),
            "loss": loss,
            "learning_rate": self._schedule.at(step - 1),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 2),
            "seconds": round(seconds, 4),
            "peak_memory": peak_memory(),
        }
        if hosts.is_first():
            self._folder.metrics.add(line)
        self._display.step(line)
        logs |= {n: line[n] for n in ("step", "learning_rate", "tokens", "tokens_per_second")}

    # Measuring

    def _look(self, logs: dict[str, Any]) -> None:
        """Measure the held-out loss and answer the prompts."""
        if self._held_out is not None:
            logs["val_loss"] = self._measure(self._held_out)
        if self._settings.sample_prompts:
            self._answer()

    def _measure(self, held_out: TokenBatches) -> float:
        state, model = self._state, self._whole
        # `evaluate` uses the same metrics, whose means of the epoch shall go on.
        kept = [(v, backend.ops.to_numpy(v).copy()) for v in model.metrics_variables]
        begun = time.perf_counter()
        loss = float(model.evaluate(held_out, verbose=0, return_dict=True)["loss"])
        for variable, value in kept:
            backend.ops.assign(variable, value)
        state.eval_loss, self._has_measured = loss, True
        is_best = state.best_loss is None or loss < state.best_loss
        state.waited = 0 if is_best else state.waited + 1
        if is_best:
            state.best_loss, state.best_step = loss, state.step
        line = {
            "step": state.step,
            "epoch": round(state.step / len(self._batches), 4),
            "eval_loss": loss,
            "seconds": round(time.perf_counter() - begun, 4),
        }
        if hosts.is_first():
            self._folder.metrics.add(line)
        self._display.say(f"step {state.step}/{self._total}: held-out loss {loss:.4f}", "bold")
        patience = self._settings.early_stopping
        if patience is not None:
            if is_best:
                self.save()
            elif state.waited >= patience:
                state.ended = True
                self._display.say(
                    f"stopping: the held-out loss was no better {state.waited} times in a row; the "
                    f"best was {state.best_loss:.4f} after step {state.best_step}"
                )
        return loss

    def _answer(self) -> None:
        model, most = self._whole, self._settings.sample_tokens
        for prompt in self._settings.sample_prompts:
            if model.tokenizer.chat_templates:
                chat = ChatState(model, sampler="greedy", max_new_tokens=most)
                text = chat.send_message(prompt)
            else:
                text = model.generate(
                    prompt, max_new_tokens=most, sampler="greedy", strip_prompt=True
                )
            if hosts.is_first():
                line = {"step": self._state.step, "prompt": prompt, "text": text}
                self._folder.samples.add(line)
            self._display.say(f"> {prompt}\n{text}", "dim")
