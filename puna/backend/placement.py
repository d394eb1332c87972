"""On which devices a Keras variable lies: an axis of the mesh, or None, for each of its axes.

The names that Keras keeps private are used here, as in `build.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras

from puna import backend
from puna.backend import build

Axes = tuple[str | None, ...]


def current() -> Any | None:
    """The distribution that is set, or None."""
    return keras.distribution.distribution()


def mesh_sizes(distribution: Any) -> dict[str, int]:
    """How many devices each axis of a distribution's mesh has."""
    mesh = distribution.device_mesh
    return dict(zip(mesh.axis_names, map(int, mesh.shape), strict=True))


def has_place(variable: Any) -> bool:
    """Whether it is settled where a variable lies."""
    return variable._layout is not None or variable._value is not None


def axes_of(variable: Any) -> Axes | None:
    """The mesh's axes along which a variable is cut; None where no distribution holds for it."""
    return None if variable._layout is None else tuple(variable._layout.axes)


def place(variable: Any, axes: Axes, distribution: Any) -> None:
    """Settle where a variable without a value shall lie; an axis that does not divide it is none.

    Args:
        variable: it has a shape.
        axes: one for each of its own.
        distribution: the one that is set.
    """
    sizes = mesh_sizes(distribution)
    pairs = zip(axes, variable.shape, strict=True)
    fit = [a if a and size % sizes[a] == 0 else None for a, size in pairs]
    variable._layout = keras.distribution.TensorLayout(fit, distribution.device_mesh)


def place_as_told(variable: Any, distribution: Any) -> None:
    """Settle it as the distribution itself says."""
    variable._layout = distribution.get_variable_layout(variable)


def layout_map(distribution: Any) -> Any | None:
    """The rules of a `ModelParallel`; None for another kind of distribution."""
    return getattr(distribution, "_layout_map", None)


def told(variable: Any, but_not: str, distribution: Any) -> Axes | None:
    """What a rule says of a variable itself, if it does not say it of the path `but_not` too."""
    rules = layout_map(distribution) or {}
    for pattern in rules:
        if re.fullmatch(pattern, variable.path) and not re.fullmatch(pattern, but_not):
            axes = tuple(rules[pattern].axes)
            return axes if len(axes) == len(variable.shape) else None
    return None


@contextlib.contextmanager
def placed_first(layer: Any, settle: Callable[[Any], None]) -> Iterator[None]:
    """In this scope, new variables of a layer get their places before they get their values.

    Args:
        layer: a layer or model.
        settle: called at the end; it gives each variable its place.
    """
    if current() is None or build.is_abstract():
        yield
        return
    with build.abstract():
        yield
    settle(current())
    for variable in layer.variables:
        if not build.is_initialized(variable):
            backend.ops.initialize_at_random(variable)
            build.mark_initialized(variable)
