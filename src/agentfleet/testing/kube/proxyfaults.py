"""What a `FaultProxy` can do to single requests and watch events."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import anyio

from agentfleet.errors import DeadlineExceeded

_REASONS = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the request instead of the server, which does not see it; or, with `done`, after it has carried it out."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True, slots=True)
class SlowBody:
    """The answer's body comes in pieces of `size` bytes, `pause` seconds apart."""

    size: int = 100
    pause: float = 0.1


@dataclass(frozen=True, slots=True)
class TruncatedBody:
    """The connection breaks after `size` bytes of the answer's body."""

    size: int = 100


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The request is swallowed, or with `done` carried out, and never answered; the connection stays open."""

    done: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset instead of an answer; with `done`, after the server has carried the request out."""

    done: bool = False


@dataclass(frozen=True, slots=True)
class EventFault:
    """Something happens to an event of a watch, also of one that is open already.

    Attributes:
        kind: "drop", "duplicate", "swap" (it comes after the next one), or "replace".
        matching: A regular expression that the event's line must contain; bookmarks are never touched.
        replacement: The line that comes instead.
    """

    kind: str
    matching: str = ""
    replacement: bytes = b""


Fault = Answer | SlowBody | TruncatedBody | NoAnswer | Reset | EventFault


def status_answer(
    status: int, message: str = "injected", *, retry_after: int | None = None, done: bool = False
) -> Answer:
    """An answer as the API server itself gives it, such as 409, 410, 429 (with Retry-After) or 503."""
    reason = _REASONS.get(status, "Unknown")
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
    headers = {"Content-Type": "application/json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return Answer(status, json.dumps(body | {"code": status}).encode(), headers, done=done)


def html_502() -> Answer:
    """What a load balancer says when it cannot reach the API server."""
    page = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>502 Bad Gateway</body>\r\n</html>\r\n"
    return Answer(502, page, {"Content-Type": "text/html"})


def drop_event(matching: str = "") -> EventFault:
    """An event never comes."""
    return EventFault("drop", matching)


def duplicate_event(matching: str = "") -> EventFault:
    """An event comes twice."""
    return EventFault("duplicate", matching)


def swap_events(matching: str = "") -> EventFault:
    """An event comes after the one that follows it."""
    return EventFault("swap", matching)


def expired_event(matching: str = "") -> EventFault:
    """Instead of an event comes the error that the watch's version has expired."""
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
    line = {"type": "ERROR", "object": {**status, "metadata": {}, "message": "too old resource version: 1 (2)"}}
    return EventFault("replace", matching, json.dumps(line).encode())


class Injection:
    """A fault that waits for its requests, and counts them."""

    def __init__(self, fault: Fault, *, method: str, path: str, times: int | None, skip: int) -> None:
        self.fault = fault
        self.hits = 0
        """How often it has struck."""
        self._method = method
        self._methods = frozenset(method.split("|"))
        self._path = re.compile(path)
        self._times = times
        self._skip = skip
        self._struck = anyio.Event()

    @property
    def spent(self) -> bool:
        """Whether it has struck as often as it should."""
        return self._times is not None and self.hits >= self._times

    def wants(self, method: str, target: str) -> bool:
        """Whether it is about such requests, and not spent."""
        return not self.spent and not self._methods.isdisjoint({"*", method}) and self._path.search(target) is not None

    def strike(self) -> bool:
        """Count one occasion; False while it is still to let some pass."""
        if self._skip > 0:
            self._skip -= 1
            return False
        self.hits += 1
        self._struck.set()
        self._struck = anyio.Event()
        return True

    def cancel(self) -> None:
        """Take it back."""
        self._times = self.hits

    async def struck(self, times: int = 1, *, timeout: float = 30) -> None:
        """Wait until it has struck so often."""
        with anyio.move_on_after(timeout):
            while self.hits < times:
                await self._struck.wait()
            return
        raise DeadlineExceeded(
            f"{self.fault} has struck {self.hits} times and not {times} within {timeout:g} s: "
            f"no request matched {self._method} {self._path.pattern!r} often enough"
        )
