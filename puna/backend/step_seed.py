"""Random numbers that depend on the step alone, where a backend draws them by itself.

On PyTorch, Keras's dropout draws from the process's own generator where its seed generator was
given no seed, and so does each iterator over batches. On JAX and TensorFlow seeds are variables,
and a checkpoint has them.
"""

from __future__ import annotations

import keras
import numpy as np


def seed_step(seed: int, step: int) -> None:
    """Seed the backend's own generators, if it has any.

    Args:
        seed: of the run.
        step: the number of the step to come.
    """
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
