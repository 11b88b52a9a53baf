"""HTTP/1.1 on a plain socket: connecting, writing a request, reading an answer. The client in `http.py` uses it.

Framing follows RFC 9112; an answer that breaks it is an error, never a guess.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

from agentfleet.egress import is_nobodys
from agentfleet.errors import AgentFleetError, SpecError
from agentfleet.signals.inbox import inbox

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.ASCII)
_TARGET = re.compile(r"/[!-~]*", re.ASCII)
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_STATUS = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d)(?: [\t\x20-\x7e\x80-\xff]*)?", re.ASCII)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
_MAX_HEAD = 65_536
_MAX_INTERIM = 16


class HttpError(AgentFleetError):
    """The peer refused, reset, or did not speak HTTP. Whether a retry helps depends on the peer.

    Attributes:
        sent: Whether the peer may have received the request. False (refused, unresolvable) makes any retry safe.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: `headers` have lower-case names, repeated ones are joined with ", "."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """One socket and the bytes received on it that nobody has read yet."""

    __slots__ = ("_inbox", "_sock", "address", "answered", "buffer", "used")

    def __init__(self, address: str, sock: socket.socket) -> None:
        self.address = address
        self._sock = sock
        self._inbox = inbox(sock)
        self.buffer = b""
        self.used = False
        """Whether an earlier request was answered on it."""
        self.answered = False
        """Whether a byte of the present answer has arrived."""

    def silent(self) -> bool:
        """Whether the peer has neither closed nor spoken since the last answer."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self.buffer
        except OSError:
            return False
        return False

    async def send(self, data: bytes) -> None:
        """Hand all of `data` to the system."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._sock)

    async def more(self) -> bool:
        """Receive something; False at the end of the stream."""
        data = await self._inbox.receive()
        self.buffer = self.buffer + data if self.buffer else data
        self.answered = self.answered or bool(data)
        return bool(data)

    async def until(self, mark: bytes, limit: int, what: str) -> bytes:
        """The bytes before `mark`, which is consumed."""
        start = 0
        while True:
            end = self.buffer.find(mark, start)
            if end > limit or (end < 0 and len(self.buffer) > limit + len(mark)):
                raise HttpError(f"{self.address} sent {what} of more than {limit} bytes")
            if end >= 0:
                taken, self.buffer = self.buffer[:end], self.buffer[end + len(mark) :]
                return taken
            start = max(0, len(self.buffer) - len(mark) + 1)
            if not await self.more():
                raise HttpError(f"{self.address} closed the connection in the middle of {what}")

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        if len(self.buffer) >= size:
            taken, self.buffer = self.buffer[:size], self.buffer[size:]
            return taken
        parts = [self.buffer]
        missing = size - len(self.buffer)
        while missing > 0:
            self.buffer = b""
            if not await self.more():
                raise HttpError(f"{self.address} closed the connection {missing} bytes before the end of its answer")
            parts.append(self.buffer[:missing])
            self.buffer, missing = self.buffer[missing:], missing - len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """Close the socket."""
        self._inbox.close()

    def break_off(self) -> None:
        """Close the socket under the task that uses it; its waiting ends with `anyio.ClosedResourceError`."""
        anyio.notify_closing(self._sock)
        self._inbox.break_off()
        self._inbox.close()


# ------------------------------------------------------------------------------------------------ connecting


@functools.lru_cache(maxsize=16_384)
def _split(address: str) -> tuple[socket.AddressFamily | None, str, int]:
    """Family (None for a name to resolve), host and port of "host:port"."""
    host, colon, digits = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    plain = host and host.isascii() and host.isprintable() and not set(host) & set(" /@?#")
    if not (colon and plain and digits.isascii() and digits.isdigit() and 0 < int(digits) < 65_536):
        raise SpecError(f"{address[:100]!r} is no address; write host:port, such as 10.0.0.7:8000 or [::1]:8000")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, host, int(digits)
    return None, host, int(digits)


async def _resolve(address: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """Where to connect to; addresses that no agent can have are refused, whoever says that one is there (SSRF)."""
    found = await _addresses(address)
    wrong = next((target[0] for _, target in found if is_nobodys(target[0])), None)
    if wrong is not None:
        raise HttpError(
            f"{address} is not asked: {wrong} is no agent's address, but this machine's or its cloud's", sent=False
        )
    return found


async def _addresses(address: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    family, host, port = _split(address)
    if family is not None:
        return [(family, (host, port))]
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise HttpError(f"{host} does not resolve: {say(error)}", sent=False) from error
    return [(item[0], (item[4][0], item[4][1])) for item in found]


async def connect(address: str) -> socket.socket:
    """A connected non-blocking socket, by the first address that accepts."""
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, target in await _resolve(address):
        try:
            with _opening(family) as sock:
                await _open(sock, target)
                return sock
        except OSError as error:
            failure = error
    raise HttpError(f"cannot connect to {address}: {say(failure)}", sent=False) from failure


@contextmanager
def _opening(family: socket.AddressFamily) -> Iterator[socket.socket]:
    """A socket that is closed unless the block succeeds, cancellation included."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield sock
    except BaseException:
        sock.close()
        raise


async def _open(sock: socket.socket, target: tuple[str, int]) -> None:
    code = sock.connect_ex(target)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        await anyio.wait_writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    if sock.getsockname() == sock.getpeername():
        # TCP connects a socket to itself when the system happens to lend it the very port it asks for: a dead agent
        # on this machine would look alive
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def say(error: BaseException) -> str:
    """An error in a few words."""
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ------------------------------------------------------------------------------------------------ messages


def encode(method: str, address: str, path: str, body: bytes | None, headers: Mapping[str, str] | None) -> bytes:
    """A request as bytes; raises `SpecError` for characters that HTTP does not allow."""
    if body is None and not headers:
        return _encode_bare(method, address, path)
    return _encode(method, address, path, body, headers)


