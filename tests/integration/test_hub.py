"""`hf://` addresses, through the real `huggingface_hub` client and a Hub on loopback."""

import os
import shutil
import socket

import pytest

from puna.checkpoint.hub import parse_address
from puna.errors import PresetError
from puna.testing import write_tiny_preset
from tests.hub_server import HubServer
from tests.processes import result_of, run

NAME = "org/tiny-llama"
TOKEN = "hf_" + "aB3dE" * 7
SMALL = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}

# Only the fetching: no Keras is imported.
LOCATE = """
import sys
from puna.checkpoint.hub import locate
print(locate(sys.argv[1], weights=len(sys.argv) < 3))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository with what a preset needs, and with other copies of the same weights."""
    directory = write_tiny_preset(tmp_path_factory.mktemp("repo") / "tiny")
    for name in ("original/consolidated.00.pth", "onnx/model.onnx", "flax_model.msgpack"):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not needed")
    (directory / "README.md").write_text("# Tiny\n")
    (directory / "original" / "tokenizer.model").write_bytes(b"not needed")
    return directory


@pytest.fixture
def hub(published):
    with HubServer() as server:
        server.add(NAME, published)
        yield server


def locate(hub, home, address=f"hf://{NAME}", *arguments, **env):
    return run(["-c", LOCATE, address, *arguments], hub.environment(home, **env))


def error_of(done):
    """The one line that the user is to read."""
    assert done.status == 1, done.out
    assert done.last_line.startswith("puna.errors.PresetError: ")
    return done.last_line


@pytest.mark.slow
def test_from_preset_loads_the_main_branch(hub, tmp_path):
    result = result_of(
        """
import json
import numpy as np
import puna
from puna.testing import tiny_model
model = puna.models.Llama3CausalLM.from_preset("hf://org/tiny-llama")
pairs = zip(model.variables, tiny_model().variables, strict=True)
print(json.dumps({
    "same": all(np.array_equal(a.numpy(), b.numpy()) for a, b in pairs),
    "dtype": model.dtype_policy.name,
    "stops": list(model.tokenizer.stop_token_ids),
    "text": model.generate("Hello", max_new_tokens=3, sampler="greedy")[:5],
}))
""",
        env=hub.environment(tmp_path),
    )
    expected = {"same": True, "dtype": "float32", "stops": [300, 304, 305], "text": "Hello"}
    assert result == expected
    assert set(hub.downloads) == SMALL | {"model.safetensors", "README.md"}
    assert set(hub.downloads.values()) == {1}


@pytest.mark.backend_free
def test_a_second_load_downloads_nothing(hub, tmp_path):
    first = locate(hub, tmp_path)
    assert first.status == 0, first.err
    assert hub.downloads["model.safetensors"] == 1
    hub.forget()
    again = locate(hub, tmp_path)
    assert again.out == first.out
    assert not hub.downloads


@pytest.mark.backend_free
def test_a_tokenizer_alone_fetches_no_weights_and_its_model_fetches_the_rest(hub, tmp_path):
    assert locate(hub, tmp_path, f"hf://{NAME}", "no weights").status == 0
    assert set(hub.downloads) == SMALL
    hub.forget()
    assert locate(hub, tmp_path).status == 0
    assert set(hub.downloads) == {"model.safetensors", "README.md"}


@pytest.mark.backend_free
def test_the_public_tokenizer_fetches_no_weights(hub, tmp_path):
    code = """
import json, puna
print(json.dumps(puna.models.Llama3Tokenizer.from_preset("hf://org/tiny-llama")("Hi").tolist()))
"""
    assert result_of(code, env=hub.environment(tmp_path)) == [261]
    assert set(hub.downloads) == SMALL


@pytest.mark.backend_free
def test_a_revision_is_fetched_by_its_branch_and_by_its_commit(hub, published, tmp_path):
    older = shutil.copytree(published, tmp_path / "older")
    (older / "generation_config.json").write_text('{"eos_token_id": 7}')
    commit = hub.add(NAME, older, revision="feature/v1")
    by_branch = locate(hub, tmp_path / "home", f"hf://{NAME}@feature/v1")
    by_commit = locate(hub, tmp_path / "home", f"hf://{NAME}@{commit}")
    main = locate(hub, tmp_path / "home")
    assert by_branch.status == 0, by_branch.err
    assert by_branch.out == by_commit.out != main.out
    assert by_branch.out.strip().endswith(commit)


