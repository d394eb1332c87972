"""Streams: the same as `generate` in pieces, and stopping them at any time."""

import asyncio
import gc
import random
import threading

import keras
import numpy as np
import pytest

from puna.decoding.streams import Piece
from puna.errors import ConfigError, ContextLengthError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_model
from tests.hard_strings import hard_strings

OPTIONS = {"max_new_tokens": 12, "sampler": "greedy"}
FREE = OPTIONS | {"stop_token_ids": None}


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_length=128)


# What they give


def prompts(count, longest=40):
    """Texts of emoji, combining marks and many scripts."""
    own = ["🦙", "🏳️‍🌈 flag", "e\u0301a\u0308", "👩‍👩‍👧‍👦 family", "हिन्दी", "日本語🎌", "שלום"]
    return (own + [text[:longest] for text in hard_strings(count)])[:count]


@pytest.mark.slow
def test_pieces_are_what_generate_gives(model):
    for i, prompt in enumerate(prompts(25)):
        options = {"max_new_tokens": 12, "sampler": "random", "temperature": 3.0, "seed": i}
        stream = model.stream(prompt, **options)
        pieces = list(stream)
        assert "".join(pieces) == model.generate(prompt, strip_prompt=True, **options)
        made = model.generate(ids_of(model, prompt), strip_prompt=True, **options)
        assert stream.token_ids.tolist() == made.tolist()
        told = [token for piece in pieces for token in piece.token_ids]
        assert told == made[: len(told)].tolist()
        rest = model.tokenizer.detokenize(made[len(told) :], skip_special_tokens=True)
        assert rest == ""
        assert all(pieces)


def ids_of(model, text):
    return np.array(model.preprocessor.prompt_ids(text)[0][0], np.int32)


@pytest.mark.soak
def test_pieces_are_what_generate_gives_on_a_real_model(smollm2_gguf):
    model = Llama3CausalLM.from_preset(smollm2_gguf)
    for i, prompt in enumerate(prompts(500, longest=100)):
        options = {"max_new_tokens": 20, "sampler": "random", "temperature": 1.5, "seed": i}
        stream = model.stream("Repeat: " + prompt, **options)
        text = "".join(stream)
        assert text == model.generate("Repeat: " + prompt, strip_prompt=True, **options)


def test_a_piece_is_a_string_with_its_tokens(model):
    stream = model.stream("Hello", logprobs=2, **FREE)
    pieces = list(stream)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert stream.token_ids.dtype == np.int32
    assert len(stream.token_ids) == len(stream.logprobs) == 12
    told = [one for piece in pieces for one in piece.logprobs]
    assert tuple(told) == stream.logprobs[: len(told)]
    for piece in pieces:
        assert [one.token_id for one in piece.logprobs] == list(piece.token_ids)
    for one in stream.logprobs:
        assert len(one.top) == 2
        assert one.top[0] == (one.token_id, one.logprob)
        assert one.top[1][1] <= one.logprob <= 0
    assert all(piece.logprobs == () for piece in model.stream("Hello", **FREE))


def test_logprobs_are_those_of_generate(model):
    stream = model.stream("Hello", logprobs=1, **FREE)
    list(stream)
    found = model.generate("Hello", logprobs=1, strip_prompt=True, **FREE)
    assert [one.token_id for one in found.logprobs] == stream.token_ids.tolist()
    ours, theirs = ([one.logprob for one in each.logprobs] for each in (stream, found))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_why_it_ended(model):
    stream = model.stream("Hello", **FREE)
    next(stream)
    assert stream.finish_reason is None
    list(stream)
    assert stream.finish_reason == "length"
    last = int(stream.token_ids[5])
    stream = model.stream("Hello", **OPTIONS, stop_token_ids=[last])
    list(stream)
    assert stream.finish_reason == "stop"
    assert stream.token_ids[-1] == last
    stream = model.stream("Hello", **FREE)
    next(stream)
    stream.close()
    assert stream.finish_reason == "cancelled"


def test_nothing_asked_for_is_nothing_given(model):
    stream = model.stream("Hello", max_new_tokens=0)
    assert list(stream) == []
    assert stream.finish_reason == "length"
    assert stream.token_ids.tolist() == []
    assert stream.prompt_cache is None


def test_the_prompt_is_counted_once_it_is_taken_in(model):
    stream = model.stream("Hello there", **FREE)
    assert stream.prefilled == 0
    next(stream)
    assert stream.prefilled == len(ids_of(model, "Hello there")) - 1
    assert stream.reused == 0


def test_what_cannot_be_streamed_is_refused_at_once(model):
    with pytest.raises(TokenizerError, match="there are 2 prompts; expected one"):
        model.stream(["Hello", "Hi"])
    with pytest.raises(ContextLengthError):
        model.stream("Hello", max_length=1)
    with pytest.raises(ConfigError, match="beam search"):
        model.stream("Hello", sampler="beam")
    with pytest.raises(TokenizerError, match="no preprocessor"):
        Llama3CausalLM(model.backbone).stream([5, 6])


