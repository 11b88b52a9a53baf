"""Many small writes to an API server: one pooled session, deadlines, and repetition of what may be repeated."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from agentfleet.testing.kube.access import Access

_REPEAT = frozenset({429, 500, 502, 503, 504})


class ApiClient:
    """Sends raw requests as one user. An async context manager on asyncio."""

    def __init__(self, access: Access, *, connections: int = 64, timeout: float = 15) -> None:
        self._access = access
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        with tempfile.TemporaryDirectory() as folder:
            context = self._access.ssl_context(Path(folder))
        headers = {"Accept": "application/json"}
        if self._access.token is not None:
            headers["Authorization"] = f"Bearer {self._access.token}"
        connector = aiohttp.TCPConnector(ssl=context or True, limit=self._connections)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Send one request until it is answered with something final; returns status and body.

        Every write here may be repeated: statuses are absolute, creations and deletions end in 409 and 404.
        """
        pause = 0.1
        data = None if body is None else json.dumps(body).encode()
        while True:
            try:
                status, said, wait = await self._once(method, path, data, kind)
            except (aiohttp.ClientError, TimeoutError, OSError):
                status, said, wait = 0, b"", 0.0
            if status and status not in _REPEAT:
                return status, said
            await asyncio.sleep(max(wait, pause * random.uniform(0.5, 1.0)))  # noqa: S311 - jitter
            pause = min(pause * 2, 2.0)

    async def _once(self, method: str, path: str, data: bytes | None, kind: str) -> tuple[int, bytes, float]:
        assert self._session is not None
        url = self._access.server.rstrip("/") + path
        headers = {"Content-Type": kind}
        async with self._session.request(method, url, data=data, headers=headers, timeout=self._timeout) as answer:
            said = await answer.read()
            wait = answer.headers.get("Retry-After", "0")
            return answer.status, said, float(wait) if wait.isdecimal() else 0.0

    async def lines(self, path: str, *, silence: float) -> AsyncIterator[bytes]:
        """The lines of a watch, until the server ends it.

        Raises:
            aiohttp.ClientError: The connection broke, or the status is not 200.
            TimeoutError: Nothing came for `silence` seconds.
        """
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence)
        url = self._access.server.rstrip("/") + path
        async with self._session.get(url, timeout=timeout, raise_for_status=True) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    if line:
                        yield line
