"""Uploads to a Hub on loopback, in a process of their own, and what is there afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.hub_files import files_of
from tests.hub_server import HubServer
from tests.processes import run

TOKEN = "hf_" + "wRiTeR" * 6
STRANGER = "hf_" + "nobody" * 6
MINE = "me"

# Uploads each, and tells of each the page or the error, the seconds and what was told.
UPLOAD = """
import json, sys, time, traceback, types, warnings
from huggingface_hub.utils import _http
from puna.checkpoint import hub_errors
from puna.checkpoint.upload import upload_preset
from puna.errors import PunaError
hub_errors._FIRST_WAIT = 0.02
_http.time = types.SimpleNamespace(sleep=lambda seconds: None)  # the client's own attempts
results = []
for arguments in json.loads(sys.argv[1]):
    began, result = time.monotonic(), {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result["url"] = upload_preset(**arguments)
        except PunaError as error:
            result["error"] = str(error)
            traceback.print_exc()
    result["told"] = [str(w.message) for w in told if issubclass(w.category, UserWarning)]
    result["seconds"] = time.monotonic() - began
    results.append(result)
assert not {"keras", "jax", "torch", "tensorflow"} & set(sys.modules)
print(json.dumps(results))
"""


def upload_all(
    hub: HubServer, home: Path, *uploads: dict[str, Any], **env: str
) -> list[dict[str, Any]]:
    """What came of each upload, in one process; it has the token of the user `MINE`."""
    asked = json.dumps([{**one, "preset": str(one["preset"])} for one in uploads])
    done = run(["-c", UPLOAD, asked], hub.environment(home / "hf", **({"HF_TOKEN": TOKEN} | env)))
    assert done.status == 0, done.err
    for secret in (TOKEN, STRANGER):
        assert secret not in done.out + done.err
    # The client's own notes of its attempts are replaced by one of ours.
    assert "Retrying" not in done.err
    results = json.loads(done.out)
    assert all("\n" not in result.get("error", "") for result in results)
    return results


def upload(hub: HubServer, home: Path, uri: str, preset: Path, **env: str) -> dict[str, Any]:
    """What came of one upload."""
    (result,) = upload_all(hub, home, {"uri": uri, "preset": preset}, **env)
    return result


def published(hub: HubServer, name: str, revision: str = "main") -> dict[str, Path]:
    """The files of a repository, by their names."""
    return files_of(hub.repositories[name].revisions[revision])


def commit(hub: HubServer, name: str, revision: str = "main") -> str:
    """The commit that a branch stands for."""
    found = hub.repositories[name].resolve(revision)
    assert found is not None
    return found[0]
