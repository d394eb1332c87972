"""Prompt caches: the same text with less work, and files that fit or are refused."""

import json
import struct

import numpy as np
import pytest

import puna
from puna.checkpoint.fingerprint import fingerprint
from puna.checkpoint.safetensors import SafetensorsSource, write_safetensors
from puna.decoding.prompt_cache import PromptCache
from puna.errors import ConfigError, ContextLengthError, PresetError, TokenizerError
from puna.models import Llama3CausalLM
from puna.testing import tiny_config, tiny_model

PREFIX = "the system and the user are in the world"
QUESTIONS = [" Hello", " Hi there, you", "", "!"]
OPTIONS = {"max_new_tokens": 12, "sampler": "greedy", "stop_token_ids": None}


@pytest.fixture(scope="module")
def model():
    return tiny_model(sequence_length=128)


@pytest.fixture(scope="module")
def cache(model):
    return model.prompt_cache(PREFIX)


def ids_of(model, text):
    return np.array(model.preprocessor.prompt_ids(text)[0][0], np.int32)


# The same with less


def test_a_prefix_reused_gives_the_same_tokens(model, cache):
    known = len(ids_of(model, PREFIX))
    for question in QUESTIONS * 2:  # the cache is there as before after each
        ids = ids_of(model, PREFIX + question)
        expected = model.generate(ids, **OPTIONS).tolist()
        assert model.generate(ids, prompt_cache=cache, **OPTIONS).tolist() == expected
        stream = model.stream(ids, prompt_cache=cache, **OPTIONS)
        list(stream)
        assert ids.tolist() + stream.token_ids.tolist() == expected
        # A prompt's last token goes through the model with the first that is made.
        assert stream.reused == min(known, len(ids) - 1)
        assert stream.prefilled == len(ids) - 1 - stream.reused


def test_a_batch_reuses_it_in_every_row(model, cache):
    prompts = [PREFIX + question for question in QUESTIONS] + ["Hello"]
    expected = model.generate(prompts, **OPTIONS)
    assert model.generate(prompts, prompt_cache=cache, **OPTIONS) == expected


def test_what_is_shared_in_part_is_reused_in_part(model, cache):
    for prompt in ("the system and the world", "the", "Hello"):
        stream = model.stream(prompt, prompt_cache=cache, **OPTIONS)
        text = "".join(stream)
        assert text == model.generate(prompt, strip_prompt=True, **OPTIONS)
        ours, theirs = ids_of(model, prompt)[:-1], ids_of(model, PREFIX)
        shared = min(len(ours), len(theirs))
        differs = ours[:shared] != theirs[:shared]
        assert stream.reused == (int(np.argmax(differs)) if differs.any() else shared)
        assert stream.reused >= 1  # the start token


def test_a_stream_goes_on_from_another(model):
    first = model.stream("Hello", **OPTIONS)
    text = "".join(first)
    ids = np.concatenate([ids_of(model, "Hello"), first.token_ids, model.tokenizer(" Hi")])
    for _ in range(2):
        stream = model.stream(ids, prompt_cache=first.prompt_cache, **OPTIONS)
        list(stream)
        expected = model.generate(ids, strip_prompt=True, **OPTIONS)
        assert stream.token_ids.tolist() == expected.tolist()
        assert stream.reused == len(ids_of(model, "Hello")) + 11
    assert text == model.generate("Hello", strip_prompt=True, **OPTIONS)


@pytest.mark.slow
def test_it_may_be_longer_than_the_prompt_and_grow(model):
    model = tiny_model(max_position_embeddings=2048)
    long = np.arange(300, dtype=np.int32) % 250 + 3
    cache = model.prompt_cache(long)
    for length in (2, 40, 299, 300):
        ids = long[:length]
        expected = model.generate(ids, **OPTIONS).tolist()
        assert model.generate(ids, prompt_cache=cache, **OPTIONS).tolist() == expected
    more = np.concatenate([long, long, long, long])
    expected = model.generate(more, **OPTIONS).tolist()
    assert model.generate(more, prompt_cache=cache, **OPTIONS).tolist() == expected


