"""What `puna` offers, so that a name never appears or goes by accident."""

import pytest

import puna

pytestmark = pytest.mark.backend_free

PUBLIC = [
    "ChatState",
    "FinetuneSettings",
    "LlamaConfig",
    "__version__",
    "distribution",
    "finetune",
    "load_model",
    "models",
    "samplers",
    "tuning",
    "upload_preset",
]

MODELS = [
    "CausalLM",
    "Llama3Backbone",
    "Llama3CausalLM",
    "Llama3CausalLMPreprocessor",
    "Llama3Tokenizer",
    "load_model",
]

TUNING = ["Rows", "TextData", "read_rows"]

SAMPLERS = ["GreedySampler", "RandomSampler", "Sampler", "TopKSampler", "TopPSampler"]


def test_public_names_of_puna():
    assert sorted(puna.__all__) == PUBLIC
    assert all(getattr(puna, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(puna))


def test_public_names_of_models():
    assert sorted(puna.models.__all__) == MODELS


def test_public_names_of_tuning():
    assert sorted(puna.tuning.__all__) == TUNING


def test_samplers_of_keras_hub_have_their_names():
    assert all(hasattr(puna.samplers, name) for name in SAMPLERS)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        puna.no_such_thing  # noqa: B018
