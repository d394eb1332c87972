"""A Hub that refuses, fails, breaks off or is away, through the real client."""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from puna.testing import write_tiny_preset
from tests.hub_server import SIGNATURE, HubServer
from tests.processes import Finished, run

pytestmark = pytest.mark.backend_free

TOKEN = "hf_" + "sEcReT" * 6
STRANGER = "hf_" + "unknown" * 5

# Locates each address, and tells of each the path or the error, the seconds and what was told.
LOCATE = """
import json, sys, time, traceback, warnings
from puna.checkpoint import hub, hub_errors
from puna.errors import PresetError
hub_errors._FIRST_WAIT = 0.02
results = []
for address in sys.argv[1:]:
    address, _, revision = address.partition(" ")
    began, result = time.monotonic(), {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result["path"] = str(hub.locate(address, revision=revision or None))
        except PresetError as error:
            result["error"] = str(error)
            traceback.print_exc()
    result["told"] = [str(warning.message) for warning in told]
    result["seconds"] = time.monotonic() - began
    results.append(result)
assert not {"keras", "jax", "torch", "tensorflow", "numpy"} & set(sys.modules)
print(json.dumps(results))
"""


def locate_all(hub: HubServer, home: Path, *addresses: str, **env: str) -> tuple[list, Finished]:
    """What came of each address, in one process, and all that the process printed."""
    done = run(["-c", LOCATE, *addresses], hub.environment(home, **env))
    assert done.status == 0, done.err
    for secret in (TOKEN, STRANGER, SIGNATURE):
        assert secret not in done.out + done.err
    # The client's own notes of its attempts are replaced by one of ours.
    assert "Retrying" not in done.err
    return json.loads(done.out), done


def locate(hub: HubServer, home: Path, address: str, **env: str) -> dict:
    (result,), _ = locate_all(hub, home, address, **env)
    return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp("repo") / "tiny")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@contextlib.contextmanager
def nowhere():
    """An endpoint that refuses connections."""
    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


