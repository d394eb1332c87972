"""Cached steps equal whole sequences, `generate` equals transformers', and few logits are made."""

import keras
import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.decoding import ladder
from puna.layers.cache import empty_cache
from puna.models import Llama3CausalLM
from tests import references

TOLERANCE = 1e-5  # of the largest logit

MODELS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": references.ROPES["llama3"]},
    "yarn": {"rope_parameters": references.ROPES["yarn"]},
    "one-key-head": {"num_key_value_heads": 1, "attention_bias": True},
    "every-head-its-own": {"num_key_value_heads": 4, "head_dim": 12},
}


def load(directory, **fields):
    """A saved tiny model, as transformers has it and as we do."""
    reference = references.make(**fields)
    references.save(reference, directory)
    return reference, Llama3CausalLM.from_preset(directory, preprocessor=None, dtype="float32")


def compiled_step(model):
    """`model.step` as `generate` runs it: without gradients, the cache given away."""
    return backend.ops.compile_step(model.step, model.variables, donate=(2,))


def stepped(model, ids, sizes, rng):
    """Logits [B, T, V] where a step gave them, NaN elsewhere.

    Each row takes a random number of real tokens a step, so that rows start at places of their own;
    what fills up the chunk is junk, which a later step overwrites.
    """
    B, T = ids.shape
    step = compiled_step(model)
    cache = empty_cache(model.config, B, T + max(sizes), model.compute_dtype)
    start = np.zeros(B, np.int32)
    found = np.full((B, T, model.config.vocab_size), np.nan, np.float32)
    while (start < T).any():
        size = int(rng.choice(sizes))
        count = np.minimum(rng.integers(1, size + 1, B), np.maximum(T - start, 1)).astype(np.int32)
        place = np.minimum(start, T - 1)  # a row that has ended repeats its last token
        chunk = rng.integers(0, model.config.vocab_size, (B, size)).astype(np.int32)
        for row in range(B):
            chunk[row, : count[row]] = ids[row, place[row] : place[row] + count[row]]
        arrays = [ops.convert_to_tensor(array) for array in (chunk, place, count - 1)]
        logits, cache = step(*arrays[:2], cache, arrays[2])
        found[np.arange(B), place + count - 1] = ops.convert_to_numpy(logits)
        start = np.minimum(place + count, T).astype(np.int32)
    return found


@pytest.mark.parametrize(
    ("name", "sizes"), [("default", (1,)), *((name, (1, 9)) for name in MODELS)]
)
def test_steps_of_any_size_equal_the_whole_sequence(name, sizes, tmp_path):
    _, model = load(tmp_path, **MODELS[name])
    ids = references.token_ids(3, 28, seed=1)
    whole = ops.convert_to_numpy(model(ids))
    cached = stepped(model, ids, sizes, np.random.default_rng(0))
    seen = ~np.isnan(cached[..., 0])
    assert seen[:, -1].all()
    assert seen.sum() >= ids.size // max(sizes)
    references.assert_close(cached[seen], whole[seen], TOLERANCE)


def test_step_without_positions_gives_no_logits_and_fills_the_cache(tmp_path):
    _, model = load(tmp_path)
    ids = references.token_ids(2, 12)
    whole = ops.convert_to_numpy(model(ids))
    step = compiled_step(model)
    cache = empty_cache(model.config, 2, 16, model.compute_dtype)
    zero = ops.zeros(2, "int32")
    logits, cache = step(ops.convert_to_tensor(ids[:, :11]), zero, cache, None)
    assert logits is None
    logits, _ = step(ops.convert_to_tensor(ids[:, 11:]), zero + 11, cache, zero)
    references.assert_close(ops.convert_to_numpy(logits), whole[:, -1], TOLERANCE)


def test_rows_of_one_step_do_not_see_each_other(tmp_path):
    _, model = load(tmp_path)
    ids = references.token_ids(2, 10)
    step = compiled_step(model)

    def last_logits(rows):
        cache = empty_cache(model.config, len(rows), 16, model.compute_dtype)
        zero = np.zeros(len(rows), np.int32)
        arrays = [ops.convert_to_tensor(array) for array in (rows, zero, zero + 9)]
        return ops.convert_to_numpy(step(*arrays[:2], cache, arrays[2])[0])

    both = last_logits(ids)
    for row in range(2):
        references.assert_close(both[row], last_logits(ids[row : row + 1])[0], TOLERANCE)


# How many logits are made.


@pytest.fixture
def head_rows(monkeypatch):
    """How many positions each product with the head took, as it was traced or run."""
    rows = []
    linear, linears = backend.ops.linear, backend.ops.linears

    def count(x, weight):
        if weight.shape[0] == references.VOCABULARY:
            rows.append(int(np.prod(x.shape[:-1])))

    def counting(x, weight, out_dtype):
        count(x, weight)
        return linear(x, weight, out_dtype)

    def counting_each(x, weights, out_dtype):
        for weight in weights:
            count(x, weight)
        return linears(x, weights, out_dtype)

    monkeypatch.setattr(backend.ops, "linear", counting)
    monkeypatch.setattr(backend.ops, "linears", counting_each)
    return rows


