"""`puna.upload_preset` through the real `huggingface_hub` client, to a Hub on loopback and back."""

import json
import os
import shutil
from pathlib import Path

import pytest

from puna.checkpoint.model_card import PLACE, is_ours
from puna.testing import tiny_model, write_tiny_preset
from tests.hub_files import files_of
from tests.hub_server import HubServer
from tests.hub_uploading import MINE, TOKEN, commit, published, upload, upload_all
from tests.processes import result_of, run

MB = 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that was saved here: weights, tokenizer, template, settings and a card."""
    directory = tmp_path_factory.mktemp("saved") / "pirate"
    tiny_model().save_to_preset(directory)
    return directory


@pytest.fixture
def hub():
    with HubServer() as server:
        server.users[TOKEN] = MINE
        yield server


# There and back

ROUND_TRIP = """
import json, sys
import keras
import numpy as np
import puna
from puna.testing import randomize, tiny_model

work = sys.argv[1]
IDS = np.array([[300, 5, 261, 17, 3, 0, 44, 259]], "int32")

def numpy(value):
    return keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))

def are_equal(ours, theirs):
    return all(np.array_equal(numpy(a), numpy(b)) for a, b in zip(ours, theirs, strict=True))

model = tiny_model(dtype="bfloat16", seed=3)
model.save_to_preset(f"{work}/pirate", max_shard_size=4000)
url = puna.upload_preset(uri="hf://me/pirate", preset=f"{work}/pirate")
again = puna.models.Llama3CausalLM.from_preset("hf://me/pirate")

again.enable_lora(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "lm_head"])
for seed, variable in enumerate(again.trainable_variables):
    noise = np.random.default_rng(seed).normal(0, 0.2, tuple(variable.shape))
    variable.assign(noise.astype("float32"))
again.save_to_preset(f"{work}/lora", adapter="only")
puna.upload_preset("hf://me/lora", f"{work}/lora", private=True, commit_message="An adapter")
found = puna.models.CausalLM.from_preset("hf://me/lora", dtype="float32")
beside = puna.models.CausalLM.from_preset("hf://me/pirate")
beside.load_adapter("hf://me/lora")
exact = puna.models.CausalLM.from_preset("hf://me/pirate", dtype="float32")
exact.load_adapter("hf://me/lora")

