"""What the Hub and its client say when something goes wrong: tried again, or told in one line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator

from puna.errors import PresetError

# How often one thing is tried, and the seconds before it is tried again: the first wait, which
# doubles, and the longest that a Hub may ask for.
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT = 5, 0.5, 300.0
# The Hub's way to say that no question is left, and in how many seconds there will be again.
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
# What we say ourselves of an upload that changes nothing.
_SAID_ANYWAY = "No files have been modified since last commit"
# How the client's own notes of its own attempts begin, or go on.
_CLIENTS_NOTES = ("HTTP Error ", "Retrying in ", "Rate limited", "Error while downloading from ")


class NotAHubError(ValueError):
    """Something else answers for the Hub, such as the network of a hotel."""


def status_of(error: BaseException | None) -> int | None:
    """The status that the Hub answered with, if this error comes of an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def is_transport(error: BaseException | None) -> bool:
    """Whether the connection could not be made, or broke."""
    # The client's transport has exception types of its own, which it does not name for us.
    library = type(error).__module__.partition(".")[0]
    return library in ("httpx", "httpx2", "httpcore") and status_of(error) is None


def is_passing(error: BaseException | None) -> bool:
    """Whether the same may go well a moment later."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # the client has looked into the cache since
        return is_passing(error.__cause__)
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # The client says of a file that came in part that it is an OSError of no kind.
    return is_transport(error) or (type(error) is OSError and error.errno is None)


def retry_after(error: BaseException | None) -> float | None:
    """The seconds that the Hub asks to wait, if it does."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    if match := _RATE_LIMIT.search(headers.get("RateLimit", "")):
        return float(match[1])
    value = headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else None


class Retries:
    """When something is tried again, and who has been told of it.

    Args:
        what: what is fetched or sent, for the one line that tells.
        doing: what the Hub does with it.
    """

    def __init__(self, what: str, doing: str = "giving"):
        self.what, self.doing = what, doing
        self.stop = threading.Event()
        self._is_told, self._lock = False, threading.Lock()

    def wait(self, error: BaseException, failures: int) -> None:
        """Wait for the next attempt.

        Args:
            error: what the last attempt ended with; raised where another is of no use.
            failures: the attempts that failed since the last success.
        """
        asked = retry_after(error)
        seconds = _FIRST_WAIT * 2 ** (failures - 1) if asked is None else asked
        if failures >= _ATTEMPTS or seconds > _LONGEST_WAIT or not is_passing(error):
            raise error
        status = status_of(error.__cause__ if status_of(error) is None else error)
        self.tell("the connection broke" if status is None else f"it answered {status}", asked)
        if self.stop.wait(seconds):
            raise error

    def tell(self, reason: str, seconds: float | None = None) -> None:
        """Say that something is tried again, the first time."""
        with self._lock:
            if self._is_told:
                return
            self._is_told = True
        soon = f"in {seconds:.0f} s, as it asks" if seconds else "shortly"
        text = f"the Hub has trouble {self.doing} {self.what} ({reason}); it is tried again {soon}"
        warnings.warn(text, UserWarning, stacklevel=3)


@contextlib.contextmanager
def quiet_client(retries: Retries) -> Iterator[None]:
    """Say once, in our words, what the client says of each of its own attempts."""

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith(_SAID_ANYWAY):
            return False
        if not text.startswith(_CLIENTS_NOTES) and "' thrown while requesting " not in text:
            return True
        status = text.split()[2] if text.startswith("HTTP Error ") else None
        retries.tell(f"it answered {status}" if status else "the connection broke")
        return False

    handlers = logging.getLogger("huggingface_hub").handlers[:]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def check_token() -> None:
    """Refuse a token that cannot be sent: the transport's own words for it would show it."""
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise PresetError(
            "the token for the Hub holds characters that none has; set HF_TOKEN to one of "
            "https://huggingface.co/settings/tokens, as it stands there, or unset it"
        )


