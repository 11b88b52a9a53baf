"""The way to the API server for writes to one fleet in one term: what a deposed leader sends late is refused there.

Before anything else is written the term's epoch is stamped on the fleet's Deployment, and on each other object before
it is written itself, which moves its resource version. Every write carries the uid and the version that it was decided
on. So a write of an earlier term, however late it arrives, has an old version; whoever is refused reads again, and
finds a higher epoch than its own. What does not exist yet is made by a request that never changes what does.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import anyio.lowlevel

from agentfleet.backends.kubernetes import apply, naming
from agentfleet.backends.kubernetes.connection import JSON, MERGE_PATCH, Query, Requests
from agentfleet.backends.kubernetes.errors import AlreadyExists, Replaced
from agentfleet.backends.kubernetes.guarded import (
    EPOCH,
    Stand,
    based,
    decided_on_version,
    first_of,
    pod_based,
    uid_meant,
)
from agentfleet.backends.kubernetes.objects import Pod
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, PODS
from agentfleet.backends.kubernetes.retry import Backoff
from agentfleet.clock import SystemClock
from agentfleet.core.fence import Fence
from agentfleet.errors import Conflict, DeadlineExceeded, InstanceGone, NotLeader

__all__ = ["EPOCH", "Guard"]

_TRIES = 8
"""Times that a write is based on a newer version: the status moves the version, too, several times in a rollout."""
_PAUSE = 0.1
"""Longest wait in seconds before the second try; it doubles, up to eight times as much."""
_TIMEOUT = 10.0
"""Seconds for one request that writes, or less if the term lapses before, or the time of the whole call is over."""
_PATIENCE = 30.0
"""Seconds for a whole call that writes, unless it says otherwise."""


class Guard:
    """A connection that lets through what is written in this term, and nothing later.

    Args:
        connection: How the API server is asked.
        namespace: Where the fleet lives.
        fleet: Its name.
        fence: The term.
        pod: A pod of the namespace as last seen, by its name.
    """

    def __init__(
        self,
        connection: Requests,
        namespace: str,
        fleet: str,
        fence: Fence,
        *,
        pod: Callable[[str], Pod | None] = lambda _: None,
    ) -> None:
        self._connection = connection
        self._fence = fence
        self._fleet = fleet
        self._pod = pod
        self._pods = PODS.path(namespace) + "/"
        self._deployment = DEPLOYMENTS.path(namespace, fleet)
        self._parts = {DEPLOYMENTS.path(namespace, fleet, "scale"): self._deployment}
        self._known: dict[str, Stand | None] = {}
        """By path: the objects as last seen here, all with this term's epoch; None where there is none."""
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
        """As `Connection.request`; raises `NotLeader` when another leads the fleet now, or may.

        `timeout` is for waiting until other writes to the fleet are over, too.
        """
        given: dict[str, Any] = {"query": query, "content_type": content_type, "idempotent": idempotent}
        if method == "GET":
            answer = await self._connection.request(method, path, body=body, timeout=timeout, **given)
            if path == self._deployment:
                self._learn(answer)
            return answer
        content: dict[str, Any] = json.loads(body or b"{}")
        seconds = _PATIENCE if timeout is None else timeout
        with anyio.move_on_after(seconds):
            return await self._write_any(method, path, content, given)
        raise DeadlineExceeded(
            f"{method} {path}: not done within {seconds:g} s, because others write it all the time or the server is"
            " slow; a part of it may have been done"
        )

    async def _write_any(self, method: str, path: str, content: dict[str, Any], given: Mapping[str, Any]) -> bytes:
        async with self._turn:
            if self._deployment not in self._known:
                await self._look(self._deployment)
            if f"{path}/" == self._pods:
                return await self._write_new_pod(path, content, given)
            if not path.startswith(self._pods):
                return await self._write_object(method, path, content, given)
        return await self._write_pod(method, path, content, given)

    def stream(
        self, path: str, *, query: Query | None = None, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """As `Connection.stream`: reading is everybody's."""
        return self._connection.stream(path, query=query, silence=silence)

    # ------------------------------------------------------------------------------------------ the fleet's objects

    async def _write_object(self, method: str, path: str, content: dict[str, Any], given: Mapping[str, Any]) -> bytes:
        """Write on the version that is known; if that is old, on the next one, as long as no other leader made it."""
        whole, decided_on = self._parts.get(path, path), content.get("metadata", {}).get("resourceVersion")
        if decided_on is not None:
            return await self._write_decided(method, path, content, given)
        if whole not in self._known or (method == "DELETE" and self._known[whole] is None):  # it was listed, so it is
            await self._look(whole)
        pauses = _pauses()
        for left in reversed(range(_TRIES)):
            known = self._known.get(whole)
            try:
                if known is None and given["content_type"] == apply.CONTENT_TYPE:
                    known = await self._make(whole, content, given)
                new = based(method, content, known, given, self._fence.epoch)
                answer = await self._write(method, path, new, given)
            except AlreadyExists:  # made by another meanwhile
                if not left:
                    raise
                await pauses.wait()
                await self._look(whole)
            except (Conflict, InstanceGone) as error:
                if not left or known is None or (method == "DELETE" and isinstance(error, Replaced)):
                    raise
                await pauses.wait()
                await self._look(whole)
                if self._known[whole] is None:  # deleted: whether to make it again is to be decided anew
                    raise
            else:
                self._known[whole] = None if method == "DELETE" else Stand.of(answer)
                return answer
        raise AssertionError("unreachable: the last try returns or raises")

    async def _write_decided(self, method: str, path: str, content: dict[str, Any], given: Mapping[str, Any]) -> bytes:
        """Write what was decided on one version on that one alone: whoever decided it decides anew, on the next one."""
        whole, version = self._parts.get(path, path), content["metadata"]["resourceVersion"]
        known = self._known.pop(whole, None)
        if known is None or known.version != version:
            await self._look(whole)  # who has written it since?
            known = self._known[whole]
        if known is None or known.version != version:
            raise Conflict(f"{path} has changed since it was read; nothing was written: read it again, decide again")
        answer = await self._write(method, path, based(method, content, known, given, self._fence.epoch), given)
        self._known[whole] = Stand.of(answer)
        return answer

    async def _make(self, path: str, content: Mapping[str, Any], given: Mapping[str, Any]) -> Stand | None:
        """Make what is to be applied, unless it exists; an apply would change what another has made meanwhile.

        Raises:
            AlreadyExists: It does.
        """
        query = {"fieldManager": (given["query"] or {}).get("fieldManager", naming.MANAGER)}
        body, collection = first_of(content, self._fence.epoch), path.rpartition("/")[0]
        answer = await self._write("POST", collection, body, {"query": query, "content_type": JSON})
        await self._look(path, Stand.of(answer))
        return self._known[path]

    def _learn(self, answer: bytes) -> None:
        """Remember a Deployment that somebody has read, if it is this term's: no other leader has written it by then.

        So what is decided on it is written at once. To read it again before would be to find another version.
        """
        seen = Stand.of(answer)
        if seen.epoch == self._fence.epoch and seen.stamped(seen.epoch) is None:
            self._known[self._deployment] = seen

    async def _look(self, path: str, seen: Stand | None = None) -> None:
        """Read an object, and stamp it if this is its first write of the term.

        Args:
            path: Where it is.
            seen: As it was seen just now.

        Raises:
            NotLeader: A later term has stamped it.
        """
        self._known.pop(path, None)
        pauses = _pauses()
        for left in reversed(range(_TRIES)):
            try:
                seen = seen or Stand.of(await self._connection.request("GET", path))
            except InstanceGone:
                self._known[path] = None
                return
            if seen.epoch > self._fence.epoch:
                raise NotLeader(
                    f"{self._fleet}: {path} is written in epoch {seen.epoch} by now, and this manager's epoch"
                    f" {self._fence.epoch} is over; nothing was written"
                )
            try:
                self._known[path] = await self._stamp(path, seen)
            except (Conflict, InstanceGone):
                if not left:
                    raise
                await pauses.wait()
                seen = None
            else:
                return

    async def _stamp(self, path: str, seen: Stand) -> Stand:
        """Give an object this term's epoch, and what we made of it to our applies; nothing where that is so."""
        patch = seen.stamped(self._fence.epoch)
        if patch is None:
            return seen
        given = {"query": {"fieldManager": naming.MANAGER}, "content_type": MERGE_PATCH}
        return Stand.of(await self._write("PATCH", path, patch, given))

    # ------------------------------------------------------------------------------------------ its pods

    async def check(self) -> None:
        """Raise `NotLeader` if a later term has written the fleet's Deployment; one request, or two at first."""
        with anyio.move_on_after(_PATIENCE):
            async with self._turn:
                return await self._look(self._deployment)
        raise DeadlineExceeded(f"fleet {self._fleet}: who leads it could not be asked within {_PATIENCE:g} s")

    async def _write_new_pod(self, path: str, content: dict[str, Any], given: Mapping[str, Any]) -> bytes:
        """Make a pod. Nothing of it is there that a later term could have changed, so it is asked who leads, and told.

        One that arrives late all the same is for the next leader to end: it says of which term it is.
        """
        await self._look(self._deployment)
        metadata = content.get("metadata", {})
        notes = {**(metadata.get("annotations") or {}), EPOCH: str(self._fence.epoch)}
        return await self._write("POST", path, {**content, "metadata": {**metadata, "annotations": notes}}, given)

    async def _write_pod(self, method: str, path: str, content: dict[str, Any], given: Mapping[str, Any]) -> bytes:
        """Write on the version that was seen last; if the pod has changed since, ask first who leads by now."""
        name, _, _ = path.removeprefix(self._pods).partition("/")
        if decided_on_version(method, content):  # whoever decided it decides anew
            return await self._write(method, path, content, given)
        uid, seen = uid_meant(method, content), self._pod(name)
        version = None if seen is None or seen.metadata.uid != uid else seen.metadata.resource_version
        pauses = _pauses()
        for left in reversed(range(_TRIES)):
            try:
                return await self._write(method, path, pod_based(method, content, version), given)
            except Conflict as conflict:
                if not left or version is None:
                    raise
                await pauses.wait()
                async with self._turn:
                    await self._look(self._deployment)
                now = Stand.of(await self._connection.request("GET", self._pods + name))
                if now.uid != uid or now.leaving:
                    raise InstanceGone(f"pod {name} of uid {uid} is gone, or going") from conflict
                version = now.version
        raise AssertionError("unreachable: the last try returns or raises")

    async def _write(self, method: str, path: str, content: Mapping[str, Any], given: Mapping[str, Any]) -> bytes:
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        await anyio.lowlevel.checkpoint_if_cancelled()  # what follows cannot be
        left = anyio.current_effective_deadline() - anyio.current_time()
        with self._fence.writing(min(_TIMEOUT, left)) as deadline:
            return await self._connection.request(method, path, body=body, timeout=deadline, **given)


def _pauses() -> Backoff:
    """Between the tries of one write."""
    return Backoff(SystemClock(), random.Random(), initial=_PAUSE, limit=8 * _PAUSE)  # noqa: S311 - jitter
