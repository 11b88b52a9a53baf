"""Calls to one API server: each with a deadline, a checked status, one kind of errors, a rate limit and patience.

Who asks and whom comes from `credentials`, bytes are carried by `transport`, repetitions are decided in `retry`,
errors are mapped in `errors`. Bodies are bytes: `objects` holds what is decoded from them.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlencode

import anyio

from agentfleet.backends.kubernetes.credentials import Access, Credentials, InCluster, KubeConfig
from agentfleet.backends.kubernetes.errors import Overloaded, error_of
from agentfleet.backends.kubernetes.limits import TokenBucket
from agentfleet.backends.kubernetes.retry import again
from agentfleet.backends.kubernetes.transport import Answer, Limits, Transport, load_client, open_transport
from agentfleet.clock import Clock, SystemClock
from agentfleet.errors import BackendError, BackendRefused, BackendUnavailable, DeadlineExceeded

__all__ = ["APPLY", "JSON", "JSON_PATCH", "MERGE_PATCH", "Connection", "Requests", "Traffic"]

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
"""Server-side apply; JSON is YAML."""
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"

Query = Mapping[str, str | int | bool]


class Requests(Protocol):
    """Whatever asks an API server as `Connection` does; all that the rest of the package needs of it."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: bytes | None = None,
        content_type: str = JSON,
        timeout: float | None = None,
        idempotent: bool | None = None,
    ) -> bytes:
        """See `Connection.request`."""
        ...

    def stream(
        self, path: str, *, query: Query | None = None, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `Connection.stream`."""
        ...


@dataclass(slots=True)
class Traffic:
    """What a connection has done since it was made."""

    calls: int = 0
    """Requests sent, each attempt counted, watches too."""
    writes: int = 0
    """Of these, those that are no GET."""
    repeated: int = 0
    """Attempts that were not the first of their call."""
    failed: int = 0
    """Attempts that ended in an error."""
    overloaded: int = 0
    """Of these, those in which the server asked to be left alone (429, 503)."""
    reauthenticated: int = 0
    """Times that credentials were read again because the server did not accept them."""
    clients: int = 0
    """TLS clients built: one, and one more with each change of certificates."""


class _Shared:
    """A transport and how many use it: the old one lives on until its last watch has ended."""

    def __init__(self, access: Access, transport: Transport) -> None:
        self.access = access
        self.transport = transport
        self.users = 0
        self.retired = False


class Connection:
    """One API server, asked as one user. Safe for concurrent use by tasks of one asyncio event loop.

    Use it as an async context manager; leaving it closes every connection.

    Args:
        credentials: Who asks, and whom.
        qps: Calls a second in the long run; watches count when they begin.
        burst: Calls at once after a rest.
        timeout: Seconds for one call with all its repetitions, unless the call says otherwise.
        connect_timeout: Seconds for one attempt to connect.
        read_timeout: Longest silence of the server within one attempt, in seconds.
        attempts: Times that one call is tried, at most.
        clock: Sleeps between attempts.
        rng: Draws the jitter.
        opener: Makes a transport; another client library can be put in here.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        qps: float = 50.0,
        burst: int = 100,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        read_timeout: float = 15.0,
        attempts: int = 4,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        opener: Callable[[Access], Awaitable[Transport]] = open_transport,
    ) -> None:
        self._credentials = credentials
        self._bucket = TokenBucket(qps, burst)
        self._timeout = timeout
        self._limits = Limits(connect_timeout, read_timeout)
        self._attempts = attempts
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter is no secret
        self._opener = opener
        self._shared: _Shared | None = None
        self._retired: set[_Shared] = set()
        self._opening = anyio.Lock()
        self._closed = False
        self.traffic = Traffic()

    @classmethod
    def find(cls, path: str | Path | None = None, context: str | None = None) -> Self:
        """The pod's own service account where there is one and no kubeconfig is named; a kubeconfig otherwise."""
        inside = path is None and context is None and InCluster.found()
        return cls(InCluster() if inside else KubeConfig(path, context))

    async def __aenter__(self) -> Self:
        if self._opener is open_transport:
            await load_client()  # on nobody's deadline
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; calls under way end with an error. May be repeated."""
        self._closed = True
        shared, self._shared = self._shared, None
        for each in (*self._retired, *([shared] if shared is not None else [])):
            await each.transport.aclose()
        self._retired.clear()

    @property
    def throttled(self) -> float:
        """Seconds that callers have waited for our own rate limit, in all."""
        return self._bucket.waited

    async def namespace(self) -> str:
        """The namespace of the kubeconfig's context or of the pod that we run in; raises like `request`."""
        return (await self._credentials.access()).namespace

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: bytes | None = None,
        content_type: str = JSON,
        timeout: float | None = None,
        idempotent: bool | None = None,
    ) -> bytes:
        """One call, repeated with back-off as long as that can help and the deadline allows it.

        Args:
            method: "GET", "POST", "PUT", "PATCH" or "DELETE".
            path: Absolute path, percent-encoded, without a query: "/api/v1/namespaces/default/pods".
            query: Parameters of the query.
            body: What is sent, in the form that `content_type` says.
            content_type: `JSON`, or the kind of a patch: `APPLY`, `MERGE_PATCH`, `JSON_PATCH`.
            timeout: Seconds for the call with its repetitions and its waiting; the connection's own by default.
            idempotent: Whether it may be repeated when its effect is unknown. By default every call may that is no POST
                and no JSON patch. All are repeated that certainly were not carried out.

        Returns:
            The answer's body.

        Raises:
            InstanceGone: `NotFound`.
            Conflict: The object changed (409), or what was asked for is `Expired`.
            BackendRefused: `AlreadyExists`, `FieldConflict`, `Invalid`, `Unauthenticated`, `Forbidden`,
                `DisruptionBlocked`.
            BackendUnavailable: No connection, a broken one, trouble in the server, or `Overloaded`.
            DeadlineExceeded: No answer in time; the effect is unknown.
            SpecError: The configuration of the connection is wrong.
        """
        method = method.upper()
        if idempotent is None:
            idempotent = method != "POST" and content_type != JSON_PATCH
        seconds = self._timeout if timeout is None else timeout
        call, url = f"{method} {path}", _url(path, query)
        answer = b""
        last: BaseException | None = None
        with anyio.move_on_after(seconds) as scope:
            deadline = anyio.current_time() + seconds
            async for attempt in again(
                self._clock, self._rng, idempotent=idempotent, attempts=self._attempts, deadline=deadline
            ):
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        self.traffic.repeated += 1
                    try:
                        async with self._exchange(
                            call, method, url, body=body, content_type=content_type, limits=self._limits
                        ) as got:
                            answer = await got.read()
                    except (BackendError, DeadlineExceeded) as error:
                        last = error
                        raise
        if scope.cancelled_caught:
            tail = f"; at last: {last}" if last is not None else "; it may have been done nevertheless"
            raise DeadlineExceeded(f"{call}: no answer within {seconds:g} s{tail}") from last
        return answer

    @asynccontextmanager
    async def stream(
        self, path: str, *, query: Query | None = None, silence: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """One GET whose answer has no end, such as a watch. It is not repeated.

        Args:
            path: Absolute path, percent-encoded, without a query.
            query: Parameters of the query.
            silence: Longest pause between two pieces in seconds; more is `DeadlineExceeded`.

        Yields:
            The pieces of the body as they come; a clean end of the answer ends them.

        Raises:
            BackendError: As `request` does.
            DeadlineExceeded: Silence, or no connection in time.
        """
        limits = Limits(self._limits.connect, silence)
        call = f"GET {path}?watch"
        with anyio.move_on_after(self._timeout) as opening:  # until the headers have come; what follows has `silence`
            async with self._exchange(
                call, "GET", _url(path, query), body=None, content_type=JSON, limits=limits
            ) as answer:
                opening.deadline = float("inf")
                yield answer.pieces()
        if opening.cancelled_caught:
            raise DeadlineExceeded(f"{call}: no answer within {self._timeout:g} s")

    @asynccontextmanager
    async def _exchange(
        self, call: str, method: str, url: str, *, body: bytes | None, content_type: str, limits: Limits
    ) -> AsyncIterator[Answer]:
        """One attempt, and a second one with fresh credentials if the server did not accept the first's."""
        rejected: Access | None = None
        while True:
            await self._bucket.take()
            async with self._transport(rejected) as shared:
                headers = [("Accept", JSON), ("Accept-Encoding", "identity"), ("User-Agent", "agentfleet")]
                if body is not None:
                    headers.append(("Content-Type", content_type))
                if shared.access.authorization is not None:
                    headers.append(("Authorization", shared.access.authorization))
                headers.extend(shared.access.impersonation)
                self.traffic.calls += 1
                self.traffic.writes += method != "GET"
                try:
                    async with shared.transport.exchange(
                        method, shared.access.server + url, headers=headers, body=body, limits=limits
                    ) as answer:
                        if answer.status == 401 and rejected is None:
                            rejected = shared.access
                            self.traffic.reauthenticated += 1
                            continue
                        await self._check(call, answer)
                        yield answer
                        return
                except (BackendError, DeadlineExceeded) as error:
                    self.traffic.failed += 1
                    if isinstance(error, Overloaded):
                        self.traffic.overloaded += 1
                        if error.unserved and error.retry_after:  # holds for every caller, not for this one alone
                            self._bucket.hold(min(error.retry_after, 60.0))
                    raise

    async def _check(self, call: str, answer: Answer) -> None:
        """Raise what the status means, unless it means success."""
        status = answer.status
        if 300 <= status < 400:
            where = answer.headers.get("Location", "elsewhere")
            raise BackendRefused(f"{call}: {status}, go to {where}: this is no API server, or a proxy wants a login")
        if status >= 400:
            raise error_of(call, status, answer.headers, await answer.read())
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise BackendUnavailable(
                f"{call}: {status} with a web page: this is no API server, or a proxy is in the way"
            )

    @asynccontextmanager
    async def _transport(self, rejected: Access | None) -> AsyncIterator[_Shared]:
        """The transport for the present credentials; a new one when the certificates or the server have changed."""
        if self._closed:
            raise BackendUnavailable("the connection to the API server is closed")
        access = await self._credentials.access(rejected=rejected)
        shared = self._shared
        if shared is None or shared.access is not access:
            async with self._opening:
                shared = await self._renewed(access)
        shared.users += 1
        try:
            yield shared
        finally:
            shared.users -= 1
            if shared.retired and not shared.users and shared in self._retired:
                self._retired.discard(shared)
                await shared.transport.aclose()

    async def _renewed(self, access: Access) -> _Shared:
        before = self._shared
        if before is not None and before.access is access:
            return before
        if before is not None and (before.access.tls, before.access.server) == (access.tls, access.server):
            before.access = access  # a new token alone
            return before
        after = _Shared(access, await self._opener(access))
        self.traffic.clients += 1
        self._shared = after
        if self._closed:  # closed while this one was being opened
            self._shared = None
            await after.transport.aclose()
            raise BackendUnavailable("the connection to the API server is closed")
        if before is not None:
            before.retired = True
            if before.users:
                self._retired.add(before)
            else:
                await before.transport.aclose()
        return after


def _url(path: str, query: Query | None) -> str:
    if not query:
        return path
    plain = {key: str(value).lower() if isinstance(value, bool) else value for key, value in query.items()}
    return f"{path}?{urlencode(plain)}"
