"""Large files of the Hub, fetched into its client's cache so that nothing is fetched twice.

The client resumes a download while it runs, and keeps nothing of it when it gives up or is
interrupted. Here what has come stays, as the `.incomplete` file that the client's cache knows, and
the next attempt asks for the rest, be it a moment or a day later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from puna.checkpoint.hub_errors import Retries

LARGE = 8 << 20  # bytes from which on a file is one
_AT_ONCE = 4
_NAME = re.compile(r"[\w-]+")  # of a content in the cache
_PROGRESS = 1 << 20  # bytes after which an attempt counts as a success


def fetch_large(repository: str, commit: str, names: Collection[str], retries: Retries) -> None:
    """Fetch large files into the client's cache, each from where an earlier attempt ended.

    The client then finds them in its cache, by the names that it gives to contents.

    Args:
        repository: its id.
        commit: the commit's id.
        names: the files.
        retries: when to try again.
    """
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="puna-fetch") as pool:
        try:
            for _ in pool.map(lambda name: _Large(repository, commit, name, retries).run(), names):
                pass
        except BaseException:  # an interrupt must not wait until the other files have come
            retries.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Large:
    """A large file on its way into the client's cache."""

    def __init__(self, repository: str, commit: str, name: str, retries: Retries):
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=repository, repo_type="model")
        self.cache, self.folder = Path(constants.HF_HUB_CACHE), folder
        self.pointer = self.cache / folder / "snapshots" / commit / name
        self.url = hf_hub_url(repository, name, revision=commit)
        self.name, self.retries = name, retries

    def run(self) -> None:
        from huggingface_hub.utils import WeakFileLock

        if self.pointer.exists():
            return
        about = self._about()
        # Xet storage is fetched in chunks, which the client does better. And a name for the file
        # that may be none, since whoever answers has made it up, is the client's to judge.
        if about.size is None or not _NAME.fullmatch(about.etag or "") or _uses_xet(about):
            return
        blob = self.cache / self.folder / "blobs" / about.etag
        lock = self.cache / ".locks" / self.folder / f"{about.etag}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the client's own
            if not blob.exists():
                partial = blob.with_name(f"{blob.name}.incomplete")
                if not self._fill(partial, about.size) and not self._fill(partial, about.size):
                    raise OSError(f"{self.name} is not what the Hub says it is")
                os.replace(partial, blob)

    def _about(self) -> Any:
        from huggingface_hub import get_hf_file_metadata

        failures = 0
        while True:
            try:
                return get_hf_file_metadata(self.url)
            except Exception as error:
                failures += 1
                self.retries.wait(error, failures)

    def _fill(self, partial: Path, size: int) -> bool:
        """Fetch what is missing of a file; whether it then is what it shall be."""
        from huggingface_hub.utils import tqdm

        have = began = partial.stat().st_size if partial.exists() else 0
        failures = 0
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=self.name) as bar:
            while have < size:
                try:
                    self._append(partial, have, bar)
                    error = OSError(f"{self.name} ended before its end")
                except Exception as raised:
                    error = raised
                before, have = have, partial.stat().st_size if partial.exists() else 0
                if have < size:
                    failures = 1 if have >= before + _PROGRESS else failures + 1
                    self.retries.wait(error, failures)
        # What an earlier process left is only believed if the whole is what the Hub says.
        if have > size or (began and not _has_digest(partial, partial.name.partition(".")[0])):
            partial.unlink()
            return False
        return True

    def _append(self, partial: Path, have: int, bar: Any) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        # The Hub's own address each time: it sends on to a storage, by an address that expires,
        # and the transport then leaves the token out.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.url, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            is_part = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not is_part:
                bar.update(-have)
            with open(partial, "ab" if is_part else "wb") as file:
                for block in response.iter_bytes():
                    if self.retries.stop.is_set():
                        return
                    file.write(block)
                    bar.update(len(block))


def _uses_xet(about: Any) -> bool:
    from huggingface_hub import constants

    is_there = importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    return about.xet_file_data is not None and is_there


def _has_digest(path: Path, etag: str) -> bool:
    """Whether a file has the SHA-256 that large files have for an etag; others are believed."""
    if not re.fullmatch(r"[0-9a-f]{64}", etag):
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == etag
