"""FleetClient: everything that the REST API can, as methods."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import anyio

from agentfleet.client.settings import Settings
from agentfleet.client.streaming import events
from agentfleet.client.transport import Answered, Token, Transport, compact
from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.rest.answers import (
    Accepted,
    Cluster,
    ClusterHealth,
    ClusterPage,
    ClusterSummary,
    Created,
    EventAnswer,
    EventPage,
    Instance,
    InstancePage,
    Logs,
    OperationAnswer,
    OperationPage,
    Revision,
    Revisions,
    Scaling,
)
from agentfleet.rest.base import Answer
from agentfleet.rest.clusters import ClusterConfig, ClusterFromSpec, RemoteSpec
from agentfleet.rest.system import AuditAnswer, AuditPage, ManagerAnswer, Managers
from agentfleet.specs import FleetSpec
from agentfleet.waiting import Timeout, seconds_of, timeout_of

_A = TypeVar("_A", bound=Answer)
_ROUND = 20.0
"""Seconds of one long wait for an operation."""
Asked = ClusterConfig | ClusterFromSpec | FleetSpec


class FleetClient:
    """Asks the managers of a platform. Use it as an async context manager, on asyncio.

    Errors are those of the library: what the manager would have raised, `AccessDenied` for a token that is not known or
    not enough, `BackendUnavailable` where no manager can be reached, `DeadlineExceeded` where none answers in time.
    Each change carries an idempotency key, so that it is done once however often it is sent; one that could not be
    answered is sent once more, to the next address.

    Args:
        urls: Addresses of managers, such as "https://fleet-a:8080", or of one that balances between them.
        token: Sent with each request, or a function that gives it.
        timeout: For one request with its other try, in seconds or like "30s".
        tls: How servers are checked, such as `ssl.create_default_context(cafile=...)`.
        tries: How often one request is sent at most.

    Raises:
        SpecError: An argument is not usable.
    """

    def __init__(
        self,
        *urls: str,
        token: Token = None,
        timeout: float | str = 30.0,
        tls: ssl.SSLContext | None = None,
        tries: int = 2,
    ) -> None:
        self._transport = Transport(urls, token=token, timeout=seconds_of(timeout, "timeout"), tls=tls, tries=tries)
        self.configuration = Settings(self._transport)
        """What agents are told."""

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.__aexit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------ clusters

    async def create(self, cluster: Asked, *, namespace: str | None = None, key: str | None = None) -> Created:
        """Have a cluster made; returns when that is sure to happen.

        Args:
            cluster: In few words, or a fleet's whole spec.
            namespace: Where it lives, for a spec; the server's own by default.
            key: Idempotency key, for who asks again in another process.
        """
        return await self._send("POST", "/clusters", Created, _body(cluster, namespace), key=key)

    async def apply(self, id: str, cluster: Asked, *, etag: str = "*", key: str | None = None) -> Accepted:
        """Have a cluster be as another spec says.

        Args:
            id: The cluster's id or name.
            cluster: What is wanted from now on.
            etag: Of the state that it is based on, as `cluster_with_etag` gives it; "*" takes any.
            key: As in `create`.

        Raises:
            Conflict: Somebody else has changed it since.
        """
        return await self._send("PUT", _of(id), Accepted, _body(cluster, None), headers={"If-Match": etag}, key=key)

    async def delete(self, id: str, *, etag: str = "*", key: str | None = None) -> Accepted:
        """Have all instances ended, and the cluster forgotten; `etag` as in `apply`."""
        return await self._send("DELETE", _of(id), Accepted, headers={"If-Match": etag}, key=key)

    async def cluster(self, id: str) -> Cluster:
        """A cluster in full."""
        return (await self.cluster_with_etag(id))[0]

    async def cluster_with_etag(self, id: str) -> tuple[Cluster, str]:
        """A cluster in full, and its ETag for `apply`, `delete`, `scale`, `deploy` and `rollback`."""
        answered = await self._transport.ask("GET", f"/api/v1{_of(id)}")
        return _read(Cluster, answered), answered.headers.get("etag", "*")

    async def clusters(self) -> AsyncIterator[ClusterSummary]:
        """Every cluster that the token reaches, by name."""
        async for each in self._pages("/clusters", ClusterPage, {}):
            yield each

    async def health(self, id: str) -> ClusterHealth:
        """How well a cluster is, and why it is not."""
        return await self._get(f"{_of(id)}/health", ClusterHealth)

    async def revisions(self, id: str) -> Sequence[Revision]:
        """A cluster's kept revisions, oldest first."""
        return (await self._get(f"{_of(id)}/revisions", Revisions)).items

    # ------------------------------------------------------------------------------------------ operations

    async def scale(self, id: str, replicas: int, *, etag: str = "*", key: str | None = None) -> Scaling:
        """Ask for another size; `etag` as in `apply`."""
        body, match = {"replicas": replicas}, {"If-Match": etag}
        return await self._send("PUT", f"{_of(id)}/scale", Scaling, body, headers=match, key=key)

    async def deploy(
        self, id: str, version: str | None = None, *, etag: str = "*", key: str | None = None, **changes: Any
    ) -> Accepted:
        """Roll out another version, or other fields of the template; `etag` as in `apply`."""
        body: dict[str, Any] = {"changes": changes} | ({} if version is None else {"version": version})
        return await self._send("POST", f"{_of(id)}/deploy", Accepted, body, headers={"If-Match": etag}, key=key)

    async def rollback(
        self, id: str, revision: int | None = None, *, etag: str = "*", key: str | None = None
    ) -> Accepted:
        """Return to a revision; None is the last good one; `etag` as in `apply`."""
        body, match = {"revision": revision}, {"If-Match": etag}
        return await self._send("POST", f"{_of(id)}/rollback", Accepted, body, headers=match, key=key)

    async def pause(self, id: str, *, key: str | None = None) -> Accepted:
        """Hold rollouts where they are."""
        return await self._send("POST", f"{_of(id)}/pause", Accepted, key=key)

    async def resume(self, id: str, *, key: str | None = None) -> Accepted:
        """Go on with rollouts."""
        return await self._send("POST", f"{_of(id)}/resume", Accepted, key=key)

    async def stop(self, id: str, *, key: str | None = None) -> Accepted:
        """Drain and end all instances; the size is remembered."""
        return await self._send("POST", f"{_of(id)}/stop", Accepted, key=key)

    async def start(self, id: str, *, key: str | None = None) -> Accepted:
        """Bring a stopped cluster back to its size."""
        return await self._send("POST", f"{_of(id)}/start", Accepted, key=key)

    async def operation(self, id: str, *, wait: Timeout = None) -> OperationAnswer:
        """How far an operation has come; with `wait` when it has ended, or after that long."""
        seconds = timeout_of(wait)
        query = {} if seconds is None else {"wait": f"{min(seconds, 3600):.3f}s"}
        answered = await self._transport.ask(
            "GET", f"/api/v1/operations/{_quoted(id)}", query=query, longer=seconds or 0
        )
        return _read(OperationAnswer, answered)

    async def finished(self, id: str, *, timeout: Timeout = None) -> OperationAnswer:
        """Wait until an operation has ended; it may have failed.

        Raises:
            NotFound: There is no such operation.
            DeadlineExceeded: `timeout` is over; the operation goes on.
        """
        seconds = timeout_of(timeout)
        until = float("inf") if seconds is None else anyio.current_time() + seconds
        while True:
            wait = max(0.0, min(_ROUND, until - anyio.current_time()))
            began, asked = anyio.current_time(), self._transport.at
            found = await self.operation(id, wait=wait)
            if not found.open:
                return found
            if anyio.current_time() >= until:
                raise DeadlineExceeded(f"operation {id} has not ended within {seconds:g} s; it goes on")
            if anyio.current_time() - began < min(1.0, wait):  # a manager that leaves answers at once
                self._transport.turn(asked)
                await anyio.sleep(0.2)

    async def operations(self, id: str) -> AsyncIterator[OperationAnswer]:
        """What was asked of a cluster, newest first."""
        async for each in self._pages(f"{_of(id)}/operations", OperationPage, {}):
            yield each

    # ------------------------------------------------------------------------------------------ instances

    async def instances(
        self, id: str, *, status: str | None = None, node: str | None = None, version: str | None = None
    ) -> AsyncIterator[Instance]:
        """A cluster's instances by id, those alone that are as it is said."""
        query = compact({"status": status, "node": node, "version": version, "limit": 1000})
        async for each in self._pages(f"{_of(id)}/instances", InstancePage, query):
            yield each

    async def instance(self, id: str, instance: str) -> Instance:
        """One instance, as it was last seen."""
        return await self._get(f"{_of(id)}/instances/{_quoted(instance)}", Instance)

    async def logs(self, id: str, instance: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines that an instance wrote, oldest first."""
        path = f"{_of(id)}/instances/{_quoted(instance)}/logs"
        return (await self._get(path, Logs, {"lines": str(lines)})).lines

    async def restart(self, id: str, instance: str, *, key: str | None = None) -> Accepted:
        """Restart an instance in its place."""
        return await self._act(id, instance, "restart", None, key)

    async def replace(self, id: str, instance: str, *, elsewhere: bool = False, key: str | None = None) -> Accepted:
        """Have an instance replaced; `elsewhere`: on another node, or not at all."""
        return await self._act(id, instance, "replace", {"elsewhere": elsewhere}, key)

    async def isolate(
        self, id: str, instance: str, *, reason: str, keep: float | None = 3600.0, key: str | None = None
    ) -> Accepted:
        """Set an instance apart for examination, for `keep` seconds."""
        return await self._act(id, instance, "isolate", {"reason": reason, "keep": keep}, key)

    async def release(self, id: str, instance: str, *, key: str | None = None) -> Accepted:
        """End an isolated instance."""
        return await self._act(id, instance, "release", None, key)

    # ------------------------------------------------------------------------------------------ events and the platform

    async def events(self, id: str, *, after: int = 0, kinds: Sequence[str] = ()) -> AsyncIterator[EventAnswer]:
        """What happened to a cluster so far, oldest first."""
        query, position = [("kind", kind) for kind in kinds], after
        while True:
            pairs = [*query, ("after", str(position)), ("limit", "500")]
            path = f"{_of(id)}/events?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs)
            page = await self._get(path, EventPage)
            for each in page.items:
                position = each.seq
                yield each
            if page.next is None:
                return

    async def stream(
        self, id: str, *, after: int | None = None, kinds: Sequence[str] = ()
    ) -> AsyncIterator[EventAnswer]:
        """What happens to a cluster from now on (or after a place), without end and without a gap.

        A stream that ends or breaks is taken up again, at the next manager. An event of kind "journal.trimmed" says
        that some of what was missed is kept no longer.
        """
        async for each in events(self._transport, f"/api/v1{_of(id)}/events/stream", after=after, kinds=kinds):
            yield each

    async def decisions(self, id: str) -> AsyncIterator[EventAnswer]:
        """What was decided about a cluster, newest first, with its reasons."""
        async for each in self._pages(f"{_of(id)}/decisions", EventPage, {}):
            yield each

    async def managers(self) -> Sequence[ManagerAnswer]:
        """The managers that share the clusters."""
        return (await self._get("/managers", Managers)).items

    async def audit(self, cluster: str | None = None) -> AsyncIterator[AuditAnswer]:
        """Who changed what, newest first."""
        async for each in self._pages("/audit", AuditPage, compact({"cluster": cluster})):
            yield each

    # ------------------------------------------------------------------------------------------ inside

    async def _act(
        self, id: str, instance: str, what: str, body: Mapping[str, Any] | None, key: str | None
    ) -> Accepted:
        return await self._send("POST", f"{_of(id)}/instances/{_quoted(instance)}/{what}", Accepted, body, key=key)

    async def _get(self, path: str, model: type[_A], query: Mapping[str, str] | None = None) -> _A:
        return _read(model, await self._transport.ask("GET", f"/api/v1{path}", query=query))

    async def _send(
        self,
        method: str,
        path: str,
        model: type[_A],
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> _A:
        data = None if body is None else json.dumps(body).encode()
        return _read(model, await self._transport.ask(method, f"/api/v1{path}", body=data, headers=headers, key=key))

    async def _pages(self, path: str, model: type[Any], query: Mapping[str, str]) -> AsyncIterator[Any]:
        cursor: str | None = None
        while True:
            page = await self._get(path, model, {**query, **compact({"cursor": cursor})})
            for each in page.items:
                yield each
            cursor = page.next
            if cursor is None:
                return


def _read(model: type[_A], answered: Answered) -> _A:
    try:
        return model.model_validate_json(answered.body)
    except ValueError as error:
        raise BackendUnavailable(f"the answer is no {model.__name__}: {str(error)[:500]}") from error


def _body(cluster: Asked, namespace: str | None) -> dict[str, Any]:
    if isinstance(cluster, FleetSpec):
        spec = cluster if isinstance(cluster, RemoteSpec) else RemoteSpec.parse(cluster.to_dict(), source="the spec")
        cluster = ClusterFromSpec(namespace=namespace, spec=spec)
    return cluster.model_dump(mode="json", exclude_none=True, exclude_unset=isinstance(cluster, ClusterConfig))


def _of(id: str) -> str:
    return f"/clusters/{_quoted(id)}"


def _quoted(word: str) -> str:
    return quote(word, safe="")
