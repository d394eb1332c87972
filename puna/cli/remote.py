"""A repository of the Hub, mirrored without its weights: their headers, and holes for the rest.

The mirror's weight files have their full size and take no room, so that the same readers with the
same checks read them as if they were here. The real client asks for the ranges, with its token,
endpoint and errors.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from puna.checkpoint import hub
from puna.checkpoint.gguf_header import GGUFHeader, read_header
from puna.checkpoint.hub_errors import Retries, explained, quiet_client
from puna.checkpoint.hub_files import needed
from puna.checkpoint.safetensors_writer import MAX_HEADER
from puna.errors import PresetError, PunaError

# Bytes asked for first: nearly all safetensors headers fit, a GGUF header holds the vocabulary.
_FIRST = {".safetensors": 64 << 10, ".gguf": 1 << 20}
_MOST_GGUF = 256 << 20
_TIMEOUT = 30  # seconds for the Hub to send something
_AT_ONCE = 8


@contextlib.contextmanager
def mirrored(address: str, revision: str | None, *, headers: bool = True) -> Iterator[Path]:
    """What stands for a preset of the Hub while the scope lasts, as `Preset` takes it.

    Args:
        address: `hf://org/name[/file][@revision]`.
        revision: a branch, tag or commit, where the address names none.
        headers: whether the weights' headers are needed; else only what tells the tokenizer is
            fetched, which in a GGUF file is its header.

    Raises:
        PresetError: the Hub refuses it, or it holds no weights whose headers can be asked for.
    """
    from huggingface_hub import constants

    repository, in_address, wanted = hub.parse_file_address(address)
    revision = in_address or revision
    if constants.HF_HUB_OFFLINE:
        yield hub.locate(address, weights=headers, revision=revision)
        return
    cached = hub.in_cache(address, weights=headers, revision=revision)
    try:
        commit, sizes = hub.listed(address, revision, is_patient=cached is None)
    except PresetError:
        if cached is None:
            raise
        yield cached
        return
    if cached is not None and commit in cached.parts:
        yield cached
        return
    names = needed(sizes, weights=headers, file=wanted, where=f"{hub.SCHEME}{repository}")
    weights = [name for name in names if name.endswith(tuple(_FIRST))]
    if headers:
        _refuse_other_formats(address, names, weights)
    small = [name for name in names if name not in weights]
    with tempfile.TemporaryDirectory(prefix="puna-") as work:
        target = Path(work)
        retries = Retries(address)
        with explained(address, repository, revision), quiet_client(retries):
            _copy(repository, small, revision, target)

        def mirror(name: str) -> None:
            with explained(address, repository, revision):
                file = target / name
                file.parent.mkdir(parents=True, exist_ok=True)
                _mirror(_Ranges(repository, name, commit, retries), sizes[name] or 0, file)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="puna-headers") as pool:
            for _ in pool.map(mirror, weights):
                pass
        is_file = wanted is not None or (weights and weights[0].endswith(".gguf"))
        try:
            yield target / (wanted or weights[0]) if is_file else target
        except PunaError as error:
            # The mirror is nobody's business.
            raise type(error)(str(error).replace(str(target), address)) from error


def _refuse_other_formats(address: str, names: list[str], weights: list[str]) -> None:
    """Refuse a repository whose weights are in files that begin with no header."""
    if weights:
        return
    others = [name for name in names if name.endswith((".h5", ".pth", ".bin"))]
    found = f"its weights are {', '.join(others[:3])}" if others else "it has no weights"
    raise PresetError(
        f"{address} cannot be looked into from afar: {found}, and only headers of "
        "*.safetensors and *.gguf can be asked for; download it and give the directory"
    )


def _copy(repository: str, names: list[str], revision: str | None, target: Path) -> None:
    """Fetch the small files into the client's cache, and copy them from there."""
    from huggingface_hub import snapshot_download

    if not names:
        return
    # The client takes patterns, and a name may hold what a pattern means something by.
    patterns = [glob.escape(name) for name in names]
    here = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(here / name, target / name)


class _Ranges:
    """A file on the Hub, of which some bytes are asked for."""

    def __init__(self, repository: str, name: str, commit: str, retries: Retries):
        from huggingface_hub import hf_hub_url

        self.name, self._retries = name, retries
        self._url = hf_hub_url(repository, name, revision=commit)

    def read(self, begin: int, end: int) -> bytes:
        """The bytes `[begin, end)`."""
        failures = 0
        while True:
            try:
                return self._read(begin, end)
            except PresetError:
                raise
            except Exception as error:
                failures += 1
                self._retries.wait(error, failures)

    def _read(self, begin: int, end: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | {
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        # Streamed, so that a server which knows no ranges does not send it all.
        with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT) as response:
            if response.is_error:
                response.read()
                hf_raise_for_status(response)
            # A whole small file may come as such.
            is_all = response.headers.get("content-length") == str(end - begin)
            if response.status_code != 206 and not is_all:
                raise PresetError(
                    f"the Hub does not send parts of {self.name} (it answered "
                    f"{response.status_code}, expected 206); fetch the whole file to look into it"
                )
            raw = response.read()
        if len(raw) != end - begin:
            raise PresetError(
                f"the Hub sent {len(raw)} bytes of {self.name}, expected {end - begin}; try again"
            )
        return raw


def _mirror(ranges: _Ranges, size: int, target: Path) -> None:
    """Write the header of a file, and a hole for the rest."""
    suffix = target.suffix
    head = ranges.read(0, min(size, _FIRST[suffix]))
    more: dict[int, bytes] = {}
    if suffix == ".gguf":
        head, header = _gguf_head(ranges, head, size)
        # All that a config needs of the data: what the rotary frequencies are divided by.
        for tensor in header.tensors:
            if tensor.name == "rope_freqs.weight" and tensor.nbytes < 1 << 20:
                more[tensor.offset] = ranges.read(tensor.offset, tensor.offset + tensor.nbytes)
    elif len(head) >= 8:
        (length,) = struct.unpack_from("<Q", head)
        if len(head) < 8 + length <= min(size, 8 + MAX_HEADER):
            head += ranges.read(len(head), 8 + length)
    with open(target, "wb") as file:
        file.write(head)
        for offset, raw in more.items():
            file.seek(offset)
            file.write(raw)
        file.truncate(size)


def _gguf_head(ranges: _Ranges, head: bytes, size: int) -> tuple[bytes, GGUFHeader]:
    """The beginning of a GGUF file, as far as its header goes."""
    while True:
        # The header says nowhere how long it is: it is parsed until nothing is missing.
        file: Any = SimpleNamespace(path=Path(ranges.name), buffer=head, size=size)
        try:
            return head, read_header(file)
        except (PresetError, struct.error) as error:
            if len(head) >= min(size, _MOST_GGUF) or head[:4] != b"GGUF":
                raise PresetError(
                    f"{ranges.name} has no header that can be read: {error}"
                ) from error
        head += ranges.read(len(head), min(size, 2 * len(head)))
