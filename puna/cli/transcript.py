"""Conversations as JSON files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from puna.errors import PunaError

_ROLES = ("system", "user", "assistant", "tool", "ipython")


class TranscriptError(PunaError, ValueError):
    """A conversation cannot be read or written."""


def save(path: Path, preset: str, messages: list[dict[str, Any]]) -> None:
    """Write a conversation: all of it, or the file stays as it was.

    Args:
        path: the file; one that is there is replaced only if it is a conversation too.
        preset: what the model was loaded from, for the reader.
        messages: the turns, `{"role", "content"}`.

    Raises:
        TranscriptError: the file cannot be written, or is something else.
    """
    path = path.expanduser()
    if path.exists():
        try:
            load(path)
        except TranscriptError as error:
            raise TranscriptError(
                f"{path} is there and is no conversation, so it is left alone; choose another name"
            ) from error
    text = json.dumps({"model": preset, "messages": messages}, indent=2, ensure_ascii=False)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
        raise TranscriptError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: Path) -> list[dict[str, Any]]:
    """The turns of a conversation that `save` wrote, or of a plain JSON list of messages.

    Raises:
        TranscriptError: the file is not there, or holds no conversation.
    """
    path = path.expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TranscriptError(f"{path} is not JSON ({error}); give a file of /save") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise TranscriptError(
            f"{path} holds no conversation; expected a list of messages, or an object with "
            "'messages' as /save writes it"
        )
    for place, message in enumerate(messages):
        known = isinstance(message, dict) and message.get("role") in _ROLES
        if not known or not isinstance(message.get("content"), str):
            raise TranscriptError(
                f"{path}: message {place} is {message!r:.80}; expected a role of "
                f"{', '.join(_ROLES)} and a content that is text"
            )
    return [{"role": m["role"], "content": m["content"]} for m in messages]
