"""A Hugging Face Hub on loopback, for the real `huggingface_hub` client.

Here is what downloads need of it; `tests.hub_uploads` has what uploads need.

    with HubServer() as hub:
        hub.add("org/name", directory)
        subprocess.run([...], env=hub.environment(home))
        assert hub.downloads["model.safetensors"] == 1

What goes wrong is asked for by path: `hub.fail("*/model.safetensors", status=503, times=2)`.

The client reads `HF_ENDPOINT` when it is imported, so clients run in processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from tests.hub_faults import Fault, Refusal, cut, read_body
from tests.hub_files import commit_of, files_of, sibling, tree_entry
from tests.hub_uploads import Uploads

SIGNATURE = "s1gn4ture"
STORAGE = "/storage"  # how the paths begin at the server of large files

Access = Literal["public", "private", "gated"]


@dataclass
class Repository:
    """A model repository.

    Args:
        revisions: the directory of each branch or tag.
        access: "private" hides it from those without a token; "gated" shows what there is, and
            gives files to nobody without.
        tokens: the tokens that may read it.
    """

    revisions: dict[str, Path]
    access: Access = "public"
    tokens: frozenset[str] = frozenset()
    commits: dict[str, Path] = field(default_factory=dict)

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the directory of a branch, tag or commit; None where there is none."""
        directory = self.revisions.get(revision)
        if directory is None:
            found = self.commits.get(revision)
            return None if found is None else (revision, found)
        commit = commit_of(directory)
        self.commits[commit] = directory
        return commit, directory