@functools.lru_cache(maxsize=16_384)
def _encode_bare(method: str, address: str, path: str) -> bytes:
    return _encode(method, address, path, None, None)  # a probe sends the same bytes again and again


def _encode(method: str, address: str, path: str, body: bytes | None, headers: Mapping[str, str] | None) -> bytes:
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(path):
        raise SpecError(f"{method[:40]!r} {path[:100]!r} is no HTTP request: method or path holds illegal characters")
    _split(address)
    lines = [f"{method} {path} HTTP/1.1\r\nHost: {address}\r\n"]
    for name, value in headers.items() if headers else ():
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise SpecError(f"header {name[:60]!r} holds characters that HTTP does not allow")
        lines.append(f"{name}: {value}\r\n")
    if body is not None or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body or b'')}\r\n")
    lines.append("\r\n")
    head = "".join(lines).encode("latin-1")
    return head + body if body else head


async def read_response(connection: Connection, method: str, max_body: int) -> tuple[Response, bool]:
    """One final answer, and whether the connection can serve again."""
    return _read_at_once(connection, method, max_body) or await _read_in_parts(connection, method, max_body)


def _read_at_once(connection: Connection, method: str, max_body: int) -> tuple[Response, bool] | None:
    """The commonest case, for speed: a small answer with its length that has arrived whole."""
    head, mark, body = connection.buffer.partition(b"\r\n\r\n")
    if not mark or method == "HEAD":
        return None
    version, status, headers = _parse_head(head, connection.address)
    length = headers.get("content-length", "")
    if status != 200 or length != str(len(body)) or len(body) > max_body or "transfer-encoding" in headers:
        return None
    connection.buffer = b""
    return Response(status, headers, body), _may_keep(version, headers)


def _may_keep(version: str, headers: Mapping[str, str]) -> bool:
    options = headers.get("connection", "").lower()
    return "close" not in options and (version == "1" or "keep-alive" in options)


async def _read_in_parts(connection: Connection, method: str, max_body: int) -> tuple[Response, bool]:
    for _ in range(_MAX_INTERIM):
        head = await connection.until(b"\r\n\r\n", _MAX_HEAD, "a header")
        version, status, headers = _parse_head(head, connection.address)
        if status >= 200:
            break
        if status == 101:
            raise HttpError(f"{connection.address} switched protocols without being asked to")
    else:
        raise HttpError(f"{connection.address} sent {_MAX_INTERIM} interim answers and no final one")
    keep = _may_keep(version, headers)
    if method == "HEAD" or status in (204, 304):
        return Response(status, headers, b""), keep
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise HttpError(f"{connection.address} used a transfer encoding other than chunked")
        body = await _read_chunks(connection, max_body)
        return Response(status, headers, body), keep and "content-length" not in headers
    length = headers.get("content-length")
    if length is None:
        return Response(status, headers, await _read_rest(connection, max_body)), False
    size = _length(length, connection.address)
    if size > max_body:
        raise _too_large(connection, max_body)
    return Response(status, headers, await connection.exactly(size)), keep


def _parse_head(head: bytes, address: str) -> tuple[str, int, dict[str, str]]:
    """Minor version, status and headers."""
    first, *lines = head.decode("latin-1").split("\r\n")
    match = _STATUS.fullmatch(first)
    if match is None:
        raise HttpError(f"{address} does not speak HTTP/1.1: it began with {first[:60]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        raw, colon, value = line.partition(":")
        name = _header_name(raw)
        if not colon or not name:
            raise HttpError(f"{address} sent a malformed header line: {line[:60]!r}")
        value = value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return match[1], int(match[2]), headers


@functools.lru_cache(maxsize=1024)
def _header_name(raw: str) -> str:
    """In lower case; empty if it is no name. The same few names come again and again."""
    return raw.lower() if len(raw) < 256 and _TOKEN.fullmatch(raw) else ""


def _length(text: str, address: str) -> int:
    sizes = {part.strip() for part in text.split(",")}  # repeated equal lengths are one length (RFC 9112, 6.3)
    size = sizes.pop()
    if sizes or not size.isascii() or not size.isdigit() or len(size) > 15:
        raise HttpError(f"{address} sent the content length {text[:60]!r}")
    return int(size)


async def _read_chunks(connection: Connection, max_body: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    while True:
        line = await connection.until(b"\r\n", 1024, "a chunk size")
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise HttpError(f"{connection.address} sent a malformed chunk size: {line[:60]!r}")
        size = int(match[1], 16)
        if size == 0:
            break
        total += size
        if total > max_body:
            raise _too_large(connection, max_body)
        parts.append(await connection.exactly(size))
        if await connection.exactly(2) != b"\r\n":
            raise HttpError(f"{connection.address} sent a chunk that is longer than its size")
    trailers = 0
    while line := await connection.until(b"\r\n", _MAX_HEAD, "a trailer"):  # trailers are read and ignored
        trailers += len(line) + 2
        if trailers > _MAX_HEAD:
            raise HttpError(f"{connection.address} sent trailers of more than {_MAX_HEAD} bytes")
    return b"".join(parts)


async def _read_rest(connection: Connection, max_body: int) -> bytes:
    parts = [connection.buffer]
    total = len(connection.buffer)
    connection.buffer = b""
    while total <= max_body and await connection.more():
        parts.append(connection.buffer)
        total += len(connection.buffer)
        connection.buffer = b""
    if total > max_body:
        raise _too_large(connection, max_body)
    return b"".join(parts)


def _too_large(connection: Connection, max_body: int) -> HttpError:
    return HttpError(f"{connection.address} sent a body of more than {max_body} bytes")
