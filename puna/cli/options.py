"""Options that several verbs share: each group is a dataclass, and its fields are the flags."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from puna.errors import ConfigError

# What is used where neither the user nor the checkpoint's generation_config.json asks for sampling.
DEFAULTS: Mapping[str, float] = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}

Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET",
        help="A directory, a .gguf or .safetensors file, hf://org/name (also /FILE or @REVISION), "
        "or a short name such as llama3.2_instruct_1b.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="The directory to write; it must be empty or not there yet.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the Hub.")]


def _bytes_of(text: str) -> int:
    """A size such as "500MB", in bytes; transformers' units.

    >>> _bytes_of("1.5GB"), _bytes_of("2000")
    (1500000000, 2000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; expected one such as 500MB or 2GB")
    return size


MaxShardSize = Annotated[
    int | None,
    typer.Option(
        "--max-shard-size",
        parser=_bytes_of,
        metavar="SIZE",
        help="Bytes of a weights file at the most, such as 500MB. Else 5GB.",
        show_default=False,
    ),
]

_SAMPLING, _LOADING = "Sampling", "Loading"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and how many.

    What is not given is taken from the checkpoint's `generation_config.json`, else from `DEFAULTS`;
    but who names one of --top-k, --top-p and --min-p gets those alone that are named.
    """

    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="NUMBER",
            help="Divides the logits; 0 takes the best token. Else the checkpoint's, or 0.7.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="K",
            help="Choose among the k best tokens; 0 among all. Without it, --top-p and --min-p, "
            "the checkpoint's, or k = 50 and p = 0.95.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Choose among the fewest tokens of this probability together.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Choose among the tokens with at least this share of the best one's probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Above 1, makes tokens of the prompt and the answer less likely. Else the "
            "checkpoint's, or 1.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Taken from the logit of every token of the answer so far.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Taken from it as often as the token is there.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Take the best token, always.", rich_help_panel=_SAMPLING),
    ] = False
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Makes the choices repeatable.", rich_help_panel=_SAMPLING
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of an answer at the most. Else it may fill the model's context.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text; may be given more than once.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None

    def __post_init__(self):
        others = ("temperature", "top_k", "top_p", "min_p")
        given = [f"--{n.replace('_', '-')}" for n in others if getattr(self, n) is not None]
        if self.greedy and given:
            raise typer.BadParameter(
                f"--greedy takes the best token always; leave out {', '.join(given)}"
            )
        if self.top_p == 0:
            raise typer.BadParameter("--top-p is 0; expected a number above 0, up to 1")
        if self.min_p == 1:
            raise typer.BadParameter("--min-p is 1; expected a number from 0, below 1")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise typer.BadParameter(
                f"--repetition-penalty is {self.repetition_penalty}; expected a number above 0"
            )
        if "" in (self.stop or ()):
            raise typer.BadParameter("--stop is empty; expected a text")

    def arguments(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `stream` that these settings ask for; see `sampler`."""
        return {
            "sampler": self.sampler(generation_config),
            "max_new_tokens": self.max_new_tokens,
            "stop": tuple(self.stop or ()),
        }

    def sampler(self, generation_config: Mapping[str, Any]) -> Any:
        """The `puna.samplers.Sampler` that these settings ask for.

        Args:
            generation_config: what the checkpoint says; where it says not to sample, its
                temperature and the like are not heeded.

        Raises:
            ConfigError: the checkpoint's settings are no numbers.
        """
        from puna import samplers

        said = dict(generation_config)
        if not said.get("do_sample"):
            kept = {name: said.get(name) for name in ("repetition_penalty", "min_new_tokens")}
            said = {"do_sample": True, **DEFAULTS, **kept}
        settings = {name: getattr(self, name) for name in _SAMPLER_SETTINGS}
        settings = {name: value for name, value in settings.items() if value is not None}
        if settings.get("top_k") == 0:
            settings["top_k"] = None
        if self.greedy:
            settings["temperature"] = 0.0
        try:
            return samplers.from_generation_config(said).replace(**settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"generation_config.json and the options ask for what cannot be: {error}"
            ) from error


_SAMPLER_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Run in this dtype. Else the checkpoint's own; float32 for a quantized GGUF.",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit of the Hub.", rich_help_panel=_LOADING),
    ] = None

    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A PEFT adapter (a directory, or hf://org/name) to merge into the weights.",
            rich_help_panel=_LOADING,
        ),
    ] = None

    quantization: Annotated[
        Literal["int4", "int8", "float8", "none"] | None,
        typer.Option(
            help="Quantize the weights while they are read; with none, dequantize those of a "
            "quantized checkpoint, which else stay packed.",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = None

    def load(self, preset: str) -> Any:
        """The causal LM of a preset: the moment when Keras is imported."""
        from puna.checkpoint.hub import PRESETS, SCHEME
        from puna.cli import interrupts, terminal

        # The Hub's client draws bars of its own, which a spinner would spoil.
        quiet = PRESETS.get(preset, preset).startswith(SCHEME)
        with contextlib.nullcontext() if quiet else terminal.waiting(f"Loading {preset}"):
            from puna.models import CausalLM

            model = CausalLM.from_preset(
                preset,
                dtype=self.dtype,
                revision=self.revision,
                adapter=self.adapter,
                quantization=self.quantization,
            )
        interrupts.check()
        return model


def with_groups(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as typer shall see it: in the place of each dataclass its fields, as options.

    >>> def verb(preset: str, loading: Loading): return loading.dtype
    >>> nothing = dict(revision=None, adapter=None, quantization=None)
    >>> with_groups(verb)(preset="a", dtype="float32", **nothing)
    'float32'
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name not in groups:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            )
            continue
        fields = get_type_hints(groups[name], include_extras=True)
        parameters += [
            parameter.replace(
                name=field.name,
                annotation=fields[field.name],
                default=field.default,
                kind=parameter.KEYWORD_ONLY,
            )
            for field in dataclasses.fields(groups[name])
        ]

    @functools.wraps(verb)
    def flat(**given: Any) -> Any:
        for name, group in groups.items():
            values = {field.name: given.pop(field.name) for field in dataclasses.fields(group)}
            given[name] = group(**values)
        return verb(**given)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat
