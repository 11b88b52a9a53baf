"""HTTP/1.1 as far as an agent needs it: read one request, write one answer. Strict, and bounded in bytes and time.

`http.server` would cost more to import than the rest of the agent, and knows neither deadlines nor limits.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

HEAD_LIMIT = 16_384
"""Bytes that a request's line and headers may take together."""
_HEADERS_LIMIT = 64
_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,2047}) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")
_REASONS = {
    100: "Continue", 200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 422: "Unprocessable Content", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 501: "Not Implemented", 503: "Service Unavailable",
    504: "Gateway Timeout",
}  # fmt: skip
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BadRequest(Exception):
    """The bytes are no request that this server takes; it answers `status` and closes the connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# Plain classes: each frozen dataclass would cost every agent another millisecond of start-up.


class Head:
    """A request without its body. Header names are lower-case; `length` is None when none was announced."""

    __slots__ = ("headers", "keep_alive", "length", "method", "path")

    def __init__(
        self, method: str, path: str, headers: Mapping[str, str], *, keep_alive: bool, length: int | None
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.keep_alive = keep_alive
        self.length = length


class Answer:
    """What goes back. `sent` is called once the client's side has taken it."""

    __slots__ = ("body", "content_type", "headers", "sent", "status")

    def __init__(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers or {}
        self.sent = sent

    def encode(self, *, keep_alive: bool) -> bytes:
        """The answer's bytes."""
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + self.body


class Reader(asyncio.StreamReader):
    """A stream reader that also tells when the client has left, without taking bytes from the stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=HEAD_LIMIT, loop=loop)
        self.gone: asyncio.Future[None] = loop.create_future()

    def feed_eof(self) -> None:
        """The client sends no more: for a waiting answer it has left."""
        super().feed_eof()
        self._leave()

    def set_exception(self, exc: Exception) -> None:
        """The connection broke."""
        super().set_exception(exc)
        self._leave()

    def _leave(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)


async def read_head(reader: Reader, timeout: float) -> Head | None:
    """The next request's head; None when the client has nothing more to say.

    Raises:
        BadRequest: Too large, too slow or malformed.
        ConnectionError: The connection broke.
    """
    try:
        async with asyncio.timeout(timeout):
            raw = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        return None  # idle or slow: let go without a word, which clients of kept-alive connections expect
    except asyncio.LimitOverrunError as error:
        raise BadRequest(431, f"request line and headers exceed {HEAD_LIMIT} bytes") from error
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise BadRequest(400, "the request ends in the middle of its head") from error
    return parse_head(raw)


def parse_head(raw: bytes) -> Head:
    """Parse a head that ends with an empty line; raises `BadRequest`."""
    first, *lines = raw[:-4].split(b"\r\n")
    line = _LINE.fullmatch(first)
    if line is None:
        raise BadRequest(400, "malformed request line")
    if len(lines) > _HEADERS_LIMIT:
        raise BadRequest(431, f"more than {_HEADERS_LIMIT} headers")
    headers: dict[str, str] = {}
    for item in lines:
        match = _HEADER.fullmatch(item)
        if match is None:
            raise BadRequest(400, "malformed header")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1")
        if name in ("content-length", "authorization", "host") and headers.get(name, value) != value:
            # two lengths are how requests are smuggled past a proxy
            raise BadRequest(400, f"contradicting {name} headers")
        headers[name] = value
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection if line[3] == b"1" else "keep-alive" in connection
    path = line[2].decode("ascii").partition("?")[0]
    return Head(line[1].decode("ascii"), path, headers, keep_alive=keep_alive, length=_length(headers))


def _length(headers: Mapping[str, str]) -> int | None:
    if "transfer-encoding" in headers:
        raise BadRequest(501, "send Content-Length: transfer encodings are not supported")
    text = headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise BadRequest(400, "malformed Content-Length")
    return int(text)


async def read_body(reader: Reader, length: int, timeout: float) -> bytes:
    """Exactly `length` bytes; raises `BadRequest` when they do not come within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            return await reader.readexactly(length)
    except TimeoutError as error:
        raise BadRequest(408, f"the body did not arrive within {timeout:g} s") from error
    except asyncio.IncompleteReadError as error:
        raise BadRequest(400, f"the body ends after {len(error.partial)} of {length} bytes") from error
