"""A simulated engine that keeps whole fleets by itself, as Kubernetes' Deployments do, on a simulated cluster.

It is to `MemoryBackend` what a Deployment is to pods: told a size and a revision, it makes and removes instances, rolls
them with surge, fills the places of those that are gone and restarts what has exited, with a growing back-off. For
tests of whatever stands above a `WorkloadBackend`, in virtual time.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from agentfleet.backends.base import Changed, Creation, Observation, Ordered, Removed, Snapshot, Workload
from agentfleet.backends.memory.backend import MemoryBackend
from agentfleet.backends.memory.network import MemoryNetwork
from agentfleet.backends.memory.prober import MemoryProber
from agentfleet.clock import Clock, SystemClock
from agentfleet.core import rollout
from agentfleet.core.rollout import RolloutMemory, RolloutObserved
from agentfleet.errors import BackendError, InstanceGone, Outdated
from agentfleet.instances import NO_SLOT, Instance, Isolation, Node, Phase, Usage
from agentfleet.specs import RolloutPolicy
from agentfleet.view import Counts

BACKOFF = 10.0
BACKOFF_LIMIT = 300.0
"""Seconds before what has exited again is started again, as a kubelet waits."""


class MemoryDeployments:
    """Keeps fleets on a simulated cluster.

    Args:
        cluster: Where the instances live; its faults happen to them.
        policy: How revisions are rolled; what a Deployment's strategy says.
        clock: Times back-offs; the cluster's own.
        seed: Makes the ids reproducible.
    """

    def __init__(
        self, cluster: MemoryBackend, *, policy: RolloutPolicy | None = None, clock: Clock | None = None, seed: int = 0
    ) -> None:
        self.cluster = cluster
        self.orders: list[Workload] = []
        """Every order that was accepted."""
        self._policy = policy or RolloutPolicy(max_surge="25%", max_unavailable="25%", auto_rollback=False)
        self._rng = random.Random(seed)  # noqa: S311 - names, no secrets
        self._clock: Clock = clock or SystemClock()
        self._kept: dict[str, Kept] = {}
        self._tasks: TaskGroup | None = None
        self._users = 0

    async def __aenter__(self) -> Self:
        self._users += 1
        if self._users > 1:
            return self
        await self.cluster.__aenter__()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        for kept in self._kept.values():
            self._tasks.start_soon(kept.keep)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users:
            return
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(None, None, None)
        finally:  # also when whoever leaves is cancelled
            for kept in self._kept.values():
                for watcher in kept.watchers:
                    watcher.close()
            await self.cluster.__aexit__(kind, error, trace)

    def kept(self, fleet: str) -> Kept:
        """One fleet as it is kept; a person's hand on it, too."""
        if fleet not in self._kept:
            self._kept[fleet] = Kept(self.cluster, fleet, self._policy, self._rng, self._clock)
            if self._tasks is not None:
                self._tasks.start_soon(self._kept[fleet].keep)
        return self._kept[fleet]

    async def apply(self, workload: Workload) -> None:
        """See `WorkloadBackend`."""
        await self.cluster.usage(workload.fleet)  # an engine that cannot be reached raises
        kept = self.kept(workload.fleet)
        kept.check(workload)
        self.orders.append(workload)
        kept.tell(workload, by=None)

    async def delete(self, fleet: str) -> None:
        """See `WorkloadBackend`."""
        await self.cluster.usage(fleet)
        self.kept(fleet).forget()

    async def isolate(self, fleet: str, id: str, *, isolation: Isolation) -> None:
        """See `WorkloadBackend`."""
        await self.cluster.usage(fleet)
        self.kept(fleet).isolate(id, isolation)

    async def stand_in(self, fleet: str, id: str, *, away_from: str) -> None:
        """See `Relocating`."""
        await self.cluster.usage(fleet)
        await self.kept(fleet).stand_in(id, away_from)

    async def exchange(self, fleet: str, id: str, stand_in: str, *, grace: float) -> None:
        """See `Relocating`."""
        await self.cluster.usage(fleet)
        await self.kept(fleet).exchange(id, stand_in, grace)

    async def discard(self, fleet: str, stand_in: str) -> None:
        """See `Relocating`."""
        if self.kept(fleet).is_stand_in(stand_in):
            await self.cluster.stop(fleet, stand_in, grace=0.0)

    async def watch(self, fleet: str) -> AsyncIterator[Observation]:
        """See `Engine`."""
        kept = self.kept(fleet)
        told, seen = anyio.create_memory_object_stream[Observation](math.inf)
        with told, seen:
            kept.subscribe(told)
            try:
                async for each in seen:
                    yield each
            finally:
                kept.watchers.remove(told)

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """End an instance; another takes its place."""
        await self.cluster.stop(fleet, id, grace=grace)
        self.kept(fleet).end(id)

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """End an instance; another takes its place."""
        self.kept(fleet).known(id)
        await self.stop(fleet, id, grace=grace)

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """See `Engine`."""
        return await self.cluster.usage(fleet)

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """See `Engine`."""
        return await self.cluster.logs(fleet, id, lines=lines)

    def credential(self, fleet: str, id: str) -> str | None:
        """See `Engine`."""
        return self.cluster.credential(fleet, id)

    def prober(self) -> MemoryProber:
        """Asks the simulated agents."""
        return self.cluster.prober()

    def network(self) -> MemoryNetwork:
        """Carries requests to the simulated agents."""
        return self.cluster.network()