again.save_to_preset(f"{work}/merged")
puna.upload_preset("hf://me/merged", f"{work}/merged")
merged = puna.models.CausalLM.from_preset("hf://me/merged")
local = puna.models.CausalLM.from_preset(f"{work}/merged")
logits = numpy(exact(IDS))
print(json.dumps({
    "url": url,
    "weights": are_equal(model.variables, puna.models.CausalLM.from_preset("hf://me/pirate").variables),
    "text": again.tokenizer.chat_templates == model.tokenizer.chat_templates,
    "adapter": are_equal(again.trainable_variables, beside.trainable_variables),
    # Merged into bfloat16 weights, against beside them: what the weights round off.
    "difference": float(np.abs(numpy(found(IDS)) - logits).max() / np.abs(logits).max()),
    "merged": are_equal(merged.variables, local.variables),
    "base": again.card.base,
}))
"""


@pytest.mark.slow
def test_a_model_an_adapter_and_a_merged_model_come_back(tmp_path):
    with HubServer(has_storage=True) as hub:
        hub.users[TOKEN] = MINE
        env = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)
        result = result_of(ROUND_TRIP, str(tmp_path), env=env)
        assert result.pop("url").startswith(f"{hub.url}/me/pirate/commit/")
        assert result.pop("difference") < 0.02
        assert result == {"weights": True, "text": True, "adapter": True, "merged": True,
                          "base": "me/pirate"}  # fmt: skip
        assert hub.uploads.commits == {"me/pirate": 1, "me/lora": 1, "me/merged": 1}
        assert hub.repositories["me/lora"].access == "private"
        card = published(hub, "me/lora")["README.md"].read_text()
        assert "base_model: me/pirate\n" in card
        assert 'from_preset("hf://me/lora")' in card
        # The token is for the Hub alone, not for the storage of large files.
        for path, tokens in hub.tokens.items():
            assert tokens == ({None} if path.startswith("/storage/") else {TOKEN})


@pytest.mark.backend_free
def test_all_of_a_preset_is_in_one_commit_and_nothing_else(hub, saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "pirate")
    for name in (".cache/x", "checkpoints/1.keras", "run.yaml", ".env", "model.safetensors.7.tmp"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("mine alone")
    (directory / "loss.png").write_bytes(b"a picture")
    (result,) = upload_all(hub, tmp_path, {"uri": "hf://me/pirate", "preset": directory})
    assert result["url"] == f"{hub.url}/me/pirate/commit/{commit(hub, 'me/pirate')}"
    assert result["told"] == []
    there = published(hub, "me/pirate")
    names = {*files_of(saved), "loss.png", ".gitattributes"}
    assert set(there) == names
    for name in names - {"README.md", ".gitattributes"}:
        assert there[name].read_bytes() == (directory / name).read_bytes()
    card = there["README.md"].read_text()
    assert is_ours(card)
    assert PLACE not in card
    assert PLACE in (directory / "README.md").read_text()


@pytest.mark.backend_free
@pytest.mark.slow
def test_large_files_go_in_parts_and_come_back(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    directory = write_tiny_preset(tmp_path / "large", **shape)
    size = (directory / "model.safetensors").stat().st_size
    assert size > 10 * MB
    with HubServer(has_storage=True) as hub:
        hub.users[TOKEN] = MINE
        hub.uploads.part_size = 4 * MB
        hub.fail("/storage/take/*/2", method="PUT", times=1, after=1 * MB)
        hub.fail("/storage/take/*/3", method="PUT", times=1, status=500)
        result = upload(hub, tmp_path, "hf://me/large", directory)
        assert "url" in result
        (told,) = result["told"]
        assert told.startswith("the Hub has trouble taking hf://me/large (")
        # Each part that came to its end was taken in once.
        assert sorted(hub.uploads.taken.values()) == [1] * -(-size // (4 * MB))
        code = "import sys; from puna.checkpoint.hub import locate; print(locate('hf://me/large'))"
        done = run(["-c", code], hub.environment(tmp_path / "other", HF_TOKEN=TOKEN))
        assert done.status == 0, done.err
    there = Path(done.out.strip(), "model.safetensors").read_bytes()
    assert there == (directory / "model.safetensors").read_bytes()


# Again, elsewhere, and for few


@pytest.mark.backend_free
def test_a_newer_model_takes_the_place_of_an_older_one(hub, saved, tmp_path):
    tiny_model(seed=1).save_to_preset(tmp_path / "sharded", max_shard_size=4_000)
    model = tiny_model()
    model.enable_lora(rank=2)
    model.preset = ("org/base", None)
    model.save_to_preset(tmp_path / "adapter", adapter="only")
    directories = (saved, tmp_path / "sharded", tmp_path / "adapter", saved, saved)
    asked = [{"uri": "hf://me/pirate", "preset": directory} for directory in directories]
    results = upload_all(hub, tmp_path, *asked)
    urls = [result["url"] for result in results]
    commits = hub.repositories["me/pirate"].commits
    for directory, url in zip(directories, urls, strict=True):
        there = set(files_of(commits[url.rpartition("/")[2]]))
        assert there == {*files_of(directory), ".gitattributes"}
    # What is there already is no commit.
    assert hub.uploads.commits["me/pirate"] == 4
    assert urls[-1] == urls[-2]
    told = ["hf://me/pirate holds all of this already; nothing was changed"]
    assert [result["told"] for result in results] == [[], [], [], [], told]


@pytest.mark.backend_free
def test_a_card_that_somebody_wrote_on_the_hub_stays(hub, saved, tmp_path):
    (tmp_path / "first").mkdir()
    for name, text in {"README.md": "# Theirs\n", "notes.txt": "theirs"}.items():
        (tmp_path / "first" / name).write_text(text)
    hub.add("me/pirate", tmp_path / "first", tokens=(TOKEN,))
    result = upload(hub, tmp_path, "hf://me/pirate", saved)
    assert "README.md of hf://me/pirate is not Puna's and stays as it is" in result["told"][0]
    there = published(hub, "me/pirate")
    assert there["README.md"].read_text() == "# Theirs\n"
    assert there["notes.txt"].read_text() == "theirs"
    # One that the user wrote here is what he wants there.
    mine = shutil.copytree(saved, tmp_path / "mine")
    (mine / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert upload(hub, tmp_path, "hf://me/pirate", mine)["told"] == []
    assert published(hub, "me/pirate")["README.md"].read_text().endswith("# Mine\n")


@pytest.mark.backend_free
def test_a_branch_is_made_and_the_main_one_stays(hub, saved, tmp_path):
    older = shutil.copytree(saved, tmp_path / "older")
    (older / "loss.png").write_bytes(b"a picture")
    results = upload_all(
        hub, tmp_path,
        {"uri": "hf://me/pirate", "preset": older},
        {"uri": "hf://me/pirate@v2", "preset": saved, "revision": "never"},
        {"uri": "hf://me/pirate", "preset": older, "revision": "v2"},
        {"uri": "hf://me/new", "preset": saved, "revision": "v1"},
        {"uri": f"hf://me/pirate@{'0a' * 20}", "preset": saved},
    )  # fmt: skip
    assert ["url" in result for result in results] == [True] * 4 + [False]
    assert "is a commit, which never changes; give the name of a branch" in results[-1]["error"]
    assert set(hub.repositories["me/pirate"].revisions) == {"main", "v2"}
    # The second had nothing new to say, nor had the third.
    assert hub.uploads.commits == {"me/pirate": 1, "me/new": 1}
    assert set(files_of(hub.repositories["me/new"].revisions["main"])) == {".gitattributes"}
    assert "model.safetensors" in files_of(hub.repositories["me/new"].revisions["v1"])


@pytest.mark.backend_free
def test_private_is_private_or_refused(hub, saved, tmp_path):
    hub.add("me/shown", saved, tokens=(TOKEN,))
    results = upload_all(
        hub, tmp_path,
        {"uri": "hf://me/hidden", "preset": saved, "private": True},
        {"uri": "hf://me/shown", "preset": saved, "private": True},
    )  # fmt: skip
    assert hub.repositories["me/hidden"].access == "private"
    assert "hf://me/shown is there and public, and private=True was given" in results[1]["error"]
    assert not hub.uploads.commits["me/shown"]
    code = "from puna.checkpoint.hub import locate; print(locate('hf://me/hidden'))"
    stranger = run(["-c", code], hub.environment(tmp_path / "stranger"))
    assert "or it is private: check the name" in stranger.last_line
    owner = run(["-c", code], hub.environment(tmp_path / "owner", HF_TOKEN=TOKEN))
    assert owner.status == 0, owner.err


# Kaggle

FAKE_KAGGLEHUB = """
import json, os
def model_upload(handle, local_model_dir, license_name=None, version_notes=""):
    if handle.startswith("stranger/"):
        raise RuntimeError("403 Forbidden")
    files = [os.path.relpath(os.path.join(folder, file), local_model_dir)
             for folder, _, names in os.walk(local_model_dir) for file in names]
    sizes = {file: os.path.getsize(os.path.join(local_model_dir, file)) for file in files}
    with open(os.environ["SEEN"], "w") as seen:
        json.dump([handle, version_notes, sizes], seen)
