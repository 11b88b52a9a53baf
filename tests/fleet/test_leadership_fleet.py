"""Several managers share one fleet: one acts, another follows when it is gone, and nothing stale gets through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import anyio
import pytest
from tests.fleet.world import EPOCH, spec

from agentfleet import (
    Event,
    Fleet,
    FleetSpec,
    MemoryBackend,
    MemoryJournal,
    NotLeader,
    OperationRefused,
    Phase,
    SystemClock,
)
from agentfleet.autoscaler import MetricSource
from agentfleet.core.leadership import LeaseRecord
from agentfleet.core.recovery import RecoveryMemory
from agentfleet.errors import DeadlineExceeded
from agentfleet.specs import MetricTarget, ScalingPolicy
from agentfleet.stores.leases import MemoryLeases
from agentfleet.testing import virtual


class CutLeases(MemoryLeases):
    """The same store as one manager sees it, until it is cut off."""

    def __init__(self, store: MemoryLeases) -> None:
        super().__init__()
        self.store = store
        self.cut = False

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        return await self._reached(timeout).get(name, timeout=timeout)

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        return await self._reached(timeout).create(name, record, timeout=timeout)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        return await self._reached(timeout).update(name, record, timeout=timeout)

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        await self._reached(timeout).remove(name, record, timeout=timeout)

    def _reached(self, timeout: float) -> MemoryLeases:
        if self.cut:
            raise DeadlineExceeded(f"cut off: no answer within {timeout:g} s")
        return self.store


class Shared:
    """What the managers of one fleet have in common."""

    def __init__(self, wanted: FleetSpec | None = None, *, metrics: Mapping[str, MetricSource] | None = None) -> None:
        self.spec = spec(6) if wanted is None else wanted
        self.clock = SystemClock(EPOCH)
        self.backend = MemoryBackend(seed=0, clock=self.clock, nodes=3)
        self.journal = MemoryJournal(limit=None)
        self.leases = MemoryLeases(clock=self.clock, latency=0.02)
        self.metrics = metrics or {}
        self.seeds = iter(range(100))

    @asynccontextmanager
    async def manager(self, identity: str) -> AsyncIterator[tuple[Fleet, CutLeases]]:
        """One manager, and its way to the leases."""
        way = CutLeases(self.leases)
        async with Fleet(
            self.spec,
            backend=self.backend,
            journal=self.journal,
            clock=self.clock,
            metrics=self.metrics,
            seed=next(self.seeds),
            leases=way,
            identity=identity,
        ) as fleet:
            yield fleet, way

    def events(self, *kinds: str) -> list[Event]:
        return [event for event in self.journal.read() if event.kind in kinds]

    @property
    def now(self) -> float:
        return self.clock.now()


def _phase(there: Shared, id: str) -> Phase:
    (found,) = [each for each in there.backend.instances("a") if each.id == id]
    return found.phase


@asynccontextmanager
async def two_managers(there: Shared) -> AsyncIterator[tuple[Fleet, CutLeases, Fleet]]:
    """The one that leads, its way to the leases, and one that stands by."""
    async with there.manager("one") as (first, way):
        await first.leading(timeout=5)
        async with there.manager("two") as (second, _):
            yield first, way, second


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - that is the point
            await anyio.sleep(0.01)


@virtual
async def test_exactly_one_acts_and_the_others_say_who() -> None:
    there = Shared()
    async with two_managers(there) as (first, _, second):
        await first.deploy()
        assert (first.leads, second.leads) == (True, False)
        assert len(there.backend.instances("a")) == 6
        assert len(second.instances) == 6, "who stands by sees the instances"
        for refused in (second.deploy, second.upgrade, second.stop, second.delete, second.pause):
            with pytest.raises(NotLeader, match="two-.* does not lead; one-.* does"):
                await refused()
        with pytest.raises(NotLeader):
            await second.scale(9)
        with pytest.raises(NotLeader):
            await second.configure({"a": 1})
        with pytest.raises(NotLeader):
            await second.restart(first.instances[0].id)
        with pytest.raises(DeadlineExceeded, match="until this manager leads"):
            await second.leading(timeout=3)
        before = len(there.journal.read())
        there.backend.faults.crash(first.instances[0].id)
        await anyio.sleep(30)
        await first.ready(timeout=60)
        written = [event.kind for event in there.journal.read()[before:]]
        assert written.count("instance.exited") == 1
        assert len(there.events("manager.started")) == 1
        assert 'agentfleet_leading_epoch{fleet="a"} 1.0' in first.telemetry.render().decode()
        assert 'agentfleet_leading_epoch{fleet="a"} 1.0' not in second.telemetry.render().decode()
    assert [event.kind for event in there.events("manager.leads", "manager.deposed")] == ["manager.leads"]


@virtual
async def test_without_leases_it_leads_from_the_opening_to_the_end() -> None:
    clock = SystemClock(EPOCH)
    fleet = Fleet(spec(1), backend=MemoryBackend(clock=clock), clock=clock)
    with pytest.raises(OperationRefused, match="not open"):
        await fleet.leading()
    async with fleet:
        await fleet.leading()
        assert fleet.leads
    assert not fleet.leads


@virtual
async def test_another_acts_within_a_second_when_the_leader_leaves() -> None:
    there = Shared()
    async with there.manager("two") as (second, way):
        way.cut = True  # so that the other one is the first
        async with there.manager("one") as (first, _):
            await first.leading(timeout=5)
            await first.deploy()
            way.cut = False
            await anyio.sleep(10)
            ids = {instance.id for instance in first.instances}
            left = there.now
        await second.leading(timeout=1)
        assert there.now - left < 1.0
        assert second.state is not None
        assert second.state.desired == 6
        await second.scale(8)
        await second.ready(timeout=60)
        assert ids < {instance.id for instance in second.instances}
        assert [event.kind for event in there.events("manager.leads", "manager.left", "manager.deposed")] == [
            "manager.leads",
            "manager.left",
            "manager.leads",
        ]
        with pytest.raises(OperationRefused, match="is closed"):
            await first.scale(3)


@virtual
async def test_another_acts_within_ten_seconds_when_the_leader_is_cut_off() -> None:
    there = Shared()
    async with there.manager("one") as (first, way):
        await first.leading(timeout=5)
        await first.deploy()
        async with there.manager("two") as (second, _):
            await anyio.sleep(5)
            way.cut = True
            cut = there.now
            await second.leading(timeout=10)
            assert there.now - cut < 10.0
            await second.upgrade(version="2")
            written = len(there.journal.read())
            await until(lambda: not first.leads)
            with pytest.raises(NotLeader):
                await first.scale(2)
            way.cut = False  # it learns what has become of it, and stands by again
            await anyio.sleep(5)
            assert not first.leads
            assert first.status()["revision"] is None, "a wanted state is for who leads"
            assert len(first.instances) == 6
            assert not [event for event in there.journal.read()[written:] if event.kind.startswith("manager.")]
            (deposed,) = there.events("manager.deposed")
            assert deposed.data["epoch"] == 1
            assert deposed.data["identity"].startswith("one-")
            assert deposed.data["by"].startswith("two-")
        await first.leading(timeout=1)
        assert first.state is not None
        assert first.state.template.version == "2", "it has read what the other one wrote meanwhile"
        assert [event.data["epoch"] for event in there.events("manager.leads")] == [1, 2, 3]
        await first.ready(timeout=60)


@virtual
async def test_a_lapsed_leader_does_nothing_and_goes_on_when_it_may() -> None:
    there = Shared()
    async with there.manager("one") as (fleet, way):
        await fleet.leading(timeout=5)
        await fleet.deploy()
        way.cut = True
        await until(lambda: not fleet.leads)
        before = len(there.journal.read())
        victim = fleet.instances[0]
        there.backend.faults.crash(victim.id)
        with pytest.raises(NotLeader, match="lapsed"):
            await fleet.scale(3)
        await anyio.sleep(20)
        assert _phase(there, victim.id) is Phase.EXITED, "nobody may repair it"
        assert len(there.journal.read()) == before, "nobody else may have written, but who knows"
        way.cut = False
        await fleet.leading(timeout=3)
        await fleet.ready(timeout=120)
        assert len(there.events("manager.leads")) == 1, "the same term went on"
        assert len(there.events("instance.exited")) == 1, "what was seen meanwhile is told"


@virtual
async def test_an_action_that_may_not_be_done_any_more_is_dropped_and_does_not_count() -> None:
    there = Shared()
    async with there.manager("one") as (fleet, way):
        await fleet.leading(timeout=5)
        await fleet.deploy()
        victim = fleet.instances[0]
        way.cut = True
        await until(lambda: not fleet.leads)
        fleet._runtime.turn._desk.actuator.restart(victim.id, grace=0)
        await anyio.sleep(1)
        way.cut = False
        await fleet.leading(timeout=3)
        await anyio.sleep(1)
        (dropped,) = there.events("action.failed")
        assert (dropped.data["error"], dropped.data["action"], dropped.instance) == ("NotLeader", "restart", victim.id)
        assert fleet._runtime.recovery.memory(victim.slot) == RecoveryMemory()
        await fleet.ready(timeout=60)


@virtual
async def test_what_was_tried_is_known_to_the_next_leader() -> None:
    there = Shared()
    async with there.manager("two") as (second, second_way):
        second_way.cut = True
        async with there.manager("one") as (first, way):
            await first.leading(timeout=5)
            await first.deploy()
            second_way.cut = False
            victim = first.instances[0]
            there.backend.faults.hang(victim.id)
            await until(lambda: first._runtime.recovery.memory(victim.slot).attempts == 1, 300)
            before = first._runtime.recovery.memory(victim.slot)
            way.cut = True
            await second.leading(timeout=10)
            assert second._runtime.recovery.memory(victim.slot).attempts >= before.attempts
            await second.ready(timeout=600)


@virtual
async def test_a_takeover_changes_no_size() -> None:
    load = 60.0
    policy = ScalingPolicy(
        min_replicas=2, max_replicas=20, targets=(MetricTarget(metric="load", value=10.0),), period=5.0
    )
    there = Shared(spec(6, scaling=policy), metrics={"load": lambda: load})
    async with there.manager("one") as (first, way):
        await first.leading(timeout=5)
        await first.deploy()
        await anyio.sleep(400)
        sizes = len(there.events("fleet.scaled"))
        ids = {instance.id for instance in first.instances}
        async with there.manager("two") as (second, _):
            await anyio.sleep(5)
            way.cut = True
            await second.leading(timeout=10)
            await anyio.sleep(120)
            assert {instance.id for instance in second.instances} == ids
            assert len(there.events("fleet.scaled")) == sizes


@virtual
async def test_a_configuration_outlives_its_leader() -> None:
    there = Shared()
    async with two_managers(there) as (first, way, second):
        await first.deploy()
        assert await first.configure({"level": 1}) == 1
        assert await first.configure({"level": 2}) == 2
        way.cut = True
        await second.leading(timeout=10)
        assert await second.configure({"level": 3}) == 3


@virtual
async def test_who_waits_is_told_when_another_takes_over() -> None:
    there = Shared()
    told: list[str] = []

    async def wait(fleet: Fleet) -> None:
        try:
            await fleet._runtime.until(lambda: False, None, "never")
        except NotLeader as error:
            told.append(str(error))

    async with two_managers(there) as (first, way, second):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, first)
            await anyio.sleep(1)
            way.cut = True
            await second.leading(timeout=10)
            way.cut = False
        assert told
        assert "does not lead any more" in told[0]


@virtual
async def test_the_lease_of_a_deleted_fleet_goes_and_no_other() -> None:
    there = Shared()
    async with two_managers(there) as (first, _, _):
        await first.deploy()
    left = await there.leases.get("a", timeout=1)
    assert left is not None
    assert left.holder is None, "given up, and kept for the next manager"
    async with there.manager("one") as (first, _):
        await first.leading(timeout=30)
        async with there.manager("two"):
            await first.delete(timeout=120)
    assert await there.leases.get("a", timeout=1) is None
    epoch = there.leases.history["a"][-1].epoch
    async with there.manager("one") as (first, _):
        await first.leading(timeout=30)
        await first.deploy()
        assert first.epoch == epoch + 1, "the journal knows how far the epochs had come"
    assert await there.leases.get("a", timeout=1) is not None, "it is there again"


@virtual
async def test_a_store_that_never_answers_holds_up_nobody_who_leaves(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(MemoryLeases):
        async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
            del name, record, timeout
            await anyio.sleep_forever()

    there = Shared()
    there.leases = Mute(clock=there.clock)
    async with there.manager("one") as (first, _):
        await first.leading(timeout=5)
        await first.deploy()
        await first.delete(timeout=120)
        left = there.now
    assert there.now - left < 60
    assert "stays, though the fleet was deleted: no answer within" in caplog.text


@virtual
async def test_a_lease_that_cannot_be_removed_stays(caplog: pytest.LogCaptureFixture) -> None:
    there = Shared()
    async with there.manager("one") as (first, way):
        await first.leading(timeout=5)
        await first.deploy()
        await first.delete(timeout=120)
        way.cut = True
    assert await there.leases.get("a", timeout=1) is not None
    assert "the lease of fleet a stays" in caplog.text
