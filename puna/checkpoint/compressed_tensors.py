"""The `quantization_config` of compressed-tensors, and schemes: one into the other.

Sources: compressed-tensors 0.20, `quantization/quant_config.py` and `quant_args.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from puna.errors import ConfigError
from puna.quantization.scheme import GROUP_SIZES, SMALL_GROUP, Scheme

KEY = "quantization_config"  # in config.json
METHOD = "compressed-tensors"
VERSION = "0.20.0"  # of compressed-tensors, whose layout is written
PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MIXED, NAIVE = "mixed-precision", "naive-quantized"

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"

# Fields of the configuration that must say nothing, for us to compute what it means.
_MUST_BE_EMPTY = ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config")
_EMPTY = (None, {}, [], {"format": "dense"})


class Layout(NamedTuple):
    """How a quantized matrix is in the files: its scheme, and the format's name."""

    scheme: Scheme
    format: str


def split(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A `config.json` without its `quantization_config`, and that, if it is of compressed-tensors.

    Other methods stay in, for whoever reads the configuration to refuse.
    """
    quantization = hf.get(KEY)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return dict(hf), None
    return {name: value for name, value in hf.items() if name != KEY}, quantization


def format_of(scheme: Scheme) -> str:
    """The name of the format in which we write a scheme."""
    return FLOAT if scheme.kind == "float" else PACK if scheme.bits == 4 else INT


def to_config(schemes: Mapping[str, Scheme], matrices: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        schemes: under the names of the matrices that are quantized.
        matrices: the names of all that could be.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        key = Scheme.parse(scheme, scale_dtype=None)
        groups.setdefault(key, []).append(name)
    linear = [(key, n) for key, names in groups.items() for n in names if n != _EMBEDDING]
    usual = Counter(key for key, _ in linear).most_common(1)
    config_groups = {}
    for place, (key, names) in enumerate(groups.items()):
        is_usual = bool(usual) and key == usual[0][0]
        targets = [n for n in names if n != _EMBEDDING and not is_usual]
        targets = (["Linear"] if is_usual else []) + targets
        targets += ["Embedding"] if _EMBEDDING in names else []
        config_groups[f"group_{place}"] = {
            "targets": targets,
            "weights": _weights(key),
            "input_activations": None,
            "output_activations": None,
            "format": format_of(key),
        }
    formats = {format_of(key) for key in groups}
    ignored = [name for name in matrices if name not in schemes and name != _EMBEDDING]
    if _HEAD not in matrices:
        ignored.append(_HEAD)  # it is the embedding
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "observer": "minmax",
    }


def layouts(config: Mapping[str, Any], matrices: Collection[str]) -> dict[str, Layout]:
    """How each quantized matrix is stored, by a `quantization_config`.

    Args:
        config: the contents.
        matrices: the names of the model's matrices, such as `model.layers.0.mlp.up_proj`.

    Returns:
        Under the names of the matrices that are quantized; the scales' dtypes are left open.

    Raises:
        ConfigError: it asks for what we do not compute.
    """
    for name in _MUST_BE_EMPTY:
        if config.get(name) not in _EMPTY:
            raise _refused(f"{name}={config[name]!r:.200}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise _refused(f"config_groups={groups!r:.200}")
    ignored = _strings(config, "ignore")
    found: dict[str, Layout] = {}
    layout_of = {place: _layout(group, config) for place, group in groups.items()}
    for name in matrices:
        kind = "Embedding" if name == _EMBEDDING else "Linear"
        if any(_rank(target, name, kind) for target in ignored):
            continue
        ranks = {
            place: max((_rank(t, name, kind) for t in _strings(group, "targets")), default=0)
            for place, group in groups.items()
        }
        best = max(ranks, key=ranks.__getitem__, default=None)
        if best is not None and ranks[best]:
            found[name] = layout_of[best]
    return found


def _rank(target: str, name: str, kind: str) -> int:
    """How closely a target names a module: 0 not at all, 1 by its class, 3 by its name."""
    if target == name:
        return 3
    if target.startswith("re:"):
        try:
            return 2 if re.match(target.removeprefix("re:"), name) else 0
        except re.error as error:
            raise _refused(f"{target!r}, which is no regular expression ({error})") from error
    return 1 if target == kind else 0


def _layout(group: Mapping[str, Any], config: Mapping[str, Any]) -> Layout:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refused(f"weights={weights!r:.200}")
    for name in ("input_activations", "output_activations"):
        activations = group.get(name)
        # What is quantized anew in each step is an approximation of what we compute.
        if activations is not None and not (
            isinstance(activations, dict) and activations.get("dynamic") is True
        ):
            raise _refused(f"{name}={activations!r:.200}")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    group_size = weights.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(group_size, int) and group_size > 0 else "channel"
    form = str(group.get("format") or config.get("format"))
    bits: Any = weights.get("num_bits")
    is_known = (
        kind in ("int", "float")
        and strategy in (("group", "channel", "tensor") if kind == "int" else ("channel", "tensor"))
        and weights.get("dynamic", False) is False
        and weights.get("actorder") not in (True, "group", "dynamic")
        and form in ((PACK, INT, NAIVE) if kind == "int" else (FLOAT, NAIVE))
        and bits in ((4, 8) if kind == "int" else (8,))
        and weights.get("symmetric", True) in ((True, False) if kind == "int" else (True,))
    )
    sizes = GROUP_SIZES
    if bits == 8 and weights.get("symmetric", True):
        sizes = (SMALL_GROUP, *GROUP_SIZES)
    is_known = is_known and (strategy != "group" or group_size in sizes)
    if not is_known:
        raise _refused(f"format={form!r:.80}, weights={weights!r:.400}")
    scheme = Scheme(
        bits=bits,
        group_size=group_size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        kind=kind,
    )
    return Layout(scheme, form)


def _strings(container: Mapping[str, Any], name: str) -> list[str]:
    value = container.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(f"{name}={value!r:.200}")
    return value


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"config.json's {KEY} has {what}, which Puna does not compute; it reads whole numbers of 4 "
        f"or 8 bits as {PACK} or {INT}, per channel or in groups of "
        f"{', '.join(map(str, GROUP_SIZES))}, and floats of 8 bits as {FLOAT}, per channel: "
        "fetch the full-precision checkpoint, and load it with quantization="
    )