"""


@pytest.mark.backend_free
def test_kaggle_gets_the_same_files_through_its_own_client(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "pirate")
    (directory / "optimizer.pt").write_text("mine alone")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "kagglehub.py").write_text(FAKE_KAGGLEHUB)
    code = """
import json, os, sys
import puna
directory, fake = sys.argv[1:]
def answer(uri, **more):
    try:
        return puna.upload_preset(uri, directory, **more)
    except puna.errors.PresetError as error:
        return str(error)
sys.modules["kagglehub"] = None
absent = answer("kaggle://me/pirate/keras/1b")
del sys.modules["kagglehub"]
sys.path.insert(0, fake)
print(json.dumps([
    absent,
    answer("kaggle://me/pirate/keras/1b", commit_message="Arr"),
    json.load(open(os.environ["SEEN"])),
    answer("kaggle://stranger/pirate/keras/1b"),
    answer("kaggle://me/pirate"),
    answer("kaggle://me/pirate/keras/1b", revision="v2"),
]))
"""
    env = {**os.environ, "SEEN": str(tmp_path / "seen.json")}
    absent, url, seen, stranger, short, revision = result_of(
        code, str(directory), str(tmp_path / "fake"), env=env
    )
    assert "install it with: pip install kagglehub" in absent
    assert url == "https://www.kaggle.com/models/me/pirate/keras/1b"
    sizes = {name: path.stat().st_size for name, path in files_of(saved).items()}
    assert seen == ["me/pirate/keras/1b", "Arr", sizes]
    assert "Kaggle did not take kaggle://stranger/pirate/keras/1b (RuntimeError: 403" in stranger
    assert "is not of the form kaggle://user/model/framework/variation" in short
    assert "Kaggle has no branches; leave it out" in revision


@pytest.mark.backend_free
def test_the_article_changes_one_import(hub, saved, tmp_path):
    code = f"""
import puna as keras_hub
keras_hub.upload_preset(
    uri = "hf://me/llama-3.2-1B-pirate-instruct",
    preset = {str(saved)!r})
"""
    done = run(["-c", code], hub.environment(tmp_path, HF_TOKEN=TOKEN))
    assert (done.status, done.out) == (0, ""), done.err
    assert json.loads((saved / "config.json").read_text())["model_type"] == "llama"
    assert "model.safetensors" in published(hub, "me/llama-3.2-1B-pirate-instruct")
