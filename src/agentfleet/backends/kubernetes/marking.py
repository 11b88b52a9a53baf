"""Who goes when a Deployment gets smaller: those that the fleet has chosen, not those that a ReplicaSet would choose.

From Kubernetes 1.21 a ReplicaSet heeds an annotation on its pods (pod-deletion-cost, KEP-2255), so the chosen ones are
marked before it is told its new size. An older one takes what is not ready first. There the chosen ones are deleted, a
few at a time, and the size is lowered by as many right after: what the ReplicaSet has begun in their place is the first
to go, because no pod is ready within that moment. (Reporting the chosen ones as not ready would seem the gentler way,
but a kubelet puts its own word back at any moment within 10 s, and then others go.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress

import anyio
import msgspec

from agentfleet.backends.kubernetes import naming, singles
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.errors import Invalid
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.informer_cache import Snapshot, key_of
from agentfleet.backends.kubernetes.objects import Meta, Pod
from agentfleet.backends.kubernetes.resources import PODS, decode, version_of
from agentfleet.errors import Conflict, InstanceGone

_AT_ONCE = 16
"""Pods that are marked, or deleted before the size follows, at the same time."""
_STEPS = 20
"""In how many steps a size is lowered at most."""
_REACTS_WITHIN = 1.0
"""Seconds that a ReplicaSet is given to begin others in the place of those that were deleted, and to end them again."""
FIRST_WITH_COST = 21
"""The 1.Y of Kubernetes from which a ReplicaSet heeds the cost."""


class _Answer(msgspec.Struct):
    metadata: Meta


async def mark_expendable(connection: Requests, seen: Informer[Pod], pods: Iterable[Pod]) -> None:
    """Mark pods as those to go first. Returns when our own watch shows the marks, as the ReplicaSet's will.

    Args:
        connection: How the API server is asked.
        seen: The pods as they are seen.
        pods: Those to mark; one that is gone already is passed over.

    Raises:
        BackendError: As `Connection.request`; some may be marked.
    """
    limiter = anyio.CapacityLimiter(_AT_ONCE)
    versions: list[int] = []

    async def mark(pod: Pod) -> None:
        async with limiter:
            version = await _cost(connection, pod)
            if version is not None:
                versions.append(version)

    async with anyio.create_task_group() as tasks:
        for pod in pods:
            tasks.start_soon(mark, pod)
    if versions:
        await seen.wait_for(max(versions))


async def remove_and_shrink(
    connection: Requests,
    seen: Informer[Pod],
    pods: Sequence[Pod],
    size: int,
    *,
    to: int,
    scale: Callable[[int], Awaitable[None]],
) -> None:
    """Delete pods and lower the size with them, until one of both is at its end.

    A ReplicaSet that hears of the size before it hears of the deletions would take others; so the size is not lowered
    before it has begun as many in their place, or has had a second for it.

    Args:
        connection: How the API server is asked.
        seen: The pods as they are seen.
        pods: Those to go, all of one fleet.
        size: What the Deployment is told to keep now.
        to: The size to reach; not gone below.
        scale: Tells the Deployment another size.

    Raises:
        BackendError: As `Connection.request`; the Deployment has been told a size in between.
    """
    count = min(len(pods), size - to)
    at_once = max(_AT_ONCE, math.ceil(count / _STEPS))
    for first in range(0, count, at_once):
        leaving = pods[first : min(first + at_once, count)]
        known = frozenset(seen.cache)
        await _delete_all(connection, leaving)
        begun = await _begun(seen, known, leaving[0].metadata.labels.get(naming.FLEET), len(leaving))
        await scale(size - first - len(leaving))
        await _left(seen, begun)  # what is begun next must not be taken for what is too many now


async def _begun(seen: Informer[Pod], known: frozenset[str], fleet: str | None, count: int) -> set[str]:
    """Wait until there are so many pods of a fleet that were not known; returns the keys of those that came in time."""
    begun: set[str] = set()
    with anyio.move_on_after(_REACTS_WITHIN):
        async with aclosing(seen.events()) as events:
            async for event in events:
                for pod in event.objects if isinstance(event, Snapshot) else (event.object,):
                    if key_of(pod.metadata) not in known and pod.metadata.labels.get(naming.FLEET) == fleet:
                        begun.add(key_of(pod.metadata))
                if len(begun) >= count:
                    break
    return begun


async def _left(seen: Informer[Pod], keys: set[str]) -> None:
    """Wait until these have been ended."""
    with anyio.move_on_after(_REACTS_WITHIN):
        async with aclosing(seen.events()) as events:
            async for _ in events:
                if not any(_stays(seen.cache.get(key)) for key in keys):
                    break


def _stays(pod: Pod | None) -> bool:
    return pod is not None and pod.metadata.deletion_timestamp is None


async def _delete_all(connection: Requests, pods: Iterable[Pod]) -> None:
    async with anyio.create_task_group() as tasks:
        for pod in pods:
            tasks.start_soon(_delete, connection, pod)


async def _delete(connection: Requests, pod: Pod) -> None:
    with suppress(InstanceGone, Conflict):  # it is gone already, which is all that was wanted
        await singles.delete(connection, pod)


async def _cost(connection: Requests, pod: Pod) -> int | None:
    """Mark one pod; returns the resource version that this made, None when there is no such pod any more."""
    cost = {"controller.kubernetes.io/pod-deletion-cost": "-1000"}
    try:
        answer = await connection.request(
            "PATCH",
            PODS.path(pod.metadata.namespace, pod.metadata.name),
            query={"fieldManager": naming.MANAGER},
            body=json.dumps({"metadata": {"uid": pod.metadata.uid, "annotations": cost}}).encode(),
            content_type=MERGE_PATCH,
        )
    except (InstanceGone, Conflict):
        return None
    except Invalid as error:
        if "metadata.uid" not in error.fields:  # so the server says, too, that another has its name
            raise
        return None
    return version_of(decode(msgspec.json.Decoder(_Answer).decode, answer, "the answer to a mark").metadata)
