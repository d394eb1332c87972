"""Models from presets, and presets from models: where checkpoints and model classes meet."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from puna import backend, distribution
from puna.backend import build
from puna.checkpoint import compressed_tensors, hub
from puna.checkpoint.gguf import GGUFSource
from puna.checkpoint.gguf_packed import SCHEMES, DequantizedWarning
from puna.checkpoint.load import load_weights as fill
from puna.checkpoint.packed_files import Matrix
from puna.checkpoint.packed_source import DequantizedSource, PackedSource, with_scale_dtypes
from puna.checkpoint.peft_config import CONFIG as ADAPTER_CONFIG
from puna.checkpoint.peft_config import AdapterConfig
from puna.checkpoint.preset import Preset
from puna.checkpoint.readers import is_adapter
from puna.checkpoint.save import save_directory
from puna.checkpoint.source import TensorSource
from puna.config import LlamaConfig
from puna.errors import ConfigError, PresetError, TokenizerError
from puna.models.adapter_files import merged_tensors, save_adapter_preset
from puna.quantization.scheme import Quantization, Recipe

if TYPE_CHECKING:
    from puna.models.backbone import Llama3Backbone
    from puna.models.causal_lm import Llama3CausalLM
    from puna.models.preprocessor import Llama3CausalLMPreprocessor
    from puna.models.tokenizer import Llama3Tokenizer

NONE = "none"  # of `quantization`: what is quantized shall be dequantized

_UNSET: Any = object()
_MOST_ADAPTERS = 8  # one upon the other


def open_preset(
    preset: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    weights: bool = True,
    revision: str | None = None,
) -> Preset:
    """A preset's files, fetched where it is an address; an adapter's base is found and opened.

    Args:
        preset: as in `CausalLM.from_preset`; the directory or address of an adapter too, which
            names its base.
        adapter: the directory or address of an adapter to merge into it.
        weights: whether the weights are needed; without them no adapter is merged.
        revision: a branch, tag or commit of the Hub, where the address names none.

    Raises:
        PresetError: something is not there, or an adapter's base cannot be found.
    """
    path = hub.locate(preset, weights=weights, revision=revision)
    adapters: list[Path] = []
    if adapter is not None:
        adapters = [hub.locate(adapter, weights=weights)]
        if not is_adapter(adapters[0]):
            raise PresetError(
                f"{adapters[0]} is no adapter; expected a directory with adapter_config.json"
            )
    while is_adapter(path):
        if len(adapters) > _MOST_ADAPTERS:
            raise PresetError(f"{path} is an adapter of an adapter without an end; name the base")
        adapters.insert(0, path)
        path = _base_of(path, weights)
    return Preset(path, adapters, weights=weights)


def _base_of(adapter: Path, weights: bool) -> Path:
    """The model that an adapter names as its base."""
    config = AdapterConfig.read(adapter / ADAPTER_CONFIG)
    name = config.base_model_name_or_path
    if name is None:
        raise PresetError(
            f"{config.path} does not say what the adapter is for; load the base with adapter="
        )
    for path in (Path(name).expanduser(), adapter / name):
        if path.exists():
            return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return hub.locate(f"{hub.SCHEME}{name}", weights=weights, revision=config.revision)
    if name in hub.PRESETS or name.startswith(hub.SCHEME):
        return hub.locate(name, weights=weights, revision=config.revision)
    raise PresetError(
        f"{config.path} names {name!r} as its base, which is not there; load the base from where "
        "it is, with adapter="
    )


def load_causal_lm(
    cls: type[Llama3CausalLM],
    preset: str | os.PathLike[str],
    load_weights: bool,
    dtype: Any,
    revision: str | None,
    adapter: str | os.PathLike[str] | None,
    quantization: Quantization | None,
    devices: distribution.Devices,
    kwargs: dict[str, Any],
) -> Llama3CausalLM:
    """See `CausalLM.from_preset`."""
    from puna.models.backbone import Llama3Backbone
    from puna.models.preprocessor import Llama3CausalLMPreprocessor

    opened = open_preset(preset, adapter, weights=load_weights, revision=revision)
    hf, quantized = compressed_tensors.split(opened.config)
    config = LlamaConfig.from_hf(hf)
    form = _form(quantization, quantized, opened)
    preprocessor = kwargs.pop("preprocessor", _UNSET)

    def make(policy: Any) -> Llama3CausalLM:
        return cls(Llama3Backbone(config=config, dtype=policy), **kwargs)

    with ThreadPoolExecutor(1, thread_name_prefix="puna-tokenizer") as pool:
        # The tokenizer of Llama 3 takes as long to read as a gigabyte of weights.
        reading = None
        if preprocessor is _UNSET:
            reading = pool.submit(preprocessor_of, Llama3CausalLMPreprocessor, opened, {})
        with distribution.loading(devices, config, dtype, quantization):
            model = _load(make, opened, load_weights, dtype, form, has_head=True)
        model.preset = model.backbone.preset = _address(preset, revision, opened)
        model.generation_config, model.card = opened.generation_config, opened.card()
        model.preprocessor = reading.result() if reading is not None else preprocessor
    if model.preprocessor is not None:
        _check_vocabulary(model.preprocessor, model.config, opened.path)
    return model


def load_backbone(
    cls: type[Llama3Backbone],
    preset: str | os.PathLike[str],
    load_weights: bool,
    dtype: Any,
    revision: str | None,
    adapter: str | os.PathLike[str] | None,
    quantization: Quantization | None,
    devices: distribution.Devices,
) -> Llama3Backbone:
    """See `Llama3Backbone.from_preset`."""
    opened = open_preset(preset, adapter, weights=load_weights, revision=revision)
    hf, quantized = compressed_tensors.split(opened.config)
    config = LlamaConfig.from_hf(hf)
    form = _form(quantization, quantized, opened)

    def make(policy: Any) -> Llama3Backbone:
        return cls(config=config, dtype=policy)

    with distribution.loading(devices, config, dtype, quantization):
        backbone = _load(make, opened, load_weights, dtype, form, has_head=False)
    backbone.preset = _address(preset, revision, opened)
    return backbone


def _address(
    preset: str | os.PathLike[str], revision: str | None, opened: Preset
) -> tuple[str, str | None] | None:
    """What an adapter's file names as its base, and the revision; None where others are merged."""
    text = hub.PRESETS.get(os.fspath(preset), os.fspath(preset))
    if opened.adapters:
        return None
    if not text.startswith(hub.SCHEME):
        return text, None
    repository, said, _ = hub.parse_file_address(text)
    return repository, said or revision


