"""Quantization schemes, and which matrix of a model gets which."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.errors import ConfigError

GROUP_SIZES = (32, 64, 128)
SMALL_GROUP = 16  # of 8 bits without minima alone
SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a matrix `(out, in)` is stored: small numbers, and a scale for each group of inputs.

    A weight is `scale * q`, or `scale * (q - zero)` where the scheme is not symmetric; `zero` is a
    whole number of as many bits as `q`. With `free_minima` it is `scale * q + low`.

    Args:
        bits: 8 or 4, of each number.
        group_size: inputs that share a scale: 32, 64 or 128; None means all, "per channel". For
            symmetric schemes of 8 bits it may be 16.
        symmetric: whether zero is in the middle; else each group has a minimum of its own.
        scale_dtype: in which scales are stored, "bfloat16", "float16" or "float32"; None means the
            matrix's own half precision, and float32 for any other; for float8, whose scales are
            too small for float16, bfloat16 or float32.
        free_minima: whether minima are any numbers of the scales' dtype, as GGUF files have them,
            and no whole multiples of scales. Matrices are read so, not rounded to it.
        kind: what `q` is: "int", a whole number, or "float", one of float8's (e4m3, up to 448),
            which are 8 bits, symmetric and per channel.

    Raises:
        ConfigError: a value is not one of these.

    >>> Scheme.parse("int4").group_size
    32
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str | None = None
    free_minima: bool = False
    kind: str = "int"

    def __post_init__(self):
        allowed: dict[str, tuple[Any, ...]] = {
            "kind": ("int", "float"),
            "bits": (8, 4),
            "group_size": (None, *GROUP_SIZES),
            "symmetric": (True, False),
            "scale_dtype": (None, *SCALE_DTYPES),
            "free_minima": (False,) if self.symmetric else (False, True),
        }
        if self.bits == 8 and self.symmetric is True:
            allowed["group_size"] += (SMALL_GROUP,)
        if self.kind == "float":
            allowed |= {"bits": (8,), "group_size": (None,), "symmetric": (True,)}
        for name, values in allowed.items():
            value = getattr(self, name)
            if not any(value is v or (type(value) is type(v) and value == v) for v in values):
                of = "a float8 scheme" if self.kind == "float" else "a scheme"
                raise ConfigError(f"{of}'s {name} is {value!r:.80}; expected one of {values}")

    @classmethod
    def parse(cls, name: str | Scheme, **changes: Any) -> Scheme:
        """The scheme of a name: "int8", "float8" (both per channel) or "int4" (groups of 32).

        Args:
            name: the name; a scheme stands for itself.
            changes: fields to have otherwise.

        Raises:
            ConfigError: there is no scheme of that name, or a field cannot have that value.
        """
        scheme = name if isinstance(name, Scheme) else _NAMED.get(str(name))
        if scheme is None:
            raise ConfigError(
                f"quantization {name!r:.80} is not known; expected one of {', '.join(_NAMED)}, or "
                "a puna.quantization.scheme.Scheme"
            )
        return dataclasses.replace(scheme, **changes)

    @property
    def name(self) -> str:
        """Keras's name of the mode: "int8", "int4" or "float8"."""
        return f"{self.kind}{self.bits}"

    @property
    def number_dtype(self) -> str:
        """In which dtype the numbers are held: of 4 bits, two to a byte."""
        return "float8_e4m3fn" if self.kind == "float" else "int8" if self.bits == 8 else "uint8"

    def fit(self, in_features: int, weight_dtype: str) -> Scheme:
        """The scheme for a matrix of so many inputs and a dtype: nothing in it is left open.

        Where the inputs are no multiple of the group, the largest group of 32 or 64 is taken that
        they are a multiple of, and where there is none, one scale for all inputs of a row.
        """
        sizes = [s for s in GROUP_SIZES if self.group_size and s <= self.group_size]
        sizes = [SMALL_GROUP] if self.group_size == SMALL_GROUP else sizes
        fitting = [s for s in sizes if in_features % s == 0]
        suitable = SCALE_DTYPES if self.kind == "int" else ("bfloat16",)
        own = weight_dtype if weight_dtype in suitable else "float32"
        return dataclasses.replace(
            self, group_size=max(fitting, default=None), scale_dtype=self.scale_dtype or own
        )

    @property
    def held_scale_dtype(self) -> str:
        """In which dtype scales are held in memory: float32 beside minima that are made of zeros.

        `-zero * scale` has more digits than half precision, and products take both in one dtype.
        """
        as_stored = self.symmetric or self.free_minima
        return (self.scale_dtype or "float32") if as_stored else "float32"

    def to_config(self) -> dict[str, Any]:
        """The fields, as JSON; `Scheme(**fields)` is the inverse."""
        return dataclasses.asdict(self)


_NAMED = {
    "int8": Scheme(bits=8),
    "int4": Scheme(bits=4, group_size=32),
    "float8": Scheme(bits=8, kind="float"),
}

Filter = str | Sequence[str] | Callable[[Any], bool] | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which matrix of a model gets which scheme.

    Args:
        default: for the matrices that `filters` let through; None leaves them as they are.
        filters: a regular expression or several, searched for in the names of matrices such as
            `model.layers.0.mlp.up_proj`; or a function of the layer. None lets all through.
        overrides: regular expressions, and for each a scheme, a scheme's name, or None, which
            leaves the matrix as it is. The first that is found in a name decides.

    Raises:
        ConfigError: something of it is not what is expected.
    """

    default: Scheme | None = None
    filters: Filter = None
    overrides: Mapping[str, str | Scheme | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for pattern in (*_patterns(self.filters), *self.overrides):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"{pattern!r:.80} is no regular expression ({error}); expected one that is "
                    "found in names such as model.layers.0.mlp.up_proj"
                ) from error

    @classmethod
    def parse(cls, quantization: Quantization) -> Recipe:
        """What `from_preset(..., quantization=)` takes: a scheme for all, or `overrides` alone.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(quantization, Recipe):
            return quantization
        if isinstance(quantization, Mapping):
            return cls(overrides=dict(quantization))
        return cls(default=Scheme.parse(quantization))

    def schemes(self, matrices: Mapping[str, Any]) -> dict[str, Scheme]:
        """The scheme of each matrix that gets one, not yet made to fit.

        Args:
            matrices: layers under their names.

        Raises:
            ConfigError: a regular expression is found in no name.
        """
        for pattern in (*_patterns(self.filters), *self.overrides):
            if not any(re.search(pattern, name) for name in matrices):
                raise ConfigError(
                    f"{pattern!r} is found in none of {len(matrices)} names of matrices, such as "
                    f"{', '.join(list(matrices)[1:3])}; correct the regular expression"
                )
        chosen = {name: self._scheme(name, layer) for name, layer in matrices.items()}
        return {name: scheme for name, scheme in chosen.items() if scheme is not None}

    def _scheme(self, name: str, layer: Any) -> Scheme | None:
        for pattern, scheme in self.overrides.items():
            if re.search(pattern, name):
                return None if scheme is None else Scheme.parse(scheme)
        if callable(self.filters):
            return self.default if self.filters(layer) else None
        patterns = _patterns(self.filters)
        let_through = self.filters is None or any(re.search(p, name) for p in patterns)
        return self.default if let_through else None


def _patterns(filters: Filter) -> Iterable[str]:
    if filters is None or callable(filters):
        return ()
    return (filters,) if isinstance(filters, str) else tuple(filters)


# What a model can be asked to be quantized by; see `Recipe.parse`.
Quantization = str | Scheme | Recipe | Mapping[str, str | Scheme | None]
