"""Building a model without allocating its weights.

The names that Keras keeps private are used here and in the backend modules only; pyproject.toml
bounds the version of Keras, and tests/unit/test_build.py fails where they change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope

_PENDING = "uninitialized_variables"


@contextlib.contextmanager
def abstract() -> Iterator[None]:
    """Variables made in this scope have shapes and dtypes, and no memory until initialised."""
    pending = list(global_state.get_global_attribute(_PENDING) or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Keras would otherwise initialise them at random when the next scope ends.
        global_state.set_global_attribute(_PENDING, pending)


def is_abstract() -> bool:
    """Whether variables that are made now get no memory."""
    scope = get_stateless_scope()
    return scope is not None and not scope.initialize_variables


def is_initialized(variable: Any) -> bool:
    """Whether a variable has memory."""
    return variable._value is not None


def mark_initialized(variable: Any) -> None:
    """Let go of the initializer of a variable that got its value from elsewhere."""
    variable._initializer = None


def replace_weight(layer: Any, attribute: str, value: np.ndarray) -> None:
    """Put a variable of another shape in the place of a built layer's, where Keras looks for it.

    It has the old one's path, dtype and trainable flag. A built layer's variables are locked and
    its name scope is closed, hence the private names.

    Args:
        layer: a built layer.
        attribute: the weight's attribute, which is the variable's name too.
        value: of the new variable; it is copied.
    """
    old = getattr(layer, attribute)
    tracked_as_trainable = any(variable is old for variable in layer._trainable_variables)
    layer._untrack_variable(old)
    with changed_weights(layer):
        new = layer.add_weight(
            name=old.name,
            shape=value.shape,
            initializer=lambda shape, dtype=None: value,
            dtype=old._dtype,
            trainable=tracked_as_trainable,
            autocast=old._autocast,
        )
        setattr(layer, attribute, new)
    new.trainable = old.trainable


@contextlib.contextmanager
def changed_weights(layer: Any) -> Iterator[None]:
    """In this scope, variables of a built layer may come and go, and get paths like the others."""
    layer._tracker.unlock()
    try:
        with layer._open_name_scope():
            yield
    finally:
        layer._tracker.lock()


def add_weight_under(
    layer: Any, scopes: Sequence[str], shape: tuple[int, ...], initializer: Any
) -> Any:
    """Add a variable in float32 to a built layer, whatever the layer's own dtype.

    Args:
        layer: a built layer.
        scopes: what stands between the layer's path and the variable's name, which is "weight";
            `add_weight` takes no such thing.
        shape: the variable's.
        initializer: Keras's, or a function of shape and dtype.
    """
    with changed_weights(layer), contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        variable = keras.Variable(
            initializer, shape=shape, dtype="float32", autocast=False, name="weight"
        )
        layer._track_variable(variable)
    return variable


def retrack(model: Any) -> None:
    """Let every layer of a model forget the variables that one below it no longer has.

    On torch, layers hold the parameters of all that is inside them.
    """
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


def is_built_for(optimizer: Any, variables: Sequence[Any]) -> bool:
    """Whether an optimizer, if it has been used at all, knows all of these variables."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # LossScaleOptimizer
    if optimizer is None or not optimizer.built:
        return True
    known = {id(variable) for variable in optimizer._trainable_variables}
    return all(id(variable) in known for variable in variables)
