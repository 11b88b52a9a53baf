"""Leases of the API group coordination.k8s.io/v1: the store for `agentfleet.leadership.Leadership` on a cluster.

Every write is a merge patch with the resource version and UID that it was decided on, so that the API server refuses it
when anything has changed, and keeps every field that is not ours. A lease that is given up has no holder; `kubectl get
lease` and clients of the official libraries read these leases, and theirs are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Any, Protocol
from urllib.parse import quote

import anyio

from agentfleet.backends.kubernetes.connection import JSON, MERGE_PATCH
from agentfleet.backends.kubernetes.errors import AlreadyExists, Invalid
from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded, InstanceGone


class Requests(Protocol):
    """What is needed of a connection to an API server."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = JSON,
        timeout: float | None = None,
        idempotent: bool | None = None,
    ) -> bytes:
        """See `Connection.request`."""
        ...


class KubernetesLeases:
    """Leases in one namespace.

    Args:
        connection: The way to the API server. One of its own, not the one that the fleet is managed through: a renewal
            must not wait its turn behind a thousand other calls.
        namespace: Where they are.
        prefix: Put before each name, so that a fleet's lease is not one that the agents use among themselves.
        at_once: Calls under way at the same time. A hundred leases that come due together share a few connections: one
            for each would cost a hundred TLS handshakes, and again after each that was cut off.
        wall: The present date for people to read in `renewTime`; nothing is decided by it.
    """

    def __init__(
        self,
        connection: Requests,
        namespace: str,
        *,
        prefix: str = "agentfleet-",
        at_once: int = 8,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._connection = connection
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace, safe='')}/leases"
        self._prefix = prefix
        self._wall = wall
        self._places = anyio.Semaphore(at_once)

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        """The lease as the API server's storage has it now, None if there is none."""
        try:
            return _record(await self._ask("GET", self._path(name), timeout=timeout))
        except InstanceGone:
            return None

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Make the lease; raises `Conflict` if there is one."""
        stamp = self._stamp("")
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._prefix + name, "labels": {"app.kubernetes.io/managed-by": "agentfleet"}},
            "spec": _spec(record) | {"acquireTime": stamp, "renewTime": stamp},
        }
        try:
            answer = await self._ask("POST", self._collection, lease, timeout=timeout)
        except AlreadyExists as error:
            raise Conflict(f"there is a lease {self._prefix}{name}: another was first") from error
        return _record(answer)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Change the lease; raises `Conflict` unless it still is that version of that very object."""
        stamp = self._stamp(record.renewed)
        spec = _spec(record) | {"renewTime": stamp}
        if record.taken:
            spec["acquireTime"] = stamp
        patch = {"metadata": {"resourceVersion": record.version, "uid": record.uid}, "spec": spec}
        try:
            answer = await self._ask("PATCH", self._path(name), patch, timeout=timeout)
        except InstanceGone as error:
            raise Conflict(f"the lease {self._prefix}{name} was deleted") from error
        except Invalid as error:
            if "metadata.uid" not in error.fields:  # so the server says that it is another object
                raise
            raise Conflict(f"the lease {self._prefix}{name} was deleted and made again") from error
        return _record(answer)

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        """Delete the lease; raises `Conflict` unless it still is that version of that very object."""
        options = {"preconditions": {"uid": record.uid, "resourceVersion": record.version}}
        with suppress(InstanceGone):
            await self._ask("DELETE", self._path(name), options, timeout=timeout)

    async def _ask(self, method: str, path: str, body: object = None, *, timeout: float) -> bytes:
        """One call within its deadline, the wait for a place included; not repeated if that could hide its effect."""
        with anyio.move_on_after(timeout) as scope:
            async with self._places:
                return await self._connection.request(
                    method,
                    path,
                    body=None if body is None else json.dumps(body).encode(),
                    content_type=MERGE_PATCH if method == "PATCH" else JSON,
                    timeout=timeout,
                    idempotent=method == "GET",
                )
        assert scope.cancelled_caught
        raise DeadlineExceeded(f"{method} {path}: no answer within {timeout:g} s")

    def _path(self, name: str) -> str:
        return f"{self._collection}/{quote(self._prefix + name, safe='')}"

    def _stamp(self, last: str) -> str:
        """The date in UTC; never the same as the last one, because a write that changes nothing makes no version."""
        wall = self._wall().astimezone(UTC)
        stamp = _written(wall)
        return _written(wall + timedelta(microseconds=1)) if stamp == last else stamp


def _written(date: datetime) -> str:
    """Kubernetes' MicroTime: microseconds, always six digits, and Z."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _spec(record: LeaseRecord) -> dict[str, Any]:
    return {
        "holderIdentity": record.holder,  # null removes it
        "leaseDurationSeconds": max(1, ceil(record.duration)),
        "leaseTransitions": record.epoch,
    }


def _record(answer: bytes) -> LeaseRecord:
    """A lease as the API server tells it; raises `BackendUnavailable` if that is no lease."""
    try:
        lease = json.loads(answer)
        metadata, spec = lease["metadata"], lease.get("spec") or {}
        return LeaseRecord(
            holder=spec.get("holderIdentity") or None,
            epoch=int(spec.get("leaseTransitions") or 0),
            duration=float(spec.get("leaseDurationSeconds") or 0),
            renewed=str(spec.get("renewTime") or ""),
            version=str(metadata["resourceVersion"]),
            uid=str(metadata["uid"]),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BackendUnavailable(f"the API server's answer is no lease: {answer[:200]!r}") from error
