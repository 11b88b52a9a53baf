"""The narrow seam: TLS and HTTP to one API server. The only module that knows which client library carries the bytes.

kubernetes-asyncio builds the TLS context and the connection pool as all its users know it (proxies of the environment
included); requests go straight to that pool, because the layer above it decodes bodies, checks no status and sets no
deadline. Whatever the library raises leaves here as an error of agentfleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio import to_thread

from agentfleet.backends.kubernetes.credentials import Access, Tls
from agentfleet.backends.kubernetes.errors import Unreachable
from agentfleet.errors import BackendError, BackendUnavailable, DeadlineExceeded, MissingExtra, SpecError

if TYPE_CHECKING:
    from kubernetes_asyncio.client.rest import RESTClientObject

__all__ = ["Answer", "LibraryTransport", "Limits", "Transport", "load_client", "open_transport"]

_POOL = 100
"""Connections to the server at once; calls beyond that wait for one, within their deadline."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines of one exchange, in seconds."""

    connect: float
    """Name lookup, TCP and TLS."""
    read: float
    """Longest silence of the server: before its headers, and between two pieces of its answer."""


class Answer(Protocol):
    """An answer whose headers have come."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, whatever the case of their names."""
        ...

    async def read(self) -> bytes:
        """The whole body; raises `BackendUnavailable` if it ends too soon."""
        ...

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises like `read`."""
        ...


class Transport(Protocol):
    """Carries requests to one server with one set of certificates."""

    def exchange(
        self, method: str, url: str, *, headers: Sequence[tuple[str, str]], body: bytes | None, limits: Limits
    ) -> AbstractAsyncContextManager[Answer]:
        """Send one request; the answer is read inside the context.

        Raises:
            Unreachable: There was no connection: the request was not sent.
            BackendUnavailable: The connection broke.
            DeadlineExceeded: The server was silent for too long.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


async def open_transport(access: Access) -> Transport:
    """A transport for this server and these certificates.

    Raises:
        MissingExtra: The extra `kubernetes` is not installed.
        SpecError: The certificates cannot be used.
    """
    rest_class = await load_client()
    return LibraryTransport(_build(rest_class, access.server, access.tls), access.tls)


async def load_client() -> type[RESTClientObject]:
    """The library's pool; half a second of import the first time, during which other tasks go on.

    Raises:
        MissingExtra: The extra `kubernetes` is not installed.
    """
    return await to_thread.run_sync(_import_client)


def _import_client() -> type[RESTClientObject]:
    try:
        from kubernetes_asyncio.client.rest import RESTClientObject  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise MissingExtra("Kubernetes needs its extra: pip install 'agentfleet[kubernetes]'") from error
    return RESTClientObject


def _build(rest_class: type[RESTClientObject], server: str, tls: Tls) -> RESTClientObject:
    """The library's pool. A private key is on the disk only while it is read: TLS takes it from files alone."""
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415 - an extra

    configuration: Any = Configuration(host=server)
    configuration.verify_ssl = tls.verify
    configuration.tls_server_name = tls.server_name
    configuration.connection_pool_maxsize = _POOL
    if tls.proxy is not None:
        configuration.proxy = tls.proxy
    with tempfile.TemporaryDirectory(prefix="agentfleet-") as name:
        folder = Path(name)
        for attribute, content in (("ssl_ca_cert", tls.ca), ("cert_file", tls.certificate), ("key_file", tls.key)):
            if content is not None:
                file = folder / attribute
                file.touch(mode=0o600)
                file.write_bytes(content)
                setattr(configuration, attribute, str(file))
        try:
            rest: RESTClientObject = rest_class(configuration)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise SpecError(f"the certificates for {server} cannot be used: {error}") from error
    return rest


