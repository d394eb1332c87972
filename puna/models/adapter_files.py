"""Adapters of a model in files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna import backend
from puna.backend import hosts
from puna.checkpoint import hub
from puna.checkpoint.model_card import write_card
from puna.checkpoint.peft import PeftAdapter
from puna.checkpoint.peft_save import write_adapter
from puna.checkpoint.save import replacement
from puna.errors import ConfigError, PresetError
from puna.layers.lora import LoraSettings

if TYPE_CHECKING:
    from puna.models.adapting import Adaptable
    from puna.models.causal_lm import Llama3CausalLM

MERGED, ONLY = "merged", "only"

# The roles of a LoRA's tensors, and what the variables are called.
_PARTS = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}


def load_adapter(model: Adaptable, directory: str | os.PathLike[str], name: str) -> None:
    """See `Adaptable.load_adapter`."""
    model.check_new(name)
    adapter = PeftAdapter(hub.locate(directory))
    try:
        model.add_adapter(name, _settings(model, adapter))
        _assign(model, adapter, name)
    finally:
        adapter.close()


def restore_adapter(model: Adaptable, directory: str | os.PathLike[str]) -> None:
    """Give the adapter in use the numbers that a file has of it.

    Args:
        model: a causal LM or a backbone with one adapter in use.
        directory: as `save_adapter` has written it.

    Raises:
        PresetError: files are missing or malformed, or are of another adapter.
        ConfigError: there is no adapter in use, or several.
    """
    name = named_adapter(model, None)
    adapter = PeftAdapter(directory)
    try:
        if (found := _settings(model, adapter)) != model.adapters()[name]:
            raise PresetError(
                f"{adapter.path} is an adapter of {len(found)} matrices, and not the one in use, "
                "of other matrices, rank, alpha, dropout or kind; load it with load_adapter"
            )
        _assign(model, adapter, name)
    finally:
        adapter.close()


def _assign(model: Adaptable, adapter: PeftAdapter, name: str) -> None:
    for module, tensors in adapter.modules.items():
        variables = model.linears()[module].adapters[name].variables()
        for role, tensor in tensors.items():
            backend.ops.assign(variables[_PARTS[role]], adapter.read(tensor))


def _settings(model: Adaptable, adapter: PeftAdapter) -> dict[str, LoraSettings]:
    """What the adapter is like at each module; it is refused where it does not fit."""
    config, linears = adapter.config, model.linears()

    def fail(what: str, advice: str) -> PresetError:
        return PresetError(f"{adapter.path}: {what}; {advice}")

    other_model = "give the adapter to the model that it was trained on"
    wanted = {"A", "B"} | ({"magnitude"} if config.use_dora else set())
    settings: dict[str, LoraSettings] = {}
    for module, roles in adapter.modules.items():
        if others := roles.keys() - _PARTS.keys():
            what = f"it has {', '.join(roles[role] for role in sorted(others))}"
            raise fail(what, "only LoRA of linear layers is kept beside the weights: merge it with "
                       "from_preset(adapter=)")  # fmt: skip
        if module not in linears:
            what = f"it has tensors for {module}, and the model has no such linear layer"
            raise fail(what, f"{other_model}, or merge it with from_preset(adapter=)")
        if roles.keys() != wanted or not config.targets(module):
            what = f"{module} has {', '.join(sorted(roles))}, expected {', '.join(sorted(wanted))}"
            why = "" if config.targets(module) else ", and target_modules names it not"
            raise fail(what + why, "fetch the adapter again")
        settings[module] = LoraSettings(
            rank=config.rank(module),
            alpha=config.alpha(module),
            dropout=config.lora_dropout,
            rslora=config.use_rslora,
            dora=config.use_dora,
        )
        (out, in_features), rank = linears[module].matrix_shape, config.rank(module)
        shapes = {"A": (rank, in_features), "B": (out, rank), "magnitude": (out,)}
        for role, tensor in roles.items():
            if (shape := adapter.info(tensor).shape) != shapes[role]:
                raise fail(f"{tensor} has shape {shape}, expected {shapes[role]}", other_model)
    if lacking := [m for m in linears if config.targets(m) and m not in settings]:
        raise fail(f"{lacking[0]} should be adapted and has no lora_A and lora_B", other_model)
    return settings


def save_adapter(
    model: Adaptable, directory: str | os.PathLike[str], name: str | None, base: str | None
) -> None:
    """See `Adaptable.save_adapter`; of several processes the first writes."""
    name = named_adapter(model, name)
    found = {
        module: layer.adapters[name]
        for module, layer in model.linears().items()
        if name in layer.adapters
    }
    known, revision = model.preset or (None, None)
    with hosts.together():
        write_adapter(
            Path(directory).expanduser() if hosts.is_first() else None,
            found,
            [*model.linears()],
            base=base or known,
            revision=revision if base is None else None,
        )


def save_adapter_preset(model: Llama3CausalLM, directory: str | os.PathLike[str]) -> None:
    """Write the adapter in use with the tokenizer, in the place of what was saved there before."""
    with replacement(Path(directory)) as work:
        save_adapter(model, work or directory, None, None)
        if work is None:
            return
        tokenizer = None if model.preprocessor is None else model.preprocessor.tokenizer
        if tokenizer is not None:
            tokenizer.save(work)
        card = dataclasses.replace(model.card.of_files(tokenizer, {}), kind="adapter")
        write_card(work, card, Path(directory).expanduser())


def merged_tensors(
    model: Adaptable, adapter: str | None
) -> dict[str, Callable[[], np.ndarray]] | None:
    """What `save_to_preset` writes of the matrices with adapters.

    Args:
        model: a causal LM.
        adapter: "merged", "only", or None where nothing was said.

    Returns:
        Of each such matrix, by its tensor's name, a function that merges it; or None, where the
        adapter alone is to be written.

    Raises:
        ConfigError: the choice is none, or cannot be, or has to be made.
    """
    if adapter not in (None, MERGED, ONLY):
        raise ConfigError(f"adapter is {adapter!r:.80}; expected {MERGED!r} or {ONLY!r}")
    if adapter == ONLY:
        named_adapter(model, None)
        return None
    model.check_mergeable()
    adapted = {name: layer for name, layer in model.linears().items() if layer.is_adapted}
    return {f"{name}.weight": layer.merged_matrix for name, layer in adapted.items()}


def named_adapter(model: Adaptable, name: str | None) -> str:
    """The adapter that is meant: the one of that name, or the one in use.

    Raises:
        ConfigError: there is none, or there are several.
    """
    there, active = model.adapters(), [*model.active_adapters()]
    if name is None and len(active) == 1:
        return active[0]
    if name is None or name not in there:
        what = f"no adapter {name!r:.80}" if name else f"{len(active)} adapters in use"
        names = " or ".join(map(repr, there)) or "one that enable_lora has made"
        raise ConfigError(f"there is {what}, and one is to be written; expected name={names}")
    return name
