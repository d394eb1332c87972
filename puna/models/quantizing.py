"""`Model.quantize` of a Llama: which matrices, and by which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from puna.backend import build
from puna.errors import ConfigError
from puna.layers.matrix import MatrixLayer, scheme_of, with_own_quantize
from puna.quantization.scheme import Filter, Recipe, Scheme

_UNSET: Any = object()


class Quantizable:
    """The part of a backbone or causal LM that turns its matrices into small numbers and scales."""

    def __new__(cls, *args, **kwargs):
        return with_own_quantize(super().__new__(cls, *args, **kwargs))

    def matrices(self) -> dict[str, MatrixLayer]:
        """The layers that can be quantized, under the checkpoint's names for them."""
        raise NotImplementedError

    def quantization(self) -> dict[str, Scheme]:
        """The names of the matrices that are quantized, and how."""
        return {name: layer.scheme for name, layer in self.matrices().items() if layer.scheme}

    def quantize(
        self,
        mode: str | None = None,
        config: Any = None,
        filters: Filter = None,
        *,
        group_size: int | None = _UNSET,
        symmetric: bool = True,
        overrides: Mapping[str, str | Scheme | None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace matrices by small numbers and scales: all linear layers, embedding and head.

        Norms and biases stay. What is quantized is not trained any more; `from_preset` with
        `quantization` never holds the full-precision model. A tied embedding is one matrix, which
        serves as the head too. What shall be saved for transformers (5.24) needs its embedding as
        it was, since it opens no packed one: `overrides={"embed_tokens": None}`.

        Args:
            mode: "int8" (a scale for each row), "int4" (for each 32 inputs of a row) or "float8"
                (e4m3, a scale for each row). That is how weights are stored; Keras's own "float8",
                which trains in it, is something else and refused. None where `config` or
                `overrides` alone say what to do.
            config: a scheme instead of a mode, or Keras's `Int8QuantizationConfig` or
                `Int4QuantizationConfig`.
            filters: only matrices are quantized in whose names, such as
                `model.layers.0.mlp.up_proj`, this regular expression or one of these is found; or
                those of whose layers this function is true.
            group_size: inputs that share a scale: 32, 64, 128, or None for all; left out, the
                mode's own. See `Scheme.fit` for matrices that it does not divide.
            symmetric: False gives each group a minimum of its own.
            overrides: regular expressions with another scheme each, or None to leave a matrix as it
                is; the first that is found in a name decides, before `filters`.
            **kwargs: `type_check`, as Keras has it; there is nothing to check.

        Raises:
            TypeError: an argument is not known.
            ConfigError: there is no such scheme, a regular expression is found in no name, or a
                matrix is quantized already or holds NaN or infinite numbers.

        >>> from puna.testing import tiny_model
        >>> model = tiny_model()
        >>> model.quantize("int4", group_size=32, overrides={"lm_head": "int8"})
        >>> model.quantization()["lm_head"].name
        'int8'
        """
        if unknown := kwargs.keys() - {"type_check"}:
            raise TypeError(f"quantize takes no {', '.join(sorted(unknown))}")
        changes: dict[str, Any] = {} if group_size is _UNSET else {"group_size": group_size}
        changes |= {} if symmetric else {"symmetric": False}
        asks = mode is not None or config is not None or not overrides
        recipe = Recipe(
            default=scheme_of(mode, config, **changes) if asks else None,
            filters=filters,
            overrides=dict(overrides or {}),
        )
        if recipe.default is None and not recipe.overrides:
            raise ConfigError(
                "quantize got neither a mode nor overrides; expected 'int8', 'int4' or 'float8'"
            )
        matrices = self.matrices()
        schemes = recipe.schemes(matrices)
        if done := [name for name in schemes if matrices[name].scheme is not None]:
            raise ConfigError(
                f"{len(done)} matrices are already quantized, such as {done[0]}; load the "
                "full-precision model again to quantize it otherwise"
            )
        for name, scheme in schemes.items():
            matrices[name].quantize(config=scheme)
        model = cast("Any", self)
        build.retrack(model)
        # Keras's own compiled steps hold on to the variables that they were traced with.
        model.train_function = model.test_function = model.predict_function = None

    def set_schemes(self, schemes: Mapping[str, Scheme | dict[str, Any]]) -> None:
        """Give matrices the form of a quantized one, without numbers of any meaning.

        Args:
            schemes: under the names of matrices, a scheme or its fields.

        Raises:
            ConfigError: there is no matrix of a name.
        """
        matrices = self.matrices()
        for name, scheme in schemes.items():
            if name not in matrices:
                raise ConfigError(
                    f"quantization names {name!r}, and the model has no such matrix; it has "
                    f"{', '.join(list(matrices)[:3])} and {len(matrices) - 3} more"
                )
            matrices[name].set_scheme(scheme if isinstance(scheme, Scheme) else Scheme(**scheme))
