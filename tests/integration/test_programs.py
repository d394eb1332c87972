"""How many programs are compiled: one for each size of the ladder, whatever is asked for."""

import keras
import numpy as np
import pytest

from puna.decoding import ladder
from puna.testing import tiny_model

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX tells of compiling")

WORDS = ["Hello", "there", "how", "are", "you", "the", "system", "and", "user", "in", "world"]


@pytest.fixture
def compiled():
    """The names of the programs that are compiled, as they are."""
    import jax

    names = []

    def note(event, seconds, **details):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def random_call(numbers):
    """Prompts and settings of any kind, prompt and completion within 1,024 tokens."""

    def maybe(name, make, chance=0.4):
        return {name: make()} if numbers.random() < chance else {}

    new = int(numbers.integers(1, 12))
    longest = int(numbers.choice([5, 20, 150]))
    prompts = [
        " ".join(numbers.choice(WORDS, numbers.integers(1, longest + 1)))
        for _ in range(numbers.integers(1, 9))
    ]
    settings = {
        **maybe("temperature", lambda: float(numbers.random() * 2)),
        **maybe("top_k", lambda: int(numbers.integers(1, 200))),
        **maybe("top_p", lambda: float(numbers.random() + 1e-3) / 1.01),
        **maybe("min_p", lambda: float(numbers.random() * 0.9)),
        **maybe("typical_p", lambda: float(numbers.random() * 0.9 + 0.05)),
        **maybe("repetition_penalty", lambda: 1.3),
        **maybe("frequency_penalty", lambda: 0.5),
        **maybe("logit_bias", lambda: {int(numbers.integers(260)): 3.0}),
        **maybe("bad_words", lambda: ["Hello", "the world", [5]]),
        **maybe("min_new_tokens", lambda: int(numbers.integers(5))),
        **maybe("logprobs", lambda: int(numbers.integers(9))),
        **maybe("stop", lambda: ["e", "you are"]),
        **maybe("stop_token_ids", lambda: numbers.integers(0, 260, numbers.integers(9)).tolist()),
        **maybe("seed", lambda: int(numbers.integers(99))),
    }
    return prompts, {"max_new_tokens": new, **settings}


def test_two_hundred_calls_compile_few_programs_and_none_after_the_warm_up(compiled):
    model = tiny_model(max_position_embeddings=2048)
    compiled.clear()
    model.warm_up(max_length=1024, batch_size=8)
    capacities, rows = 2, 4  # 256 and 1,024 tokens; 1, 2, 4 and 8 rows
    chunks = sum(size <= room for size in ladder.CHUNKS for room in (256, 1024))
    assert len(compiled) == capacities * rows + chunks
    assert len(compiled) <= 20

    compiled.clear()
    numbers = np.random.default_rng(5)
    for _ in range(200):
        prompts, settings = random_call(numbers)
        model.generate(prompts, **settings)
    assert compiled == []


def test_eight_uneven_prompts_get_their_lone_tokens():
    model = tiny_model(max_position_embeddings=512)
    numbers = np.random.default_rng(6)
    prompts = [" ".join(numbers.choice(WORDS, size)) for size in (1, 2, 3, 5, 9, 17, 30, 60)]
    kwargs = {"max_new_tokens": 20, "sampler": "greedy", "stop_token_ids": None, "logprobs": 1}
    together = model.generate(prompts, **kwargs)
    for prompt, found in zip(prompts, together, strict=True):
        # Among seven others, whatever they are, the row is computed the same to the last bit.
        same_shape = model.generate([prompt] * 8, **kwargs)[7]
        np.testing.assert_array_equal(found.token_ids, same_shape.token_ids)
        assert [t.logprob for t in found.logprobs] == [t.logprob for t in same_shape.logprobs]
        alone = model.generate(prompt, **kwargs)
        np.testing.assert_array_equal(found.token_ids, alone.token_ids)