@pytest.mark.backend_free
def test_offline_works_after_the_first_fetch(hub, tmp_path):
    first = locate(hub, tmp_path)
    hub.forget()
    offline = locate(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.out == first.out
    assert not hub.requests


@pytest.mark.backend_free
@pytest.mark.slow
def test_an_unreachable_hub_is_no_obstacle_after_the_first_fetch(hub, tmp_path):
    first = locate(hub, tmp_path)
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert locate(hub, tmp_path, HF_ENDPOINT=address).out == first.out


@pytest.mark.backend_free
def test_offline_before_the_first_fetch_says_to_go_online(hub, tmp_path):
    message = error_of(locate(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert "is not in the cache" in message
    assert "go online once" in message


@pytest.mark.backend_free
def test_a_model_of_which_only_the_tokenizer_is_cached_says_so_offline(hub, tmp_path):
    locate(hub, tmp_path, f"hf://{NAME}", "no weights")
    message = error_of(locate(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert "go online once" in message


@pytest.mark.backend_free
@pytest.mark.parametrize("token", [None, "hf_" + "other" * 7], ids=["no token", "no access"])
def test_a_gated_repository_says_where_to_accept_its_terms(hub, published, tmp_path, token):
    hub.add("org/gated", published, access="gated", tokens=(TOKEN,))
    hub.add("org/else", published, access="private", tokens=("hf_" + "other" * 7,))
    env = {} if token is None else {"HF_TOKEN": token}
    done = locate(hub, tmp_path, "hf://org/gated", **env)
    message = error_of(done)
    assert "is gated" in message
    assert "https://huggingface.co/org/gated" in message
    assert "HF_TOKEN" in message
    assert token is None or token not in done.out + done.err


@pytest.mark.backend_free
@pytest.mark.parametrize("access", ["gated", "private"])
def test_a_token_opens_a_closed_repository(hub, published, tmp_path, access):
    hub.add("org/closed", published, access=access, tokens=(TOKEN,))
    assert locate(hub, tmp_path, "hf://org/closed", HF_TOKEN=TOKEN).status == 0


@pytest.mark.backend_free
@pytest.mark.parametrize("name", ["org/nothing", "org/hidden"])
def test_a_missing_or_private_repository_says_to_check_name_and_token(
    hub, published, tmp_path, name
):
    hub.add("org/hidden", published, access="private", tokens=(TOKEN,))
    message = error_of(locate(hub, tmp_path, f"hf://{name}"))
    assert repr(name) in message
    assert "check the name" in message
    assert "HF_TOKEN" in message


@pytest.mark.backend_free
def test_a_missing_repository_is_named_to_those_with_a_token_too(hub, published, tmp_path):
    hub.add("org/hidden", published, access="private", tokens=(TOKEN,))
    done = locate(hub, tmp_path, "hf://org/nothing", HF_TOKEN=TOKEN)
    assert "'org/nothing'" in error_of(done)
    assert TOKEN not in done.out + done.err


@pytest.mark.backend_free
def test_a_wrong_token_is_said_to_be_wrong_and_not_printed(hub, tmp_path):
    done = locate(hub, tmp_path, HF_TOKEN=TOKEN)
    assert "HF_TOKEN" in error_of(done)
    assert TOKEN not in done.out + done.err


@pytest.mark.backend_free
def test_a_missing_revision_is_named(hub, tmp_path):
    message = error_of(locate(hub, tmp_path, f"hf://{NAME}@nothing"))
    assert "has no revision 'nothing'" in message


@pytest.mark.backend_free
def test_a_repository_without_a_model_is_said_to_have_no_config(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing here")
    hub.add("org/empty", tmp_path / "empty")
    code = "import puna; puna.models.Llama3CausalLM.from_preset('hf://org/empty')"
    done = run(["-c", code], hub.environment(tmp_path / "home"))
    assert "config.json" in error_of(done)


@pytest.mark.backend_free
@pytest.mark.parametrize("address", ["hf://name", "hf://", "hf://a/b/c", "hf:///name"])
def test_an_address_that_is_none_is_refused_with_the_form(address):
    with pytest.raises(PresetError, match="is not of the form hf://org/name"):
        parse_address(address)


@pytest.mark.backend_free
def test_a_name_that_the_hub_allows_nobody_is_refused_in_one_line(hub, tmp_path):
    assert "org/na--me" in error_of(locate(hub, tmp_path, "hf://org/na--me"))


@pytest.mark.backend_free
def test_the_fetched_files_are_those_of_the_repository(hub, published, tmp_path):
    path = locate(hub, tmp_path).out.strip()
    for name in (*SMALL, "model.safetensors"):
        with open(os.path.join(path, name), "rb") as file:
            assert file.read() == (published / name).read_bytes()
