"""What it means when the Hub does not take something: told in one line, with what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator

from puna.checkpoint.hub_errors import (
    NotAHubError,
    host,
    is_passing,
    is_transport,
    line_of,
    retry_after,
    status_of,
)
from puna.errors import PresetError, PunaError

TOKENS = "https://huggingface.co/settings/tokens"
_BILLING = "https://huggingface.co/settings/billing"
# In what the Hub says where an account, or a repository, is full.
_FULL = re.compile(r"storage|quota|limit (has been )?(reached|exceeded)|over the limit", re.I)
# How the client's storage of large files names the status of an answer.
_XET_STATUS = re.compile(r"status (?:client|server) error \((\d{3}) ")


def root_of(error: BaseException) -> BaseException:
    """What an error comes of: the client wraps those of its threads."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def may_pass(error: BaseException) -> bool:
    """Whether the same may go well when it is tried again."""
    root = root_of(error)
    if type(root) is ConnectionError:
        status = _status(root)
        return status is None or status >= 500
    return not isinstance(root, Exception) or is_passing(root) or is_transport(root)


def may_have_arrived(error: BaseException) -> bool:
    """Whether the commit may have been made, though no answer has told so."""
    if isinstance(error, KeyError | json.JSONDecodeError):  # the answer was none
        return True
    root, path = root_of(error), ""
    with contextlib.suppress(AttributeError, RuntimeError):  # not all errors know their request
        path = root.request.url.path  # type: ignore[attr-defined]
    return "/commit/" in path and isinstance(root, Exception) and may_pass(root)


@contextlib.contextmanager
def upload_explained(where: str, repository: str, outcome: Callable[[], str]) -> Iterator[None]:
    """The client's errors as ours, each in one line that says what became of the upload.

    Args:
        where: the address.
        repository: its id.
        outcome: asked when something has failed: what is published now, and what is left behind.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except PunaError:
        raise
    except HFValidationError as error:
        raise PresetError(f"{where} is no name that the Hub allows: {line_of(error)}") from error
    except Exception as raised:
        error = root_of(raised)
        message = (
            _of_answer(error, where, repository)
            or _of_transport(error, where)
            or _of_client(error, where)
        )
        if message is None:
            raise
        raise PresetError(f"{message} ({outcome()})") from raised


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error comes of."""
    if type(error) is ConnectionError and (found := _XET_STATUS.search(str(error))):
        return int(found[1])
    return status_of(error)


def _of_answer(error: BaseException, where: str, repository: str) -> str | None:
    """What an answer of the Hub's means."""
    status = _status(error)
    if status is None:
        return None
    said, page = _said(error), f"https://huggingface.co/{repository}"
    if status in (402, 507) or (status in (400, 403, 413) and _FULL.search(said)):
        return _no_room(where, said or str(status))
    if status == 401:
        return (
            f"the Hub does not know the token that {where} was to be written with; set HF_TOKEN to "
            f"a valid one of {TOKENS}"
        )
    if status == 403:
        return (
            f"the Hub does not let this token write to {where}; give it the right to at {TOKENS}, "
            "set HF_TOKEN to another, or give a name of your own"
        )
    if status == 404:
        return (
            f"the Hub has no {where} that this token may write to; check the name, and the token's "
            f"rights at {TOKENS}"
        )
    if status == 409:
        return f"the Hub has {where} already, where this token cannot see it; give another name"
    if status == 412:
        return f"somebody has changed {where} meanwhile; see {page}, and upload it again"
    if status == 413:
        return f"the Hub finds {where} too large; save it with a smaller max_shard_size"
    if status == 429:
        seconds = retry_after(error)
        later = "later" if seconds is None else f"in {seconds:.0f} s"
        return f"the Hub has had too many requests from here to take {where} (429); try {later}"
    if status >= 500:
        return f"the Hub failed to take {where} ({status}), several times; try again later"
    return f"the Hub did not take {where} ({said or status}); correct that, or see {page}"


def _of_transport(error: BaseException, where: str) -> str | None:
    """What a connection that failed means."""
    if isinstance(error, NotAHubError):
        return (
            f"what answers as the Hub ({host()}) is none: check HF_ENDPOINT, the proxy, or whether "
            "the network wants you to log in"
        )
    is_xet = type(error) is ConnectionError
    if not is_xet and not is_transport(error):
        return None
    name = type(error).__name__
    if not is_xet and ("Connect" in name or "Proxy" in name or "Unsupported" in name):
        return f"the Hub ({host()}) cannot be reached ({line_of(error)}); try again later"
    if "Timeout" in name:
        return f"the Hub ({host()}) does not answer; try again later"
    # The other storage's words hold addresses that are nobody's business.
    why = "" if is_xet else f" ({line_of(error)})"
    return (
        f"the connection to the Hub ({host()}) broke while {where} was uploaded{why}; run it again"
    )


def _of_client(error: BaseException, where: str) -> str | None:
    """What this machine, or the client itself, has against it."""
    if isinstance(error, OSError) and error.errno is not None:
        file = f"{error.filename}: " if error.filename else ""
        return f"{where} was not uploaded ({file}{os.strerror(error.errno)}); correct that"
    if not isinstance(error, ValueError):
        return None
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    if lines and lines[0].startswith("Invalid metadata"):
        return f"the Hub does not take the head of README.md ({'; '.join(lines[1:])}); correct it"
    said = "; ".join(lines) or type(error).__name__
    if _FULL.search(said):
        return _no_room(where, said)
    return f"the Hub did not take {where} ({said}); see https://status.huggingface.co"


def _no_room(where: str, said: str) -> str:
    return f"the Hub has no room for {where} ({said}); remove what is not needed, or see {_BILLING}"


def _said(error: BaseException) -> str:
    """The Hub's own words, in one line."""
    return " ".join(str(getattr(error, "server_message", None) or "").split())[:300]
