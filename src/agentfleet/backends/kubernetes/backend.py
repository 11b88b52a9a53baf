"""Fleets on Kubernetes: each a Deployment, with the objects beside it, in one namespace.

The Deployment controller keeps size and revision; this module says what should be, acts on single pods with the uid
that was decided on, and tells what is seen. It decides nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec

from agentfleet.backends.base import Observation, Ordered, Workload
from agentfleet.backends.kubernetes import apply as requests
from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Connection
from agentfleet.backends.kubernetes.errors import NotFound
from agentfleet.backends.kubernetes.manifests import render
from agentfleet.backends.kubernetes.marking import mark_expendable
from agentfleet.backends.kubernetes.objects import Meta, Pod
from agentfleet.backends.kubernetes.pods import Written
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, POD_METRICS, PODS, decode, version_of
from agentfleet.backends.kubernetes.sight import Sight
from agentfleet.errors import BackendUnavailable, Conflict, InstanceGone
from agentfleet.instances import Usage
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.units import parse_cpu, parse_memory


class _Object(msgspec.Struct):
    """As much of any object as it takes to delete it."""

    metadata: dict[str, Any]


class _Written(msgspec.Struct):
    """The answer to a write."""

    metadata: Meta


class _Objects(msgspec.Struct):
    items: list[_Object] = []


@dataclass(frozen=True, slots=True)
class _Said:
    """What a Deployment was told last, but for its size."""

    spec: FleetSpec
    revision: int
    template: AgentTemplate
    paused: bool


class KubernetesBackend:
    """Keeps fleets as Deployments. Use it as an async context manager; fleets outlive it.

    Args:
        connection: How the API server is asked; found as kubectl does when omitted, and then closed with the backend.
        namespace: Where the fleets live; by default that of the connection.
        node_grace: Seconds without a heartbeat after which a node counts as lost.
    """

    def __init__(
        self, connection: Connection | None = None, *, namespace: str | None = None, node_grace: float = 16.0
    ) -> None:
        self._given = connection
        self._connection = connection
        self._namespace = namespace
        self._node_grace = node_grace
        self._sight: Sight | None = None
        self._api: ApiVersions | None = None
        self._said: dict[str, _Said] = {}
        self._stack = AsyncExitStack()
        self._users = 0

    async def __aenter__(self) -> Self:
        self._users += 1
        if self._users > 1:
            return self
        try:
            await self._open()
        except BaseException:
            self._users -= 1
            raise
        return self

    async def _open(self) -> None:
        async with AsyncExitStack() as stack:
            if self._given is None:
                self._connection = await stack.enter_async_context(Connection.find())
            connection = self._asked
            self._namespace = self._namespace or await connection.namespace()
            version = json.loads(await connection.request("GET", "/version"))
            self._api = ApiVersions.discovered(version, json.loads(await connection.request("GET", "/apis")))
            sight = Sight(connection, self._namespace, node_grace=self._node_grace)
            self._sight = await stack.enter_async_context(sight)
            self._stack = stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0:
            await self._stack.aclose()
            self._sight = None

    @property
    def _asked(self) -> Connection:
        if self._connection is None:
            raise BackendUnavailable("the backend is not open; use it inside 'async with backend:'")
        return self._connection

    @property
    def _seen(self) -> Sight:
        if self._sight is None:
            raise BackendUnavailable("the backend is not open; use it inside 'async with backend:'")
        return self._sight

    def watch(self, fleet: str) -> AsyncIterator[Observation]:
        """Observe one fleet. See `Engine.watch`."""
        return self._seen.watch(fleet).run()

    # ------------------------------------------------------------------------------------------ the whole fleet

    async def apply(self, workload: Workload) -> None:
        """Have the fleet be so.

        When it gets smaller, those who are to go first are marked before; the size alone is changed by the scale
        subresource, anything else by server-side apply of all objects.

        Raises:
            SpecError: The fleet cannot be said in Kubernetes' words.
            BackendError: As `Connection.request`.
        """
        said = _Said(workload.spec, workload.revision, workload.template, workload.paused)
        fleet, ordered = workload.fleet, Ordered(workload.replicas, workload.revision, workload.paused)
        if workload.expendable:
            await self._mark(workload.expendable)
        with self._seen.writing(fleet):
            if self._said.get(fleet) == said:
                version = await self._scale(fleet, workload.replicas)
            else:
                self._said.pop(fleet, None)
                version = await self._say(workload)
            self._said[fleet] = said
            self._seen.wrote(fleet, Written(ordered, version))

    async def _say(self, workload: Workload) -> int:
        """Apply all objects; returns the resource version of the Deployment."""
        spec = workload.spec.replace(template=workload.template)
        deployment = self._seen.deployment(workload.fleet)
        manifests = render(
            spec,
            self._api,
            namespace=self._namespace,
            replicas=workload.replicas,
            paused=workload.paused,
            revision=workload.revision,
            owner=None if deployment is None else deployment.metadata.uid,
        )
        version = 0
        for manifest in manifests.objects:
            answer = await self._send(requests.apply(manifest))
            if manifest["kind"] == "Deployment":
                version = _version(answer)
        return version

    async def _scale(self, fleet: str, replicas: int) -> int:
        path = DEPLOYMENTS.path(self._namespace, fleet, "scale")
        return _version(await self._merge(path, {"spec": {"replicas": replicas}}))

    async def _mark(self, names: Sequence[str]) -> None:
        """Have the ReplicaSet take these first."""
        assert self._api is not None, "open"
        pods = [pod for name in names if (pod := self._seen.pod(name)) is not None]
        await mark_expendable(self._asked, self._seen.pods, pods, minor=self._api.minor)

    async def delete(self, fleet: str) -> None:
        """Delete every object of the fleet; the pods go with their Deployment."""
        assert self._api is not None, "open"
        assert self._namespace is not None, "open"
        self._said.pop(fleet, None)
        self._seen.wrote(fleet, None)
        read = msgspec.json.Decoder(_Objects).decode
        for kind, request in requests.kept_collections(self._api, self._namespace, fleet).items():
            found = decode(read, await self._send(request), f"list {kind}")
            for each in found.items:
                name, uid = each.metadata["name"], each.metadata["uid"]
                options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
                try:
                    await self._asked.request("DELETE", f"{request.path}/{name}", body=json.dumps(options).encode())
                except NotFound:
                    continue

    # ------------------------------------------------------------------------------------------ single instances

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """Delete one pod; its Deployment puts another in its place. Already gone is success."""
        pod = self._pod(fleet, id)
        if pod is None:
            return
        try:
            await self._delete_pod(pod, grace)
        except (InstanceGone, Conflict):
            return  # gone, or another of the same name

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """Delete one pod; its Deployment puts another in its place.

        Raises:
            InstanceGone: There is no such pod.
        """
        pod = self._pod(fleet, id)
        if pod is None:
            raise InstanceGone(f"there is no pod {id} of fleet {fleet}")
        await self._delete_pod(pod, grace)

    def _pod(self, fleet: str, id: str) -> Pod | None:
        pod = self._seen.pod(id)
        return pod if pod is not None and pod.metadata.labels.get(naming.FLEET) == fleet else None

    async def _delete_pod(self, pod: Pod, grace: float | None) -> None:
        options: dict[str, Any] = {"preconditions": {"uid": pod.metadata.uid}}
        if grace is not None:
            options["gracePeriodSeconds"] = math.ceil(grace)
        path = PODS.path(self._namespace, pod.metadata.name)
        await self._asked.request("DELETE", path, body=json.dumps(options).encode())

    # ------------------------------------------------------------------------------------------ reading

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """What the pods use, by metrics.k8s.io; raises `InstanceGone` where the cluster has no metrics server."""
        query = {"labelSelector": f"{naming.FLEET}={fleet}"}
        body = await self._asked.request("GET", POD_METRICS.path(self._namespace), query=query)
        page = decode(POD_METRICS.read_page, body, "pod metrics")
        used = {}
        for each in page.items or ():
            if each.timestamp is not None:
                cpu = sum(parse_cpu(one.usage.cpu or "0") for one in each.containers)
                memory = sum(parse_memory(one.usage.memory or "0") for one in each.containers)
                window = (
                    float(each.window.rstrip("s") or 0) if each.window.rstrip("s").replace(".", "").isdigit() else 0.0
                )
                used[each.metadata.name] = Usage(each.timestamp.timestamp(), cpu, int(memory), window)
        return used

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines of a pod; raises `InstanceGone` when there is no such pod."""
        if self._pod(fleet, id) is None:
            raise InstanceGone(f"there is no pod {id} of fleet {fleet}")
        path = PODS.path(self._namespace, id, "log")
        body = await self._asked.request("GET", path, query={"tailLines": lines, "container": naming.CONTAINER})
        return body.decode(errors="replace").splitlines()

    def credential(self, fleet: str, id: str) -> str | None:
        """Pods are asked without one."""
        del fleet, id
        return None

    # ------------------------------------------------------------------------------------------ sending

    async def _send(self, request: requests.Request) -> bytes:
        return await self._asked.request(
            request.method,
            request.path,
            query=request.query,
            body=request.body or None,
            content_type=request.content_type or "application/json",
        )

    async def _merge(self, path: str, patch: Mapping[str, Any]) -> bytes:
        return await self._asked.request(
            "PATCH",
            path,
            query={"fieldManager": naming.MANAGER},
            body=json.dumps(patch).encode(),
            content_type=MERGE_PATCH,
        )


def _version(answer: bytes) -> int:
    """The resource version that a write has made."""
    return version_of(decode(msgspec.json.Decoder(_Written).decode, answer, "the answer to a write").metadata) or 0
