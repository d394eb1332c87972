"""Low-rank adapters beside a matrix: LoRA, rank-stabilised LoRA and DoRA.

`y = W x + s · B (A x)`: W stays as it is, in floats or quantized, and `A (r, in)` and `B (out, r)`
are trained, in float32. With DoRA each row of `W + s · B A` is brought to a length of its own,
which is trained too.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685); rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732);
DoRA, Liu et al. 2024 (arXiv:2402.09353); how they start and what gradients they have, as PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from puna import backend
from puna.backend import build
from puna.backend.generic import dequantize
from puna.backend.packed import Packed
from puna.backend.protocol import Tensor
from puna.errors import ConfigError
from puna.layers.matrix import MatrixLayer

_CHUNK = 1 << 20  # elements merged at a time: 4 MB of float32


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What an adapter of one matrix is like.

    Args:
        rank: r, rows of A and columns of B.
        alpha: its strength; the scale is alpha / rank. None means the rank, a scale of 1.
        dropout: share of the inputs that A does not see, in training only.
        rslora: the scale is alpha / √rank.
        dora: rows have lengths of their own.

    Raises:
        ConfigError: a number is out of range.

    >>> LoraSettings(rank=8, alpha=16).scale
    2.0
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank is {self.rank!r:.80}; expected a whole number, 1 or more")
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.rank)
        for name, low, high in (("alpha", 0, math.inf), ("dropout", -math.inf, 1)):
            number = getattr(self, name)
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not is_number or not low < number < high or (name == "dropout" and number < 0):
                wanted = "a number above 0" if name == "alpha" else "a number from 0 to below 1"
                raise ConfigError(f"{name} is {number!r:.80}; expected {wanted}")

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        assert self.alpha is not None
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_config(self) -> dict[str, Any]:
        """The fields, as JSON."""
        return dataclasses.asdict(self)


@dataclass(eq=False)
class Adapter:
    """One adapter of one matrix.

    Args:
        settings: what it is like.
        a: float32 variable (r, in).
        b: float32 variable (out, r).
        magnitude: float32 variable (out,), the lengths of DoRA's rows, or None.
        strength: what its scale is multiplied by, where it is one of several.
    """

    settings: LoraSettings
    a: Any
    b: Any
    magnitude: Any = None
    strength: float = 1.0

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by now."""
        return self.settings.scale * self.strength

    def variables(self) -> dict[str, Any]:
        """Its variables under PEFT's names for them."""
        parts = {"lora_A": self.a, "lora_B": self.b, "lora_magnitude_vector": self.magnitude}
        return {name: variable for name, variable in parts.items() if variable is not None}


