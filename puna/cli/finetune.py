"""`puna finetune`: train a preset on rows of text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from puna.cli import terminal
from puna.errors import ConfigError, StoppedError
from puna.runs.flags import Setting, read_yaml, settings_of
from puna.runs.settings import FinetuneSettings

EXAMPLES = (
    "puna finetune --preset ./my-llama --data train.jsonl --eval-data held_out.jsonl",
    "puna finetune --preset llama3.2_instruct_1b --data train.jsonl --quantization int4 "
    "--packing --out ./pirate",
    "puna finetune --config run.yaml --learning-rate 1e-4",
    "python -m puna.launch --processes 2 -m puna finetune --hosts --mesh 2x4 --config run.yaml",
)

_KNOWN = settings_of(FinetuneSettings)


def _option(setting: Setting) -> tuple[str, Any, Any]:
    """A setting as a field that is a flag; None where it is not given."""
    kind, flag = setting.kind, setting.flag
    metavar = flag.metavar
    if setting.is_list and get_origin(kind) is Literal:  # typer has no lists of words
        metavar = f"[{'|'.join(get_args(kind))}]"
        kind = str
    kind = list[kind] if setting.is_list else kind
    words = [setting.option]
    if setting.kind is bool:
        words = [f"{setting.option}/--no-{setting.name.replace('_', '-')}"]
    return (
        setting.name,
        Annotated[
            kind | None,
            typer.Option(
                *words,
                help=f"{flag.help}{_default(setting)}",
                metavar=metavar,
                rich_help_panel=flag.panel,
                show_default=False,
            ),
        ],
        None,
    )


def _default(setting: Setting) -> str:
    """What is used where the flag is not given, where that says something."""
    default = setting.default
    if default in (dataclasses.MISSING, None, (), False):
        return ""
    told = ", ".join(default) if isinstance(default, tuple) else default
    told = f"{told:g}" if isinstance(told, float) else told
    return f"  [default: {told}]"


# The flags are the settings' names and types; there is no list of them here.
Flags = dataclasses.make_dataclass(
    "Flags", [_option(setting) for setting in _KNOWN.values()], frozen=True, kw_only=True
)


def finetune(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A YAML file of the settings below, by their names, such as batch_size: 8. Flags "
            "come before it.",
            show_default=False,
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Begin anew, and delete what an earlier run left in --out."),
    ] = False,
    hosts: Annotated[
        bool,
        typer.Option(
            "--hosts",
            help="This is one of several processes that train together, started by python -m "
            "puna.launch, SLURM, Kubernetes or a TPU pod; see docs/hosts.md.",
        ),
    ] = False,
    flags: Flags,  # type: ignore[valid-type]
) -> None:
    """Fine-tune a preset on rows of text: chats, prompts with completions, plain texts.

    It trains a LoRA adapter, or with --method full all weights, and writes into --out: the adapter
    or model, metrics.jsonl, samples.jsonl, loss.png, run.json and checkpoints. A run that was cut
    off, by a kill too, goes on with the same command, to the same losses. Ctrl-C lets the step
    end and writes a checkpoint.
    """
    try:
        settings = _settings(config, dataclasses.asdict(flags))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None

    from puna import distribution
    from puna.runs import finetune as run
    from puna.runs.report import summary

    if hosts:
        distribution.initialize()

    try:
        finished = run(settings, restart=restart)
    except StoppedError as error:
        if distribution.is_first_process():
            terminal.note(str(error))
        raise typer.Exit(130) from None
    if not distribution.is_first_process():
        return
    print("\n".join(summary(finished)), file=sys.stderr)
    print(finished.directory)


def _settings(config: Path | None, flags: dict[str, Any]) -> FinetuneSettings:
    """What the file says, and the flags in its place."""
    told = {} if config is None else read_yaml(config, _KNOWN)
    told |= {name: value for name, value in flags.items() if value is not None}
    return FinetuneSettings.from_dict(told, "puna finetune" if config is None else str(config))
