"""`puna fuse` and `puna upload`: what they say, and what is there afterwards."""

import shutil

import pytest
from safetensors import safe_open

from puna.checkpoint.model_card import front_matter
from puna.models import CausalLM
from puna.testing import write_tiny_preset
from tests.hub_files import files_of
from tests.hub_server import HubServer
from tests.hub_uploading import MINE, TOKEN, commit, published
from tests.processes import run
from tests.unit.test_cli import error_of, puna

# What is tested here is the same on every backend, whose own parity is tested elsewhere.
pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A base in bfloat16 and an adapter for it."""
    root = tmp_path_factory.mktemp("originals")
    base = write_tiny_preset(root / "base", dtype="bfloat16")
    (base / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n# Theirs\n")
    model = CausalLM.from_preset(base)
    model.enable_lora(rank=2)
    model.save_to_preset(root / "adapter", adapter="only")
    model.save_to_preset(root / "whole")
    return root


def fuse(originals, out, *more):
    adapter = ("--adapter", originals / "adapter")
    return puna("fuse", originals / "base", *adapter, "--out", out, *more)


def test_fuse_writes_a_whole_model_with_a_card(originals, tmp_path):
    result = fuse(originals, tmp_path / "out", "--max-shard-size", "4KB", "--dtype", "float16")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "weight files, " in result.stderr
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    names = set(files_of(tmp_path / "out"))
    assert names > {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    text = (tmp_path / "out" / "README.md").read_text()
    told = front_matter(text)
    assert (told["base_model"], told["license"]) == ("org/base", "mit")
    assert "with an adapter merged into the weights" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "more",
    [(), ("--max-shard-size", "0"), ("--max-shard-size", "5XB"), ("--max-shard-size", "-1MB")],
)
def test_fuse_says_what_it_needs(originals, tmp_path, more):
    adapter = ("--adapter", originals / "adapter") if more else ()
    result = puna("fuse", originals / "base", *adapter, "--out", tmp_path / "out", *more)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_failed_fusion_leaves_nothing(originals, tmp_path):
    for name in ("base", "nothing"):
        arguments = ("--adapter", originals / name, "--out", tmp_path / "out")
        line = error_of(puna("fuse", originals / "base", *arguments))
        assert "adapter_config.json" in line or "there is no preset" in line
    assert "not an empty directory" in error_of(fuse(originals, originals))
    assert list(tmp_path.iterdir()) == []


def test_upload_prints_the_page_and_tells_what_it_does(originals, tmp_path):
    directory = shutil.copytree(originals / "whole", tmp_path / "pirate")
    (directory / "optimizer.pt").write_text("mine alone")
    count = len(files_of(originals / "whole"))
    size = sum(path.stat().st_size for path in (originals / "whole").iterdir())
    with HubServer() as hub:
        hub.users[TOKEN] = MINE
        env = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)
        upload = ["-m", "puna", "upload", str(directory), "hf://me/pirate"]
        done = run([*upload, "--private", "--message", "Arr"], env)
        page = f"{hub.url}/me/pirate/commit/{commit(hub, 'me/pirate')}\n"
        assert (done.status, done.out) == (0, page), done.err
        assert done.err.splitlines() == [
            "puna: left out: optimizer.pt",
            f"puna: uploading {count} files, {size:,} bytes, to hf://me/pirate",
        ]
        assert hub.repositories["me/pirate"].access == "private"
        done = run([*upload, "--revision", "v2"], env)
        assert done.status == 0, done.err
        assert set(published(hub, "me/pirate", "v2")) == set(published(hub, "me/pirate"))
        (directory / "tokenizer.json").unlink()
        before = hub.requests.total()
        done = run(upload, env)
        assert (done.status, done.out) == (1, "")
        (line,) = done.err.splitlines()
        assert line.startswith(f"puna: error: {directory} has no tokenizer.json")
        assert hub.requests.total() == before
