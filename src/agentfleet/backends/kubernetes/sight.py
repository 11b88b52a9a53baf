"""What is seen of all fleets in one namespace: pods, Deployments, nodes and the nodes' heartbeats, by one watch each.

Watchers of a fleet are told which of its pods changed and read them when they come to it: a slow one skips what a pod
was in between, never what it is.

A node is lost when its heartbeat (its Lease, KEP-589) has not moved for `node_grace` seconds by our own clock, see
`heartbeats`: the control plane itself waits 40 s before it says so, and minutes before it acts. While the heartbeats'
own watch is broken or silent nothing is said of any node.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.backends.base import Changed, Observation, Ordered, Removed, Snapshot
from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.heartbeats import Heartbeats
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.informer_cache import Changed as Put
from agentfleet.backends.kubernetes.informer_cache import Snapshot as Listed
from agentfleet.backends.kubernetes.informer_queue import Closed
from agentfleet.backends.kubernetes.objects import Deployment, Lease, Node, Pod
from agentfleet.backends.kubernetes.pods import Written, instance_of, node_of, ordered_of
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, LEASES, NODES, PODS, version_of
from agentfleet.errors import BackendUnavailable
from agentfleet.instances import Instance

NODE_LEASES = "kube-node-lease"
_LOOK = 1.0
"""Seconds between two looks at the nodes' heartbeats."""