def load_tokenizer(
    cls: type[Llama3Tokenizer],
    preset: str | os.PathLike[str],
    revision: str | None,
    kwargs: dict[str, Any],
) -> Llama3Tokenizer:
    """See `Llama3Tokenizer.from_preset`."""
    return tokenizer_of(cls, open_preset(preset, weights=False, revision=revision), kwargs)


def load_preprocessor(
    cls: type[Llama3CausalLMPreprocessor],
    preset: str | os.PathLike[str],
    revision: str | None,
    kwargs: dict[str, Any],
) -> Llama3CausalLMPreprocessor:
    """See `Llama3CausalLMPreprocessor.from_preset`."""
    opened = open_preset(preset, weights=False, revision=revision)
    return preprocessor_of(cls, opened, kwargs)


def tokenizer_of(
    cls: type[Llama3Tokenizer], opened: Preset, kwargs: dict[str, Any]
) -> Llama3Tokenizer:
    """The tokenizer of an opened preset."""
    return cls(**(opened.tokenizer_settings() | kwargs))


def preprocessor_of(
    cls: type[Llama3CausalLMPreprocessor], opened: Preset, kwargs: dict[str, Any]
) -> Llama3CausalLMPreprocessor:
    """The preprocessor of an opened preset, with the settings that it was saved with."""
    from puna.models.tokenizer import Llama3Tokenizer

    tokenizer = tokenizer_of(Llama3Tokenizer, opened, {})
    return cls(tokenizer, **(opened.settings.get("preprocessor", {}) | kwargs))


def save_causal_lm(
    model: Llama3CausalLM,
    directory: str | os.PathLike[str],
    adapter: str | None = None,
    **kwargs: Any,
) -> None:
    """See `Llama3CausalLM.save_to_preset`."""
    if (merged := merged_tensors(model, adapter)) is None:
        save_adapter_preset(model, directory)
        return
    settings: dict[str, Any] = {}
    policy = model.dtype_policy
    if policy.compute_dtype != policy.variable_dtype:
        settings["dtype_policy"] = keras.dtype_policies.serialize(policy)
    preprocessor = model.preprocessor
    if preprocessor is not None:
        settings["preprocessor"] = {
            "sequence_length": preprocessor.sequence_length,
            "add_start_token": preprocessor.add_start_token,
            "add_end_token": preprocessor.add_end_token,
        }
    save_directory(
        Path(directory),
        config=model.config,
        tensors=model.tensors(),
        tokenizer=None if preprocessor is None else preprocessor.tokenizer,
        generation_config=model.generation_config,
        settings=settings,
        card=model.card,
        quantized=matrices_of(model),
        matrices=model.matrices(),
        merged=merged,
        **kwargs,
    )


class _Dequantized(NamedTuple):
    """A checkpoint's `quantization_config`, whose matrices shall become floats."""

    config: dict[str, Any]


# How matrices are to be quantized; or how the checkpoint has them, by its `quantization_config` or
# by its types. None leaves all as floats.
_Form = Recipe | dict[str, Any] | _Dequantized | GGUFSource | None


