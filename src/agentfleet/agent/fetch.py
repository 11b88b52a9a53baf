"""Requests of an agent to its manager: one at a time, or a stream that stays open. Standard library, asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from agentfleet.agent.incoming import BadResponse, Response
from agentfleet.errors import SpecError


class Target:
    """Where a manager serves a cluster."""

    __slots__ = ("_prefix", "_ssl", "host", "port", "scheme")

    def __init__(self, scheme: str, host: str, port: int, prefix: str) -> None:
        self.scheme, self.host, self.port, self._prefix = scheme, host, port, prefix
        self._ssl: Any = None

    @classmethod
    def of(cls, url: str) -> Target:
        """Read a URL such as `https://manager:8443/api/v1/clusters/researchers`; raises `SpecError`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise SpecError(f"AGENTFLEET_CONFIG_URL is {url[:100]!r}: {error}") from error
        sound = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        if not sound or parts.username is not None or not url.isascii() or not url.isprintable():
            raise SpecError(
                f"AGENTFLEET_CONFIG_URL is {url[:100]!r}; it must be like http://manager:8080/api/v1/clusters/NAME"
            )
        host = str(parts.hostname)
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/"))

    def path(self, rest: str, **query: object) -> str:
        """A path below the cluster's."""
        asked = urlencode({name: str(value) for name, value in query.items()}, quote_via=quote)
        return f"{self._prefix}{rest}{'?' if asked else ''}{asked}"

    @property
    def ssl(self) -> Any:
        """The TLS context; None for plain HTTP. It trusts what the system trusts, and SSL_CERT_FILE."""
        if self._ssl is None and self.scheme == "https":
            import ssl  # noqa: PLC0415  only where it is used: it takes 20 ms

            self._ssl = ssl.create_default_context()
        return self._ssl

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self._prefix}"


class Exchange(asyncio.Protocol):
    """One request and its answer on a connection of its own. Futures tell its head and its end."""

    def __init__(self, message: bytes, response: Response, loop: asyncio.AbstractEventLoop) -> None:
        self._message, self._response, self._loop = message, response, loop
        self._transport: asyncio.Transport | None = None
        self.head: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[BaseException | None] = loop.create_future()
        """Its result is what has ended the answer, None if it has ended as it should."""
        self.heard_at = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        self.heard_at = self._loop.time()
        try:
            self._response.feed(data)
        except BadResponse as error:
            self._finish(error)
            return
        if self._response.status >= 200 and not self.head.done():
            self.head.set_result(None)
        if self._response.ended:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has left."""
        if exc is not None:
            self._finish(exc)
            return
        try:
            self._response.finish()
        except BadResponse as error:
            self._finish(error)
        else:
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        if not self.end.done():
            self.end.set_result(error)
        if not self.head.done():
            self.head.set_result(None)
        self.close()

    async def ended(self, timeout: float) -> bool:
        """Whether the answer ends within so many seconds; raises what has ended it."""
        done, _ = await asyncio.wait((self.end,), timeout=timeout)
        if not done:
            return False
        error = self.end.result()
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """Close the connection; may be repeated."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if self._response.ended:
            transport.close()
        else:
            transport.abort()  # a stream is not to linger


async def _open(target: Target, message: bytes, response: Response) -> Exchange:
    loop = asyncio.get_running_loop()
    _, exchange = await loop.create_connection(
        lambda: Exchange(message, response, loop),
        target.host,
        target.port,
        ssl=target.ssl,
    )
    return exchange


def _encode(target: Target, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{target.port}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    text = "\r\n".join(lines)
    if not text.isascii() or any(not line.isprintable() for line in lines):
        raise BadResponse("a header or token holds what HTTP cannot carry")
    return text.encode("ascii") + b"\r\n\r\n" + (body or b"")


async def request(
    target: Target,
    method: str,
    path: str,
    headers: Mapping[str, str],
    *,
    body: bytes | None = None,
    limit: int = 65_536,
    timeout: float,
) -> tuple[int, Mapping[str, str], bytes]:
    """One request on a connection of its own: the status, headers and body of its answer.

    Raises:
        OSError: It cannot be connected to.
        TimeoutError: It was not answered within `timeout` seconds.
        BadResponse: The answer is none, or larger than `limit`.
    """
    pieces: list[bytes] = []
    response = Response(pieces.append, limit=limit)
    message = _encode(target, method, path, {**headers, "Connection": "close"}, body)
    async with asyncio.timeout(timeout):
        exchange = await _open(target, message, response)
        try:
            error = await exchange.end
        finally:
            exchange.close()
    if error is not None:
        raise error
    return response.status, response.headers, b"".join(pieces)


async def open_stream(
    target: Target, path: str, headers: Mapping[str, str], *, on_body: Callable[[bytes], None], timeout: float
) -> Exchange:
    """Ask for a stream, and return when it has begun; `on_body` is then called with each piece of it.

    Raises:
        OSError: It cannot be connected to.
        TimeoutError: It did not begin within `timeout` seconds.
        BadResponse: The answer is none, or a refusal.
    """
    response = Response(lambda piece: on_body(piece) if response.status == 200 else None)
    message = _encode(target, "GET", path, headers, None)
    async with asyncio.timeout(timeout):
        exchange = await _open(target, message, response)
        try:
            await exchange.head
        except BaseException:
            exchange.close()
            raise
    if response.status != 200:
        exchange.close()
        error = exchange.end.result() if exchange.end.done() else None
        raise error or BadResponse(f"the server answered {response.status}")
    return exchange
