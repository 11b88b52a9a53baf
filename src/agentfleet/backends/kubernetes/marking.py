"""Who goes when a Deployment gets smaller: those that the fleet has chosen, not those that a ReplicaSet would choose.

From Kubernetes 1.21 a ReplicaSet heeds an annotation on its pods (pod-deletion-cost, KEP-2255), so the chosen ones are
marked before it is told its new size. An older one takes what is not ready first. There the chosen ones are deleted, a
few at a time, and the size is lowered by as many right after: what the ReplicaSet has begun in their place is the first
to go, because no pod is ready within that moment. (Reporting the chosen ones as not ready would seem the gentler way,
but a kubelet puts its own word back at any moment within 10 s, and then others go.)
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial

import anyio
import msgspec

from agentfleet.backends.kubernetes import naming, singles
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.informer_cache import Snapshot, key_of
from agentfleet.backends.kubernetes.objects import Meta, Pod
from agentfleet.backends.kubernetes.resources import decode, version_of
from agentfleet.errors import AgentFleetError, InstanceGone

_AT_ONCE = 16
"""Pods that are marked, or deleted before the size follows, at the same time."""
_STEPS = 20
"""In how many steps a size is lowered at most."""
_REACTS_WITHIN = 1.0
"""Seconds that a ReplicaSet is given to begin others in the place of those that were deleted, and to end them again."""
_COST = "-1000"
"""What those to go cost; no other is cheaper."""
FIRST_WITH_COST = 21
"""The 1.Y of Kubernetes from which a ReplicaSet heeds the cost."""


class _Answer(msgspec.Struct):
    metadata: Meta


async def mark_expendable(
    connection: Requests, seen: Informer[Pod], pods: Collection[Pod], *, others: Iterable[Pod] = ()
) -> None:
    """Mark pods as those to go first, and no others. Returns when our own watch shows it, as the ReplicaSet's will.

    One that was marked before and stays has its mark taken back: it may have been chosen in vain, when the ReplicaSet
    ended one that was not ready, or when another manager chose.

    Args:
        connection: How the API server is asked.
        seen: The pods as they are seen.
        pods: Those to mark; one that is gone already is passed over, and one that is marked is marked.
        others: Those of the same fleet, these among them or not.

    Raises:
        BackendError: As `Connection.request`; some may be marked.
        NotLeader: Another leads by now; some may be marked.
    """
    versions: list[int] = []
    chosen = {pod.metadata.uid for pod in pods}
    stays = [pod for pod in others if pod.metadata.uid not in chosen and _is_marked(pod)]

    async def mark(pod: Pod) -> None:
        version = await mark_one(connection, pod, taken_back=pod.metadata.uid not in chosen)
        if version is not None:
            versions.append(version)

    await _each([*stays, *(pod for pod in pods if not _is_marked(pod))], mark, at_once=_AT_ONCE)
    if versions:
        await seen.wait_for(max(versions))


def _is_marked(pod: Pod) -> bool:
    annotations = pod.metadata.annotations
    return annotations is not None and annotations.deletion_cost == _COST


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
        await _each(leaving, partial(_delete, connection), at_once=at_once)
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


async def _each(pods: Iterable[Pod], act: Callable[[Pod], Awaitable[None]], *, at_once: int) -> None:
    """Act on pods beside one another. After a failure no more are begun, and it is raised as it is, in no group."""
    limiter = anyio.CapacityLimiter(at_once)
    failed: list[AgentFleetError] = []

    async def one(pod: Pod) -> None:
        async with limiter:
            if failed:
                return
            try:
                await act(pod)
            except AgentFleetError as error:  # also that another leads by now
                failed.append(error)

    async with anyio.create_task_group() as tasks:
        for pod in pods:
            tasks.start_soon(one, pod)
    if failed:
        raise failed[0]


async def _delete(connection: Requests, pod: Pod) -> None:
    with suppress(InstanceGone):  # it is gone already, which is all that was wanted
        await singles.delete(connection, pod)


async def mark_one(connection: Requests, pod: Pod, *, taken_back: bool = False) -> int | None:
    """Mark one pod; returns the resource version that this made, None when there is no such pod any more."""
    cost = {"controller.kubernetes.io/pod-deletion-cost": None if taken_back else _COST}
    try:
        answer = await singles.relabel(connection, pod, {"annotations": cost})
    except InstanceGone:
        return None
    return version_of(decode(msgspec.json.Decoder(_Answer).decode, answer, "the answer to a mark").metadata)
