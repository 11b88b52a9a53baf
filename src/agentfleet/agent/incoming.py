"""What a manager answers, byte by byte: an HTTP/1.1 response, and the server-sent events in it. No I/O.

Strict and bounded, as `wire` is for what an agent is asked. Server-sent events: WHATWG HTML, section 9.2.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable

HEAD_LIMIT = 16_384
"""Bytes that a response's status line and headers may take together."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: .*)?")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})(?:;.*)?")


class BadResponse(Exception):
    """The bytes are no response that is understood here."""


class Response:
    """Reads one response. `on_body` is called with each piece of its body.

    Args:
        on_body: Takes a piece of the body of an answer with the status 200.
        limit: Bytes that the body may have; None for a stream without an end.
    """

    __slots__ = ("_left", "_limit", "_mode", "_on_body", "_raw", "ended", "headers", "status")

    def __init__(self, on_body: Callable[[bytes], None], *, limit: int | None = None) -> None:
        self._on_body, self._limit = on_body, limit
        self._raw = b""
        self._mode = "head"
        self._left = 0
        self.status = 0
        """0 before the head has arrived."""
        self.headers: dict[str, str] = {}
        """By name in lower case."""
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises `BadResponse`."""
        raw = self._raw + data if self._raw else data
        while raw and not self.ended:
            step = {"head": self._head, "size": self._size, "chunk": self._chunk, "until": self._until}[self._mode]
            rest = step(raw)
            if rest is None:
                break
            raw = rest
        self._raw = raw if not self.ended else b""

    def finish(self) -> None:
        """The connection has ended; raises `BadResponse` in the middle of an answer."""
        if self._mode == "until" and self._left < 0:
            self.ended = True
        if not self.ended:
            raise BadResponse("the answer ends before its end")

    def _head(self, raw: bytes) -> bytes | None:
        end = raw.find(b"\r\n\r\n")
        if end < 0:
            if len(raw) > HEAD_LIMIT:
                raise BadResponse(f"the head of the answer exceeds {HEAD_LIMIT} bytes")
            return None
        first, *lines = raw[:end].split(b"\r\n")
        match = _STATUS.fullmatch(first)
        if match is None:
            raise BadResponse(f"this is no HTTP: {first[:60]!r}")
        self.status = int(match[1])
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise BadResponse("malformed header")
            self.headers[name.strip().lower()] = value.strip()
        if 100 <= self.status < 200:
            return raw[end + 4 :]
        self._begin_body()
        return raw[end + 4 :]

    def _begin_body(self) -> None:
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self.ended = True
        elif self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._mode = "size"
        elif length is None:
            self._mode, self._left = "until", -1
        elif length.isascii() and length.isdigit() and len(length) < 16:
            self._mode, self._left = "until", int(length)
            self.ended = self._left == 0
        else:
            raise BadResponse("malformed Content-Length")

    def _size(self, raw: bytes) -> bytes | None:
        end = raw.find(b"\r\n")
        if end < 0:
            if len(raw) > 256:
                raise BadResponse("malformed chunk")
            return None
        match = _SIZE.fullmatch(raw[:end])
        if match is None:
            raise BadResponse("malformed chunk")
        self._left = int(match[1], 16)
        self._mode, self.ended = "chunk", self._left == 0
        return raw[end + 2 :]

    def _chunk(self, raw: bytes) -> bytes | None:
        """A chunk is handed on when all of it is there: what is streamed comes in small ones."""
        if self._limit is not None and self._left > self._limit:
            raise BadResponse(f"the answer exceeds {self._limit} bytes")
        if len(raw) < self._left + 2:
            return None
        if raw[self._left : self._left + 2] != b"\r\n":
            raise BadResponse("malformed chunk")
        self._take(raw[: self._left])
        self._mode = "size"
        return raw[self._left + 2 :]

    def _until(self, raw: bytes) -> bytes:
        piece = raw if self._left < 0 else raw[: self._left]
        if self._left >= 0:
            self._left -= len(piece)
            self.ended = self._left == 0
        self._take(piece)
        return raw[len(piece) :]

    def _take(self, piece: bytes) -> None:
        if self._limit is not None:
            self._limit -= len(piece)
            if self._limit < 0:
                raise BadResponse("the answer is too large")
        self._on_body(piece)


class Events:
    """Reads server-sent events. `on_event` is called with the id and the data of each.

    Args:
        on_event: Takes (id, data) of an event of the type that is wanted.
        wanted: The type of event; others are passed over.
        limit: Bytes that one event may have.
    """

    __slots__ = ("_data", "_id", "_limit", "_on_event", "_raw", "_type", "_wanted", "retry")

    def __init__(self, on_event: Callable[[str, bytes], None], *, wanted: str, limit: int) -> None:
        self._on_event, self._wanted, self._limit = on_event, wanted.encode(), limit
        self._raw = b""
        self._data: list[bytes] = []
        self._type = b""
        self._id = b""
        self.retry: float | None = None
        """Seconds after which, the server says, a client should come back."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises `BadResponse` when an event is too large."""
        raw = self._raw + data if self._raw else data
        start = 0
        while (end := raw.find(b"\n", start)) >= 0:
            self._line(raw[start : end - 1 if raw[end - 1 : end] == b"\r" and end > start else end])
            start = end + 1
        self._raw = raw[start:]
        if len(self._raw) + sum(map(len, self._data)) > self._limit:
            raise BadResponse(f"an event exceeds {self._limit} bytes")

    def _line(self, line: bytes) -> None:
        if not line:
            if self._data and self._type == self._wanted:
                self._on_event(self._id.decode("utf-8", "replace"), b"\n".join(self._data))
            self._data, self._type = [], b""
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._type = value
        elif name == b"id":
            self._id = value
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self.retry = int(value) / 1000