# Stopping


def test_after_its_end_a_stream_gives_nothing_more(model):
    for taken in (0, 1, 3):
        stream = model.stream("Hello", **FREE)
        assert all(next(stream) for _ in range(taken))
        stream.close()
        stream.close()
        assert list(stream) == []
        assert stream.finish_reason == "cancelled"
        assert (len(stream.token_ids) > 0) == (taken > 0)
    with model.stream("Hello", **FREE) as stream:
        next(stream)
    assert next(stream, None) is None
    stream = model.stream("Hello", **FREE)
    list(stream)
    stream.close()
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_the_model_is_usable_after_a_failure(model, monkeypatch, error, calls):
    expected = model.generate("Hello", strip_prompt=True, **FREE)
    make = model._decoder.programs.make
    left = [calls]

    def failing(*args):
        if not left[0]:
            raise error
        left[0] -= 1
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model._decoder.programs, "make", failing)
        stream = model.stream("Hello", **FREE)
        with pytest.raises(type(error)):
            list(stream)
        assert stream.finish_reason == "cancelled"
        assert list(stream) == []
    assert "".join(model.stream("Hello", **FREE)) == expected


def test_closing_from_another_thread_ends_it(model, monkeypatch):
    begun, closed = threading.Event(), threading.Event()
    make = model._decoder.programs.make

    def slow(*args):
        begun.set()
        assert closed.wait(60)
        return make(*args)

    stream = model.stream("Hello", **FREE)
    with monkeypatch.context() as patch:
        patch.setattr(model._decoder.programs, "make", slow)
        taken = []
        worker = threading.Thread(target=lambda: taken.extend(stream))
        worker.start()
        assert begun.wait(60)
        stream.close()  # returns at once
        closed.set()
        worker.join(60)
    assert stream.finish_reason == "cancelled"
    assert len(taken) <= 1
    # What is kept of it is whole.
    kept = stream.prompt_cache
    assert kept is not None
    text = model.generate("Hello", prompt_cache=kept, **FREE)
    assert text == model.generate("Hello", **FREE)


# In an event loop


def test_async_for_gives_the_same(model):
    async def collect(prompt):
        stream = model.stream(prompt, **FREE)
        return [piece async for piece in stream], stream.finish_reason

    expected = [list(model.stream(prompt, **FREE)) for prompt in ("Hello", "Hi there")]
    assert asyncio.run(collect("Hello")) == (expected[0], "length")

    async def both():
        return await asyncio.gather(collect("Hello"), collect("Hi there"))

    assert [pieces for pieces, _ in asyncio.run(both())] == expected


def test_two_async_streams_take_turns(model):
    expected = [list(model.stream(prompt, **FREE)) for prompt in ("Hello", "Hi there")]

    async def alternate():
        streams = [aiter(model.stream(prompt, **FREE)) for prompt in ("Hello", "Hi there")]
        found = [[], []]
        for _ in range(max(map(len, expected)) + 1):
            for pieces, stream in zip(found, streams, strict=True):
                if (piece := await anext(stream, None)) is not None:
                    pieces.append(piece)
        return found

    assert asyncio.run(alternate()) == expected


def test_breaking_out_of_async_for_closes(model):
    async def one():
        stream = model.stream("Hello", **FREE)
        async for _ in stream:
            break
        await asyncio.sleep(0.01)
        return stream

    stream = asyncio.run(one())
    assert stream.finish_reason == "cancelled"
    assert stream.prompt_cache is not None


def test_cancelling_a_task_closes(model):
    async def cancelled():
        stream = model.stream("Hello", **FREE)

        async def take():
            async for _ in stream:
                pass

        task = asyncio.create_task(take())
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream

    stream = asyncio.run(cancelled())  # which waits for the thread
    assert stream.finish_reason == "cancelled"
    assert "".join(model.stream("Hello", **FREE)) == model.generate(
        "Hello", strip_prompt=True, **FREE
    )


# What they leave behind


def resident():
    """Bytes of this process in memory, or None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return None


@pytest.mark.slow
def test_closed_streams_leave_nothing():
    model = tiny_model(max_position_embeddings=2048)
    numbers = random.Random(0)
    expected = model.generate("Hello", strip_prompt=True, **FREE)

    def close_some(count):
        for _ in range(count):
            stream = model.stream("Hello there", stop_token_ids=None, max_new_tokens=900)
            for _ in range(numbers.randrange(20)):
                next(stream)
            if numbers.random() < 0.5:
                stream.close()
        del stream
        gc.collect()

    close_some(10)
    arrays, before = live_arrays(), resident()
    close_some(100)
    assert live_arrays() == arrays
    if before is not None:
        # A cache of this model has 128 kB, so a hundred of them would show.
        assert resident() - before < 4 * 2**20
    assert "".join(model.stream("Hello", **FREE)) == expected


def live_arrays():
    """How many arrays JAX holds; 0 on other backends."""
    if keras.backend.backend() != "jax":
        return 0
    import jax

    return len(jax.live_arrays())
