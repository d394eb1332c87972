"""Fine-tuning as a run: from files of rows to an adapter or a model, with checkpoints on the way.

`puna finetune` at the command line. Importing this package imports no Keras.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from puna.runs.settings import FinetuneSettings

if TYPE_CHECKING:
    from puna.runs.run import Finished

__all__ = ["FinetuneSettings", "finetune"]


def finetune(
    settings: FinetuneSettings, *, callbacks: Sequence[Any] = (), restart: bool = False
) -> Finished:
    """Fine-tune a preset, or go on where an earlier call was cut off.

    Everything is written to `settings.out`: checkpoints, `metrics.jsonl`, `samples.jsonl`,
    `loss.png`, at last the adapter or model and `run.json`. Ctrl-C or SIGTERM lets the step end and
    writes a checkpoint; once more leaves at once.

    Args:
        settings: all that the run is told.
        callbacks: `keras.callbacks.Callback`s. Beside what Keras tells them, `logs` has `step`,
            `step_loss`, `learning_rate`, `tokens` and `tokens_per_second`, and `val_loss` after
            a step whose loss was measured.
        restart: begin anew, and delete what the run has written so far.

    Returns:
        The model as it was saved, the directory and what `run.json` says.

    Raises:
        ConfigError: the settings cannot be carried out.
        RunError: the directory holds something else, or a run with other settings; or the loss is
            no number any more.
        StoppedError: it was interrupted, and goes on with the next call.
        DataError: rows are bad.
        PresetError: the preset cannot be loaded, or something cannot be written.
    """
    from puna.runs.run import Run

    return Run(settings, callbacks, restart).go()