class HubServer:
    """The server, running between `__enter__` and `__exit__`.

    Args:
        has_storage: whether large files are sent by a second server, of another origin, to which
            the first one redirects with a signed address.

    Attributes:
        requests: how often each (method, path) was asked for.
        downloads: how often the content of each file was asked for, by its path in its repository.
        sent: how many bytes of each file went out.
        tokens: the tokens that came with a question, by the path of the question.
        users: whose each token is; its owner may make repositories and write to them.
    """

    def __init__(self, *, has_storage: bool = False):
        self.repositories: dict[str, Repository] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.downloads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.tokens: dict[str, set[str | None]] = {}
        self.faults: list[Fault] = []
        self.users: dict[str, str] = {}
        self.uploads = Uploads(self)
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(1 + has_storage)
        ]
        for server in self._servers:
            server.daemon_threads = True

    @property
    def url(self) -> str:
        return _url(self._servers[0])

    @property
    def storage_url(self) -> str | None:
        """Where large files are sent from, if not from here."""
        return _url(self._servers[1]) + STORAGE if len(self._servers) > 1 else None

    def fail(self, path: str, **how: Any) -> Fault:
        """Answer a question with a fault from now on: see `tests.hub_faults.Fault`."""
        fault = Fault(path, **how)
        self.faults.append(fault)
        return fault

    def add(
        self,
        repository: str,
        directory: Path,
        *,
        revision: str = "main",
        access: Access = "public",
        tokens: tuple[str, ...] = (),
    ) -> str:
        """Serve a directory as a revision of a repository; its commit's id."""
        repo = self.repositories.setdefault(repository, Repository({}))
        repo.revisions[revision] = directory
        repo.access, repo.tokens = access, frozenset(tokens)
        found = repo.resolve(revision)
        assert found is not None
        return found[0]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a client's process, with a cache of its own and no token."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **more,
        }

    def forget(self) -> None:
        """Count from 0 again."""
        with self.lock:
            self.requests.clear()
            self.downloads.clear()
            self.sent.clear()
            self.tokens.clear()
            self.faults.clear()

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self.uploads.close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was ended is no fault of ours
            self._answer_or_refuse()

    def _answer_or_refuse(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests[self.command, path] += 1
            self.hub.tokens.setdefault(path, set()).add(self._token())
            takes = (fault for fault in self.hub.faults if fault.takes(self.command, path))
            self.fault = next(takes, None)
        self.is_storage = path.startswith(f"{STORAGE}/")
        path = path.removeprefix(STORAGE)
        self.body = read_body(self, self.fault)
        try:
            if self.fault is not None and (status := self.fault.begin()) is not None:
                raise Refusal(status, self.fault.code, self.fault.message)
            # A revision may hold an escaped "/", so the parts are unescaped after they are split.
            parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
            if self.command not in ("GET", "HEAD"):
                self.hub.uploads.answer(self, parts)
            elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._api("/".join(parts[2:4]), parts[4:])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise Refusal(404, "", "Not Found")
        except Refusal as refusal:
            self._refuse(refusal)

    # The two kinds of question

    def _api(self, name: str, rest: list[str]) -> None:
        """`/api/models/{id}[/revision/{rev}][?blobs=…]` and `/api/models/{id}/tree/{rev}`."""
        repository = self._repository(name)
        kind, revision = (rest[0], rest[1]) if len(rest) >= 2 else ("revision", "main")
        commit, directory = self._revision(repository, revision)
        files = files_of(directory)
        if kind == "tree":
            self._json([tree_entry(file, path) for file, path in files.items()])
        elif kind == "revision":
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": commit,
                    "private": repository.access == "private",
                    "gated": "manual" if repository.access == "gated" else False,
                    "siblings": [
                        {"rfilename": file, "size": size, "blobId": oid, **more}
                        for file, size, oid, more in map(sibling, files.items())
                    ],
                    "tags": [],
                }
            )
        else:
            raise Refusal(404, "", f"no such question: {kind}")

    def _file(self, name: str, revision: str, file: str) -> None:
        """`/{id}/resolve/{rev}/{file}`, whole or from a byte on."""
        repository = self._repository(name)
        is_open = self.is_storage or repository.access != "gated"
        if not is_open and self._token() not in repository.tokens:
            status = 401 if self._token() is None else 403
            raise Refusal(status, "GatedRepo", f"Access to model {name} is restricted.")
        commit, directory = self._revision(repository, revision)
        path = files_of(directory).get(file)
        if path is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        size = path.stat().st_size
        start, end = self._range(size)
        entry = tree_entry(file, path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(size)}
            if self.hub.storage_url is not None and not self.is_storage:
                where = f"{self.hub.storage_url}{self.path}?Signature={SIGNATURE}"
                self._head(302, headers | {"Location": where, "Content-Length": "0"})
                return
        if self.command == "GET":
            with self.hub.lock:
                self.hub.downloads[file] += 1
        if (start, end) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(206 if "Content-Range" in headers else 200, headers, path, start, end)

    # Who may see what

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def _repository(self, name: str) -> Repository:
        token, repository = self._token(), self.hub.repositories.get(name)
        if self.is_storage and repository is not None:
            return repository  # its addresses are signed
        known = {token for repo in self.hub.repositories.values() for token in repo.tokens}
        known |= set(self.hub.users)
        if token is not None and token not in known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        hidden = repository is not None and repository.access == "private"
        if repository is None or (hidden and token not in repository.tokens):
            # The Hub does not tell a stranger whether it is missing or hidden.
            raise Refusal(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _revision(self, repository: Repository, revision: str) -> tuple[str, Path]:
        found = repository.resolve(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _range(self, size: int) -> tuple[int, int]:
        """The bytes that are asked for."""
        unit, _, span = self.headers.get("Range", "").partition("=")
        if unit != "bytes":
            return 0, size
        first, _, last = span.partition("-")
        start, end = int(first), int(last) + 1 if last else size
        if start >= size:
            raise Refusal(416, "", "Range not satisfiable")
        return start, min(end, size)

    # Sending

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        if self.fault is not None and self.fault.is_answer_lost:
            cut(self, self.fault)
            return
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(
        self, status: int, headers: Mapping[str, str], path: Path, start: int, end: int
    ) -> None:
        self._head(status, {**headers, "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return
        after = None if self.fault is None else self.fault.after
        goes_to = end if after is None else min(end, start + after)
        with path.open("rb") as file:
            file.seek(start)
            while start < goes_to and (block := file.read(min(goes_to - start, 1 << 18))):
                self.wfile.write(block)
                start += len(block)
                with self.hub.lock:
                    self.hub.sent[path.name] += len(block)
        if start < end and self.fault is not None:
            cut(self, self.fault)

    def _refuse(self, refusal: Refusal) -> None:
        body = json.dumps({"error": refusal.message}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        headers["X-Error-Message"] = refusal.message
        if self.fault is not None:
            headers |= self.fault.headers
        self._head(refusal.status, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _url(server: ThreadingHTTPServer) -> str:
    host, port = server.server_address[:2]
    return f"http://{host!s}:{port}"
