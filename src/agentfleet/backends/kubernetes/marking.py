"""Who goes first when a Deployment gets smaller: a ReplicaSet is told by marks on its pods.

From Kubernetes 1.21 it heeds the annotation pod-deletion-cost (KEP-2255). An older one takes pods that are not ready
before any that are, so the chosen ones are reported as not ready, which takes traffic from them too. A kubelet puts its
own word back when it next compares (after up to 10 s): long after the ReplicaSet has acted, and soon enough if it never
does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import anyio
import msgspec

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, STRATEGIC_PATCH, Requests
from agentfleet.backends.kubernetes.errors import Invalid
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.objects import Meta, Pod
from agentfleet.backends.kubernetes.resources import PODS, decode, version_of
from agentfleet.errors import Conflict, InstanceGone

_AT_ONCE = 16
"""Pods that are marked at the same time."""
_FIRST_WITH_COST = 21
"""The 1.Y of Kubernetes from which a ReplicaSet heeds the cost."""


class _Answer(msgspec.Struct):
    metadata: Meta


async def mark_expendable(connection: Requests, seen: Informer[Pod], pods: Iterable[Pod], *, minor: int) -> None:
    """Mark pods as those to go first. Returns when our own watch shows the marks, as the ReplicaSet's will.

    Args:
        connection: How the API server is asked.
        seen: The pods as they are seen.
        pods: Those to mark; the ones that are gone or leave already are passed over.
        minor: Y of the server's version 1.Y.

    Raises:
        BackendError: As `Connection.request`; some may be marked, and none is to be removed on the strength of it.
    """
    limiter = anyio.CapacityLimiter(_AT_ONCE)
    versions: list[int] = []

    async def mark(pod: Pod) -> None:
        async with limiter:
            try:
                versions.append(await (_cost if minor >= _FIRST_WITH_COST else _not_ready)(connection, pod))
            except (InstanceGone, Conflict):
                pass  # it is gone already, which is all that was wanted
            except Invalid as error:
                if "metadata.uid" not in error.fields:  # so the server says that another has its name
                    raise

    async with anyio.create_task_group() as tasks:
        for pod in pods:
            if pod.metadata.deletion_timestamp is None:
                tasks.start_soon(mark, pod)
    if versions:
        await seen.wait_for(max(versions))


async def _cost(connection: Requests, pod: Pod) -> int:
    cost = {"controller.kubernetes.io/pod-deletion-cost": "-1000"}
    patch = {"metadata": {"uid": pod.metadata.uid, "annotations": cost}}
    return await _patch(connection, PODS.path(pod.metadata.namespace, pod.metadata.name), patch, MERGE_PATCH)


async def _not_ready(connection: Requests, pod: Pod) -> int:
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": "ScalingDown",
        "message": "its fleet is to be smaller, and this one is to go first",
        "lastTransitionTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    patch = {"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}}
    path = PODS.path(pod.metadata.namespace, pod.metadata.name, "status")
    return await _patch(connection, path, patch, STRATEGIC_PATCH)


async def _patch(connection: Requests, path: str, patch: dict[str, Any], kind: str) -> int:
    answer = await connection.request(
        "PATCH",
        path,
        query={"fieldManager": naming.MANAGER},
        body=json.dumps(patch).encode(),
        content_type=kind,
    )
    return version_of(decode(msgspec.json.Decoder(_Answer).decode, answer, "the answer to a mark").metadata) or 0
