"""A small HTTP/1.1 client for asking agents: keep-alive, deadlines, bounded answers, asyncio and trio alike.

It works on plain non-blocking sockets, because a probe is a few system calls and one wait: `wire.py` writes and reads
HTTP on them, `inbox.py` waits. There is no TLS, no redirect and no cookie: agents answer on their fleet's own network.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import anyio

from agentfleet.errors import DeadlineExceeded
from agentfleet.signals.wire import Connection, HttpError, Response, connect, encode, read_response, say

__all__ = ["HttpClient", "HttpError", "Requests", "Response", "connect_check"]

_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class Requests(Protocol):
    """Whatever sends requests as `HttpClient` does; a simulated cluster answers them without sockets."""

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        """Send one request; raises `DeadlineExceeded` or `HttpError`."""
        ...


class _Stale(Exception):  # internal: never leaves this module
    """A reused connection broke before the first byte of an answer."""


class HttpClient:
    """Asks many addresses over kept connections. Safe for concurrent use by tasks of one event loop.

    Open connections are bounded by the caller's own concurrency plus `max_idle`.

    Args:
        max_idle: Idle connections kept in total; by default half of what this process may open, at most 4096.
        max_idle_per_address: Idle connections kept to one address.
        idle_timeout: Seconds after which an idle connection may be dropped in favour of another.
        max_body: Largest answer body accepted, in bytes.
    """

    def __init__(
        self,
        *,
        max_idle: int | None = None,
        max_idle_per_address: int = 4,
        idle_timeout: float = 60.0,
        max_body: int = 16 * 2**20,
    ) -> None:
        self._max_idle = _default_idle() if max_idle is None else max_idle
        self._per_address = max_idle_per_address
        self._idle_timeout = idle_timeout
        self._max_body = max_body
        self._idle: dict[str, deque[tuple[float, Connection]]] = {}  # least recently used address first
        self._idle_count = 0
        self._active: set[Connection] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; requests under way end with `HttpError`. Never waits, may be repeated."""
        self._closed = True
        for connection in self._active:
            connection.break_off()
        self._active.clear()
        for kept in self._idle.values():
            for _, connection in kept:
                connection.close()
        self._idle.clear()
        self._idle_count = 0

    @property
    def idle(self) -> int:
        """Idle connections kept now."""
        return self._idle_count

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        """Send one request and read its whole answer.

        A kept connection that turns out to be closed is replaced by a fresh one, once, for GET, HEAD, PUT and DELETE,
        and only if no byte of an answer had arrived.

        Args:
            method: "GET", "POST", …, in capitals.
            address: "host:port", "[::1]:80" for IPv6.
            path: Absolute path with an optional query, already percent-encoded.
            body: Sent with a Content-Length.
            headers: Added to Host and Content-Length.
            timeout: Seconds for everything together: name, connection, request and answer.

        Raises:
            DeadlineExceeded: No complete answer in time; the request may have taken effect.
            HttpError: Refused, reset, malformed or too large.
            SpecError: The request itself cannot be written as HTTP; nothing was sent.
        """
        message = encode(method, address, path, body, headers)
        with anyio.move_on_after(timeout) as scope:
            return await self._exchange(method, address, message)
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"{method} {path} of {address} was not answered within {timeout:g} s")
        raise AssertionError("unreachable: the exchange returns, raises, or is cancelled")

    async def _exchange(self, method: str, address: str, message: bytes) -> Response:
        connection = self._reuse(address)
        if connection is not None:
            try:
                return await self._on(connection, method, message)
            except _Stale as error:
                if method not in _IDEMPOTENT:
                    raise HttpError(f"{address} closed the kept connection: {error}") from error
        return await self._on(await self._fresh(address), method, message)

    async def _fresh(self, address: str) -> Connection:
        if self._closed:
            raise HttpError("this client is closed", sent=False)
        return Connection(address, await connect(address))

    async def _on(self, connection: Connection, method: str, message: bytes) -> Response:
        if self._closed:
            connection.close()
            raise HttpError("this client is closed", sent=False)
        self._active.add(connection)
        keep = False
        try:
            response, keep = await self._converse(connection, method, message)
        except (OSError, anyio.ClosedResourceError) as error:
            if connection.used and not connection.answered and not self._closed:
                raise _Stale(str(error)) from error
            raise HttpError(f"the connection to {connection.address} broke: {say(error)}") from error
        finally:
            self._active.discard(connection)
            if keep and not connection.buffer and not self._closed:
                self._keep(connection)
            else:
                connection.close()
        return response

    async def _converse(self, connection: Connection, method: str, message: bytes) -> tuple[Response, bool]:
        """The answer, and whether the connection can serve again."""
        broken: OSError | None = None
        connection.answered = False
        try:
            await connection.send(message)
        except OSError as error:
            broken = error  # a peer may answer (413, 503) and close without reading the whole request
        try:
            if not connection.buffer and not await connection.more():
                raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
        except OSError as error:
            raise broken or error from error
        response, keep = await read_response(connection, method, self._max_body)
        return response, keep and broken is None

    def _reuse(self, address: str) -> Connection | None:
        """A kept connection that is still open, as far as can be seen."""
        kept = self._idle.get(address)
        while kept:
            _, connection = kept.pop()
            self._idle_count -= 1
            if not kept:
                del self._idle[address]
            if connection.silent():
                return connection
            connection.close()
        return None

    def _keep(self, connection: Connection) -> None:
        now = time.monotonic()
        address = connection.address
        kept = self._idle.pop(address, None) or deque()
        connection.used = True
        if len(kept) >= self._per_address or not self._make_room(now):
            connection.close()
        else:
            kept.append((now, connection))
            self._idle_count += 1
        if kept:
            self._idle[address] = kept

    def _make_room(self, now: float) -> bool:
        """Whether one more connection may be kept, after dropping one that nobody has used for long.

        One that was used lately stays: probes come in rounds, and under least-recently-used replacement a round
        larger than the pool would never find a kept connection.
        """
        if self._idle_count < self._max_idle:
            return True
        for address, kept in self._idle.items():  # looks at the first only
            if now - kept[0][0] < self._idle_timeout:
                return False
            kept.popleft()[1].close()
            self._idle_count -= 1
            if not kept:
                del self._idle[address]
            return True
        return False


async def connect_check(address: str, timeout: float) -> None:
    """Open and close a TCP connection to "host:port" within `timeout` seconds.

    Raises:
        DeadlineExceeded: Nobody answered in time.
        HttpError: Refused, unreachable, or the name does not resolve.
    """
    with anyio.move_on_after(timeout) as scope:
        (await connect(address)).close()
    if scope.cancelled_caught:
        raise DeadlineExceeded(f"{address} did not accept a connection within {timeout:g} s")


def _default_idle() -> int:
    try:
        import resource  # noqa: PLC0415 - POSIX only

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError, ValueError):
        return 256
    return 4096 if soft < 0 else max(1, min(4096, soft // 2))
