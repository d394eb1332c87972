"""What a linear layer and the embedding share: a matrix `(out, in)`, as it is or quantized."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras.quantizers import QuantizationConfig

from puna import backend
from puna.backend import build, placement
from puna.backend.memory import numpy_dtype
from puna.backend.packed import Packed
from puna.backend.protocol import Tensor
from puna.errors import ConfigError
from puna.quantization.arrays import LOW, PACKED, SCALE, WEIGHT, arrays_of, variables
from puna.quantization.rounding import quantize
from puna.quantization.scheme import Scheme


class MatrixLayer(keras.layers.Layer):
    """A layer of one matrix, which `quantize` turns into small numbers and scales.

    Keras's own way, a quantized dtype policy, is refused: it has no int8 beside float16 and no
    group sizes, and would call `quantized_call`, where blocks call `call`. The layer's `scheme`
    says how it is quantized, and `quantization_mode` what Keras calls that.

    A subclass says its `matrix_shape` and calls `add_matrix` in `build`.

    Args:
        initializer_range: standard deviation of a freshly made matrix.

    Raises:
        ConfigError: the dtype is one of Keras's quantized policies.
    """

    def __new__(cls, *args, **kwargs):
        return with_own_quantize(super().__new__(cls, *args, **kwargs))

    def __init__(self, *, initializer_range: float, **kwargs):
        super().__init__(**kwargs)
        if isinstance(self.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            raise ConfigError(
                f"{self.name} got the dtype policy {self.dtype_policy.name!r}, of Keras's own "
                "quantization, which Puna does not compute; expected one such as 'bfloat16' or "
                "'mixed_bfloat16': give that, and call model.quantize"
            )
        self.initializer_range = initializer_range
        self.scheme: Scheme | None = None  # to be set before `build` where it is known then
        self.weight: Any = None
        self.weight_packed: Any = None
        self.weight_scale: Any = None
        self.weight_low: Any = None
        # The axes of a device mesh along which outputs and inputs are cut, where a distribution
        # is set; all variables follow them.
        self.cut: tuple[str | None, str | None] | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        raise NotImplementedError

    @property
    def quantization_mode(self) -> str | None:
        """Keras's name of how the matrix is quantized, as int8; None where it is not."""
        return None if self.scheme is None else self.scheme.name

    def matrix(self, dtype: str | None = None) -> Tensor | Packed:
        """The matrix, as `backend.ops.linears` takes it.

        Args:
            dtype: of one that is not quantized; None means its own.
        """
        if self.scheme is None:
            return backend.ops.value(self.weight, dtype)
        value, (_, in_features) = backend.ops.value, self.matrix_shape
        return Packed(
            value(self.weight if self.weight_packed is None else self.weight_packed),
            value(self.weight_scale),
            None if self.weight_low is None else value(self.weight_low),
            in_features,
            self.scheme.group_size or in_features,
        )

    def settle(self, distribution: Any) -> None:
        """Give variables their places on a distribution's devices, by `cut`."""
        out, inputs = self.cut or (None, None)
        root = self.path or self.name
        for variable in self.weights:
            part = variable.path.removeprefix(f"{root}/").split("/")[0]
            axes = {"lora_A": (None, inputs), "lora_B": (out, None)}.get(part, (out, inputs))
            if not part.startswith((WEIGHT, "bias")) or part in (SCALE, LOW):
                axes = placement.told(variable, f"{root}/{WEIGHT}", distribution) or axes
            if not placement.has_place(variable):
                placement.place(variable, axes[: len(variable.shape)], distribution)

    def added(self) -> contextlib.AbstractContextManager[None]:
        """A scope in which a built layer gets variables more, which follow the matrix."""
        return placement.placed_first(self, self.settle)

    def add_matrix(self) -> None:
        """Make the variables; those of a quantized matrix hold noise of the same spread."""
        if self.scheme is None:
            self.weight = self.add_weight(
                name=WEIGHT,
                shape=self.matrix_shape,
                initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
            )
            return
        self._add_packed(self.scheme, _noise(self.scheme, self.initializer_range))

    def set_scheme(self, scheme: Scheme | None, *, matrix: np.ndarray | None = None) -> None:
        """Take the form that a scheme asks for; of a built layer, the matrix is replaced.

        Args:
            scheme: it is made to fit. None only where the layer has none yet.
            matrix: what to quantize; None leaves noise, or nothing where variables get no memory.
        """
        scheme = scheme and scheme.fit(self.matrix_shape[1], self.variable_dtype)
        if scheme is None or not self.built:
            self.scheme = scheme
            return
        initial = _noise(scheme, self.initializer_range)
        if matrix is not None:
            packed = quantize(matrix, scheme, name=self.path or self.name)
            initial = {name: _Constant(array) for name, array in arrays_of(packed).items()}
        with self.added(), build.changed_weights(self):
            # Not `del self.weight`: Keras then collects all garbage, for each layer anew.
            self._untrack_variable(self.weight)
            self.weight, self.scheme = None, scheme
            self._add_packed(scheme, initial)

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Replace the matrix by small numbers and scales, which are not trained.

        Args:
            mode: "int8", "int4" or "float8"; None where `config` is given.
            type_check: as Keras has it; there is nothing to check.
            config: the scheme, or Keras's config; None means that of the mode's name.

        Raises:
            ConfigError: the layer is not built or already quantized, there is no such scheme, or
                the matrix holds NaN or infinite numbers.
        """
        del type_check
        scheme = scheme_of(mode, config)
        if not self.built:
            raise ConfigError(f"{self.name} has no weights yet; build the model, then quantize it")
        if self.scheme is not None:
            raise ConfigError(
                f"{self.path} is already quantized ({self.scheme}); load the full-precision model "
                "again to quantize it otherwise"
            )
        self.set_scheme(scheme, matrix=backend.ops.to_numpy(self.weight))

    def _add_packed(self, scheme: Scheme, initial: Mapping[str, Any]) -> None:
        for name, (shape, dtype) in variables(self.matrix_shape, scheme).items():
            variable = self.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer=initial[name],
                trainable=False,
                autocast=False,
            )
            setattr(self, name, variable)

    def save_own_variables(self, store: Any) -> None:
        """As Keras saves them in a file of its own."""
        super().save_own_variables(self._stored(store))

    def load_own_variables(self, store: Any) -> None:
        """The inverse of `save_own_variables`."""
        super().load_own_variables(self._stored(store))

    def _stored(self, store: Any) -> Any:
        is_float = self.scheme is not None and self.scheme.kind == "float"
        return _BitsStore(store) if is_float else store


class _BitsStore:
    """Keras's place for a layer's variables, whose files know no float8: its bits are in uint8."""

    def __init__(self, store: Any):
        self._store = store

    def keys(self) -> Iterable[str]:
        return self._store.keys()

    def __setitem__(self, key: str, variable: Any) -> None:
        is_float8 = variable.dtype == _FLOAT8.name
        self._store[key] = backend.ops.to_numpy(variable).view(np.uint8) if is_float8 else variable

    def __getitem__(self, key: str) -> Any:
        array = self._store[key]
        if array.dtype != np.uint8:
            return array
        return backend.ops.to_device(np.array(array).view(_FLOAT8))


_FLOAT8 = numpy_dtype("float8_e4m3fn")


class _Constant:
    """An initializer: an array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Tensor:
        del shape, dtype
        # Not NumPy's array, of which Keras on torch takes no float8.
        return backend.ops.to_device(self.array)