@pytest.mark.slow
def test_beyond_dynamic_ropes_own_context_nothing_is_reused():
    rope = puna.LlamaConfig.from_hf(
        tiny_config().to_hf()
        | {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    )
    model = tiny_model(rope)
    ids = np.arange(60, dtype=np.int32) + 5
    cache = model.prompt_cache(ids[:20])
    for length, reused in ((28, 20), (60, 0)):
        stream = model.stream(ids[:length], prompt_cache=cache, **OPTIONS)
        list(stream)
        expected = model.generate(ids[:length], strip_prompt=True, **OPTIONS)
        assert stream.token_ids.tolist() == expected.tolist()
        assert stream.reused == reused


def test_what_makes_no_cache_is_refused(model):
    with pytest.raises(TokenizerError, match="there are 2 prompts"):
        model.prompt_cache(["a", "b"])
    with pytest.raises(ContextLengthError):
        model.prompt_cache([5] * 257)
    with pytest.raises(TokenizerError, match="token ids from 5 to 999"):
        model.prompt_cache([5, 999])
    bare = Llama3CausalLM(model.backbone)
    with pytest.raises(TokenizerError, match="cannot read text"):
        bare.prompt_cache("Hello")
    assert len(bare.prompt_cache([5, 6]).token_ids) == 2


@pytest.mark.slow
def test_that_of_another_model_is_refused(model, cache):
    with pytest.raises(ConfigError, match="other weights"):
        tiny_model(seed=1).generate(PREFIX, prompt_cache=cache, **OPTIONS)
    with pytest.raises(ConfigError, match="made in float32, and the model runs in bfloat16"):
        tiny_model(dtype="bfloat16").generate(PREFIX, prompt_cache=cache, **OPTIONS)
    same = tiny_model(sequence_length=128)
    text = same.generate(PREFIX, prompt_cache=cache, **OPTIONS)
    assert text == model.generate(PREFIX, **OPTIONS)


# Files


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_and_loaded_it_is_the_same(tmp_path, dtype):
    model = tiny_model(dtype=dtype, sequence_length=128)
    cache = model.prompt_cache(PREFIX)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    cache.save(path)  # over itself
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = PromptCache.load(path, model)
    np.testing.assert_array_equal(loaded.token_ids, cache.token_ids)
    for question in QUESTIONS:
        ids = ids_of(model, PREFIX + question)
        expected = model.generate(ids, prompt_cache=cache, **OPTIONS).tolist()
        assert model.generate(ids, prompt_cache=loaded, **OPTIONS).tolist() == expected
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_file_holds_what_is_live_and_says_what_it_is(model, cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    source = SafetensorsSource(path)
    length = len(ids_of(model, PREFIX))
    assert set(source.names()) == {
        "token_ids", "layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value",
    }  # fmt: skip
    assert source.info("layers.1.value").shape == (1, 2, length, 4)
    assert source.metadata == {
        "format": "puna prompt cache",
        "version": "1",
        "dtype": "float32",
        "fingerprint": fingerprint(model.config, model.tensors()),
    }


def test_what_does_not_fit_is_refused_in_one_line(model, cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    whole = path.read_bytes()

    def refused(match, model=model, path=path):
        with pytest.raises(PresetError, match=match) as caught:
            PromptCache.load(path, model)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)

    refused("other weights", tiny_model(seed=1))
    refused("made in float32, and the model runs in float16", tiny_model(dtype="float16"))
    refused("other weights", tiny_model(rms_norm_eps=1e-4))
    refused("cannot be read|no such|not there", path=tmp_path / "none.safetensors")
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused("no prompt cache to be read")
    path.write_bytes(b"no safetensors at all, but longer than a header's length")
    refused("no prompt cache to be read")
    write_safetensors(path, [("a", (1,), np.float32, lambda: np.zeros(1, np.float32))])
    refused("this is not a prompt cache")
    path.write_bytes(whole)
    PromptCache.load(path, model)


def header_changed(whole, change):
    """A safetensors file with its header changed; the data stays."""
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + whole[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(version="2"), "version '2', expected '1'"),
        (lambda h: h["__metadata__"].pop("version"), "version None"),
        (lambda h: h.update({"layers.2.key": h.pop("layers.1.key")}), "not those of the model's"),
        (lambda h: h["layers.1.key"].update(dtype="I32"), "other shapes or dtypes"),
        (lambda h: h["layers.1.key"]["shape"].reverse(), "other shapes or dtypes"),
        (lambda h: h["token_ids"].update(dtype="F32"), "other shapes or dtypes"),
    ],
)
def test_a_file_that_says_one_thing_and_holds_another(model, cache, tmp_path, change, message):
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    path.write_bytes(header_changed(path.read_bytes(), change))
    with pytest.raises(PresetError, match=message):
        PromptCache.load(path, model)


# The fingerprint


# That of `tiny_model()`, on every backend.
TINY = "ce555913524851273ac73ff6c6b63e74e45a188e1133a4e9a08c686562dbecf3"


def test_the_fingerprint_is_the_same_everywhere(tmp_path):
    model = tiny_model()
    assert fingerprint(model.config, model.tensors()) == TINY
    model.save_to_preset(tmp_path / "saved")
    again = Llama3CausalLM.from_preset(tmp_path / "saved")
    assert fingerprint(again.config, again.tensors()) == TINY
    half = Llama3CausalLM.from_preset(tmp_path / "saved", dtype="bfloat16")
    half.save_to_preset(tmp_path / "half")
    full = Llama3CausalLM.from_preset(tmp_path / "half", dtype="float32")
    found = [fingerprint(one.config, one.tensors()) for one in (half, full)]
    assert found[0] == found[1] != TINY  # the values count, and not what holds them


def test_the_fingerprint_tells_models_apart():
    models = [
        tiny_model(),
        tiny_model(seed=1),
        tiny_model(rms_norm_eps=1e-4),
        tiny_model(num_key_value_heads=4),
        tiny_model(num_hidden_layers=1),
        tiny_model(tie_word_embeddings=True),
    ]
    assert len({fingerprint(model.config, model.tensors()) for model in models}) == len(models)
    beside = tiny_model(attention_dropout=0.5, eos_token_id=7)
    assert fingerprint(beside.config, beside.tensors()) == TINY


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_the_fingerprint_tells_of_training(name):
    model = tiny_model()
    weight = model.tensors()[name]
    weight.assign(weight * 1.001)
    assert fingerprint(model.config, model.tensors()) != TINY
