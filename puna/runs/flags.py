"""Settings that are told by flags, YAML and Python alike: what is said of each, and its check.

A settings class is a frozen dataclass whose fields are `Annotated[type, Flag(...)]`, where the type
is `int`, `float`, `str`, `bool`, a `Literal`, a tuple of such, or one of them or None.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from puna.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What is known of a setting beside its name and type.

    Args:
        help: what it does, for people.
        panel: the heading that it stands under.
        metavar: what stands for its value.
        least: the smallest number that it may be.
        below: numbers must be smaller than this.
        above: numbers must be larger than this.
        affects: whether it has a part in what a run learns. Those that have none may change
            when the run goes on.
    """

    help: str
    panel: str
    metavar: str | None = None
    least: float | None = None
    below: float | None = None
    above: float | None = None
    affects: bool = True


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Args:
        name: the field's.
        kind: its type; of a list, that of an item.
        flag: what is said of it.
        default: its value where nothing is said, or `dataclasses.MISSING`.
        is_list: whether it is a tuple.
        is_optional: whether it may be None.
    """

    name: str
    kind: Any
    flag: Flag
    default: Any
    is_list: bool
    is_optional: bool

    @property
    def option(self) -> str:
        """As the command line has it, such as `--batch-size`."""
        return f"--{self.name.replace('_', '-')}"

    def checked(self, value: Any) -> Any:
        """A value in the setting's type.

        A lone value stands for a list of one. YAML takes `2e-4` for a text, so numbers are read
        from texts too.

        Raises:
            ConfigError: it is of another type, or out of range.
        """
        if value is None and self.is_optional:
            return None
        if self.is_list:
            items = value if isinstance(value, list | tuple) else (value,)
            return tuple(self._item(item) for item in items)
        return self._item(value)

    @property
    def expected(self) -> str:
        """What a value may be, in words."""
        if get_origin(self.kind) is Literal:
            return " or ".join(map(repr, get_args(self.kind)))
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        what, flag = words[self.kind], self.flag
        what += f" from {flag.least:g}" if flag.least is not None else ""
        what += f" above {flag.above:g}" if flag.above is not None else ""
        return what + (f", below {flag.below:g}" if flag.below is not None else "")

    def _item(self, value: Any) -> Any:
        fault = ConfigError(f"{self.name} is {value!r:.80}; expected {self.expected}")
        if get_origin(self.kind) is Literal:
            if value not in get_args(self.kind):
                raise fault
            return value
        if isinstance(value, Path):
            value = str(value)
        is_number = self.kind in (int, float)
        if is_number and isinstance(value, str):
            try:
                value = self.kind(value)
            except ValueError:
                raise fault from None
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (is_number and isinstance(value, bool)):
            raise fault
        if is_number and not self._is_in_range(value):
            raise fault
        return value

    def _is_in_range(self, value: float) -> bool:
        flag = self.flag
        return (
            math.isfinite(value)
            and (flag.least is None or value >= flag.least)
            and (flag.above is None or value > flag.above)
            and (flag.below is None or value < flag.below)
        )


def settings_of(cls: type[Any]) -> dict[str, Setting]:
    """The settings of a class, by their names, in its order."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        kind, flag = get_args(hints[field.name])
        is_optional = get_origin(kind) in (Union, types.UnionType)
        if is_optional:
            (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
        is_list = get_origin(kind) is tuple
        kind = get_args(kind)[0] if is_list else kind
        found[field.name] = Setting(field.name, kind, flag, field.default, is_list, is_optional)
    return found


def check_names(names: Iterable[Any], known: Mapping[str, Setting], where: str) -> None:
    """Refuse names of no setting, and tell the nearest one.

    Raises:
        ConfigError: there is one.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).replace("-", "_"), known, 1, 0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{where}: there is no setting {name!r:.80}; {advice}")


def read_yaml(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings in a YAML file, by their names; unchecked but for the names.

    Args:
        path: the file, a mapping of names to values. JSON is YAML too.
        known: the settings that there are.

    Raises:
        ConfigError: it cannot be read, is no such mapping, or names what is no setting.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds a {type(found).__name__}; expected a line for each setting, such as "
            "batch_size: 8"
        )
    check_names(found, known, str(path))
    return found
