"""Models from presets, and presets from models: where checkpoints and model classes meet."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from puna.backend import build
from puna.checkpoint import hub
from puna.checkpoint.load import load_weights as fill
from puna.checkpoint.preset import Preset
from puna.checkpoint.save import save_directory
from puna.config import LlamaConfig
from puna.errors import TokenizerError

if TYPE_CHECKING:
    from puna.models.backbone import Llama3Backbone
    from puna.models.causal_lm import Llama3CausalLM
    from puna.models.preprocessor import Llama3CausalLMPreprocessor
    from puna.models.tokenizer import Llama3Tokenizer

_UNSET: Any = object()


def load_causal_lm(
    cls: type[Llama3CausalLM],
    preset: str | os.PathLike[str],
    load_weights: bool,
    dtype: Any,
    revision: str | None,
    kwargs: dict[str, Any],
) -> Llama3CausalLM:
    """See `CausalLM.from_preset`."""
    from puna.models.backbone import Llama3Backbone
    from puna.models.preprocessor import Llama3CausalLMPreprocessor

    opened = Preset(hub.locate(preset, weights=load_weights, revision=revision))
    preprocessor = kwargs.pop("preprocessor", _UNSET)

    def make(policy: Any) -> Llama3CausalLM:
        config = LlamaConfig.from_hf(opened.config)
        return cls(Llama3Backbone(config=config, dtype=policy), **kwargs)

    with ThreadPoolExecutor(1, thread_name_prefix="puna-tokenizer") as pool:
        # The tokenizer of Llama 3 takes as long to read as a gigabyte of weights.
        reading = None
        if preprocessor is _UNSET:
            reading = pool.submit(preprocessor_of, Llama3CausalLMPreprocessor, opened, {})
        model = _load(make, opened, load_weights, dtype, has_head=True)
        model.generation_config = opened.generation_config
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
) -> Llama3Backbone:
    """See `Llama3Backbone.from_preset`."""
    opened = Preset(hub.locate(preset, weights=load_weights, revision=revision))

    def make(policy: Any) -> Llama3Backbone:
        return cls(config=LlamaConfig.from_hf(opened.config), dtype=policy)

    return _load(make, opened, load_weights, dtype, has_head=False)


def load_tokenizer(
    cls: type[Llama3Tokenizer],
    preset: str | os.PathLike[str],
    revision: str | None,
    kwargs: dict[str, Any],
) -> Llama3Tokenizer:
    """See `Llama3Tokenizer.from_preset`."""
    path = hub.locate(preset, weights=False, revision=revision)
    if path.is_dir() and not _has_gguf_only(path):
        return cls.from_directory(path, **kwargs)  # type: ignore[return-value]
    return tokenizer_of(cls, Preset(path), kwargs)


def load_preprocessor(
    cls: type[Llama3CausalLMPreprocessor],
    preset: str | os.PathLike[str],
    revision: str | None,
    kwargs: dict[str, Any],
) -> Llama3CausalLMPreprocessor:
    """See `Llama3CausalLMPreprocessor.from_preset`."""
    opened = Preset(hub.locate(preset, weights=False, revision=revision))
    return preprocessor_of(cls, opened, kwargs)


def tokenizer_of(
    cls: type[Llama3Tokenizer], opened: Preset, kwargs: dict[str, Any]
) -> Llama3Tokenizer:
    """The tokenizer of an opened preset."""
    if opened.gguf is not None:
        return cls.from_gguf(opened.gguf.metadata, **kwargs)  # type: ignore[return-value]
    return cls.from_directory(opened.path, **kwargs)  # type: ignore[return-value]


def preprocessor_of(
    cls: type[Llama3CausalLMPreprocessor], opened: Preset, kwargs: dict[str, Any]
) -> Llama3CausalLMPreprocessor:
    """The preprocessor of an opened preset, with the settings that it was saved with."""
    from puna.models.tokenizer import Llama3Tokenizer

    tokenizer = tokenizer_of(Llama3Tokenizer, opened, {})
    return cls(tokenizer, **(opened.settings.get("preprocessor", {}) | kwargs))


def save_causal_lm(model: Llama3CausalLM, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """See `Llama3CausalLM.save_to_preset`."""
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
        **kwargs,
    )


def _load(make: Any, opened: Preset, load_weights: bool, dtype: Any, *, has_head: bool) -> Any:
    """Build without memory, then give each variable its value once."""
    if not load_weights:
        return make(_policy(opened, dtype, None))
    source = opened.tensors()
    try:
        with build.abstract():
            model = make(_policy(opened, dtype, source))
        fill(model.tensors(), source, has_head=has_head)
    finally:
        source.close()
    for variable in model.variables:  # what no checkpoint holds, such as seeds of dropout
        if not build.is_initialized(variable):
            build.initialize_at_random(variable)
    return model


def _policy(opened: Preset, dtype: Any, source: Any) -> Any:
    if dtype is not None:
        return dtype
    if "dtype_policy" in opened.settings:
        return keras.dtype_policies.deserialize(opened.settings["dtype_policy"])
    if source is None:
        return LlamaConfig.from_hf(opened.config).dtype
    return opened.default_dtype(source)


def _check_vocabulary(
    preprocessor: Llama3CausalLMPreprocessor, config: LlamaConfig, path: Path
) -> None:
    size = preprocessor.tokenizer.vocabulary_size()
    if size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer in {path} has {size} tokens and the model {config.vocab_size}; they "
            "are of different checkpoints: fetch them together again"
        )


def _has_gguf_only(path: Path) -> bool:
    return any(path.glob("*.gguf")) and not (path / "tokenizer.json").exists()
