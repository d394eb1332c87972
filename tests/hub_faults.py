"""What goes wrong with a Hub: refusals, answers that come late, connections that break."""

from __future__ import annotations

import fnmatch
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Fault:
    """A fault in the answers to some questions.

    Args:
        path: a pattern of the questions' paths, such as "/api/*" or "*/model.safetensors".
        method: "GET", "HEAD" and so on, or None for any; what is cut is a "GET" then.
        times: how many questions it befalls; None means all.
        status: what is answered.
        code: the `X-Error-Code` that goes with it, such as "GatedRepo".
        message: the `X-Error-Message`.
        headers: what else goes with it, such as `Retry-After`.
        delay: seconds before anything is answered.
        after: bytes of a file after which the connection is cut; of what is sent here, where the
            method is "PUT" or "POST".
        is_reset: whether it is cut by a reset rather than by an orderly end.
        is_answer_lost: whether what is asked for is done, and the connection cut before the answer.
        seen: how many questions it has befallen.
    """

    path: str
    method: str | None = None
    times: int | None = None
    status: int | None = None
    code: str = ""
    message: str = "a fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    after: int | None = None
    is_reset: bool = False
    is_answer_lost: bool = False
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether it befalls this question; to be asked once of each."""
        wanted = self.method or (method if self.after is None else "GET")
        if self.times == 0 or wanted != method:
            return False
        if not fnmatch.fnmatchcase(path, self.path):
            return False
        if self.times is not None:
            self.times -= 1
        self.seen += 1
        return True

    def begin(self) -> int | None:
        """Wait as long as it wants, and say what to refuse with."""
        time.sleep(self.delay)
        return self.status


def cut(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    """Cut the connection in the middle of an answer."""
    handler.close_connection = True
    if not fault.is_reset:
        handler.connection.shutdown(socket.SHUT_RDWR)
        return
    # A socket that does not linger is reset when it is closed.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def read_body(handler: BaseHTTPRequestHandler, fault: Fault | None) -> bytes:
    """What comes with a question, in one piece or in chunks; cut where the fault says so."""
    most = fault.after if fault is not None and handler.command in ("PUT", "POST") else None
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        size = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(size if most is None else min(most, size))
    else:
        body = b""
        while most is None or len(body) < most:
            size = int(handler.rfile.readline(), 16)
            body += handler.rfile.read(size)
            handler.rfile.readline()
            if size == 0:
                break
    if most is not None and fault is not None:
        cut(handler, fault)
        raise ConnectionError("the connection is cut, as it shall be")
    return body
