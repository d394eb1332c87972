"""What a fine-tuning run is told: one dataclass, of which the flags and YAML keys are made.

Nothing here imports Keras, so that the command line can show its help at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from puna.errors import ConfigError
from puna.runs.flags import Flag, check_names, settings_of

_FILES, _ADAPTER, _TRAINING, _WATCHING = "Model and data", "What is trained", "Training", "Watching"
_EPOCHS = 3  # where neither epochs nor steps are given

# What is learned best, by what is trained: the few numbers of an adapter take larger steps.
_RATES = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """All that a run is told.

    The arguments are the flags of `puna finetune` and the keys of its YAML file; `docs/finetune.md`
    and `puna finetune --help` tell what each does.

    Raises:
        ConfigError: a setting is of the wrong type or out of range, or two contradict each other.

    >>> FinetuneSettings(preset="./llama", data="train.jsonl").rate
    0.0002
    >>> FinetuneSettings(preset="./llama", data="train.jsonl", dropout=1.5)
    Traceback (most recent call last):
    puna.errors.ConfigError: dropout is 1.5; expected a number from 0, below 1
    """

    # Model and data

    preset: Annotated[
        str,
        Flag(
            help="What to fine-tune: a directory, hf://org/name (also @REVISION), or a short name "
            "such as llama3.2_instruct_1b.",
            panel=_FILES,
            metavar="PRESET",
        ),
    ]
    data: Annotated[
        tuple[str, ...],
        Flag(
            help="A file of rows to learn: .jsonl, .json, .csv, .tsv or .parquet. May be given "
            "more than once.",
            panel=_FILES,
            metavar="FILE",
        ),
    ]
    eval_data: Annotated[
        tuple[str, ...],
        Flag(
            help="A file of rows to measure the loss on. May be given more than once.",
            panel=_FILES,
            metavar="FILE",
        ),
    ] = ()
    eval_share: Annotated[
        float,
        Flag(
            help="Without such a file, this share of the rows is held out for it.",
            panel=_FILES,
            metavar="SHARE",
            least=0,
            below=1,
        ),
    ] = 0.0
    out: Annotated[
        str,
        Flag(
            help="The run's directory. A run that is there and was cut off goes on.",
            panel=_FILES,
            metavar="DIR",
            affects=False,
        ),
    ] = "finetuned"
    sequence_length: Annotated[
        int | None,
        Flag(
            help="Tokens of a sequence at the most; else the preset's own.",
            panel=_FILES,
            metavar="N",
            least=2,
        ),
    ] = None
    long: Annotated[
        Literal["cut", "drop", "refuse"],
        Flag(help="What becomes of longer rows.", panel=_FILES),
    ] = "cut"
    packing: Annotated[
        bool,
        Flag(help="Let rows share sequences; none sees another.", panel=_FILES),
    ] = False
    loss_on: Annotated[
        Literal["auto", "assistant", "completion", "all"],
        Flag(
            help="What is learned: assistant is what it says in chats, completion its last turn "
            "alone, auto completions and the assistant's turns, and all of plain texts.",
            panel=_FILES,
        ),
    ] = "auto"

    # What is trained

    method: Annotated[
        Literal["lora", "dora", "full"],
        Flag(help="Train an adapter beside the weights, or the weights.", panel=_ADAPTER),
    ] = "lora"
    rank: Annotated[int, Flag(help="The adapter's rank.", panel=_ADAPTER, metavar="N", least=1)] = 8
    alpha: Annotated[
        float,
        Flag(
            help="Its strength: what it adds is multiplied by alpha / rank.",
            panel=_ADAPTER,
            metavar="NUMBER",
            above=0,
        ),
    ] = 16.0
    dropout: Annotated[
        float,
        Flag(
            help="Share of the inputs that it does not see in a step.",
            panel=_ADAPTER,
            metavar="SHARE",
            least=0,
            below=1,
        ),
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        Flag(
            help="A matrix that gets one, such as q_proj; may be given more than once. all-linear "
            "means all but the head.",
            panel=_ADAPTER,
            metavar="NAME",
        ),
    ] = ("all-linear",)
    rslora: Annotated[bool, Flag(help="Multiply by alpha / √rank instead.", panel=_ADAPTER)] = False
    quantization: Annotated[
        Literal["int4", "int8"] | None,
        Flag(help="Quantize the weights beside the adapter (QLoRA).", panel=_ADAPTER),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"] | None,
        Flag(
            help="Compute in this dtype; else in the checkpoint's own. mixed_… keeps the weights "
            "in float32, as training all of them needs.",
            panel=_ADAPTER,
        ),
    ] = None
    save: Annotated[
        Literal["adapter", "merged"],
        Flag(
            help="What to write at the end: the adapter alone, or the model with it merged in.",
            panel=_ADAPTER,
            affects=False,
        ),
    ] = "adapter"

    # Training

    epochs: Annotated[
        int | None,
        Flag(
            help=f"How often the rows are gone through; {_EPOCHS} without --max-steps.",
            panel=_TRAINING,
            metavar="N",
            least=1,
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        Flag(
            help="Or how many steps to train.",
            panel=_TRAINING,
            metavar="N",
            least=1,
        ),
    ] = None
    batch_size: Annotated[
        int, Flag(help="Sequences of a step.", panel=_TRAINING, metavar="N", least=1)
    ] = 8
    accumulate: Annotated[
        int,
        Flag(
            help="Compute a step's gradients in so many parts of its sequences, one after another: "
            "the same step, in the memory of one part.",
            panel=_TRAINING,
            metavar="N",
            least=1,
        ),
    ] = 1
    remat: Annotated[
        bool,
        Flag(
            help="Compute activations again when they are needed: slower, in less memory.",
            panel=_TRAINING,
        ),
    ] = False
    learning_rate: Annotated[
        float | None,
        Flag(
            help=f"The highest one; {_RATES['lora']} for adapters and {_RATES['full']} for all "
            "weights unless given.",
            panel=_TRAINING,
            metavar="NUMBER",
            above=0,
        ),
    ] = None
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Flag(help="How it falls to 0, or not.", panel=_TRAINING),
    ] = "cosine"
    warmup: Annotated[
        float,
        Flag(
            help="Steps in which it rises from 0 at first; below 1, a share of all steps.",
            panel=_TRAINING,
            metavar="STEPS",
            least=0,
        ),
    ] = 0.03
    weight_decay: Annotated[
        float,
        Flag(
            help="AdamW's; norms and biases have none.",
            panel=_TRAINING,
            metavar="NUMBER",
            least=0,
        ),
    ] = 0.0
    clip_norm: Annotated[
        float,
        Flag(
            help="The norm that all gradients together are cut to; 0 for none.",
            panel=_TRAINING,
            metavar="NUMBER",
            least=0,
        ),
    ] = 1.0
    seed: Annotated[
        int,
        Flag(
            help="Of the rows' order, the adapter's first numbers and the dropout.",
            panel=_TRAINING,
            metavar="N",
            least=0,
        ),
    ] = 0

    mesh: Annotated[
        str | None,
        Flag(
            help="Train on several devices (JAX): 2x4 are 2 groups that share out the sequences of "
            "a step, of 4 devices each that share out the weights.",
            panel=_TRAINING,
            metavar="NxM",
            affects=False,
        ),
    ] = None

    # Watching

    eval_every: Annotated[
        int | None,
        Flag(
            help="Measure the loss, and answer the prompts, every so many steps; else after each "
            "epoch.",
            panel=_WATCHING,
            metavar="STEPS",
            least=1,
        ),
    ] = None
    early_stopping: Annotated[
        int | None,
        Flag(
            help="Stop when the loss was no better in so many measurements, and keep the best.",
            panel=_WATCHING,
            metavar="N",
            least=1,
        ),
    ] = None
    sample_prompts: Annotated[
        tuple[str, ...],
        Flag(
            help="A prompt to answer whenever the loss is measured; may be given more than once.",
            panel=_WATCHING,
            metavar="TEXT",
            affects=False,
        ),
    ] = ()
    sample_tokens: Annotated[
        int,
        Flag(
            help="Tokens of such an answer at the most.",
            panel=_WATCHING,
            metavar="N",
            least=1,
            affects=False,
        ),
    ] = 64
    save_every: Annotated[
        int,
        Flag(
            help="Write a checkpoint every so many steps.",
            panel=_WATCHING,
            metavar="STEPS",
            least=1,
            affects=False,
        ),
    ] = 100
    keep_checkpoints: Annotated[
        int,
        Flag(
            help="How many of them to keep.",
            panel=_WATCHING,
            metavar="N",
            least=1,
            affects=False,
        ),
    ] = 2
    log: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...],
        Flag(
            help="Tell TensorBoard or Weights & Biases too; may be given more than once.",
            panel=_WATCHING,
            affects=False,
        ),
    ] = ()

    def __post_init__(self) -> None:
        if isinstance(self.mesh, tuple | list):  # as `from_preset` takes it
            object.__setattr__(self, "mesh", "x".join(map(str, self.mesh)))
        for name, setting in settings_of(type(self)).items():
            object.__setattr__(self, name, setting.checked(getattr(self, name)))
        for fault in self._faults():
            raise ConfigError(fault)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return _RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def mesh_shape(self) -> tuple[int, int] | None:
        """How many devices share out the sequences, and how many the weights."""
        if self.mesh is None:
            return None
        rows, weights = self.mesh.split("x")
        return int(rows), int(weights)

    @property
    def trains_all(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.method == "full"

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to measure the loss on."""
        return bool(self.eval_data) or self.eval_share > 0

    def steps(self, batches: int) -> int:
        """How many steps the run has, where an epoch has so many batches."""
        return self.max_steps or (self.epochs or _EPOCHS) * batches

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON and YAML have them, in the order of the flags."""
        values = dataclasses.asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "settings") -> FinetuneSettings:
        """Settings by their names.

        Args:
            values: of the settings; those that are left out, or None, are what they are by default.
            where: what they are from, for errors.

        Raises:
            ConfigError: there is no setting of a name, one that is needed is not there, or as the
                class raises.
        """
        known = settings_of(cls)
        check_names(values, known, where)
        given = {name: value for name, value in values.items() if value is not None}
        needed = [s for s in known.values() if s.default is dataclasses.MISSING]
        if missing := [setting for setting in needed if setting.name not in given]:
            raise ConfigError(
                f"{where}: {' and '.join(s.name for s in missing)} not given; give "
                f"{' and '.join(s.option for s in missing)}, or a line such as "
                f"{missing[0].name}: … in the YAML file"
            )
        return cls(**given)

    def difference(self, other: FinetuneSettings) -> dict[str, tuple[Any, Any]]:
        """Where another run would learn otherwise: the settings' names, and both values."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            name: (mine[name], theirs[name])
            for name, setting in settings_of(type(self)).items()
            if setting.flag.affects and mine[name] != theirs[name]
        }

    def _faults(self) -> Iterator[str]:
        """What contradicts itself, in sentences."""
        if not self.data:
            yield "data names no file; expected one at the least"
        if self.mesh is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.mesh):
            yield (
                f"mesh is {self.mesh!r:.80}; expected the devices that share out the sequences and "
                "those that share out the weights, such as 2x4"
            )
        if self.eval_data and self.eval_share:
            yield "eval_data and eval_share were both given; expected one of them"
        if self.epochs and self.max_steps:
            yield "epochs and max_steps were both given; expected one of them"
        if self.accumulate > self.batch_size:
            yield (
                f"accumulate is {self.accumulate} and batch_size {self.batch_size}; a step has no "
                "more parts than sequences"
            )
        if self.early_stopping and not self.evaluates:
            yield "early_stopping needs rows to measure the loss on; give eval_data or eval_share"
        if self.eval_every and not self.evaluates and not self.sample_prompts:
            yield (
                "eval_every was given and there is nothing to do then; give eval_data, eval_share "
                "or sample_prompts"
            )
        if self.save == "merged" and self.quantization:
            yield (
                "save is 'merged', and nothing can be merged into quantized weights; save the "
                "adapter, and merge it into the full-precision model with puna convert --adapter"
            )
        if self.trains_all:
            known = settings_of(type(self))
            for name in _OF_ADAPTERS:
                if getattr(self, name) != known[name].default:
                    yield f"{name} is a setting of adapters, and method is 'full'; leave it out"


_OF_ADAPTERS = ("rank", "alpha", "dropout", "target_modules", "rslora", "quantization", "save")
