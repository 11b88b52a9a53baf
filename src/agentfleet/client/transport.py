"""Requests to one of several managers: kept connections, deadlines, and one more try at another address.

aiohttp carries them. It is released often, brings pooling, TLS and streams of its own, and comes with the Kubernetes
backend anyway; `agentfleet.signals.http` has no TLS, and httpx had no release in the two years before this was written.
"""

from __future__ import annotations

import random
import ssl
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import anyio

from agentfleet.client.problems import AGAIN, error_of
from agentfleet.errors import AgentFleetError, BackendUnavailable, DeadlineExceeded, OperationRefused, SpecError

_LARGEST = 64 * 2**20
_LONGEST_PAUSE = 2.0
"""Seconds that a server may make us wait before the other try."""
Token = str | Callable[[], str] | None
"""A token; or what gives one, for those that change."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A successful answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Asks managers.

    Args:
        urls: Their addresses, such as "https://fleet-a:8080"; a path is kept, for servers that are mounted.
        token: Sent with each request.
        timeout: Seconds for a request with its other try.
        tls: How servers are checked; the machine's own authorities by default.
        tries: How often one request is sent at most, each time to the next address.

    Raises:
        SpecError: An argument is not usable.
    """

    def __init__(
        self, urls: Sequence[str], *, token: Token, timeout: float, tls: ssl.SSLContext | None, tries: int
    ) -> None:
        if not urls:
            raise SpecError("urls: name at least one address, such as 'https://fleet:8080'")
        self._urls = [_checked(url) for url in urls]
        if tries < 1:
            raise SpecError("tries: at least 1")
        self._token = token
        self.timeout = timeout
        self._tls = tls
        self._tries = tries
        self._at = 0
        self._stack = AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        if self._session is not None:
            raise OperationRefused("this client is open already")
        connector = aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=100)
        session = aiohttp.ClientSession(
            connector=connector, auto_decompress=True, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._session = await self._stack.enter_async_context(session)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        await self._stack.aclose()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session; raises `OperationRefused` outside the client's block."""
        if self._session is None:
            raise OperationRefused("the client is not open; use it inside 'async with'")
        return self._session

    @property
    def at(self) -> int:
        """Number of the address that is asked first."""
        return self._at

    def url(self, number: int) -> str:
        """An address, by its number; they go round."""
        return self._urls[number % len(self._urls)]

    def turn(self, failed: int) -> None:
        """Ask the address after the one of this number first from now on, unless another one is asked already.

        Of many requests that fail together the first turns; the others would turn back to where they failed.
        """
        if self._at == failed % len(self._urls):
            self._at = (self._at + 1) % len(self._urls)

    def headers(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Headers of a request."""
        token = self._token() if callable(self._token) else self._token
        known = {} if token is None else {"Authorization": f"Bearer {token}"}
        return {"User-Agent": "agentfleet", **known, **(more or {})}

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        longer: float = 0.0,
    ) -> Answered:
        """One request, and once more at the next address if the first one could not answer it.

        Args:
            method: "GET", "POST", "PUT" or "DELETE".
            path: Absolute, percent-encoded.
            body: JSON.
            query: Parameters.
            headers: Added.
            key: Idempotency key; the same at every try. One is made for changes when omitted.
            longer: Seconds that the answer may take longer than others.

        Raises:
            AgentFleetError: As `problems.error_of` says.
            BackendUnavailable: No manager could be reached, or none could answer.
            DeadlineExceeded: There was no answer in time; what was asked for may be done.
        """
        asked = f"{method} {path}"
        told = self.headers(headers)
        if body is not None:
            told["Content-Type"] = "application/json"
        if method != "GET":
            told["Idempotency-Key"] = key or str(uuid.uuid4())
        last: AgentFleetError = BackendUnavailable(f"{asked}: not sent")
        first = self._at
        with anyio.move_on_after(self.timeout + longer) as scope:
            for attempt in range(self._tries):
                url = self.url(first + attempt)
                try:
                    status, answer, given = await self._once(
                        method, url + path, body, query, headers=told, longer=longer
                    )
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    last = BackendUnavailable(f"{asked}: {url} cannot be reached: {_say(error)}")
                    wait = 0.0
                else:
                    if status < 400:
                        return Answered(status, answer, given)
                    last = error_of(asked, status, given)
                    if status not in AGAIN:
                        raise last
                    wait = _pause(answer.get("retry-after"))
                self.turn(first + attempt)
                if attempt + 1 < self._tries:
                    await anyio.sleep((wait if len(self._urls) == 1 else 0.0) + 0.1 * random.random())  # noqa: S311 - jitter
        if scope.cancelled_caught:
            raise DeadlineExceeded(
                f"{asked}: no answer within {self.timeout + longer:g} s; it may have been done"
            ) from last
        raise last

    async def _once(
        self,
        method: str,
        url: str,
        body: bytes | None,
        query: Mapping[str, str] | None,
        *,
        headers: Mapping[str, str],
        longer: float,
    ) -> tuple[int, Mapping[str, str], bytes]:
        # each try has its share of the time, so that one address that is silent leaves some for another
        share = longer + self.timeout / self._tries
        limits = aiohttp.ClientTimeout(total=share, sock_connect=min(5.0, share))
        async with self.session.request(
            method,
            url,
            data=body,
            params=query,
            headers=headers,
            allow_redirects=False,
            timeout=limits,
        ) as answer:
            given = await answer.content.read(_LARGEST + 1)
            while len(given) <= _LARGEST and (more := await answer.content.read(_LARGEST)):
                given += more
            if len(given) > _LARGEST:
                raise aiohttp.ClientPayloadError(f"an answer of more than {_LARGEST} bytes")
            lowered = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, lowered, given


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SpecError(f"urls: {url[:100]!r} is no address: {error}") from error
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise SpecError(f"urls: {url[:100]!r} is no address such as 'https://fleet:8080'")
    return url.rstrip("/")


def _pause(said: str | None) -> float:
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(said or 0)))
    except ValueError:
        return 0.0


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__


def compact(query: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a query, without those that are None."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in query.items()
        if value is not None
    }