def _form(
    quantization: Quantization | None, quantized: dict[str, Any] | None, opened: Preset
) -> _Form:
    """What becomes of the matrices, by the user's choice and the checkpoint.

    Raises:
        ConfigError: a quantized checkpoint shall be quantized, or an adapter be merged into whole
            numbers.
    """
    is_none = isinstance(quantization, str) and quantization == NONE
    if quantized is None and quantization is None and opened.gguf is not None:
        return _form_of_gguf(opened.gguf, opened)
    if quantized is None:
        return None if quantization is None or is_none else Recipe.parse(quantization)
    if opened.adapters or not (quantization is None or is_none):
        what = "an adapter" if opened.adapters else f"quantization={quantization!r:.80}"
        raise ConfigError(
            f"{opened.path} is quantized already, and {what} was given; leave that out, or load "
            "the full-precision checkpoint with it"
        )
    return _Dequantized(quantized) if is_none else quantized


def _form_of_gguf(source: GGUFSource, opened: Preset) -> GGUFSource | None:
    """The file, if it has matrices that stay packed; those that do not are warned of."""
    if others := Counter(source.dequantized().values()):
        found = ", ".join(f"{count} in {stored}" for stored, count in others.most_common())
        warnings.warn(
            f"{opened.path}: {others.total()} matrices are dequantized and take 4 bytes a weight "
            f"({found}), since only {', '.join(SCHEMES)} stay packed; fetch a file in one of "
            'these, or give quantization="int8" or "int4"',
            DequantizedWarning,
            stacklevel=5,
        )
    if not source.schemes():
        return None
    if opened.adapters:
        raise ConfigError(
            f"{opened.path} is quantized already, and an adapter was given, which cannot be merged "
            f'into whole numbers; load it with quantization="{NONE}", or load the full-precision '
            "checkpoint with it"
        )
    return source


def _load(
    make: Any,
    opened: Preset,
    load_weights: bool,
    dtype: Any,
    form: _Form,
    *,
    has_head: bool,
) -> Any:
    """Build without memory, then give each variable its value once."""
    if not load_weights and (form is None or isinstance(form, _Dequantized)):
        return make(_policy(opened, dtype, None))
    source = opened.tensors() if load_weights else None
    try:
        with build.abstract():
            model = make(_policy(opened, dtype, source))
            layouts = _set_schemes(model, form, source)
        distribution.settle(model)
        if source is not None:
            if isinstance(form, _Dequantized):
                source = _dequantizing(model, source, layouts or {})
            elif found := matrices_of(model):
                is_tied = has_head and "lm_head" not in model.matrices()
                packed = form.read_packed if isinstance(form, GGUFSource) else None
                source = PackedSource(source, found, layouts, packed=packed, is_tied=is_tied)
            fill(model.tensors(), source, has_head=has_head)
    finally:
        if source is not None:
            source.close()
    for variable in model.variables:  # what no checkpoint holds, such as seeds of dropout
        if not build.is_initialized(variable):
            backend.ops.initialize_at_random(variable)
    return model


def _set_schemes(
    model: Any, form: _Form, source: TensorSource | None
) -> dict[str, compressed_tensors.Layout] | None:
    """Give a model's matrices their form; how a `quantization_config` has them, if there is one."""
    matrices = model.matrices()
    if isinstance(form, Recipe):
        model.set_schemes(form.schemes(matrices))
    elif isinstance(form, GGUFSource):
        schemes = form.schemes().items()
        model.set_schemes({name: scheme for name, scheme in schemes if name in matrices})
    elif isinstance(form, _Dequantized):
        return compressed_tensors.layouts(form.config, matrices)
    elif form is not None:
        layouts = compressed_tensors.layouts(form, matrices)
        model.set_schemes(with_scale_dtypes(layouts, source))
        return layouts
    return None


def _dequantizing(
    model: Any, source: TensorSource, layouts: dict[str, compressed_tensors.Layout]
) -> TensorSource:
    """The source of a quantized checkpoint, with floats for a model's matrices."""
    shapes = {name: layer.matrix_shape for name, layer in model.matrices().items()}
    found = {
        name: Matrix(shapes[name], scheme.fit(shapes[name][1], "float32"))
        for name, scheme in with_scale_dtypes(layouts, source).items()
    }
    return DequantizedSource(source, found, layouts)


def matrices_of(model: Any) -> dict[str, Matrix]:
    """The quantized matrices of a model, as files know them."""
    layers = model.matrices()
    return {
        name: Matrix(layers[name].matrix_shape, scheme)
        for name, scheme in model.quantization().items()
    }


def _policy(opened: Preset, dtype: Any, source: Any) -> Any:
    if dtype is not None:
        return dtype
    if "dtype_policy" in opened.settings:
        return keras.dtype_policies.deserialize(opened.settings["dtype_policy"])
    if source is None and (opened.config.get("dtype") or opened.config.get("torch_dtype")) is None:
        return None
    return opened.default_dtype(source)


def _check_vocabulary(
    preprocessor: Llama3CausalLMPreprocessor, config: LlamaConfig, path: Path
) -> None:
    size = preprocessor.tokenizer.vocabulary_size()
    if size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer in {path} has {size} tokens and the model {config.vocab_size}. If they "
            "are of different checkpoints, fetch them together again. If tokens were added, load "
            "the model with preprocessor=None and the preprocessor by itself, set "
            "model.preprocessor, and call model.resize_token_embeddings()"
        )
