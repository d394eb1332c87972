"""Uploads that the Hub refuses, or that break: one line each, and nothing half published."""

import contextlib
import shutil
import socket

import pytest

from puna.checkpoint.model_card import CARD
from puna.testing import tiny_model
from tests.hub_server import HubServer
from tests.hub_uploading import (
    MINE,
    STRANGER,
    TOKEN,
    commit,
    published,
    upload,
    upload_all,
)

pytestmark = pytest.mark.backend_free


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "pirate"
    tiny_model().save_to_preset(directory)
    return directory


@pytest.fixture
def hub():
    with HubServer() as server:
        server.users[TOKEN] = MINE
        yield server


# What is refused before anything is asked


def test_what_is_not_whole_is_refused_and_nothing_is_asked(hub, saved, tmp_path):
    lost = {}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        lost[name] = shutil.copytree(saved, tmp_path / name)
        (lost[name] / name).unlink()
    cut = shutil.copytree(saved, tmp_path / "cut")
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    whole = [lost["config.json"], lost["tokenizer.json"], lost["model.safetensors"], cut]
    uploads = [{"uri": "hf://me/pirate", "preset": directory} for directory in whole]
    for uri in ("hf://pirate", "pirate", "s3://me/pirate", "hf://me/pi--rate"):
        uploads.append({"uri": uri, "preset": saved})
    errors = [result["error"] for result in upload_all(hub, tmp_path, *uploads)]
    for error, message in zip(
        errors,
        (
            "has no config.json",
            "has no tokenizer.json",
            "has no model.safetensors and no",
            "model.safetensors: its tensors end at byte",
            "is not of the form hf://org/name",
            "expected hf://user/name or kaggle://user/model/framework/variation",
            "the address 's3://me/pirate' has no scheme that can be written to",
            "hf://me/pi--rate is no name that the Hub allows",
        ),
        strict=True,
    ):
        assert message in error
    assert not hub.requests
    assert not hub.repositories


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HF_TOKEN": ""}, "there is no token for the Hub; set HF_TOKEN to one of"),
        ({"HF_TOKEN": f"{TOKEN} {TOKEN}"}, "holds characters that none has; set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it"),
    ],
    ids=["no token", "no such token", "offline"],
)
def test_what_no_upload_can_be_made_with_is_said(hub, saved, tmp_path, settings, message):
    assert message in upload(hub, tmp_path, "hf://me/pirate", saved, **settings)["error"]
    assert not hub.requests


# What the Hub refuses. Each fault befalls a repository of its name, which is new.

