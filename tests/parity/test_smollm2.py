"""The real SmolLM2-135M-Instruct: logits and greedy text equal transformers'."""

from __future__ import annotations

import json

import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.models import Llama3CausalLM
from tests.parity.smollm2_reference import (
    GOLDEN,
    NEW_TOKENS,
    PROMPTS,
    continuation,
    reference_model,
)

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": NEW_TOKENS, "sampler": "greedy", "stop_token_ids": None}


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return Llama3CausalLM.from_preset(smollm2_gguf)


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    return reference_model(smollm2_gguf)


@pytest.fixture(scope="module")
def expected():
    """What transformers says to each prompt alone, written by `smollm2_reference`."""
    rows = json.loads(GOLDEN.read_text())
    assert list(rows) == PROMPTS
    return rows


def test_logits_equal_transformers(model, reference):
    import torch

    ids = model.tokenizer(PROMPTS[-1] + PROMPTS[1])
    with torch.inference_mode():
        theirs = reference(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    ours = ops.convert_to_numpy(model({"token_ids": ids[None]}))[0]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.skipif(backend.name == "tensorflow", reason="a minute, for JAX's own program")
def test_all_prompts_in_one_uneven_batch_continue_as_in_transformers(model, expected):
    prompts = [model.tokenizer(prompt) for prompt in PROMPTS]
    rows = model.generate(prompts, strip_prompt=True, **GREEDY)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tolist() == expected[prompt], prompt


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_a_prompt_alone_continues_as_in_transformers(model, expected, prompt):
    ours = model.generate(model.tokenizer(prompt), strip_prompt=True, **GREEDY)
    assert ours.tolist() == expected[prompt]


@pytest.mark.soak
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_alone_continues_as_in_transformers_here_and_now(model, reference, prompt):
    ids = model.tokenizer(prompt)
    ours = model.generate(ids, strip_prompt=True, **GREEDY)
    assert ours.tolist() == continuation(reference, ids)


def test_streamed_pieces_are_the_text(model):
    options = {"max_new_tokens": 40, "sampler": "greedy"}
    pieces = list(model.stream(PROMPTS[1], **options))
    assert len(pieces) >= 10
    assert "".join(pieces) == model.generate(PROMPTS[1], strip_prompt=True, **options)