def write_sharded(directory: Path, size: int = 1000, count: int = 3) -> Path:
    """A repository whose weights are nothing, in shards."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name in names:
        (directory / name).write_bytes(os.urandom(size))
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_large(directory: Path, size: int) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(size))
    return directory


# What stays: one line each

API, FILE = "/api/models/org/{}*", "/org/{}/resolve/*/model.safetensors"
LASTING = {
    "unknown-token": (API, {"status": 401,
        "message": "Invalid credentials in Authorization header"},
        "does not know the token that hf://org/unknown-token was asked for with; set HF_TOKEN"),
    "no-repository": (API, {"status": 404, "code": "RepoNotFound"},
        "the Hub has no repository 'org/no-repository', or it is private: check the name"),
    "no-revision": (API, {"status": 404, "code": "RevisionNotFound"},
        "has no revision"),
    "no-right": (API, {"status": 403},
        "the Hub does not let this token read hf://org/no-right; see its rights at"),
    "gated": (FILE, {"status": 403, "code": "GatedRepo"},
        "is gated; accept its terms at https://huggingface.co/org/gated and set HF_TOKEN"),
    "file-no-right": (FILE, {"status": 403},
        "does not let this token read hf://org/file-no-right (model.safetensors)"),
    "file-unknown-token": (FILE, {"status": 401,
        "message": "Invalid credentials in Authorization header"},
        "does not know the token that hf://org/file-unknown-token (model.safetensors)"),
    "no-file": (FILE, {"status": 404, "code": "EntryNotFound"},
        "lists hf://org/no-file (model.safetensors) and does not have it; try again"),
    "disabled": (API, {"status": 403, "message": "Access to this resource is disabled."},
        "the Hub has disabled hf://org/disabled"),
    "busy": (API, {"status": 429, "headers": {"Retry-After": "9999"}},
        "too many requests from here to give hf://org/busy (429); try again in 9999 s"),
    "limited": (API, {"status": 429}, "(429); try again later, with HF_TOKEN set"),
    "down": (API, {"status": 500}, "failed to give hf://org/down (500), several times; try again"),
    "file-down": (FILE, {"status": 502, "method": "GET"},
        "failed to give hf://org/file-down (model.safetensors) (502), several times"),
    "teapot": (API, {"status": 418}, "did not give hf://org/teapot (418); see"),
    "reset": (FILE, {"after": 100, "is_reset": True},
        "broke again and again while hf://org/reset was fetched"),
}  # fmt: skip
# What is asked for again before it is given up.
TRIED = {"limited": 5, "down": 5, "file-down": 5, "reset": 5}


@pytest.fixture(scope="module")
def lasting(tiny, tmp_path_factory):
    """What came of each repository of `LASTING`, and how often the fault befell it."""
    faults = {}
    with HubServer() as server:
        for name, (pattern, how, _) in LASTING.items():
            server.add(f"org/{name}", tiny, tokens=(TOKEN,))
            faults[name] = server.fail(pattern.format(name), **how)
        addresses = [f"hf://org/{name}" for name in LASTING]
        home = tmp_path_factory.mktemp("home")
        results, _ = locate_all(server, home, *addresses, HF_TOKEN=TOKEN)
    seen = {name: fault.seen for name, fault in faults.items()}
    return dict(zip(LASTING, results, strict=True)), seen


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_told_in_one_line(lasting, name):
    result = lasting[0][name]
    assert LASTING[name][2] in result["error"]
    assert "\n" not in result["error"]
    assert len(result["told"]) == (1 if name in TRIED else 0)


def test_what_may_pass_is_tried_a_few_times_and_what_will_not_once(lasting):
    results, seen = lasting
    assert seen == {name: TRIED.get(name, 1) for name in LASTING}
    assert sum(result["seconds"] for result in results.values()) < 20


def test_a_hub_that_is_away_is_named(hub, tmp_path):
    with nowhere() as url:
        result = locate(hub, tmp_path, "hf://org/tiny", HF_ENDPOINT=url)
    host = url.removeprefix("http://")
    assert f"the Hub ({host}) cannot be reached" in result["error"]
    assert "and hf://org/tiny is not in the cache; go online once, or give" in result["error"]
    assert result["seconds"] < 3


def test_whoever_is_no_hub_is_told_so(hub, tmp_path):
    hub.fail("/api/*", status=200)
    assert "is none: check HF_ENDPOINT" in locate(hub, tmp_path, "hf://org/tiny")["error"]


@pytest.mark.parametrize(
    "token", [f"{TOKEN} {TOKEN}", f"{TOKEN}\x01", f"{TOKEN}é"], ids=["space", "control", "letter"]
)
def test_a_token_that_cannot_be_sent_is_not_printed(hub, tiny, tmp_path, token):
    hub.add("org/tiny", tiny)
    error = locate(hub, tmp_path, "hf://org/tiny", HF_TOKEN=token)["error"]
    assert "holds characters that none has; set HF_TOKEN" in error


# What passes

PASSING = {
    "busy": (API, {"status": 429, "headers": {"Retry-After": "1"}, "times": 1}),
    "limited": (API, {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}, "times": 1}),
    "file-busy": (FILE, {"status": 429, "times": 1, "method": "GET"}),
    "500": (API, {"status": 500, "times": 3}),
    "502": (FILE, {"status": 502, "times": 1, "method": "HEAD"}),
    "503": (FILE, {"status": 503, "times": 3, "method": "GET"}),
    "cut": (FILE, {"after": 1000, "times": 1}),
    "reset": (FILE, {"after": 1000, "times": 3, "is_reset": True}),
    "slow": (API, {"delay": 1.0, "times": 1}),
}
SILENT = {"slow", "502"}  # the client repeats a failed HEAD at once, and without a word


@pytest.mark.slow
def test_what_passes_is_waited_for_and_told_once(hub, tiny, tmp_path):
    for name, (pattern, how) in PASSING.items():
        hub.add(f"org/{name}", tiny)
        hub.fail(pattern.format(name), **how)
    results, _ = locate_all(hub, tmp_path, *(f"hf://org/{name}" for name in PASSING))
    weights = (tiny / "model.safetensors").read_bytes()
    for name, result in zip(PASSING, results, strict=True):
        assert "error" not in result, name
        assert (Path(result["path"]) / "model.safetensors").read_bytes() == weights, name
        assert len(result["told"]) == (name not in SILENT), name
    assert results[0]["seconds"] >= 1
    assert results[0]["told"] == [
        "the Hub has trouble giving hf://org/busy (it answered 429); it is tried again in 1 s, "
        "as it asks"
    ]


# Large files

MB = 1 << 20


@pytest.mark.slow
def test_a_large_file_cut_three_times_is_resumed(tmp_path):
    size = 100 * MB
    large = write_large(tmp_path / "large", size)
    with HubServer(has_storage=True) as hub:
        hub.add("org/large", large, access="private", tokens=(TOKEN,))
        for after, is_reset in ((30 * MB, False), (1 * MB, True), (40 * MB, True)):
            hub.fail("/storage/*", method="GET", times=1, after=after, is_reset=is_reset)
        result = locate(hub, tmp_path / "home", "hf://org/large", HF_TOKEN=TOKEN)
        assert hub.downloads["model.safetensors"] == 4
        assert size <= hub.sent["model.safetensors"] < 1.1 * size
        # The token is for the Hub alone, not for the storage that it redirects to.
        for path, tokens in hub.tokens.items():
            assert tokens == ({None} if path.startswith("/storage/") else {TOKEN})
    here, there = (Path(d) / "model.safetensors" for d in (result["path"], large))
    assert here.read_bytes() == there.read_bytes()
    assert len(result["told"]) == 1


def test_what_has_come_is_kept_for_another_process(hub, tmp_path):
    size = 9 * MB
    large = write_large(tmp_path / "large", size)
    home = tmp_path / "home"
    hub.add("org/large", large)
    hub.fail("*/model.safetensors", method="GET", times=1, after=6 * MB)
    hub.fail("*/model.safetensors", method="GET", status=503)
    assert "what has come is kept" in locate(hub, home, "hf://org/large")["error"]
    (partial,) = home.rglob("*.incomplete")
    assert 5 * MB < partial.stat().st_size <= 6 * MB
    hub.faults.clear()
    result = locate(hub, home, "hf://org/large")
    assert hub.sent["model.safetensors"] < 1.1 * size
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == (
        large / "model.safetensors"
    ).read_bytes()
    assert not list(home.rglob("*.incomplete"))


def test_what_another_left_is_not_believed(hub, tmp_path):
    size = 9 * MB
    large = write_large(tmp_path / "large", size)
    home = tmp_path / "home"
    hub.add("org/large", large)
    hub.fail("*/model.safetensors", method="GET", status=403)
    locate(hub, home, "hf://org/large")
    hub.faults.clear()
    (lock,) = home.rglob("*.lock")
    folder = next(home.rglob("models--org--large"))
    partial = folder / "blobs" / f"{lock.stem}.incomplete"
    partial.write_bytes(b"of something else" * 1000)
    result = locate(hub, home, "hf://org/large")
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == (
        large / "model.safetensors"
    ).read_bytes()


# The cache

SECOND = "model-00002-of-00003.safetensors"


def test_a_half_fetched_checkpoint_is_no_checkpoint(hub, tmp_path):
    sharded = write_sharded(tmp_path / "sharded")
    home = tmp_path / "home"
    hub.add("org/sharded", sharded)
    hub.fail(f"*/{SECOND}", method="GET", status=503)
    assert f"({SECOND}) (503)" in locate(hub, home, "hf://org/sharded")["error"]
    offline = locate(hub, home, "hf://org/sharded", HF_HUB_OFFLINE="1")["error"]
    assert "HF_HUB_OFFLINE is set, and hf://org/sharded is incomplete in the cache" in offline
    assert f"1 of its 5 files are missing ({SECOND}); go online once to fetch the rest" in offline
    hub.forget()
    hub.fail("*", status=503)
    assert "(503)" in locate(hub, home, "hf://org/sharded")["error"]
    hub.forget()
    assert "path" in locate(hub, home, "hf://org/sharded")
    assert set(hub.downloads) == {SECOND}


def test_a_branch_is_what_it_was_until_all_of_what_it_is_has_come(hub, tmp_path):
    older = write_sharded(tmp_path / "older")
    newer = write_sharded(tmp_path / "newer")
    home = tmp_path / "home"
    hub.add("org/moves", older)
    before = locate(hub, home, "hf://org/moves")["path"]
    commit = hub.add("org/moves", newer)
    fault = hub.fail(f"*/{SECOND}", method="GET", status=500)
    assert "(500)" in locate(hub, home, "hf://org/moves")["error"]
    assert locate(hub, home, "hf://org/moves", HF_HUB_OFFLINE="1")["path"] == before
    fault.times = 0
    after = locate(hub, home, "hf://org/moves")["path"]
    assert after.endswith(commit)
    assert locate(hub, home, "hf://org/moves", HF_HUB_OFFLINE="1")["path"] == after


def test_a_file_that_was_damaged_is_missed_and_fetched_again(hub, tmp_path):
    sharded = write_sharded(tmp_path / "sharded")
    home = tmp_path / "home"
    hub.add("org/sharded", sharded)
    path = Path(locate(hub, home, "hf://org/sharded")["path"])
    os.truncate(path / SECOND, 10)
    offline = locate(hub, home, "hf://org/sharded", HF_HUB_OFFLINE="1")["error"]
    assert f"1 of its 5 files are missing ({SECOND})" in offline
    assert "path" in locate(hub, home, "hf://org/sharded")
    assert (path / SECOND).read_bytes() == (sharded / SECOND).read_bytes()


def test_with_a_full_cache_no_hub_is_needed(hub, tiny, tmp_path):
    commit = hub.add("org/tiny", tiny)
    address, pinned = "hf://org/tiny", f"hf://org/tiny@{commit}"
    first, _ = locate_all(hub, tmp_path, address, pinned)
    path = first[0]["path"]
    assert path == first[1]["path"]
    hub.forget()
    offline, _ = locate_all(hub, tmp_path, address, pinned, HF_HUB_OFFLINE="1")
    # What a commit holds is known, whether or not there is a network.
    (online,), _ = locate_all(hub, tmp_path, pinned)
    assert not hub.requests
    assert all(result["path"] == path and not result["told"] for result in [*offline, online])
    assert all(result["seconds"] < 1 for result in offline)
    hub.fail("*", delay=20)
    with nowhere() as url:
        away = locate(hub, tmp_path, address, HF_ENDPOINT=url)
    for result in (locate(hub, tmp_path, address), away):
        assert result["path"] == path
        assert result["seconds"] < 3
        (told,) = result["told"]
        assert f"does not answer; hf://org/tiny is taken from the cache ({commit})" in told


def test_revisions_are_pinned_or_followed(hub, tmp_path):
    first = write_sharded(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    (second / "config.json").write_text('{"second": 2}')
    home = tmp_path / "home"
    old = hub.add("org/moves", first, revision="branch")
    hub.add("org/moves", first)
    ways = ("hf://org/moves", "hf://org/moves@branch", "hf://org/moves branch",
            f"hf://org/moves@{old}", f"hf://org/moves {old}")  # fmt: skip
    results, _ = locate_all(hub, home, *ways)
    assert {Path(result["path"]).name for result in results} == {old}
    new = hub.add("org/moves", second, revision="branch")
    hub.forget()
    results, _ = locate_all(hub, home, *ways)
    assert [Path(result["path"]).name for result in results] == [old, new, new, old, old]
    assert set(hub.downloads) == {"config.json"}  # what both hold is fetched once
    # The address says it louder than the argument.
    (result,), _ = locate_all(hub, home, f"hf://org/moves@{old} branch")
    assert Path(result["path"]).name == old


def test_a_cache_that_cannot_be_written_is_named(hub, tiny, tmp_path):
    hub.add("org/tiny", tiny)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file, where a folder shall be")
    error = locate(hub, tmp_path / "home", "hf://org/tiny")["error"]
    assert "cannot be written to the cache" in error
    assert str(tmp_path / "home") in error