class LibraryTransport:
    """A `Transport` over kubernetes-asyncio's connection pool."""

    def __init__(self, rest: RESTClientObject, tls: Tls) -> None:
        self._session = rest.pool_manager
        self._extra: dict[str, Any] = {}
        if tls.server_name is not None:
            self._extra["server_hostname"] = tls.server_name
        if rest.proxy:
            self._extra["proxy"] = rest.proxy

    @asynccontextmanager
    async def exchange(
        self, method: str, url: str, *, headers: Sequence[tuple[str, str]], body: bytes | None, limits: Limits
    ) -> AsyncIterator[Answer]:
        """See `Transport`."""
        from aiohttp import ClientError, ClientTimeout  # noqa: PLC0415 - an extra
        from yarl import URL  # noqa: PLC0415 - an extra

        call = f"{method} {url.partition('?')[0]}"
        timeout = ClientTimeout(total=None, sock_connect=limits.connect, sock_read=limits.read)
        try:
            response = await self._session.request(
                method,
                URL(url, encoded=True),
                headers=headers,
                data=body,
                timeout=timeout,
                allow_redirects=False,  # an API server does not redirect; a login page in front of it does
                **self._extra,
            )
        except (ClientError, OSError) as error:
            raise _error_of(call, error, limits) from error
        try:
            yield _Response(call, response, limits)
        finally:
            _abort(response)
            response.release()  # back into the pool if it was read to its end

    async def aclose(self) -> None:
        """Close every connection at once: a TLS farewell to a server that is gone would take its time."""
        connector = self._session.connector
        with anyio.CancelScope(shield=True), contextlib.suppress(TimeoutError), anyio.fail_after(2):
            if connector is not None:
                await connector.close(abort_ssl=True)
            await self._session.close()
        await asyncio.sleep(0)  # a transport closes its socket in the loop's next round


def _abort(response: Any) -> None:
    """Break off what was not read to its end: a TLS farewell would take its time, longer than our loop may last."""
    connection = response.connection  # None once it was read to its end
    if connection is not None and connection.transport is not None:
        connection.transport.abort()


class _Response:
    """An `Answer` as aiohttp has it."""

    def __init__(self, call: str, response: Any, limits: Limits) -> None:
        self._call = call
        self._response = response
        self._limits = limits

    @property
    def status(self) -> int:
        return int(self._response.status)

    @property
    def headers(self) -> Mapping[str, str]:
        headers: Mapping[str, str] = self._response.headers
        return headers

    async def read(self) -> bytes:
        from aiohttp import ClientError  # noqa: PLC0415 - an extra

        try:
            body: bytes = await self._response.read()
        except (ClientError, OSError) as error:
            raise _error_of(self._call, error, self._limits) from error
        return body

    async def pieces(self) -> AsyncIterator[bytes]:
        from aiohttp import ClientError  # noqa: PLC0415 - an extra

        content = self._response.content
        while True:
            try:
                piece: bytes = await content.readany()
            except (ClientError, OSError) as error:
                raise _error_of(self._call, error, self._limits) from error
            if not piece:
                return
            yield piece


def _error_of(call: str, error: Exception, limits: Limits) -> BackendError | DeadlineExceeded | SpecError:
    """What a broken exchange means. Here only: an answer that came is mapped in `errors`."""
    import aiohttp  # noqa: PLC0415 - an extra

    match error:
        case aiohttp.ConnectionTimeoutError():
            return Unreachable(f"{call}: no connection within {limits.connect:g} s")
        case aiohttp.ClientConnectorCertificateError():
            return Unreachable(f"{call}: the server's certificate is not trusted: {error.certificate_error}")
        case aiohttp.ClientConnectorError():
            return Unreachable(f"{call}: no connection: {error}")
        case TimeoutError():
            return DeadlineExceeded(f"{call}: nothing came for {limits.read:g} s; it may have been done nevertheless")
        case aiohttp.ClientPayloadError():
            return BackendUnavailable(f"{call}: the answer ended too soon: {error}")
        case aiohttp.InvalidURL():
            return SpecError(f"{call}: not an address: {error}")
        case ssl.SSLError():  # TLS 1.3 tells a refused client certificate only after the request was sent
            return BackendUnavailable(f"{call}: TLS failed: {error}")
    return BackendUnavailable(f"{call}: the connection broke: {str(error) or type(error).__name__}")
