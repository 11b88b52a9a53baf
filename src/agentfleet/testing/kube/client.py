"""A plain client for tests: one JSON request per connection, in a thread, on any event loop. Slow and simple."""

from __future__ import annotations

import http.client
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio import to_thread

from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.errors import ApiRefused

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"
_AGAIN = 0.1


class Client:
    """Asks an API server as one user. Bound to no event loop, safe for concurrent use."""

    def __init__(self, access: Access) -> None:
        self.access = access
        with tempfile.TemporaryDirectory() as folder:
            self._context = access.ssl_context(Path(folder))

    async def get(self, path: str, *, timeout: float = 10) -> Any:
        """GET; the answer's JSON."""
        return await self.request("GET", path, timeout=timeout)

    async def post(self, path: str, body: Any, *, timeout: float = 10) -> Any:
        """POST a JSON body."""
        return await self.request("POST", path, body, timeout=timeout)

    async def put(self, path: str, body: Any, *, timeout: float = 10) -> Any:
        """PUT a JSON body."""
        return await self.request("PUT", path, body, timeout=timeout)

    async def patch(self, path: str, body: Any, *, kind: str = MERGE, timeout: float = 10) -> Any:
        """PATCH; `kind` is the content type, a merge patch unless told."""
        return await self.request("PATCH", path, body, kind=kind, timeout=timeout)

    async def delete(self, path: str, body: Any = None, *, timeout: float = 10) -> Any:
        """DELETE, with DeleteOptions as body if wanted."""
        return await self.request("DELETE", path, body, timeout=timeout)

    async def wait(self, path: str, holds: Callable[[Any], bool], *, timeout: float = 30) -> Any:
        """GET again and again until `holds` says so of the answer (None while it is 404); returns that answer.

        Raises:
            DeadlineExceeded: It did not within `timeout` seconds; the message tells the last answer.
        """
        last: Any = None
        with anyio.move_on_after(timeout):
            while True:
                try:
                    last = await self.get(path)
                except ApiRefused as error:
                    if error.status != 404:
                        raise
                    last = None
                if holds(last):
                    return last
                await anyio.sleep(_AGAIN)
        raise DeadlineExceeded(
            f"GET {path}: not what was waited for after {timeout:g} s; last: {json.dumps(last)[:2000]}"
        )

    async def request(
        self, method: str, path: str, body: Any = None, *, kind: str = "application/json", timeout: float = 10
    ) -> Any:
        """Send one request and return the decoded JSON, or the text where it is not JSON.

        Raises:
            ApiRefused: The status is 400 or above.
            BackendUnavailable: No connection, or a broken one.
            DeadlineExceeded: No whole answer within `timeout` seconds.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            with anyio.fail_after(timeout):
                status, said = await to_thread.run_sync(
                    partial(self._ask, method, path, data, kind, timeout), abandon_on_cancel=True
                )
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{method} {path}: no answer from {self.access.server} within {timeout:g} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise BackendUnavailable(f"{method} {path}: cannot reach {self.access.server}: {error!r}") from error
        try:
            answer = json.loads(said)
        except ValueError:
            answer = said.decode(errors="replace")
        if status >= 400:
            told = answer if isinstance(answer, dict) else {"message": str(answer)[:500]}
            raise ApiRefused(
                f"{method} {path}: {status} {told.get('message', '')}", status=status, reason=told.get("reason") or ""
            )
        return answer

    def _ask(self, method: str, path: str, data: bytes | None, kind: str, timeout: float) -> tuple[int, bytes]:
        place = urlsplit(self.access.server)
        host, port = place.hostname or "", place.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=timeout)
            if self._context is None
            else http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
        )
        headers = {"Accept": "application/json", "Content-Type": kind}
        if self.access.token is not None:
            headers["Authorization"] = f"Bearer {self.access.token}"
        try:
            connection.request(method, place.path.rstrip("/") + path, body=data, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
