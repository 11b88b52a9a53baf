"""What a story on a cluster has come to, and what it took: compared with the same story without faults."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import anyio

from agentfleet.testing.kube import ControlPlane
from agentfleet.testing.kube.apiclient import ApiClient

_COLLECTIONS = {
    "configmaps": "/api/v1",
    "deployments": "/apis/apps/v1",
    "horizontalpodautoscalers": "/apis/autoscaling/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "pods": "/api/v1",
    "poddisruptionbudgets": "/apis/policy/v1beta1",
    "replicasets": "/apis/apps/v1",
    "services": "/api/v1",
}
_NOT_OURS = frozenset({"kube-root-ca.crt"})


@dataclass(frozen=True, slots=True)
class EndState:
    """What a namespace holds once all has come to rest."""

    owned: Mapping[str, int]
    """How many objects, by type; pods that are leaving are none."""
    sizes: tuple[int, ...]
    """The size of each Deployment."""
    ready: int
    """Pods that are ready and of their Deployment's present template: amid a rollout they are fewer than in the end."""
    template: str
    """The Deployments' pod templates, with what the revisions are called."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a story has ended, and how many pods were made and deleted for it."""

    end: EndState
    created: int
    deleted: int


@dataclass(slots=True)
class Ledger:
    """All pods that a namespace has had, kept by a watch of its own."""

    created: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    good: set[str] = field(default_factory=set)
    """Uids of pods that are ready and not leaving."""
    least: int = 0
    """Fewest good pods at any moment since `begin`."""

    def begin(self) -> None:
        """Watch the disruption budget from now on."""
        self.least = len(self.good)

    def see(self, kind: str, pod: Mapping[str, Any]) -> None:
        """Take in one event of the watch."""
        uid = pod["metadata"]["uid"]
        self.created.add(uid)
        if kind == "DELETED":
            self.deleted.add(uid)
        ready = any(each["type"] == "Ready" and each["status"] == "True" for each in _conditions(pod))
        if kind != "DELETED" and ready and "deletionTimestamp" not in pod["metadata"]:
            self.good.add(uid)
        else:
            self.good.discard(uid)
        self.least = min(self.least, len(self.good))

    def see_all(self, pods: list[Mapping[str, Any]]) -> None:
        """Take in a list: what is not in it is gone."""
        there = {pod["metadata"]["uid"] for pod in pods}
        self.deleted |= self.created - there
        self.good &= there
        for pod in pods:
            self.see("ADDED", pod)


@asynccontextmanager
async def ledger(plane: ControlPlane, namespace: str) -> AsyncIterator[Ledger]:
    """Keep a ledger of a namespace, straight from the API server and past every proxy."""
    kept = Ledger()
    path = f"/api/v1/namespaces/{namespace}/pods"

    async with ApiClient(plane.access) as api, anyio.create_task_group() as tasks:

        async def follow() -> None:
            while True:
                try:
                    _, body = await api.send("GET", path)
                    listed = json.loads(body)
                    kept.see_all(listed["items"])
                    version = listed["metadata"]["resourceVersion"]
                    async for line in api.lines(f"{path}?watch=1&resourceVersion={version}", silence=600):
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        kept.see(event["type"], event["object"])
                except (aiohttp.ClientError, OSError):
                    await anyio.sleep(0.2)

        tasks.start_soon(follow)
        yield kept
        tasks.cancel_scope.cancel()


async def end_state(plane: ControlPlane, namespace: str) -> EndState:
    """What a namespace holds now."""
    found: dict[str, list[Any]] = {}
    for plural, root in _COLLECTIONS.items():
        items = (await plane.api.get(f"{root}/namespaces/{namespace}/{plural}"))["items"]
        found[plural] = [
            each
            for each in items
            if each["metadata"]["name"] not in _NOT_OURS and "deletionTimestamp" not in each["metadata"]
        ]
    deployments = found["deployments"]
    present = [each["spec"]["template"]["metadata"]["labels"].items() for each in deployments]
    return EndState(
        owned={plural: len(items) for plural, items in found.items()},
        sizes=tuple(each["spec"]["replicas"] for each in deployments),
        ready=sum(
            any(each["type"] == "Ready" and each["status"] == "True" for each in _conditions(pod))
            for pod in found["pods"]
            if any(labels <= pod["metadata"]["labels"].items() for labels in present)
        ),
        template=json.dumps([each["spec"]["template"] for each in deployments], sort_keys=True),
    )


async def comes_to(plane: ControlPlane, namespace: str, wanted: EndState, *, seconds: float = 60) -> None:
    """Wait until a namespace holds what it should; the error tells what it holds instead."""
    now = None
    with anyio.move_on_after(seconds):
        while (now := await end_state(plane, namespace)) != wanted:  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.2)
        return
    raise AssertionError(f"after {seconds:g} s there is\n{now}\nand not\n{wanted}")


def _conditions(pod: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = pod.get("status", {}).get("conditions") or []
    return found