class Sight:
    """The eyes of one backend. Use it as an async context manager.

    Args:
        connection: How the API server is asked.
        namespace: Where the fleets live.
        node_grace: Seconds without a heartbeat after which a node is lost; kubelets send one every 10 s.
    """

    def __init__(self, connection: Requests, namespace: str, *, node_grace: float = 16.0) -> None:
        ours = {"app.kubernetes.io/managed-by": naming.MANAGER}
        self.namespace = namespace
        self.pods: Informer[Pod] = Informer(connection, PODS, namespace=namespace, labels=naming.FLEET)
        self.deployments: Informer[Deployment] = Informer(connection, DEPLOYMENTS, namespace=namespace, labels=ours)
        self._nodes: Informer[Node] = Informer(connection, NODES)
        self._leases: Informer[Lease] = Informer(connection, LEASES, namespace=NODE_LEASES, silence=30.0)
        self._beats = Heartbeats(node_grace)
        self._lost: frozenset[str] = frozenset()
        self._watches: dict[str, list[FleetWatch]] = {}
        self._written: dict[str, Written] = {}
        self._writing: dict[str, int] = {}
        self._unseen: dict[str, int] = {}
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for informer in (self.pods, self.deployments, self._nodes, self._leases):
                await stack.enter_async_context(informer)
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(self._tasks.cancel_scope.cancel)
            for loop in (
                self._follow_pods,
                self._follow_deployments,
                self._follow_nodes,
                self._follow_beats,
                self._look,
            ):
                self._tasks.start_soon(loop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.close()
        await self._stack.__aexit__(None, None, None)

    def listen(self, before: Mapping[str, Informer[Any]]) -> None:
        """Count the server's silence from now on, or since the informers of `before` listened and heard nothing."""
        for kind, informer in self.informers.items():
            informer.last_word.begin(before[kind].last_word if kind in before else None)

    @property
    def informers(self) -> Mapping[str, Informer[Any]]:
        """The watches by what they see."""
        return {"pods": self.pods, "deployments": self.deployments, "nodes": self._nodes, "leases": self._leases}

    async def wait_synced(self, timeout: float = 60.0) -> None:
        """Wait until everything has been seen once; raises like `Informer.wait_synced`."""
        with anyio.fail_after(timeout):
            for informer in (self.pods, self.deployments, self._nodes):
                await informer.wait_synced(timeout)

    def pod(self, name: str) -> Pod | None:
        """A pod as last seen."""
        return self.pods.cache.get(f"{self.namespace}/{name}")

    def deployment(self, fleet: str) -> Deployment | None:
        """A fleet's Deployment as last seen."""
        return self.deployments.cache.get(f"{self.namespace}/{fleet}")

    @contextmanager
    def writing(self, fleet: str) -> Iterator[None]:
        """While we write a fleet's Deployment nobody is told of it: what is seen may be our own word, half said."""
        self._writing[fleet] = self._writing.get(fleet, 0) + 1
        try:
            yield
        finally:
            self._writing[fleet] -= 1
            self._reorder(fleet)

    def unseen(self, fleet: str, version: int) -> None:
        """Tell nobody of a Deployment before it is seen at this version: what is older is our own word, half said."""
        self._unseen[fleet] = version

    def wrote(self, fleet: str, written: Written | None) -> None:
        """Note what we told a Deployment; None: it is to be forgotten."""
        self._unseen.pop(fleet, None)
        if written is None:
            self._written.pop(fleet, None)
        else:
            self._written[fleet] = written

    def ordered(self, fleet: str) -> Ordered | None:
        """What a fleet's Deployment has been told; None while we are telling it."""
        if self._writing.get(fleet):
            return None
        deployment, written = self.deployment(fleet), self._written.get(fleet)
        if deployment is None and written is not None and not self.is_gone(fleet):
            return None  # what we made is not seen yet
        if deployment is not None and (version_of(deployment.metadata) or 0) < self._unseen.get(fleet, 0):
            return None
        return ordered_of(deployment, written)

    def is_gone(self, fleet: str) -> bool:
        """Whether a Deployment that we have written has been deleted by somebody else."""
        written = self._written.get(fleet)
        gone = self.deployment(fleet) is None and written is not None
        return gone and written is not None and self.deployments.version > written.version

    def last_ordered(self, fleet: str) -> Ordered | None:
        """What it was told last, by us if we have not seen our own word yet; None when there is no Deployment."""
        deployment, written = self.deployment(fleet), self._written.get(fleet)
        if written is not None and (deployment is None or (version_of(deployment.metadata) or 0) < written.version):
            return written.ordered
        return None if deployment is None else ordered_of(deployment, written)

    def watch(self, fleet: str) -> FleetWatch:
        """A new watcher of one fleet."""
        watch = FleetWatch(self, fleet)
        self._watches.setdefault(fleet, []).append(watch)
        return watch

    def unwatch(self, watch: FleetWatch) -> None:
        """Forget a watcher."""
        watches = self._watches.get(watch.fleet, [])
        if watch in watches:
            watches.remove(watch)

    # -- what is shown to watchers

    def snapshot(self, fleet: str) -> Snapshot:
        """Everything of one fleet, and all nodes. Costs what there is."""
        seen = [each for each in self.pods.cache.values() if each.metadata.labels.get(naming.FLEET) == fleet]
        nodes = (node_of(each, lost=each.metadata.name in self._lost) for each in self._nodes.cache.values())
        return Snapshot(tuple(self.shown(each, fleet) for each in seen), tuple(nodes))

    def shown(self, pod: Pod, fleet: str) -> Instance:
        """One pod as an instance."""
        return instance_of(pod, fleet, lost=pod.spec.node_name in self._lost)

    # -- the loops

    async def _follow_pods(self) -> None:
        async with aclosing(self.pods.events()) as events:
            async for event in events:
                for pod in event.objects if isinstance(event, Listed) else (event.object,):
                    for watch in self._watches.get(pod.metadata.labels.get(naming.FLEET, ""), ()):
                        watch.touch(pod.metadata.name)

    async def _follow_deployments(self) -> None:
        async with aclosing(self.deployments.events()) as events:
            async for event in events:
                for each in event.objects if isinstance(event, Listed) else (event.object,):
                    self._reorder(each.metadata.name)

    async def _follow_nodes(self) -> None:
        async with aclosing(self._nodes.events()) as events:
            async for event in events:
                if (
                    isinstance(event, Put)
                    and event.before is not None
                    and node_of(event.object) == node_of(event.before)
                ):
                    continue  # only its status report moved
                self._resnap()

    async def _follow_beats(self) -> None:
        async with aclosing(self._leases.events()) as events:
            async for event in events:
                now = anyio.current_time()
                if isinstance(event, Listed):
                    self._beats.listed({each.metadata.name for each in event.objects}, now)
                elif isinstance(event, Put):
                    self._beats.beat(event.object.metadata.name, now)
                else:
                    self._beats.gone(event.object.metadata.name)

    async def _look(self) -> None:
        while True:
            await anyio.sleep(_LOOK)
            lost = self._silent_nodes(anyio.current_time())
            if lost != self._lost:
                self._lost = lost
                self._resnap()

    def _silent_nodes(self, now: float) -> frozenset[str]:
        if self._leases.error is not None or self._leases.staleness > self._beats.grace:
            return self._lost
        return self._beats.lost(now)

    def _reorder(self, fleet: str) -> None:
        for watch in self._watches.get(fleet, ()):
            watch.reorder()

    def _resnap(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.renew()


class FleetWatch:
    """One watcher of one fleet: an async iterator of observations."""

    def __init__(self, sight: Sight, fleet: str) -> None:
        self.fleet = fleet
        self._sight = sight
        self._touched: dict[str, None] = {}
        self._told: dict[str, str] = {}
        """Uid of each pod that was shown, by name."""
        self._shown: tuple[Ordered, str | None] | None = None
        self._whole = True
        self._closed = False
        self._moved = anyio.Event()

    def touch(self, name: str) -> None:
        """Say that a pod changed."""
        self._touched[name] = None
        self._moved.set()

    def reorder(self) -> None:
        """Say that the Deployment changed."""
        self._moved.set()

    def renew(self) -> None:
        """Say that everything should be looked at anew."""
        self._whole = True
        self._moved.set()

    def close(self) -> None:
        """End the watch."""
        self._closed = True
        self._moved.set()

    async def run(self) -> AsyncIterator[Observation]:
        """What is seen, from now on."""
        sight = self._sight
        try:
            await sight.wait_synced()
            while not self._closed:
                self._moved = anyio.Event()
                now = sight.ordered(self.fleet)
                if now is not None and (now, now.trouble) != self._shown:
                    self._shown = now, now.trouble
                    yield now
                if self._whole:
                    yield self._everything()
                while self._touched and not self._whole:
                    name = next(iter(self._touched))
                    del self._touched[name]
                    for seen in self._look_at(name):
                        yield seen
                if not self._touched and not self._whole:
                    await self._moved.wait()
        except Closed:
            if not self._closed:
                raise
        except TimeoutError as error:
            raise BackendUnavailable(f"fleet {self.fleet}: the API server showed nothing in time") from error
        finally:
            sight.unwatch(self)

    def _everything(self) -> Snapshot:
        self._whole = False
        self._touched.clear()
        seen = self._sight.snapshot(self.fleet)
        pods = ((each.id, self._sight.pod(each.id)) for each in seen.instances)
        self._told = {id: pod.metadata.uid for id, pod in pods if pod is not None}
        return seen

    def _look_at(self, name: str) -> list[Observation]:
        pod = self._sight.pod(name)
        known = self._told.pop(name, None)
        gone: list[Observation] = [] if known is None else [Removed(name)]
        if pod is None:
            return gone
        self._told[name] = pod.metadata.uid
        shown = Changed(self._sight.shown(pod, self.fleet))
        return [shown] if known in (None, pod.metadata.uid) else [*gone, shown]
