"""The way to the API server for writes to one fleet in one term: what a deposed leader sends late is refused there.

Before anything else is written the term's epoch is stamped on the fleet's Deployment, which moves its resource version.
Every write to the Deployment carries the version that it was decided on. So a write of an earlier term, however late it
arrives, has an old version; whoever is refused reads again, and finds a higher epoch than its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec

from agentfleet.backends.kubernetes import apply, naming
from agentfleet.backends.kubernetes.connection import JSON, MERGE_PATCH, Query, Requests
from agentfleet.backends.kubernetes.objects import Meta, Slim
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, decode
from agentfleet.core.leadership import Fence
from agentfleet.errors import Conflict, InstanceGone, NotLeader

EPOCH = "agentfleet.io/epoch"
"""The annotation on a Deployment: the epoch of who wrote it last."""
_TRIES = 8
"""Times that a write is based on a newer version: the status moves the version, too, several times in a rollout."""
_TIMEOUT = 10.0
"""Seconds for one request, or less if the term lapses before."""


class _Object(Slim, frozen=True):
    """As much of any answer as it takes to base the next write on it."""

    metadata: Meta = Meta()


_read = msgspec.json.Decoder(_Object).decode


class Guard:
    """A connection that lets through what is written in this term, and nothing later.

    Args:
        connection: How the API server is asked.
        namespace: Where the fleet lives.
        fleet: Its name.
        fence: The term.
    """

    def __init__(self, connection: Requests, namespace: str, fleet: str, fence: Fence) -> None:
        self._connection = connection
        self._fence = fence
        self._fleet = fleet
        self._path = DEPLOYMENTS.path(namespace, fleet)
        self._guarded = (self._path, DEPLOYMENTS.path(namespace, fleet, "scale"))
        self._version: str | None = None
        """The Deployment's resource version as last seen here; None while there is none."""
        self._stamped = False
        self._turn = anyio.Lock()

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
        """As `Connection.request`; raises `NotLeader` when another leads the fleet now, or may."""
        given: dict[str, Any] = {"query": query, "content_type": content_type, "idempotent": idempotent}
        if method == "GET":
            return await self._connection.request(method, path, body=body, timeout=timeout, **given)
        async with self._turn:
            if not self._stamped:
                await self._look()
            if path in self._guarded:
                return await self._write_based(method, path, body, given)
        return await self._write(method, path, body, given)

    def stream(
        self, path: str, *, query: Query | None = None, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """As `Connection.stream`: reading is everybody's."""
        return self._connection.stream(path, query=query, silence=silence)

    async def _write_based(self, method: str, path: str, body: bytes | None, given: dict[str, Any]) -> bytes:
        """Write on the version that is known; if that is old, on the next one, as long as no other leader made it."""
        for left in reversed(range(_TRIES)):
            try:
                answer = await self._write(method, path, self._based(method, body, given), given)
            except (Conflict, InstanceGone):
                known = self._version
                if not left or known is None:
                    raise
                await self._look()
            else:
                self._version = None if method == "DELETE" else _version(answer)
                return answer
        raise AssertionError("unreachable: the last try returns or raises")

    def _based(self, method: str, body: bytes | None, given: Mapping[str, Any]) -> bytes:
        content: dict[str, Any] = json.loads(body or b"{}")
        if method == "DELETE":
            if self._version is not None:
                content.setdefault("preconditions", {})["resourceVersion"] = self._version
            return json.dumps(content).encode()
        metadata = content.setdefault("metadata", {})
        if self._version is not None:
            metadata["resourceVersion"] = self._version
        if given["content_type"] == apply.CONTENT_TYPE and (given["query"] or {}).get("fieldManager") == naming.MANAGER:
            metadata["annotations"] = {**(metadata.get("annotations") or {}), EPOCH: str(self._fence.epoch)}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    async def _look(self) -> None:
        """Read the Deployment, and stamp it if this is the first write of the term.

        Raises:
            NotLeader: A later term has stamped it.
        """
        for left in reversed(range(_TRIES)):
            try:
                seen = decode(_read, await self._connection.request("GET", self._path), "the fleet's Deployment")
            except InstanceGone:
                self._version, self._stamped = None, True
                return
            notes = seen.metadata.annotations
            epoch = _number(None if notes is None else notes.epoch)
            if epoch > self._fence.epoch:
                raise NotLeader(
                    f"{self._fleet}: its Deployment is written in epoch {epoch} by now, and this manager's epoch"
                    f" {self._fence.epoch} is over; nothing was written"
                )
            version = seen.metadata.resource_version
            if epoch < self._fence.epoch:
                stamp = {"metadata": {"resourceVersion": version, "annotations": {EPOCH: str(self._fence.epoch)}}}
                given = {"query": {"fieldManager": naming.MANAGER}, "content_type": MERGE_PATCH, "idempotent": None}
                try:
                    version = _version(await self._write("PATCH", self._path, json.dumps(stamp).encode(), given))
                except (Conflict, InstanceGone):
                    if not left:
                        raise
                    continue
            self._version, self._stamped = version, True
            return

    async def _write(self, method: str, path: str, body: bytes | None, given: dict[str, Any]) -> bytes:
        with self._fence.writing(_TIMEOUT) as deadline:
            return await self._connection.request(method, path, body=body, timeout=deadline, **given)


def _version(answer: bytes) -> str:
    return decode(_read, answer, "the answer to a write").metadata.resource_version


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
