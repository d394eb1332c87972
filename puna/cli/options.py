"""Options that several verbs share: each group is a dataclass, and its fields are the flags."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

from puna.errors import ConfigError

# What is used where neither the user nor the checkpoint's generation_config.json says anything.
# A bound on k of at most 64 also spares a sort of the whole vocabulary for every token.
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

_SAMPLING, _LOADING = "Sampling", "Loading"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and how many.

    What is not given is taken from the checkpoint's `generation_config.json`, else from `DEFAULTS`.
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
            help="Choose among the k best tokens; 0 among all. Else the checkpoint's, or 50.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Choose among the fewest tokens of this probability together. Else the "
            "checkpoint's, or 0.95.",
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

    def __post_init__(self):
        others = {"temperature": self.temperature, "top-k": self.top_k, "top-p": self.top_p}
        given = [f"--{name}" for name, value in others.items() if value is not None]
        if self.greedy and given:
            raise typer.BadParameter(
                f"--greedy takes the best token always; leave out {', '.join(given)}"
            )
        if self.top_p == 0:
            raise typer.BadParameter("--top-p is 0; expected a number above 0, up to 1")

    def sampler(self, generation_config: Mapping[str, Any]) -> Any:
        """The `puna.samplers.Sampler` that these settings ask for.

        Args:
            generation_config: what the checkpoint says; heeded unless it says not to sample.

        Raises:
            ConfigError: the checkpoint's settings are no numbers.
        """
        from puna.samplers import GreedySampler, TopPSampler

        if self.greedy:
            return GreedySampler(seed=self.seed)
        values = dict(DEFAULTS)
        if generation_config.get("do_sample"):
            given = {name: generation_config.get(name) for name in DEFAULTS}
            values |= {"top_p": 1.0} | {n: v for n, v in given.items() if v is not None}
        own = {name: getattr(self, name) for name in DEFAULTS}
        values |= {name: value for name, value in own.items() if value is not None}
        try:
            top_k = int(values["top_k"])
            return TopPSampler(
                p=float(values["top_p"]),
                k=top_k if top_k > 0 else None,
                temperature=float(values["temperature"]),
                seed=self.seed,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"generation_config.json and the options ask for {values}, which cannot be: {error}"
            ) from error


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

    def load(self, preset: str) -> Any:
        """The causal LM of a preset: the moment when Keras is imported."""
        from puna.checkpoint.hub import PRESETS, SCHEME
        from puna.cli import interrupts, terminal

        # The Hub's client draws bars of its own, which a spinner would spoil.
        quiet = PRESETS.get(preset, preset).startswith(SCHEME)
        with contextlib.nullcontext() if quiet else terminal.waiting(f"Loading {preset}"):
            from puna.models import CausalLM

            model = CausalLM.from_preset(
                preset, dtype=self.dtype, revision=self.revision, adapter=self.adapter
            )
        interrupts.check()
        return model


def with_groups(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as typer shall see it: in the place of each dataclass its fields, as options.

    >>> def verb(preset: str, loading: Loading): return loading.dtype
    >>> with_groups(verb)(preset="a", dtype="float32", revision=None, adapter=None)
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
