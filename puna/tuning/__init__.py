"""Training: rows of text to batches, which `fit` takes."""

import puna.backend as _backend  # chooses the backend before any module imports Keras
from puna.tuning.files import Rows, read_rows
from puna.tuning.text_data import TextData

__all__ = ["Rows", "TextData", "read_rows"]
del _backend