def with_own_quantize(layer: Any) -> Any:
    """A layer just made by `__new__`, without what Keras has put around its `quantize`.

    That resolves mode and config to one of Keras's own configs before `quantize` sees them, and
    refuses any other.
    """
    layer.quantize = functools.partial(type(layer).quantize, layer)
    return layer


def scheme_of(mode: str | None, config: Any, **changes: Any) -> Scheme:
    """The scheme that Keras's arguments of `quantize` ask for.

    Args:
        mode: "int8", "int4" or "float8"; may be None where `config` is given.
        config: a scheme, or Keras's `Int8QuantizationConfig` or `Int4QuantizationConfig`, whose
            `block_size` is the group's. What it says of activations is not heeded: they stay as
            they are.
        changes: fields of the scheme to have otherwise.

    Raises:
        ConfigError: there is no such scheme, or the two contradict each other.
    """
    scheme = config
    if isinstance(config, QuantizationConfig) and config.mode == "float8":
        raise ConfigError(
            f"{type(config).__name__} asks for Keras's float8, which trains with scales of its "
            "own for inputs and gradients and is not computed here; for weights stored in float8, "
            "call quantize('float8') of Puna's model, or give Scheme.parse('float8') as config"
        )
    if isinstance(config, QuantizationConfig) and config.mode in ("int8", "int4"):
        if config.weight_quantizer is not None:
            raise ConfigError(
                f"{type(config).__name__} has a weight_quantizer of its own, which is not used; "
                "leave it out, or give a puna.quantization.scheme.Scheme as config"
            )
        block = getattr(config, "block_size", None)
        scheme = Scheme(bits=int(config.mode[3:]), group_size=None if block == -1 else block)
    if config is None and mode is not None:
        return Scheme.parse(mode, **changes)
    if not isinstance(scheme, Scheme) or mode not in (None, scheme.name):
        raise ConfigError(
            f"quantize got mode={mode!r:.80} and config={config!r:.120}; expected 'int8', "
            "'int4' or 'float8', or a puna.quantization.scheme.Scheme as config"
        )
    return Scheme.parse(scheme, **changes)


def _noise(scheme: Scheme, spread: float) -> dict[str, Any]:
    """An initializer for each variable: numbers that are all equally likely."""
    deviation = (2**scheme.bits) / 12**0.5
    if scheme.kind == "float":
        deviation = float(_without_nan(np.arange(256)).view(_FLOAT8).astype(np.float32).std())

    def numbers(shape: tuple[int, ...], dtype: Any = None) -> Any:
        # Keras's own generators make no numbers of 8 bits on every backend.
        del dtype
        drawn = np.random.randint(0, 256, shape, np.uint8)
        drawn = _without_nan(drawn) if scheme.kind == "float" else drawn
        return backend.ops.to_device(drawn.view(numpy_dtype(scheme.number_dtype)))

    middle = 7.5 if scheme.bits == 4 else -0.5
    return {
        WEIGHT: numbers,
        PACKED: numbers,
        SCALE: keras.initializers.Constant(spread / deviation),
        LOW: keras.initializers.Constant(-middle * spread / deviation),
    }


def _without_nan(bits: np.ndarray) -> np.ndarray:
    """Float8's bits, with zero for the two of 256 that are no number."""
    return np.where(bits % 128 == 127, 0, bits).astype(np.uint8)
