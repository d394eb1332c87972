"""What uploads need of a Hub: repositories made and removed, large files taken in, commits.

    with HubServer() as hub:
        hub.users[TOKEN] = "me"
        subprocess.run([...], env=hub.environment(home, HF_TOKEN=TOKEN))
        assert hub.repositories["me/pirate"].commits

A large file is taken in one piece, or in parts of `part_size` where it is larger than that.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub_faults import Refusal
from tests.hub_files import commit_of, digest, files_of, is_large

if TYPE_CHECKING:
    from tests.hub_server import HubServer, Repository

TAKE = "take"  # how the paths of large files begin


class Uploads:
    """The half of the server that changes what it serves.

    Args:
        hub: the server.

    Attributes:
        part_size: bytes of a part of a large file.
        taken: how often each large file, or part of one, has been sent, by its digest and number.
        commits: how many commits each repository has had, the one that made it not counted in.
    """

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.part_size = 1 << 30
        self.taken: Counter[tuple[str, int]] = Counter()
        self.commits: Counter[str] = Counter()
        self._work = tempfile.TemporaryDirectory(prefix="hub-")
        self._directories = itertools.count()
        self._objects: dict[str, dict[str, Path]] = {}  # of each repository
        self._parts: dict[tuple[str, int], bytes] = {}

    def close(self) -> None:
        self._work.cleanup()

    def forget(self, name: str) -> None:
        """Forget the large files that a repository was sent."""
        self._objects.pop(name, None)

    def answer(self, handler: Any, parts: list[str]) -> None:
        """Answer a question that is no GET."""
        value, method = json.loads, handler.command
        if parts == ["api", "repos", "create"]:
            told = self._create(handler, value(handler.body))
        elif parts == ["api", "repos", "delete"]:
            told = self._delete(handler, value(handler.body))
        elif parts == ["api", "validate-yaml"]:
            wrong = _wrong_in(value(handler.body)["content"])
            errors = [{"message": wrong}] if wrong else []
            handler._json({"errors": errors, "warnings": []}, 400 if wrong else 200)
            return
        elif parts[:2] == ["api", "models"] and len(parts) == 6:
            name, revision = "/".join(parts[2:4]), parts[5]
            repository = self._writable(handler, name)
            if parts[4] == "branch":
                told = self._branch(handler, repository, revision, method)
            elif parts[4] == "preupload":
                told = self._preupload(handler, repository, revision, value(handler.body))
            else:
                told = self._commit(handler, name, repository, revision, handler.body)
        elif parts[1].endswith(".git"):
            name = f"{parts[0]}/{parts[1].removesuffix('.git')}"
            self._writable(handler, name)
            told = self._batch(name, value(handler.body))
        elif parts[0] == TAKE:
            self._take(handler, f"{parts[1]}/{parts[2]}", parts[3], parts[4:])
            return
        else:
            raise Refusal(404, "", "Not Found")
        handler._json(told)

    # Repositories

    def _user(self, handler: Any) -> str:
        token = handler._token()
        user = self.hub.users.get(token)
        if user is None:
            known = "Invalid credentials in Authorization header" if token else "Log in first"
            raise Refusal(401, "", known)
        return user

    def _create(self, handler: Any, asked: dict[str, Any]) -> dict[str, Any]:
        from tests.hub_server import Repository

        user = self._user(handler)
        owner, name = asked["organization"] or user, f"{asked['organization']}/{asked['name']}"
        if owner != user:
            raise Refusal(403, "", f'You don\'t have the rights to create a model under "{owner}"')
        if name in self.hub.repositories:
            raise Refusal(409, "", "You already created this model repo")
        first = self._directory()
        (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        is_private = asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(
            {"main": first},
            access="private" if is_private else "public",
            tokens=frozenset({handler._token()}),
        )
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _delete(self, handler: Any, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        self._writable(handler, name)
        del self.hub.repositories[name]
        return {}

    def _writable(self, handler: Any, name: str) -> Repository:
        repository = handler._repository(name)
        if name.partition("/")[0] != self._user(handler):
            raise Refusal(403, "", "Forbidden: pass `create_pr=1` as a query parameter")
        return repository

    def _branch(
        self, handler: Any, repository: Repository, name: str, method: str
    ) -> dict[str, Any]:
        if method == "DELETE":
            del repository.revisions[name]
            return {}
        if name in repository.revisions:
            raise Refusal(409, "", "Reference already exists")
        repository.revisions[name] = handler._revision(repository, "main")[1]
        return {}

    def _directory(self) -> Path:
        path = Path(self._work.name, str(next(self._directories)))
        path.mkdir()
        return path

    # Large files

    def _preupload(
        self, handler: Any, repository: Repository, revision: str, asked: dict[str, Any]
    ) -> dict[str, Any]:
        """How each file is to be sent, and what is there under its name."""
        there = files_of(handler._revision(repository, revision)[1])
        found = []
        for file in asked["files"]:
            name, size = file["path"], file["size"]
            large = is_large(name, size)
            old = None if name not in there else _git_id(there[name], large)
            mode = "lfs" if large else "regular"
            found.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": old})
        return {"files": found}

    def _batch(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Where each large file is to be sent that is not here."""
        assert asked["operation"] == "upload"
        here = self._objects.setdefault(name, {})
        where = f"{self.hub.storage_url or self.hub.url}/{TAKE}/{name}"
        objects = []
        for item in asked["objects"]:
            oid, size, actions = item["oid"], item["size"], {}
            if oid not in here:
                actions["upload"] = {"href": f"{where}/{oid}"}
                if size > self.part_size:
                    count = -(-size // self.part_size)
                    parts = {str(i): f"{where}/{oid}/{i}" for i in range(1, count + 1)}
                    head = {"chunk_size": str(self.part_size), **parts}
                    actions["upload"] = {"href": f"{where}/{oid}/complete", "header": head}
            objects.append({"oid": oid, "size": size} | ({"actions": actions} if actions else {}))
        return {"transfer": "multipart", "objects": objects}

    def _take(self, handler: Any, name: str, oid: str, rest: list[str]) -> None:
        """Take in a large file, a part of one, or the word that all parts have come."""
        body = handler.body
        if handler.command == "PUT":
            number = int(rest[0]) if rest else 0
            with self.hub.lock:
                self.taken[oid, number] += 1
            if rest:
                self._parts[oid, number] = body
                etag = hashlib.md5(body).hexdigest()
                handler._head(200, {"ETag": f'"{etag}"', "Content-Length": "0"})
                return
        else:
            parts = json.loads(body)["parts"]
            body = b"".join(self._parts.pop((oid, part["partNumber"])) for part in parts)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "the content is not what its digest says")
        path = self._directory() / "object"
        path.write_bytes(body)
        self._objects[name][oid] = path
        handler._head(200, {"Content-Length": "0"})

    # Commits

    def _commit(
        self, handler: Any, name: str, repository: Repository, revision: str, body: bytes
    ) -> dict[str, Any]:
        """Make what a branch stands for anew, all of it or nothing."""
        commit, before = handler._revision(repository, revision)
        after = shutil.copytree(before, self._directory(), dirs_exist_ok=True)
        for line in body.decode().splitlines():
            kind, value = (json.loads(line)[part] for part in ("key", "value"))
            if kind == "header":
                if value.get("parentCommit") not in (None, commit):
                    raise Refusal(412, "", "A commit has happened since. Please refresh and retry.")
                assert value["summary"]
                continue
            path = after / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                taken = self._objects.get(name, {}).get(value["oid"])
                if taken is None or taken.stat().st_size != value["size"]:
                    raise Refusal(400, "", f"the object {value['oid']} of {path.name} is not here")
                shutil.copyfile(taken, path)
            elif kind == "deletedFile":
                path.unlink()
            else:
                raise Refusal(400, "", f"no such operation: {kind}")
        repository.revisions[revision] = after
        with self.hub.lock:
            self.commits[name] += 1
        new = commit_of(after)
        return {
            "commitOid": new,
            "commitUrl": f"{self.hub.url}/{name}/commit/{new}",
            "pullRequestUrl": None,
        }


def _wrong_in(card: str) -> str | None:
    """What the Hub has against a card's metadata."""
    try:
        told = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    except yaml.YAMLError as error:
        return str(error)
    is_text = not isinstance(told, dict) or isinstance(told.get("license", ""), str)
    return None if is_text else '"license" must be a string'


def _git_id(path: Path, large: bool) -> str:
    if large:
        return digest(path, "sha256")
    raw = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
