"""Building a model without allocating its weights.

The names that Keras keeps private are used here and in the backend modules only; pyproject.toml
bounds the version of Keras, and tests/unit/test_build.py fails where they change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state

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


def is_initialized(variable: Any) -> bool:
    """Whether a variable has memory."""
    return variable._value is not None


def mark_initialized(variable: Any) -> None:
    """Let go of the initializer of a variable that got its value from elsewhere."""
    variable._initializer = None


def initialize_at_random(variable: Any) -> None:
    """Give a variable that was built in `abstract` its initializer's value."""
    variable._deferred_initialize()
