"""A proxy in front of an API server that fails on demand, as networks and load balancers do."""

from __future__ import annotations

import re
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, Listener, SocketStream, TaskGroup
from anyio.streams.tls import TLSStream

from agentfleet.errors import SpecError
from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.certificates import Certificate
from agentfleet.testing.kube.exchange import CutHere, Exchange, Rules
from agentfleet.testing.kube.programs import free_ports
from agentfleet.testing.kube.proxyfaults import Fault, Injection
from agentfleet.testing.kube.proxywire import Broken, FaultyStream

__all__ = ["FaultProxy"]

_GONE = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, Broken, ssl.SSLError, OSError)
_CONNECT = 10.0


class FaultProxy:
    """Stands on loopback between an API server and its clients. An async context manager.

    Without a certificate bytes are passed as they are, TLS and all, and only the connection itself can fail. With one,
    the proxy ends the TLS of both sides and can also touch single requests and events. Clients with certificates of
    their own must use the former; clients with tokens may use either.

    Args:
        upstream: How the server is reached.
        certificate: What the proxy shows its clients, as `plane.authority.server("proxy")`.
        plain: Talk plain HTTP to clients instead of TLS; then no certificate is needed to touch requests.
    """

    def __init__(self, upstream: Access, *, certificate: Certificate | None = None, plain: bool = False) -> None:
        self.upstream = upstream
        self._certificate = certificate
        self._plain = plain
        (self._port,) = free_ports(1)
        self._lag = 0.0
        self._swallowing = False
        self._rules = Rules()
        self._open: dict[FaultyStream, anyio.CancelScope] = {}
        self._tasks: TaskGroup | None = None
        self._listener: Listener[SocketStream] | None = None
        self._stack = AsyncExitStack()
        self._server_tls: ssl.SSLContext | None = None
        self._client_tls: ssl.SSLContext | None = None
        self.accepted = 0
        """How many connections it has accepted."""

    @property
    def terminates(self) -> bool:
        """Whether it sees requests, and not just bytes."""
        return self._plain or self._certificate is not None

    @property
    def access(self) -> Access:
        """The server through this proxy, as the same user."""
        scheme = "http" if self._plain or self.upstream.server.startswith("http:") else "https"
        return replace(self.upstream, server=f"{scheme}://127.0.0.1:{self._port}")

    async def __aenter__(self) -> Self:
        with tempfile.TemporaryDirectory() as folder:
            self._server_tls = self.upstream.ssl_context(Path(folder))
        if self._certificate is not None and not self._plain:
            self._client_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._client_tls.load_cert_chain(self._certificate.certificate, self._certificate.key)
        async with AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(self._tasks.cancel_scope.cancel)
            await self.accept()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.refuse()
        await self._stack.__aexit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------------ connections

    def half_open(self) -> None:
        """From now on everything is swallowed, on connections old and new, and nothing says so.

        After `heal`, new connections work; those that were swallowed stay dead, as behind a firewall that forgot them.
        """
        self._swallowing = True
        for stream in self._open:
            stream.dead = True

    def delay(self, seconds: float) -> None:
        """Whatever passes, in either direction, passes so much later; 0 takes it back."""
        self._lag = seconds

    def cut(self) -> int:
        """Reset all connections now; new ones work. Returns how many there were."""
        for stream, scope in self._open.items():
            stream.reset()
            scope.cancel()
        return len(self._open)

    async def refuse(self) -> None:
        """Refuse new connections, until `accept`. Open ones go on."""
        if self._listener is not None:
            await self._listener.aclose()
            self._listener = None

    async def accept(self) -> None:
        """Accept connections again."""
        if self._listener is not None or self._tasks is None:
            return
        self._listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self._port, backlog=1024)
        self._tasks.start_soon(self._serve, self._listener)

    async def heal(self) -> None:
        """Take everything back: faults of connections, of requests, of events."""
        self._swallowing = False
        self._lag = 0.0
        self._rules.clear()
        await self.accept()

    # ------------------------------------------------------------------------------------------------ requests

    def inject(
        self, fault: Fault, *, method: str = "*", path: str = "", times: int | None = 1, skip: int = 0
    ) -> Injection:
        """Let something happen to requests, or to events of watches.

        Args:
            fault: What.
            method: To requests of this method, or of one of several ("PATCH|POST"); "*" is any.
            path: To requests whose path and query contain this regular expression.
            times: How often; None is until it is cancelled.
            skip: How many such requests or events are let pass before.

        Returns:
            The injection: `hits`, `cancel()`, `await struck()`.
        """
        if not self.terminates:
            raise SpecError("this proxy passes TLS on and cannot touch requests: give it a certificate, or plain=True")
        return self._rules.add(Injection(fault, method=method, path=path, times=times, skip=skip))

    def requests(self, method: str = "*", path: str = "") -> list[tuple[str, str]]:
        """The requests that came so far, as method and target, of one method and with a path that matches."""
        pattern = re.compile(path)
        return [each for each in self._rules.requests if method in {"*", each[0]} and pattern.search(each[1])]

    def forget_requests(self) -> None:
        """Begin to count requests from none."""
        self._rules.requests.clear()

    # ------------------------------------------------------------------------------------------------ work

    async def _serve(self, listener: Listener[SocketStream]) -> None:
        with _quiet():  # closed: refused from now on
            await listener.serve(self._converse, self._tasks)

    async def _converse(self, sock: SocketStream) -> None:
        self.accepted += 1
        stream = FaultyStream(sock, lambda: self._lag)
        stream.dead = self._swallowing
        with anyio.CancelScope() as scope, self._registered(stream, scope), _quiet():
            try:
                if self.terminates:
                    await self._terminate(stream)
                else:
                    await self._pass(stream)
            except CutHere:
                stream.reset()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.aclose_forcefully(stream)

    @contextmanager
    def _registered(self, stream: FaultyStream, scope: anyio.CancelScope) -> Iterator[None]:
        self._open[stream] = scope
        try:
            yield
        finally:
            del self._open[stream]

    async def _terminate(self, stream: FaultyStream) -> None:
        client: ByteStream = stream
        if self._client_tls is not None:
            client = await TLSStream.wrap(
                stream, server_side=True, ssl_context=self._client_tls, standard_compatible=False
            )
        await Exchange(client, self._connect, self._rules).run()

    async def _connect(self) -> ByteStream:
        place = urlsplit(self.upstream.server)
        host, port = place.hostname or "", place.port or (443 if self._server_tls else 80)
        with anyio.fail_after(_CONNECT):
            if self._server_tls is None or not self.terminates:
                return await anyio.connect_tcp(host, port)
            return await anyio.connect_tcp(host, port, ssl_context=self._server_tls, tls_standard_compatible=False)

    async def _pass(self, client: FaultyStream) -> None:
        server = await self._connect()

        async def pump(source: ByteStream, sink: ByteStream) -> None:
            with _quiet():
                async for data in source:
                    await sink.send(data)
            tasks.cancel_scope.cancel()  # one side has left: so does the other

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pump, client, server)
                tasks.start_soon(pump, server, client)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(server)


@contextmanager
def _quiet() -> Iterator[None]:
    """Whoever leaves or is closed is what this is all about."""
    try:
        yield
    except _GONE:
        pass
    except BaseExceptionGroup as group:
        if group.split(_GONE)[1] is not None:
            raise
