"""The only place where one Keras backend is treated otherwise than another.

`ops` is the module of the backend in use: `jax`, `torch` or `tensorflow` beside this file, each
with the same functions (see `puna/backend/protocol.py`). Everything else in Puna is `keras.ops`.
Importing this package chooses the backend and imports Keras.
"""

from puna.backend.select import choose_backend

choose_backend()

import importlib  # noqa: E402
from typing import cast  # noqa: E402

import keras  # noqa: E402

from puna.backend.protocol import BackendOps  # noqa: E402

name: str = keras.backend.backend()
ops = cast(BackendOps, importlib.import_module(f"puna.backend.{name}"))

__all__ = ["name", "ops"]
