"""Reading `.keras` files in a fresh process."""

from __future__ import annotations

import os
from typing import Any

import keras


def load_model(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Keras's `load_model`, which knows Puna's classes once this module is imported.

    Args:
        path: a `.keras` file that `model.save(path)` wrote.
        **kwargs: as Keras has them.
    """
    return keras.saving.load_model(path, **kwargs)