LONGEST = ladder.CHUNKS[-1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [[3, 30], [LONGEST + 10], [LONGEST, 7, LONGEST + 3]])
def test_generate_makes_one_row_of_logits_for_each_prompt(lengths, tied, tmp_path, head_rows):
    fields = {"max_position_embeddings": 2048, "num_hidden_layers": 1}
    _, model = load(tmp_path, tie_word_embeddings=tied, **fields)
    prompts = [references.token_ids(1, n)[0].tolist() for n in lengths]
    model.generate(prompts, max_new_tokens=2, stop_token_ids=None, sampler="greedy")
    assert head_rows, "the head was never asked"
    assert set(head_rows) == {ladder.rows(len(prompts))}


def test_whole_call_makes_logits_of_every_position(tmp_path, head_rows):
    _, model = load(tmp_path)
    model(references.token_ids(2, 20))
    assert head_rows == [40]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads JAX's own programs")
@pytest.mark.parametrize("asked", [True, False])
def test_no_array_of_the_compiled_step_holds_logits_of_a_chunk(asked, tmp_path):
    import jax

    _, model = load(tmp_path)
    B, T, V = 2, 16, model.config.vocab_size
    cache = empty_cache(model.config, B, 64, model.compute_dtype)
    ids, zero = ops.zeros((B, T), "int32"), ops.zeros(B, "int32")

    def sizes(function):
        program = jax.make_jaxpr(function)(ids, zero, cache).jaxpr
        return {shape for shape in shapes_of(program) if shape and shape[-1] == V}

    step = compiled_step(model)
    made = sizes(lambda ids, start, cache: step(ids, start, cache, zero if asked else None))
    assert {int(np.prod(shape[:-1])) for shape in made} == ({B} if asked else set())
    assert B * T in {int(np.prod(shape[:-1])) for shape in sizes(lambda ids, *_: model(ids))}


def shapes_of(program):
    """Every shape that a JAX program computes, its inner programs' too."""
    from jax.extend import core

    for equation in program.eqns:
        yield from (tuple(variable.aval.shape) for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, core.ClosedJaxpr):
                    yield from shapes_of(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from shapes_of(inner)


# Against transformers' own loop.


def greedy(model, prompts, new_tokens):
    found = model.generate(
        prompts,
        max_new_tokens=new_tokens,
        stop_token_ids=None,
        strip_prompt=True,
        sampler="greedy",
    )
    return [row.tolist() for row in found]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    reference, model = load(tmp_path, **MODELS[name])
    lengths = [1, 16, 17, 30]
    prompts = [references.token_ids(1, n, seed=n)[0].tolist() for n in lengths]
    theirs = [references.greedy(reference, prompt, 20) for prompt in prompts]
    assert len({token for row in theirs for token in row}) > 10, "the texts are all alike"
    assert greedy(model, prompts, 20) == theirs
    assert greedy(model, prompts[2:3], 20) == theirs[2:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lengths"), [("llama3", [LONGEST + 88, 5, LONGEST]), ("tied", [LONGEST + 10])]
)
def test_greedy_tokens_after_prompts_of_several_chunks_equal_transformers(name, lengths, tmp_path):
    reference, model = load(tmp_path, **(MODELS[name] | {"max_position_embeddings": 2048}))
    prompts = [references.token_ids(1, n, seed=n)[0].tolist() for n in lengths]
    theirs = [references.greedy(reference, prompt, 16) for prompt in prompts]
    assert greedy(model, prompts, 16) == theirs


def test_dynamic_scaling_stretches_each_row_by_its_own_length(tmp_path):
    fields = {"rope_parameters": references.ROPES["dynamic"], "max_position_embeddings": 24}
    _, model = load(tmp_path, **fields)
    prompts = [references.token_ids(1, n, seed=n)[0].tolist() for n in (20, 40, 60)]
    theirs = [references.greedy(references.make(**fields), prompt, 12) for prompt in prompts]
    assert greedy(model, prompts, 12) == theirs
    assert greedy(model, prompts[1:2], 12) == theirs[1:2]


def test_dynamic_scaling_of_a_prompt_of_several_chunks_counts_all_of_it(tmp_path):
    fields = {"rope_parameters": references.ROPES["dynamic"], "max_position_embeddings": 200}
    reference, model = load(tmp_path, **fields)
    prompt = references.token_ids(1, LONGEST + 88)[0].tolist()
    assert greedy(model, [prompt], 12) == [references.greedy(reference, prompt, 12)]
