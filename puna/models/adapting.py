"""LoRA on a Llama: which matrices get adapters, which of these compute, and their files."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.backend import build
from puna.checkpoint.peft_config import AdapterConfig
from puna.errors import ConfigError
from puna.layers.linear import Linear
from puna.layers.lora import LoraSettings

if TYPE_CHECKING:
    from puna.layers.matrix import MatrixLayer

ALL_LINEAR = "all-linear"
DEFAULT = "default"


class Adaptable:
    """The part of a backbone or causal LM that has adapters beside its matrices.

    Each adapter has a name. Those in use compute, and `fit` trains them and nothing else.
    """

    # What `enable_lora` adapts where it is not told; as PEFT's `target_modules`.
    _default_targets: str | tuple[str, ...] = ALL_LINEAR

    preset: tuple[str, str | None] | None = None  # what the weights are from, and its revision

    def _know(self, *others: Any) -> None:
        """Remember models that share the layers; to be called once for each."""
        if "_sharing" not in self.__dict__:
            self._sharing: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sharing.update(others)

    if TYPE_CHECKING:

        def matrices(self) -> dict[str, MatrixLayer]:
            """The layers with a matrix, under the checkpoint's names for them."""
            ...

    # What there is

    def linears(self) -> dict[str, Linear]:
        """The layers that can have adapters, under the checkpoint's names for them."""
        return {name: x for name, x in self.matrices().items() if isinstance(x, Linear)}

    def adapters(self) -> dict[str, dict[str, LoraSettings]]:
        """What adapters there are: under each name its matrices' names, and what it is there."""
        found: dict[str, dict[str, LoraSettings]] = {}
        for module, layer in self.linears().items():
            for name, adapter in layer.adapters.items():
                found.setdefault(name, {})[module] = adapter.settings
        return found

    def active_adapters(self) -> dict[str, float]:
        """The names of the adapters in use, merged or not, and their strengths."""
        found: dict[str, float] = {}
        for layer in self.linears().values():
            found |= {n: s for n, s in layer.strengths.items() if n in layer.adapters}
        return found

    @property
    def is_merged(self) -> bool:
        """Whether the adapters in use are added to the weights; see `merge_lora`."""
        return any(layer.is_merged for layer in self.linears().values())

    def adapter_tensors(self) -> dict[str, Any]:
        """The variables that compute beside the weights, under names that say by what scale."""
        return {
            f"{module}.{part}.weight * {adapter.scale:.9g}": variable
            for module, layer in self.linears().items()
            for adapter in layer.in_use
            for part, variable in adapter.variables().items()
        }

    # Making and choosing

    def enable_lora(
        self,
        rank: int,
        alpha: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        name: str = DEFAULT,
    ) -> None:
        """Put a new adapter beside matrices; it, and nothing else, is trained from here on.

        The result is `W x + s · B (A x)`, where A begins at random and B at 0. A and B are in
        float32 whatever the model's dtype, and W may be quantized (QLoRA). Compile again before the
        next `fit`. To train more than the adapter, set `trainable` of variables afterwards.

        Args:
            rank: r, rows of A and columns of B.
            alpha: the scale s is alpha / rank; None means the rank, so that s is 1.
            target_modules: as PEFT has it: a list of names or ends of names such as "q_proj"; one
                regular expression for whole names such as `model.layers.0.self_attn.q_proj`; or
                "all-linear", all but the head. None means "all-linear" for a causal LM, whose head
                is adapted where "lm_head" is named; and, as in keras-hub, `q_proj` and `v_proj`
                for a backbone.
            dropout: share of the inputs that A does not see, in training only.
            rslora: s is alpha / √rank (arXiv:2312.03732).
            dora: rows have lengths of their own (arXiv:2402.09353), at the cost of a matrix more
                each step.
            name: the adapter's, of letters, digits, "-" and "_".

        Raises:
            ConfigError: a number is out of range, there is an adapter of that name, adapters are
                merged, or no linear layer is named by a target.

        >>> from puna.testing import tiny_model
        >>> model = tiny_model()
        >>> model.enable_lora(rank=4, target_modules=["q_proj", "v_proj"])
        >>> [variable.path for variable in model.trainable_variables][:2]
        ['model/layers_0/self_attn/q_proj/lora_A/default/weight',
         'model/layers_0/self_attn/q_proj/lora_B/default/weight']
        """
        settings = LoraSettings(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)
        self.check_new(name)
        targets = self._default_targets if target_modules is None else target_modules
        modules = _targeted(self.linears(), targets)
        self.add_adapter(name, dict.fromkeys(modules, settings))

    def check_new(self, name: str) -> None:
        """Refuse what no new adapter may be called, and a new adapter where some are merged.

        Raises:
            ConfigError: as said.
        """
        self._check_unmerged("an adapter is to be added")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise ConfigError(
                f"name is {name!r:.80}; expected a name of letters, digits, '-' and '_'"
            )
        if name in self.adapters():
            raise ConfigError(
                f"there is an adapter {name!r} already; give another name, or call "
                f"delete_adapter({name!r}) first"
            )

    def add_adapter(self, name: str, settings: Mapping[str, LoraSettings]) -> None:
        """Put an adapter beside the matrices named, and use it alone; see `enable_lora`."""
        linears = self.linears()
        for module, its in settings.items():
            linears[module].add_adapter(name, its)
        self.set_adapter(name)

    def set_adapter(
        self, names: str | Iterable[str] | None, weights: Iterable[float] | None = None
    ) -> None:
        """Use these adapters, and no others; `fit` trains those in use.

        Args:
            names: of one adapter, or of several, whose changes add up; None or nothing means none.
            weights: what each one's scale is multiplied by; None means 1.

        Raises:
            ConfigError: there is no such adapter, the weights are not as many, adapters are
                merged, or one of several is DoRA, whose changes do not add up.
        """
        names = [names] if isinstance(names, str) else list(names or ())
        numbers = [1.0] * len(names) if weights is None else [float(w) for w in weights]
        self._check_unmerged("other adapters are to be used")
        there = self.adapters()
        for name in names:
            if name not in there:
                raise ConfigError(
                    f"there is no adapter {name!r:.80}; expected "
                    f"{' or '.join(map(repr, there)) or 'one that enable_lora has made'}"
                )
        if len(numbers) != len(names) or len(set(names)) != len(names):
            raise ConfigError(
                f"{len(numbers)} weights were given for the adapters {names}; expected one for "
                "each, and each once"
            )
        for name in names if len(names) > 1 else ():
            if any(settings.dora for settings in there[name].values()):
                raise ConfigError(
                    f"adapter {name!r} is DoRA, whose change is none that can be added to others; "
                    "use it alone, or merge it first"
                )
        strengths = dict(zip(names, numbers, strict=True))
        for layer in self.linears().values():
            layer.use_adapters(strengths)
        self.settle()

    def disable_adapters(self) -> None:
        """Use no adapter; they are kept, and `set_adapter` brings them back."""
        self.set_adapter(None)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter.

        The weights stay frozen; `model.trainable = True` makes them trainable again.

        Raises:
            ConfigError: there is no such adapter, or adapters are merged.
        """
        others = {n: s for n, s in self.active_adapters().items() if n != name}
        self._check_unmerged("an adapter is to be deleted")
        if name not in self.adapters():
            raise ConfigError(f"there is no adapter {name!r:.80}; there are {[*self.adapters()]}")
        for layer in self.linears().values():
            if name in layer.adapters:
                layer.remove_adapter(name)
        self.set_adapter(others, others.values())

    # Merging

    def merge_lora(self, keep: bool = True) -> None:
        """Add the adapters in use to the weights, rounded to their dtype: no product is left over.

        Args:
            keep: whether the weights as they were are kept in memory, for `unmerge_lora`.

        Raises:
            ConfigError: a matrix is quantized and has no place for the change, or adapters are
                merged already.
        """
        self._check_unmerged("merge_lora was called")
        self.check_mergeable()
        for layer in self.linears().values():
            layer.merge(keep)
        self.settle()

    def unmerge_lora(self) -> None:
        """Put the weights back as they were before `merge_lora`, to the bit.

        Raises:
            ConfigError: nothing is merged, or the weights were not kept.
        """
        layers = self.linears().values()
        if not self.is_merged:
            raise ConfigError("unmerge_lora was called and no adapter is merged; see merge_lora")
        if any(layer.has_lost_base for layer in layers):
            raise ConfigError(
                "the weights without the adapters were not kept (by merge_lora(keep=False), or the "
                "model was quantized or loaded merged); load the base again, and load_adapter"
            )
        for layer in layers:
            layer.unmerge()
        self.settle()

    def check_mergeable(self) -> None:
        """Refuse to merge adapters into quantized matrices.

        Raises:
            ConfigError: an adapter in use is beside one.
        """
        packed = [n for n, x in self.linears().items() if x.is_adapted and x.scheme is not None]
        if packed:
            raise ConfigError(
                f"{len(packed)} matrices with adapters are quantized, such as {packed[0]}, and "
                'nothing can be merged into whole numbers; use save_adapter (or adapter="only"), '
                'or load the base with quantization="none" and merge the adapter there'
            )

    def _check_unmerged(self, what: str) -> None:
        if self.is_merged:
            raise ConfigError(
                f"{what}, and adapters are merged into the weights; call unmerge_lora first"
            )

    # Files

    def load_adapter(self, directory: str | os.PathLike[str], name: str = DEFAULT) -> None:
        """Read a LoRA adapter that PEFT or `save_adapter` wrote, beside the weights; use it alone.

        `fit` goes on training it.

        Args:
            directory: it holds `adapter_config.json` and the weights; or its address,
                `hf://org/name[@revision]`.
            name: what it shall be called here.

        Raises:
            PresetError: files are missing or malformed, the adapter is for another model, or it
                changes more than linear layers (`from_preset(adapter=)` merges such).
            ConfigError: there is an adapter of that name, or adapters are merged.
        """
        from puna.models.adapter_files import load_adapter

        load_adapter(self, directory, name)

    def save_adapter(
        self,
        directory: str | os.PathLike[str],
        name: str | None = None,
        base: str | None = None,
    ) -> None:
        """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Other files of the directory stay. The weight that `set_adapter` gives it is not written.

        Args:
            directory: where to.
            name: the adapter's; None means the one in use.
            base: what the file shall name as the base; None means the preset that the model is
                from.

        Raises:
            ConfigError: there is no such adapter, or none or several are in use and none is named.
            PresetError: the directory cannot be written.
        """
        from puna.models.adapter_files import save_adapter

        save_adapter(self, directory, name, base)

    # What Keras keeps

    def settle(self) -> None:
        """Train the adapters in use and nothing else; forget what was compiled for others."""
        models: list[Any] = [self, *self.__dict__.get("_sharing", ())]
        for model in models:
            trained = {
                id(variable)
                for layer in model.linears().values()
                for adapter in layer.in_use
                for variable in adapter.variables().values()
            }
            if not model.trainable:
                model.trainable = True
            for variable in model.weights:
                variable.trainable = id(variable) in trained
            build.retrack(model)
            model.train_function = model.test_function = model.predict_function = None


def _targeted(linears: Mapping[str, Linear], targets: str | Sequence[str]) -> list[str]:
    """The names of the layers that PEFT's `target_modules` name; each target names one."""
    asked = targets if isinstance(targets, str) else tuple(targets)
    what = f"target_modules is {asked!r:.200}"
    try:
        config = AdapterConfig(path=Path("enable_lora"), target_modules=asked)
        found = [module for module in linears if config.targets(module)]
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"{what}, which is no list of names or regular expression: {error}"
        ) from error
    missing = [] if isinstance(asked, str) else [t for t in asked if not _names_one(t, linears)]
    if missing or not found:
        some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
        which = f"{missing[0]!r:.80} names no linear layer" if missing else "no linear layer fits"
        raise ConfigError(
            f"{what}, and {which}; expected names or ends of names ({some}), a regular expression "
            f"that matches whole names such as {next(iter(linears))}, or {ALL_LINEAR!r}. An "
            "embedding, and a head that is tied to it, take no adapter"
        )
    return found


def _names_one(target: str, linears: Mapping[str, Linear]) -> bool:
    return any(module == target or module.endswith(f".{target}") for module in linears)


def adapters_to_config(linears: Mapping[str, Linear]) -> dict[str, Any]:
    """The adapters of some layers, without their numbers, as JSON; empty where there are none."""
    settings: dict[str, dict[str, Any]] = {}
    strengths: dict[str, float] = {}
    for module, layer in linears.items():
        for name, adapter in layer.adapters.items():
            settings.setdefault(name, {})[module] = adapter.settings.to_config()
        strengths |= layer.strengths
    if not settings:
        return {}
    is_merged = any(layer.is_merged for layer in linears.values())
    return {"settings": settings, "strengths": strengths, "is_merged": is_merged}


def adapters_from_config(linears: Mapping[str, Linear], config: Mapping[str, Any]) -> None:
    """Make the adapters that `adapters_to_config` tells of, without their numbers."""
    for name, modules in config["settings"].items():
        for module, fields in modules.items():
            linears[module].add_adapter(name, LoraSettings(**fields))
    for layer in linears.values():
        layer.is_merged = config["is_merged"]
        layer.use_adapters(config["strengths"])
