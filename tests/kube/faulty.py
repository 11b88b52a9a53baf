"""Fleets behind a proxy that fails on demand, and the stories that are told with and without faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from tests.kube.oracle import Ledger, Outcome, comes_to, end_state, ledger
from tests.kube.permissions import grant
from tests.kube.world import Cluster, spec

from agentfleet import Fleet, FleetSpec
from agentfleet.backends.kubernetes import Connection, Informer, KubeConfig, KubernetesBackend
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.testing.kube import ControlPlane, FakeKubelet, FaultProxy, KubeletOptions, NoAnswer

SIZE = 8
LEAST = 6
"""Of these, with the default policy's quarter that may be unavailable."""
WRITES = r"/(configmaps|deployments|services|poddisruptionbudgets)([/?]|$)"
"""Requests by which a manager says what should be."""
WRITING = "POST|PATCH|DELETE"
"""Their methods. What is new is made by POST, and then applied and scaled by PATCH."""

Act = Callable[[Fleet], Awaitable[None]]


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that only the cluster can bring about."""
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.05)


def impatient(patch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Give informers other defaults, so that what takes them minutes takes seconds."""
    defaults = Informer.__init__.__kwdefaults__
    assert defaults is not None
    for name, value in seconds.items():
        assert name in defaults
        patch.setitem(defaults, name, value)


class Faulty(Cluster):
    """A namespace whose managers reach the API server through a proxy."""

    def __init__(self, inner: Cluster, proxy: FaultProxy, pods: Ledger) -> None:
        super().__init__(inner.plane, inner.kubelet, inner.namespace, inner.connection)
        self.proxy = proxy
        self.pods = pods
        self.wanted: Outcome | None = None
        """How the test's story ends without faults."""

    @asynccontextmanager
    async def fleet(self, wanted: FleetSpec) -> AsyncIterator[Fleet]:
        """A manager that remembers nothing but the journal."""
        self.backend = KubernetesBackend(self.connection, namespace=self.namespace)
        async with super().fleet(wanted) as fleet:
            yield fleet

    async def crash(self, wanted: FleetSpec, act: Act, *, write: int, done: bool = True) -> bool:
        """A manager that ends in the middle of its n-th write (from 1), which is carried out; or, not `done`, is not.

        Returns:
            Whether there was such a write; otherwise the manager has done all that it should.
        """
        hit = self.proxy.inject(NoAnswer(done=done), method=WRITING, path=WRITES, skip=write - 1)
        async with anyio.create_task_group() as tasks:

            async def live() -> None:
                async with self.fleet(wanted) as fleet:
                    await act(fleet)
                tasks.cancel_scope.cancel()

            tasks.start_soon(live)
            await hit.struck(timeout=120)
            tasks.cancel_scope.cancel()
        hit.cancel()
        return hit.hits > 0

    async def outcome(self) -> Outcome:
        """Where it stands now."""
        state = await end_state(self.plane, self.namespace)
        return Outcome(state, len(self.pods.created), len(self.pods.deleted))

    async def ends_as_without_faults(self, *, spare: int = 0) -> None:
        """All is as if there had been no fault; at most `spare` more pods were made and deleted on the way."""
        assert self.wanted is not None, "name a story in `like`"
        await comes_to(self.plane, self.namespace, self.wanted.end)
        there = self.wanted.created - self.wanted.deleted
        await until(lambda: len(self.pods.created) - len(self.pods.deleted) == there, 20)
        extra = len(self.pods.created) - self.wanted.created
        assert 0 <= extra <= spare, f"{len(self.pods.created)} pods were made, {self.wanted.created} without faults"