class AdaptedMatrix(MatrixLayer):
    """A matrix that may have adapters beside it, each under a name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.adapters: dict[str, Adapter] = {}
        self.strengths: Mapping[str, float] = {}  # of the adapters that are chosen
        self.in_use: tuple[Adapter, ...] = ()  # those of them that are not merged
        self.is_merged = False
        self._base: np.ndarray | None = None
        self.lora_seed: keras.random.SeedGenerator | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether a product takes more than the matrix."""
        return bool(self.in_use)

    @property
    def has_lost_base(self) -> bool:
        """Whether adapters are merged, and the matrix cannot be put back as it was before."""
        is_changed = self.is_merged and any(name in self.adapters for name in self.strengths)
        return is_changed and (self._base is None or self.scheme is not None)

    def constants(self) -> tuple[Any, ...]:
        """What a compiled product depends on, beside its variables."""
        return tuple((adapter.settings, adapter.strength) for adapter in self.in_use)

    def add_adapter(self, name: str, settings: LoraSettings) -> Adapter:
        """Put an adapter beside the matrix, which changes nothing until it is trained or loaded.

        A starts as PEFT's does, evenly in ± 1/√in, and B at 0.
        """
        out_features, in_features = self.matrix_shape
        bound = in_features**-0.5
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "lora_A": (
                (settings.rank, in_features),
                keras.initializers.RandomUniform(-bound, bound),
            ),
            "lora_B": ((out_features, settings.rank), keras.initializers.Zeros()),
        }
        if settings.dora:
            shapes["lora_magnitude_vector"] = ((out_features,), self._lengths())
        with self.added():
            made = {
                part: build.add_weight_under(self, (part, name), shape, initializer)
                for part, (shape, initializer) in shapes.items()
            }
        if settings.dropout and self.lora_seed is None:
            with build.changed_weights(self):
                self.lora_seed = keras.random.SeedGenerator()
        adapter = Adapter(settings, *made.values())
        self.adapters[name] = adapter
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        adapter = self.adapters.pop(name)
        self.in_use = tuple(other for other in self.in_use if other is not adapter)
        with build.changed_weights(self):
            for variable in adapter.variables().values():
                self._untrack_variable(variable)

    def use_adapters(self, strengths: Mapping[str, float]) -> None:
        """Compute with these, as far as the layer has them, and with no others."""
        self.strengths = dict(strengths)
        for name, adapter in self.adapters.items():
            adapter.strength = strengths.get(name, 1.0)
        chosen = [self.adapters[name] for name in strengths if name in self.adapters]
        self.in_use = () if self.is_merged else tuple(chosen)

    def with_adapters(self, x: Tensor, y: Tensor, out_dtype: str, training: bool) -> Tensor:
        """What the matrix makes of `x` [..., in], `y` [..., out], and the adapters in use add."""
        linear, value, dtype = backend.ops.linear, backend.ops.value, self.compute_dtype
        for adapter in self.in_use:
            seen = x
            if training and adapter.settings.dropout:
                seen = keras.random.dropout(x, adapter.settings.dropout, seed=self.lora_seed)
            inner = linear(seen, value(adapter.a, dtype), "float32") * adapter.scale
            if adapter.magnitude is None:
                y = y + linear(inner, value(adapter.b, dtype), out_dtype)
                continue
            # In float32, as a factor that is rounded moves a whole row.
            added, wide = linear(inner, value(adapter.b, dtype), "float32"), ops.cast(y, "float32")
            factor = self._dora_factor(adapter)
            if seen is x:
                wide = factor * (wide + added)
            else:  # what DoRA adds to the matrix's own product sees the dropout too
                own = linear(seen, self.matrix(dtype), "float32")
                wide = wide + (factor - 1.0) * own + factor * added
            y = ops.cast(wide, out_dtype)
        return y

    def merged_matrix(self) -> np.ndarray:
        """The matrix with the adapters in use added to it, in its own dtype."""
        old = backend.ops.to_numpy(self.weight)
        parts = []
        for adapter in self.in_use:
            left, right = (backend.ops.to_numpy(variable) for variable in (adapter.b, adapter.a))
            lengths = None if adapter.magnitude is None else backend.ops.to_numpy(adapter.magnitude)
            parts.append((left, right * np.float32(adapter.scale), lengths))
        new = np.empty(old.shape, old.dtype)
        step = max(1, _CHUNK // max(1, old.shape[1]))
        for start in range(0, old.shape[0], step):
            span = slice(start, start + step)
            block = old[span].astype(np.float32)
            for left, right, lengths in parts:
                block += left[span] @ right
                if lengths is not None:
                    block *= (lengths[span] / np.linalg.norm(block, axis=1))[:, None]
            new[span] = block.astype(old.dtype)
        return new

    def merge(self, keep: bool) -> None:
        """Add the adapters in use to the matrix, which is not quantized.

        Args:
            keep: whether the matrix as it was is kept in memory, for `unmerge`.
        """
        if self.in_use:
            new = self.merged_matrix()
            self._base = np.array(backend.ops.to_numpy(self.weight)) if keep else None
            backend.ops.assign(self.weight, new)
        self.in_use, self.is_merged = (), True

    def unmerge(self) -> None:
        """Put the matrix back as it was, to the bit."""
        if self._base is not None:
            backend.ops.assign(self.weight, self._base)
        self._base, self.is_merged = None, False
        self.use_adapters(self.strengths)

    def _dora_factor(self, adapter: Adapter) -> Tensor:
        """What rows of W + s · B A are multiplied by, float32 [out]; their lengths are fixed."""
        a, b = (backend.ops.value(variable) for variable in (adapter.a, adapter.b))
        rows = self._float_matrix() + ops.matmul(b, a) * adapter.scale
        lengths = ops.stop_gradient(ops.sqrt(ops.sum(ops.square(rows), axis=1)))
        return backend.ops.value(adapter.magnitude) / lengths

    def _float_matrix(self) -> Tensor:
        matrix = self.matrix("float32")
        return dequantize(matrix, "float32") if isinstance(matrix, Packed) else matrix

    def _lengths(self) -> Any:
        """An initializer: the lengths of the matrix's rows."""

        def lengths(shape: tuple[int, ...], dtype: Any = None) -> Tensor:
            del shape, dtype
            return ops.sqrt(ops.sum(ops.square(self._float_matrix()), axis=1))

        held = self.weight if self.weight_packed is None else self.weight_packed
        return lengths if build.is_initialized(held) else keras.initializers.Ones()