class Kept:
    """One fleet, and the loop that keeps it as it was told."""

    def __init__(
        self, cluster: MemoryBackend, fleet: str, policy: RolloutPolicy, rng: random.Random, clock: Clock
    ) -> None:
        self.watchers: list[MemoryObjectSendStream[Observation]] = []
        self._cluster = cluster
        self._fleet = fleet
        self._policy = policy
        self._rng = rng
        self._clock = clock
        self._wanted: Workload | None = None
        self._by: str | None = None
        self._memory: RolloutMemory | None = None
        self._revisions: dict[int, Workload] = {}
        """What was wanted last of each revision, as the ReplicaSets of a Deployment keep it."""
        self._instances: dict[str, Instance] = {}
        self._synced = False
        self._isolated: dict[str, Isolation] = {}
        self._stand_ins: dict[str, tuple[str, str]] = {}
        """Whose each is, and the node that it stays away from."""
        self._ended: set[str] = set()
        """Those that were told to end and may not show it, as on a lost node; they count no more."""
        self._slot = 0
        self._changed = anyio.Event()

    # ------------------------------------------------------------------------------------------ what it is told

    def tell(self, wanted: Workload, *, by: str | None) -> None:
        """Take an order, from the fleet's manager (None) or from somebody else."""
        if self._wanted is None or wanted.revision != self._wanted.revision:
            self._memory = rollout.begin(wanted.revision, self._clock.now())
        told = self.ordered()
        self._wanted, self._by = wanted, by
        self._revisions[wanted.revision] = wanted
        self._tell_order(told)

    def check(self, wanted: Workload) -> None:
        """Raise `Outdated` if an order that is not about the size would undo the one that somebody has set."""
        if wanted.same_size and self._wanted is not None and self._wanted.replicas != wanted.replicas:
            raise Outdated(f"fleet {self._fleet} was set to {self._wanted.replicas} by {self._by}, unseen as yet")

    def scale(self, replicas: int, *, by: str) -> None:
        """Somebody else sets the size."""
        assert self._wanted is not None, "there is nothing to scale yet"
        self.tell(replace(self._wanted, replicas=replicas, expendable=()), by=by)

    def forget(self) -> None:
        """Keep nothing any more."""
        told = self.ordered()
        self._wanted = self._memory = self._by = None
        self._tell_order(told)

    def isolate(self, id: str, isolation: Isolation) -> None:
        """Let go of an instance, which stays."""
        known = self.known(id)
        self._isolated[id] = isolation
        self._show(known)
        self._changed.set()

    async def stand_in(self, id: str, away_from: str) -> None:
        """Make one that is no member yet."""
        known = self.known(id)
        await self._create(self._revisions[known.revision], stands_in_for=(id, away_from))

    async def exchange(self, id: str, stand_in: str, grace: float) -> None:
        """Make a stand-in a member, and end the one that it stood in for."""
        known = self.known(stand_in)
        self.known(id)
        if self._stand_ins.get(stand_in, (None,))[0] != id:
            raise InstanceGone(f"{stand_in!r} is no stand-in for {id!r}")
        del self._stand_ins[stand_in]
        self.end(id)
        self._show(replace(known, stands_in_for=None))
        await self._cluster.stop(self._fleet, id, grace=grace)

    def is_stand_in(self, id: str) -> bool:
        """Whether an instance is no member yet."""
        return id in self._stand_ins

    def known(self, id: str) -> Instance:
        """An instance; raises `InstanceGone` where there is none."""
        if id not in self._instances:
            raise InstanceGone(f"fleet {self._fleet!r} has no instance {id!r} (any more)")
        return self._instances[id]

    def end(self, id: str) -> None:
        """Count an instance no more, which was told to end."""
        if id in self._instances:
            self._ended.add(id)
            self._changed.set()

    def put_back(self, id: str) -> None:
        """Somebody takes the mark of isolation off again."""
        del self._isolated[id]
        self._show(self._instances[id])
        self._changed.set()

    def ordered(self) -> Ordered:
        """What it was told."""
        if self._wanted is None:
            return Ordered(0, absent=True)
        return Ordered(self._wanted.replicas, self._wanted.revision, self._wanted.paused, self._by)

    def subscribe(self, watcher: MemoryObjectSendStream[Observation]) -> None:
        """Tell a watcher everything from now on, beginning with what is."""
        self.watchers.append(watcher)
        watcher.send_nowait(self.ordered())
        if self._synced:
            watcher.send_nowait(Snapshot(tuple(self._instances.values()), self._nodes))

    def _tell_order(self, before: Ordered) -> None:
        """Tell an order that is another one than before."""
        if self.ordered() != before:
            self._broadcast(self.ordered())
        self._changed.set()

    def _broadcast(self, seen: Observation) -> None:
        for watcher in self.watchers:
            watcher.send_nowait(seen)

    # ------------------------------------------------------------------------------------------ the loop

    _nodes: tuple[Node, ...] = ()

    async def keep(self) -> None:
        """Observe, and keep the fleet as it was told, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._observe)
            while True:
                self._changed = anyio.Event()
                pause = None
                if self._synced:
                    with contextlib.suppress(BackendError):  # an engine in trouble tries again
                        await self._reconcile()
                    pause = 1.0
                with anyio.move_on_after(pause):
                    await self._changed.wait()

    async def _observe(self) -> None:
        async for seen in self._cluster.watch(self._fleet):
            match seen:
                case Snapshot():
                    self._instances = {each.id: self._as_shown(each) for each in seen.instances}
                    self._nodes, self._synced = seen.nodes, True
                    self._broadcast(Snapshot(tuple(self._instances.values()), seen.nodes))
                case Changed():
                    self._show(seen.instance)
                case Removed():
                    self._instances.pop(seen.id, None)
                    self._isolated.pop(seen.id, None)
                    self._ended.discard(seen.id)
                    self._stand_ins.pop(seen.id, None)
                    self._broadcast(seen)
            self._changed.set()

    def _as_shown(self, instance: Instance) -> Instance:
        shown = replace(instance, slot=NO_SLOT, isolated=self._isolated.get(instance.id))
        whose, away_from = self._stand_ins.get(instance.id, (None, None))
        if whose is not None and (shown.node is None or shown.node == away_from):  # as if it had not been placed there
            trouble = "Unschedulable: no other node has room"
            shown = replace(shown, node=None, phase=Phase.PENDING, ready=False, address=None, trouble=trouble)
        return replace(shown, stands_in_for=whose)

    def _show(self, instance: Instance) -> None:
        self._instances[instance.id] = shown = self._as_shown(instance)
        self._broadcast(Changed(shown))

    async def _reconcile(self) -> None:
        there = [each for each in self._instances.values() if each.phase is not Phase.DRAINING]
        apart = self._ended | self._stand_ins.keys()
        staying = [each for each in there if each.isolated is None and each.id not in apart]
        if self._wanted is None or self._memory is None:
            for each in (*staying, *(each for each in there if each.id in self._stand_ins)):
                await self._cluster.stop(self._fleet, each.id, grace=30.0)
            return
        await self._restart_exited(there)  # as a kubelet does, whoever a pod belongs to
        wanted = self._wanted
        new = [each for each in staying if each.revision == wanted.revision]
        old = [each for each in staying if each.revision != wanted.revision]
        seen = RolloutObserved(wanted.replicas, _counts(new), _counts(old), paused=wanted.paused)
        step, self._memory = rollout.decide(self._policy, seen, self._memory, self._clock.now())
        newest = max((each.revision for each in old), default=wanted.revision)
        made = wanted if step.create_new else self._revisions.get(newest, wanted)
        for _ in range(step.create_new or step.create_old):
            await self._create(made)
        await self._remove(wanted, new, step.remove_new)
        await self._remove(wanted, old, step.remove_old_unfit + step.remove_old_good)

    async def _create(self, wanted: Workload, *, stands_in_for: tuple[str, str] | None = None) -> None:
        self._slot += 1
        id = f"{wanted.fleet}-{wanted.revision}-{self._rng.getrandbits(40):010x}"
        template = wanted.template
        avoid = () if stands_in_for is None else (stands_in_for[1],)
        if stands_in_for is not None:
            self._stand_ins[id] = stands_in_for
        await self._cluster.create(Creation(id, wanted.fleet, self._slot, wanted.revision, template, avoid))
        pending = Instance(id, wanted.fleet, NO_SLOT, wanted.revision, template.version, Phase.PENDING, 0.0)
        self._instances.setdefault(id, self._as_shown(pending))

    async def _remove(self, wanted: Workload, those: list[Instance], count: int) -> None:
        """As a ReplicaSet chooses: what is not ready first, then by deletion cost."""
        order = sorted(those, key=lambda each: (each.ready, each.id not in wanted.expendable))
        for each in order[:count]:
            await self._cluster.stop(wanted.fleet, each.id, grace=wanted.template.drain)

    async def _restart_exited(self, those: list[Instance]) -> None:
        now = self._clock.now()
        for each in those:
            if each.phase is not Phase.EXITED:
                continue
            wait = min(BACKOFF_LIMIT, BACKOFF * 2 ** (each.restarts - 1)) if each.restarts else 0.0
            if now >= (each.started_at or now) + wait:
                await self._cluster.restart(self._fleet, each.id, grace=0.0)


def _counts(those: list[Instance]) -> Counts:
    ready = sum(each.ready for each in those)
    return Counts(idle=ready, starting=len(those) - ready)
