"""The token embedding, which may be the head too."""

from __future__ import annotations

from keras import ops

from puna import backend
from puna.backend.protocol import Tensor
from puna.layers.matrix import MatrixLayer


class Embedding(MatrixLayer):
    """Look up rows of a weight `(vocabulary, width)`.

    Args:
        vocabulary_size: rows, V.
        width: features of a row, D.
        initializer_range: standard deviation of a freshly made weight.
    """

    def __init__(
        self, vocabulary_size: int, width: int, *, initializer_range: float = 0.02, **kwargs
    ):
        super().__init__(initializer_range=initializer_range, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.width = width

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(vocabulary, width)`."""
        return self.vocabulary_size, self.width

    def build(self, input_shape=None):
        del input_shape
        self.add_matrix()

    def call(self, token_ids_BT: Tensor) -> Tensor:
        """`[B, T]` ids to `[B, T, D]` in the compute dtype."""
        rows_BTD = backend.ops.embed(self.matrix(), token_ids_BT)
        return ops.cast(rows_BTD, self.compute_dtype)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, V]` in float32, where the head is tied to the embedding."""
        return backend.ops.linear(x_BTD, self.matrix(self.compute_dtype), "float32")
