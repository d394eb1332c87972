"""Which backend Keras shall use, decided before Keras is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from puna.errors import BackendError

# What Keras writes to keras.json on its first import, whatever backend that import used. A file
# that says just this is nobody's choice.
_WRITTEN_BY_KERAS = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}

BACKENDS = ("jax", "torch", "tensorflow")


def choose_backend() -> str | None:
    """Set `KERAS_BACKEND` where nobody has chosen and Keras's own choice would not run.

    A choice is `KERAS_BACKEND`, an imported Keras, or a `keras.json` that somebody edited and that
    names an installed backend. Else the first of jax, torch and tensorflow that is installed is
    taken.

    Returns:
        The backend chosen here, or None where the choice was made elsewhere.

    Raises:
        BackendError: where none of the three is installed.
    """
    if "keras" in sys.modules or os.environ.get("KERAS_BACKEND"):
        return None
    if (configured := _configured_backend()) is not None and _is_installed(configured):
        return None
    for backend in BACKENDS:
        if _is_installed(backend):
            os.environ["KERAS_BACKEND"] = backend
            return backend
    raise BackendError(
        "no Keras backend is installed; expected one of jax, torch and tensorflow. "
        "Install one, for example: pip install 'puna[jax]'"
    )


def _configured_backend() -> str | None:
    home = os.environ.get("KERAS_HOME")
    path = (Path(home) if home else Path.home() / ".keras") / "keras.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(settings, dict) or settings == _WRITTEN_BY_KERAS:
        return None
    backend = settings.get("backend")
    return backend if isinstance(backend, str) else None


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
