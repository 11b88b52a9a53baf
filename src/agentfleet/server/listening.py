"""The socket, TLS and HTTP below the application: uvicorn within our own event loop, with bounds of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agentfleet.errors import BackendUnavailable, SpecError
from agentfleet.server.gate import is_loopback

log = logging.getLogger(__name__)

_HEAD_BYTES = 64 * 2**10
_HEAD_SECONDS = 10.0
"""Until the head of a request must be there, from its first byte or from the connection on."""
_FAREWELL = 1.0
"""Seconds that idle connections get to close in good order."""
_LOOK = 10.0
"""Seconds between two looks at the certificate's files."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's own HTTP, for clients that send endless heads, or send them endlessly slowly."""

    _taken = 0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        self._end()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """See uvicorn."""
        self._taken = 0
        if self._patience is None:
            self._begin()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See uvicorn."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See uvicorn."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See uvicorn."""
        self._end()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._taken += size
        if self._taken > _HEAD_BYTES:
            raise ValueError("the head of the request is too large")  # uvicorn answers 400, and closes

    def _begin(self) -> None:
        self._patience = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _end(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """uvicorn's server; signals are somebody else's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. Whoever does not answer to the end of TLS, and has nothing more to get, is not waited for."""
        cutting = asyncio.get_running_loop().call_later(_FAREWELL, self._cut_idle)
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    def _cut_idle(self) -> None:
        for connection in tuple(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()


def server_of(app: Any, *, tls: ssl.SSLContext | None, connections: int, patience: float) -> Server:
    """A server for an application.

    Args:
        app: The application.
        tls: Context for TLS; None serves without.
        connections: At most so many.
        patience: Seconds that requests under way get when it ends.
    """
    more: dict[str, Any] = {} if tls is None else {"ssl_context_factory": lambda _config, _default: tls}
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        limit_concurrency=connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(patience)),
        **more,
    )
    return Server(config)


def bind(host: str, port: int, *, loopback: bool) -> socket.socket:
    """A socket that listens.

    Args:
        host: Name or address to listen at.
        port: Of TCP; 0 takes a free one.
        loopback: Whether it must be an address of this machine alone.

    Raises:
        SpecError: It is no such address, or must be another.
        BackendUnavailable: It is in use, or not ours.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SpecError(f"host: {host!r:.100} does not resolve: {error}") from error
    if loopback and not all(is_loopback(str(item[4][0])) for item in found):
        raise SpecError(f"host: without tokens only this machine is served; listen at 127.0.0.1, not at {host!r:.100}")
    family, _, _, _, address = found[0]
    # asyncio turns Nagle's algorithm off for sockets that say that they are TCP alone: with 0 for the protocol, as
    # socket.create_server has it, each answer on a kept connection waits 40 ms for the client's delayed ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address[0]), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise BackendUnavailable(f"cannot listen at {host}:{port}: {error}") from error
    return listener


def tls_of(certificate: Path, key: Path) -> ssl.SSLContext:
    """A context for TLS from PEM files; raises `SpecError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SpecError(f"TLS: {certificate} and {key} cannot be used: {error}") from error
    return context


async def keep_fresh(context: ssl.SSLContext, certificate: Path, key: Path, *, look: float = _LOOK) -> None:
    """Load certificate and key again whenever they change, for connections from then on."""
    seen = await _stamps(certificate, key)
    while True:
        await anyio.sleep(look)
        now = await _stamps(certificate, key)
        if now == seen:
            continue
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:  # half of it was replaced so far, say
            log.warning("the certificate cannot be read again, the old one stays in use: %s", error)
            continue
        seen = now
        log.info("read the certificate again from %s", certificate)


async def _stamps(*paths: Path) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            seen = await anyio.Path(path).stat()
        except OSError:
            found.append(None)
        else:
            found.append((seen.st_mtime_ns, seen.st_ino))
    return found
