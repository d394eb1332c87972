"""The public models: a causal LM, its backbone, its tokenizer and its preprocessor."""

import puna.backend as _backend  # chooses the backend before any model imports Keras
from puna.models.backbone import Llama3Backbone
from puna.models.causal_lm import CausalLM, Llama3CausalLM
from puna.models.load_model import load_model
from puna.models.preprocessor import Llama3CausalLMPreprocessor
from puna.models.tokenizer import Llama3Tokenizer

__all__ = [
    "CausalLM",
    "Llama3Backbone",
    "Llama3CausalLM",
    "Llama3CausalLMPreprocessor",
    "Llama3Tokenizer",
    "load_model",
]
del _backend
