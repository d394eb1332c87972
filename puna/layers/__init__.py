"""The layers of a Llama, plain: one device, no adapters; their matrices may be quantized."""

import puna.backend as _backend  # chooses the backend before any layer imports Keras

__all__: list[str] = []
del _backend
