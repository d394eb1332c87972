"""A quantized weight matrix, as products take it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Packed(NamedTuple):
    """Small numbers with scales; the fields are arrays of the backend, or NumPy's."""

    # int8 or float8_e4m3fn [out, in]; uint8 [out, ceil(in / 2)], the even input in the lower half
    data: Any
    scale: Any  # [out, groups], float32 or half precision
    low: Any | None  # like scale: a weight is scale * q + low
    in_features: int
    group: int  # inputs that share a scale: a multiple of 32, or all

    @property
    def is_4_bit(self) -> bool:
        """Whether a byte holds two numbers, from 0 to 15; without `low`, each stands for q - 8."""
        return "uint8" in str(self.data.dtype)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Data, scale and, if there is one, low."""
        return self[:2] if self.low is None else self[:3]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return int(self.data.shape[0]), self.in_features
