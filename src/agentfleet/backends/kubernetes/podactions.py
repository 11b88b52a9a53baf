"""What the Kubernetes backend does to single instances. `KubernetesBackend` inherits it."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress

import anyio

from agentfleet.backends.kubernetes import naming, singles, standins
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.errors import DisruptionBlocked
from agentfleet.backends.kubernetes.objects import Pod
from agentfleet.backends.kubernetes.retry import Backoff
from agentfleet.backends.kubernetes.sight import Sight
from agentfleet.clock import SystemClock
from agentfleet.errors import Conflict, InstanceGone
from agentfleet.instances import Isolation, Phase

_COUNTED_WITHIN = 5.0
"""Seconds that the cluster is given to count a new member: then the disruption budget allows its predecessor's end."""
_LOOKS = 5
"""How often a stand-in that is to end, and changes meanwhile, is looked at."""


class PodActions(ABC):
    """Ends, isolates and exchanges single pods, each by the uid that it was decided on."""

    @property
    @abstractmethod
    def _seen(self) -> Sight:
        """What is seen; raises `BackendUnavailable` where the backend is not open."""

    @property
    @abstractmethod
    def _minor(self) -> int:
        """Y of the server's version 1.Y."""

    @abstractmethod
    def _to(self, fleet: str) -> Requests:
        """The way for writes to one fleet."""

    @abstractmethod
    async def _lead(self, fleet: str) -> None:
        """Raise `NotLeader` if the server knows a later term of the fleet than ours."""

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """End one pod; its Deployment puts another in its place. Already gone is success.

        One that is ready is evicted, so that its disruption budget is kept; what does not work is deleted.

        Raises:
            DisruptionBlocked: The budget is used up; nothing was done.
            BackendError: As `Connection.request`.
        """
        with suppress(InstanceGone):  # or another of the same name is there
            await self._end(self._found(fleet, id), fleet, grace)

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """End one pod as `stop` does; its Deployment puts another in its place.

        Raises:
            InstanceGone: There is no such pod.
            DisruptionBlocked: As `stop`.
        """
        await self._end(self._found(fleet, id), fleet, grace)

    async def isolate(self, fleet: str, id: str, *, isolation: Isolation) -> None:
        """Take one pod out of the selector, so that it gets no traffic, is replaced, and stays.

        Raises:
            InstanceGone: There is no such pod.
            BackendError: As `Connection.request`.
        """
        await singles.isolate(self._to(fleet), self._found(fleet, id), self._selector(fleet), isolation)

    async def stand_in(self, fleet: str, id: str, *, away_from: str) -> None:
        """Make a pod that waits, away from a node, to take the place of another. See `Relocating`.

        Raises:
            InstanceGone: There is no such pod, or its ReplicaSet or Deployment is gone.
            NotLeader: Another leads the fleet by now.
            BackendError: As `Connection.request`; `BackendRefused` also where its template names its node.
        """
        pod, deployment = self._found(fleet, id), self._seen.deployment(fleet)
        if deployment is None:
            raise InstanceGone(f"the Deployment of fleet {fleet} is gone, so pod {id} needs no stand-in")
        selector = deployment.spec.selector.match_labels
        await standins.make(self._to(fleet), pod, selector, deployment.metadata, node=away_from)

    async def exchange(self, fleet: str, id: str, stand_in: str, *, grace: float) -> None:
        """Have a stand-in take a pod's place, and end that one as `stop` does. See `Relocating`.

        Raises:
            InstanceGone: One of the two is gone.
            NotLeader: Another leads the fleet by now.
            DisruptionBlocked: As `stop`; a server from 1.21 has the stand-in in place nevertheless.
            BackendError: As `Connection.request`.
        """
        pod, other = self._found(fleet, id), self._found(fleet, stand_in)
        await self._lead(fleet)

        async def end(*, replaced: bool) -> None:
            if replaced:
                await self._end_replaced(pod, fleet, grace)
            else:
                await self._end(pod, fleet, grace)

        selector, minor = self._selector(fleet), self._minor
        await standins.exchange(self._to(fleet), self._seen.pods, pod, other, selector, minor=minor, end=end)

    async def discard(self, fleet: str, stand_in: str) -> None:
        """End a stand-in, with its drain; one that has become a member is left alone. See `Relocating`.

        Raises:
            Conflict: It changes all the time, so that none of its versions that are seen is the present one.
            BackendError: As `Connection.request`.
        """
        pauses = Backoff(SystemClock(), random.Random(), initial=0.1, limit=1.0)  # noqa: S311 - jitter
        for left in reversed(range(_LOOKS)):
            pod = self._pod(fleet, stand_in)
            if pod is None or pod.metadata.labels.get(naming.STAND_IN) != "true":
                return
            try:
                with suppress(InstanceGone):
                    await standins.discard(self._to(fleet), pod)
            except Conflict:  # it was bound, say, or has begun to run, and is seen so in a moment
                if not left:
                    raise
                await pauses.wait()
            else:
                return

    def _selector(self, fleet: str) -> Mapping[str, str]:
        """The labels by which the fleet's Deployment knows its pods; empty where there is none."""
        deployment = self._seen.deployment(fleet)
        return {} if deployment is None else deployment.spec.selector.match_labels

    def _found(self, fleet: str, id: str) -> Pod:
        pod = self._pod(fleet, id)
        if pod is None:
            raise InstanceGone(f"there is no pod {id} of fleet {fleet}")
        return pod

    def _pod(self, fleet: str, id: str) -> Pod | None:
        pod = self._seen.pod(id)
        return pod if pod is not None and pod.metadata.labels.get(naming.FLEET) == fleet else None

    async def _end(self, pod: Pod, fleet: str, grace: float) -> None:
        shown = self._seen.shown(pod, fleet)
        if shown.ready and shown.phase is Phase.RUNNING:
            await singles.evict(self._to(fleet), pod, grace=grace, minor=self._minor)
        else:
            await singles.delete(self._to(fleet), pod, grace=grace)

    async def _end_replaced(self, pod: Pod, fleet: str, grace: float) -> None:
        """End a pod whose successor is there; its ReplicaSet may have done so. The budget counts the successor soon."""
        pauses = Backoff(SystemClock(), random.Random(), initial=0.1, limit=1.0)  # noqa: S311 - jitter
        until = anyio.current_time() + _COUNTED_WITHIN
        while True:
            try:
                with suppress(InstanceGone):
                    await self._end(pod, fleet, grace)
            except DisruptionBlocked:
                if anyio.current_time() >= until:
                    raise
                await pauses.wait()
            else:
                return