@asynccontextmanager
async def faulty(plane: ControlPlane, *, nodes: int = 3, leases: bool = True) -> AsyncIterator[Faulty]:
    """A namespace of its own, with nodes and a proxy of its own; its managers are impatient, and lead by a lease."""
    async with AsyncExitStack() as stack:
        kubelet = await stack.enter_async_context(
            FakeKubelet(plane.access, KubeletOptions(nodes=nodes, lease_period=2.0))
        )
        namespace = await plane.namespace()
        account = await grant(plane, namespace)
        proxy = await stack.enter_async_context(FaultProxy(account, certificate=plane.authority.server("proxy")))
        config = proxy.access.write(plane.folder / f"{namespace}.kubeconfig", namespace=namespace)
        connection = await stack.enter_async_context(
            Connection(KubeConfig(config), qps=500, burst=500, timeout=10, connect_timeout=2, read_timeout=3)
        )
        pods = await stack.enter_async_context(ledger(plane, namespace))
        there = Faulty(Cluster(plane, kubelet, namespace, connection), proxy, pods)
        if leases:
            to_leases = await stack.enter_async_context(Connection(KubeConfig(config)))
            there.leases = KubernetesLeases(to_leases, namespace)
        try:
            yield there
        finally:  # its next pods would settle on the next test's nodes
            with anyio.CancelScope(shield=True), anyio.move_on_after(10):
                await plane.api.delete(f"/apis/apps/v1/namespaces/{namespace}/deployments")


def on(
    plane: ControlPlane,
    test: Callable[[Faulty], Awaitable[None]],
    *,
    nodes: int = 3,
    leases: bool = True,
    like: Callable[[Faulty], Awaitable[None]] | None = None,
) -> None:
    """Run a test in a namespace of its own, within five minutes.

    Args:
        plane: Where.
        test: What.
        nodes: How many fake nodes there are.
        leases: Whether the fleet has a leader, whose writes are fenced, or a manager that believes it is alone.
        like: The story that it should end as.
    """

    async def run() -> None:
        wanted = None if like is None else await fault_free(plane, like)
        if wanted is not None and not leases:
            wanted = replace(wanted, end=replace(wanted.end, owned={**wanted.end.owned, "leases": 0}))
        with anyio.fail_after(300):
            async with faulty(plane, nodes=nodes, leases=leases) as there:
                there.wanted = wanted
                await test(there)

    anyio.run(run)


# ------------------------------------------------------------------------------------------------ stories


async def nothing(fleet: Fleet) -> None:
    """No fault."""
    del fleet


async def deployed(there: Faulty, fault: Act = nothing) -> None:
    """A fleet comes into being."""
    async with there.fleet(spec(SIZE)) as fleet:
        await fault(fleet)
        await fleet.deploy(timeout=90)


async def upgraded(there: Faulty, fault: Act = nothing) -> None:
    """A fleet gets another version."""
    async with there.fleet(spec(SIZE)) as fleet:
        await fleet.deploy(timeout=60)
        there.pods.begin()
        await fault(fleet)
        await fleet.upgrade("2", timeout=120)
        await fleet.ready(timeout=60)


async def returned(there: Faulty, fault: Act = nothing) -> None:
    """A fleet goes to another version and back."""
    async with there.fleet(spec(SIZE)) as fleet:
        await fleet.deploy(timeout=60)
        there.pods.begin()
        await fleet.upgrade("2", timeout=120)
        await fault(fleet)
        await fleet.rollback(timeout=120)
        await fleet.ready(timeout=60)


async def resized(there: Faulty, fault: Act = nothing) -> None:
    """A fleet grows and shrinks."""
    async with there.fleet(spec(SIZE)) as fleet:
        await fleet.deploy(timeout=60)
        await fault(fleet)
        await fleet.scale(SIZE + 4)
        await fleet.ready(timeout=90)
        await fleet.scale(SIZE - 2)
        await fleet.ready(timeout=90)


Story = Callable[[Faulty], Awaitable[None]]
_known: dict[Story, Outcome] = {}


async def fault_free(plane: ControlPlane, story: Story) -> Outcome:
    """How a story ends without faults; told once, in a namespace of its own."""
    if story not in _known:
        async with faulty(plane) as there:
            await story(there)
            with anyio.fail_after(30):
                while True:
                    found = await there.outcome()
                    wanted = sum(found.end.sizes)
                    if wanted == found.end.owned["pods"] == found.created - found.deleted == found.end.ready:
                        break
                    await anyio.sleep(0.2)
            _known[story] = found
    return _known[story]