CREATE, TAKE = "/api/repos/create", "/take/me/{}/*"
PREUPLOAD, BATCH = "/api/models/me/{}/preupload/*", "/me/{}.git/*"
COMMIT = "/api/models/me/{}/commit/*"
ALONE = "(nothing was published)"
REMOVED = "(nothing was published, and the repository made for it is removed again)"
KEPT = (
    "(nothing was published: hf://me/{0} was made for it and is empty; what has arrived is not "
    "sent again next time)"
)
FULL = "Private repository storage limit reached"
REFUSED = {
    "paid": (CREATE, {"status": 402, "message": "Payment required"},
        "the Hub has no room for hf://me/paid (Payment required); remove what is not", ALONE),
    "no-right": (CREATE, {"status": 403},
        "the Hub does not let this token write to hf://me/no-right; give it the right to", ALONE),
    "hidden": (CREATE, {"status": 409}, "has hf://me/hidden already, where this token", ALONE),
    "busy": (CREATE, {"status": 429, "headers": {"Retry-After": "9999"}},
        "to take hf://me/busy (429); try in 9999 s", ALONE),
    "read-only": (PREUPLOAD, {"status": 403}, "does not let this token write to", REMOVED),
    "full": (BATCH, {"status": 403, "message": FULL},
        f"the Hub has no room for hf://me/full ({FULL}); remove what is not needed", REMOVED),
    "storage": (TAKE, {"status": 403, "method": "PUT"}, "does not let this token", REMOVED),
    "moved": (COMMIT, {"status": 412}, "somebody has changed hf://me/moved meanwhile", REMOVED),
    "large": (COMMIT, {"status": 413, "message": "too big"}, "a smaller max_shard_size", REMOVED),
    "bad": (COMMIT, {"status": 400, "message": "No such thing"},
        "the Hub did not take hf://me/bad (No such thing); correct that, or see", REMOVED),
    "down": (COMMIT, {"status": 503},
        "the Hub failed to take hf://me/down (503), several times; try again later", KEPT),
    "storage-down": (TAKE, {"status": 500, "method": "PUT"},
        "failed to take hf://me/storage-down (500), several times", KEPT),
    "cut": (TAKE, {"after": 1000, "method": "PUT"},
        "broke while hf://me/cut was uploaded", KEPT),
    "reset": (TAKE, {"after": 1000, "method": "PUT", "is_reset": True},
        "broke while hf://me/reset was uploaded", KEPT),
    "cut-commit": (COMMIT, {"after": 100, "method": "POST"},
        "broke while hf://me/cut-commit was uploaded", KEPT),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(saved, tmp_path_factory):
    """What came of each upload of `REFUSED`, and the repositories that are there afterwards."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        hub.users[TOKEN] = MINE
        results = {}
        at_creation = [name for name, (path, *_) in REFUSED.items() if path == CREATE]
        for name in at_creation:
            fault = hub.fail(CREATE, **REFUSED[name][1])
            results[name] = upload(hub, home, f"hf://me/{name}", saved)
            hub.faults.remove(fault)
        others = [name for name in REFUSED if name not in at_creation]
        for name in others:
            pattern, how, *_ = REFUSED[name]
            hub.fail(pattern.format(name), **how)
        asked = [{"uri": f"hf://me/{name}", "preset": saved} for name in others]
        results |= dict(zip(others, upload_all(hub, home, *asked), strict=True))
        left = {name: set(published(hub, name)) for name in hub.repositories}
        return results, left, dict(hub.uploads.commits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_told_in_one_line_and_nothing_is_published(refused, name):
    results, left, commits = refused
    _, _, message, outcome = REFUSED[name]
    assert message in results[name]["error"]
    assert results[name]["error"].endswith(outcome.format(name))
    assert commits == {}
    # What was made for it is removed, or empty where the next attempt goes on with it.
    there = left.get(f"me/{name}")
    assert there == ({".gitattributes"} if outcome == KEPT else None)


def test_a_token_that_is_unknown_or_anothers_is_told(hub, saved, tmp_path):
    hub.users["hf_other"] = "other"
    hub.add("other/theirs", saved, tokens=("hf_other",))
    unknown = upload(hub, tmp_path, "hf://me/pirate", saved, HF_TOKEN=STRANGER)["error"]
    assert "does not know the token that hf://me/pirate was to be written with" in unknown
    uris = ("hf://other/theirs", "hf://other/new")
    asked = [{"uri": uri, "preset": saved} for uri in uris]
    for uri, result in zip(uris, upload_all(hub, tmp_path, *asked), strict=True):
        assert f"does not let this token write to {uri}" in result["error"]
        assert result["error"].endswith(ALONE)
    assert not hub.uploads.commits


def test_a_hub_that_is_away_or_none_is_named(hub, saved, tmp_path):
    with nowhere() as url:
        error = upload(hub, tmp_path, "hf://me/pirate", saved, HF_ENDPOINT=url)["error"]
    assert f"the Hub ({url.removeprefix('http://')}) cannot be reached" in error
    hub.fail("/api/*", status=200)
    error = upload(hub, tmp_path, "hf://me/pirate", saved)["error"]
    assert "is none: check HF_ENDPOINT" in error


def test_the_newer_storage_of_large_files_is_explained_too(hub, saved, tmp_path):
    pytest.importorskip("hf_xet")
    hub.fail("*/xet-write-token/*", status=403)
    error = upload(hub, tmp_path, "hf://me/pirate", saved, HF_HUB_DISABLE_XET="0")["error"]
    assert "does not let this token write to hf://me/pirate" in error
    assert error.endswith(REMOVED)
    assert "xet-write-token" not in error


@contextlib.contextmanager
def nowhere():
    """An endpoint that refuses connections."""
    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


# What is there already


@pytest.mark.parametrize("fault", [
    {"path": "/take/*", "method": "PUT", "after": 1000},
    {"path": "*/commit/*", "status": 403},
    {"path": "*/commit/*", "method": "POST", "after": 100},
], ids=["large file", "commit refused", "commit cut"])  # fmt: skip
def test_an_upload_that_fails_leaves_what_is_there(hub, saved, tmp_path, fault):
    older = shutil.copytree(saved, tmp_path / "older")
    tiny_model(seed=7).save_to_preset(older)
    assert "url" in upload(hub, tmp_path, "hf://me/pirate", older)
    before = commit(hub, "me/pirate")
    hub.fail(**fault)
    uris = ("hf://me/pirate", "hf://me/pirate@v2")
    asked = [{"uri": uri, "preset": saved} for uri in uris]
    main, branch = (result["error"] for result in upload_all(hub, tmp_path, *asked))
    assert main.endswith(ALONE)
    assert branch.endswith("(nothing was published, and the branch made for it is removed again)")
    assert set(hub.repositories["me/pirate"].revisions) == {"main"}
    assert commit(hub, "me/pirate") == before
    assert hub.uploads.commits["me/pirate"] == 1


def test_what_has_arrived_is_not_sent_again(hub, saved, tmp_path):
    fault = hub.fail("*/commit/main", status=500)
    assert "is not sent again" in upload(hub, tmp_path, "hf://me/pirate", saved)["error"]
    hub.faults.remove(fault)
    assert "url" in upload(hub, tmp_path, "hf://me/pirate", saved)
    assert set(hub.uploads.taken.values()) == {1}
    assert hub.uploads.commits["me/pirate"] == 1


def test_a_commit_whose_answer_is_lost_is_found(hub, saved, tmp_path):
    hub.fail("*/commit/main", method="POST", is_answer_lost=True)
    result = upload(hub, tmp_path, "hf://me/pirate", saved)
    assert result["url"] == f"{hub.url}/me/pirate/commit/{commit(hub, 'me/pirate')}"
    assert hub.uploads.commits["me/pirate"] == 1


def test_what_is_not_known_is_said(hub, saved, tmp_path):
    hub.add("me/pirate", tmp_path, tokens=(TOKEN,))
    (tmp_path / "notes.txt").write_text("first")
    hub.fail("*/commit/main", method="POST", is_answer_lost=True)
    # The first question is before the commit, the others are after it.
    hub.fail("/api/models/me/pirate/revision/main", times=1)
    hub.fail("/api/models/me/pirate/revision/main", status=500)
    error = upload(hub, tmp_path / "home", "hf://me/pirate", saved)["error"]
    assert "(whether the commit has arrived is not known: see https://huggingface.co/" in error
    # A commit that was never sent cannot have arrived, whether or not the Hub can be asked.
    hub.forget()
    hub.add("me/pirate", tmp_path, tokens=(TOKEN,))
    hub.uploads.forget("me/pirate")
    hub.fail("/take/*", method="PUT", after=1000)
    hub.fail("/api/models/me/pirate/revision/main", times=1)
    hub.fail("/api/models/me/pirate/revision/main", status=500)
    assert upload(hub, tmp_path / "home", "hf://me/pirate", saved)["error"].endswith(ALONE)


def test_somebody_who_commits_meanwhile_is_not_overrun(hub, saved, tmp_path):
    assert "url" in upload(hub, tmp_path, "hf://me/pirate", saved)
    theirs = shutil.copytree(saved, tmp_path / "theirs")
    (theirs / "config.json").write_text("{}")
    newer = shutil.copytree(saved, tmp_path / "newer")
    tiny_model(seed=7).save_to_preset(newer)
    uploads = hub.uploads
    batch = uploads._batch

    def commit_first(*arguments):
        hub.add("me/pirate", theirs, tokens=(TOKEN,))
        return batch(*arguments)

    uploads._batch = commit_first
    error = upload(hub, tmp_path, "hf://me/pirate", newer)["error"]
    assert "somebody has changed hf://me/pirate meanwhile" in error
    assert published(hub, "me/pirate")["config.json"].read_text() == "{}"


def test_a_card_that_the_hub_does_not_take_is_told_before_anything_is_sent(hub, saved, tmp_path):
    mine = shutil.copytree(saved, tmp_path / "mine")
    (mine / CARD).write_text("---\nlicense: [mit, apache]\n---\n# Mine\n")
    error = upload(hub, tmp_path, "hf://me/pirate", mine)["error"]
    assert "the Hub does not take the head of README.md (" in error
    assert '"license" must be a string' in error
    assert error.endswith(REMOVED)
    assert not hub.uploads.taken
