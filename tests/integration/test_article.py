"""`examples/article.py` on the current backend, from a Hub on loopback, with Llama 3's ids."""

import re

import pytest

from puna.models import Llama3Tokenizer
from puna.testing import tiny_config, tiny_model
from tests.hub_server import HubServer
from tests.hub_uploading import MINE, TOKEN, published
from tests.processes import ROOT, run


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory, llama3_tokenizer_dir):
    """A preset as of Llama 3.2 1B Instruct, but narrow: the real tokenizer, 128,256 tokens."""
    tokenizer = Llama3Tokenizer.from_preset(llama3_tokenizer_dir, stop_token_ids=[128001, 128008])
    config = tiny_config(
        vocab_size=128256,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
    )
    directory = tmp_path_factory.mktemp("article") / "llama"
    tiny_model(config, tokenizer=tokenizer, dtype="bfloat16").save_to_preset(directory)
    (directory / "puna.json").unlink()
    return directory


@pytest.fixture(scope="module")
def printed(llama_directory, tmp_path_factory):
    """What the example prints, by its titles."""
    home = tmp_path_factory.mktemp("hf")
    with HubServer() as hub:
        hub.add("meta-llama/Llama-3.2-1B-Instruct", llama_directory)
        script = str(ROOT / "examples" / "article.py")
        hub.users[TOKEN] = MINE
        upload = ["--upload", "hf://me/llama-3.2-1B-pirate-instruct"]
        env = hub.environment(home, HF_TOKEN=TOKEN)
        done = run([script, "--new-tokens", "4", *upload], env)
        assert done.status == 0, done.err
        assert hub.downloads["model.safetensors"] == 1
        there = published(hub, "me/llama-3.2-1B-pirate-instruct")
        assert "model.safetensors" in there
        assert "base_model: meta-llama/Llama-3.2-1B-Instruct" in there["README.md"].read_text()
    parts = re.split(r"^== (.*) ==$", done.out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


@pytest.mark.slow
def test_it_goes_through_the_article_in_order(printed):
    assert list(printed) == [
        "A model that takes strings",
        "Chatting",
        "Lower level access",
        "Tokenizer, preprocessor",
        "Training on strings",
        "Saving",
        "Uploading",
    ]


@pytest.mark.slow
def test_generate_continues_the_string(printed):
    text = printed["A model that takes strings"]
    assert text.startswith("Hi there!")
    assert len(text) > len("Hi there!")


@pytest.mark.slow
def test_the_conversation_is_written_as_llama_3_reads_it(printed):
    assert printed["Chatting"].startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.slow
def test_hello_is_one_token(printed):
    assert "tokenizer('Hello') -> [9906]" in printed["Lower level access"]


@pytest.mark.slow
def test_the_preprocessor_adds_ends_padding_mask_and_shifted_labels(printed):
    lines = [re.sub(r" +", " ", line) for line in printed["Tokenizer, preprocessor"].splitlines()]
    assert lines[0] == "token_ids: [128000, 9906, 128009, 0, 0, 0]"
    assert lines[1] == "padding_mask: [ True, True, True, False, False, False]"
    assert lines[2] == "labels: [ 9906, 128009, 0, 0, 0, 0]"
    assert lines[3] == "weights: [ True, True, False, False, False, False]"
    assert lines[4] == "model.backbone(batch) -> (2, 6, 8)"
    assert lines[5] == "model(batch) -> (2, 6, 128256)"


@pytest.mark.slow
def test_training_lowers_the_loss_and_a_saved_model_answers_the_same(printed):
    losses = [float(x) for x in re.findall(r"\d+\.\d+", printed["Training on strings"])]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert "the same after reloading: True" in printed["Saving"]
    assert "/me/llama-3.2-1B-pirate-instruct/commit/" in printed["Uploading"]
