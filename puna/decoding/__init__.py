"""Decoding: prompts in, tokens out; each tier knows only the one below it."""

import puna.backend as _backend  # chooses the backend before any module imports Keras

__all__: list[str] = []
del _backend
