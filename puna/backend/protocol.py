"""What each backend's module offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Tensor = Any  # jax.Array, torch.Tensor or tf.Tensor


class BackendOps(Protocol):
    """The functions of `puna.backend.jax`, `.torch` and `.tensorflow`."""

    def linear(self, x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
        """Multiply `x` [..., in] by the transpose of `weight` [out, in], sums in float32.

        Both have the compute dtype; the result [..., out] has `out_dtype`.
        """
        ...

    def embed(self, weight: Tensor, token_ids: Tensor) -> Tensor:
        """Rows of `weight` [V, D] in its own dtype: int [B, T] to [B, T, D]."""
        ...

    def attention(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask_B1TS: Tensor,
        scale: float,
        dropout: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Softmax attention over grouped heads, in the query's dtype [B, N, T, H].

        Query head n reads key head n // (N / K). The mask is true where a query may look; each
        query must be allowed to look somewhere. `dropout` is applied to the softmax's weights.
        """
        ...

    def cache_dtype(self, compute_dtype: str) -> str:
        """The dtype in which keys and values of `compute_dtype` are kept."""
        ...

    def cache_write(self, cache_BKSH: Tensor, new_BKTH: Tensor, start_B: Tensor) -> Tensor:
        """Put `new` at positions `start[b] + 0..T-1` of row b; the old cache must not be used."""
        ...

    def prepare(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The array in a dtype and in memory that `initialize` takes as it is; runs in any thread.

        Returns:
            The array itself where it will do, else a copy.
        """
        ...

    def initialize(self, variable: Any, array: np.ndarray) -> None:
        """Give a Keras variable its first value, without a copy where the backend allows it.

        The array's memory may become the variable's: nobody may write to it afterwards. When this
        returns, the array has been read unless it is aliased.
        """
        ...

    def aliases(self, array: np.ndarray) -> bool:
        """Whether `initialize` keeps using the array's memory."""
        ...

    def to_numpy(self, variable: Any) -> np.ndarray:
        """The variable's value in its own dtype (ml_dtypes for bfloat16), not to be written to."""
        ...

    def compile_step(
        self, function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """`function` of tensors, compiled for each new set of shapes, without gradients.

        Args:
            function: reads `variables` and its arguments, changes nothing.
            variables: Keras variables whose current values each call uses.
            donate: positions of arguments whose memory the call may take over.
        """
        ...