@contextlib.contextmanager
def explained(
    where: str, repository: str, revision: str | None, lacking: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """The client's errors as ours, each in one line.

    Args:
        where: the address, with its revision.
        repository: its id.
        revision: its branch, tag or commit, if one was asked for.
        lacking: what the cache says of it, if it does not do.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except PresetError:
        raise
    except HFValidationError as error:
        raise PresetError(f"{where} is no name that the Hub allows: {line_of(error)}") from error
    except Exception as raised:
        error: BaseException = raised
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        message = (
            _of_answer(error, where, repository, revision)
            or _of_transport(error, where, lacking())
            or _of_system(error, where)
        )
        if message is None:
            raise
        raise PresetError(message) from raised


def _of_answer(
    error: BaseException, where: str, repository: str, revision: str | None
) -> str | None:
    """What an answer of the Hub's means."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = status_of(error)
    if status is None:
        return None
    page = f"https://huggingface.co/{repository}"
    if isinstance(error, GatedRepoError):
        return (
            f"{where} is gated; accept its terms at {page} and set HF_TOKEN to a token that may "
            "read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{where} has no revision {revision!r}; check its branches at {page}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no repository {repository!r}, or it is private: check the name, and set "
            "HF_TOKEN for a private one"
        )
    if isinstance(error, DisabledRepoError):
        return f"the Hub has disabled {where}; see {page}"
    what = _named(error, where)
    if isinstance(error, RemoteEntryNotFoundError) or status == 404:
        return f"the Hub lists {what} and does not have it; try again, or see {page}"
    if status == 401:
        return (
            f"the Hub does not know the token that {what} was asked for with; set HF_TOKEN to a "
            "valid one of https://huggingface.co/settings/tokens, or unset it"
        )
    if status == 403:
        return (
            f"the Hub does not let this token read {what}; see its rights at "
            "https://huggingface.co/settings/tokens, or set HF_TOKEN to another"
        )
    if status == 429:
        seconds = retry_after(error)
        later = "later" if seconds is None else f"in {seconds:.0f} s"
        return (
            f"the Hub has had too many requests from here to give {what} (429); try again {later}, "
            "with HF_TOKEN set: it allows more to those whom it knows"
        )
    if status >= 500:
        return (
            f"the Hub failed to give {what} ({status}), several times; try again later: what has "
            "come is kept"
        )
    return f"the Hub did not give {what} ({status}); see {page}"


def _of_transport(error: BaseException, where: str, lacking: object) -> str | None:
    """What a connection that failed means."""
    hub = host()
    besides = "" if lacking is None else f", and {lacking}"
    if isinstance(error, NotAHubError) or type(error).__name__ == "FileMetadataError":
        return (
            f"what answers as the Hub ({hub}) is none: check HF_ENDPOINT, the proxy, or whether "
            "the network wants you to log in"
        )
    if not is_passing(error) and not is_transport(error):
        return None
    name = type(error).__name__
    if "Connect" in name or "Proxy" in name or ("Protocol" in name and "Unsupported" in name):
        return f"the Hub ({hub}) cannot be reached ({line_of(error)}){besides}"
    if "Timeout" in name:
        return f"the Hub ({hub}) does not answer{besides}"
    return (
        f"the connection to the Hub ({hub}) broke again and again while {where} was fetched "
        f"({line_of(error)}); run it again: what has come is kept"
    )


def _of_system(error: BaseException, where: str) -> str | None:
    """What this machine has against it."""
    from huggingface_hub import constants

    if not isinstance(error, OSError) or error.errno is None:
        return None
    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"there is no room for {where} in {cache}; make some, or set HF_HOME elsewhere"
    return (
        f"{where} cannot be written to the cache {cache} ({os.strerror(error.errno)}); make it "
        "writable, or set HF_HOME elsewhere"
    )


def host() -> str:
    """The Hub that is asked, without a password that the address may hold."""
    from huggingface_hub import constants

    return urllib.parse.urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]


def _named(error: BaseException, where: str) -> str:
    """The address, and the file that was asked for. Addresses of storages hold signatures."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return where
    path = urllib.parse.unquote(error.response.url.path)
    file = path.partition("/resolve/")[2].partition("/")[2]
    return f"{where} ({file})" if file and not where.partition("@")[0].endswith(file) else where


def line_of(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
