"""Autoscaling of a whole fleet: from what the metrics say to the instances that run."""

from __future__ import annotations

import anyio
import pytest
from tests.fleet.world import TEMPLATE, World, spec

from agentfleet import (
    CpuTarget,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    QueueTarget,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
)
from agentfleet.backends.memory import Load
from agentfleet.core.governor import Cause
from agentfleet.core.reason import Reason
from agentfleet.sizing import Intent
from agentfleet.testing import virtual

DOWN = ScalingBehavior(stabilization=60.0, rules=(ScalingRule(percent=100),))
QUEUE = ScalingPolicy(min_replicas=2, max_replicas=30, targets=(QueueTarget(length=5),), period=10.0, down=DOWN)
CPU = ScalingPolicy(
    min_replicas=2, max_replicas=20, targets=(CpuTarget(utilization=50),), period=10.0, down=DOWN, cpu_initialization=20
)


class Queue:
    """A queue whose length the test sets; None cannot be read."""

    def __init__(self, length: float | None = 0) -> None:
        self.length = length

    def __call__(self) -> float:
        if self.length is None:
            raise ConnectionError("the queue's broker is down")
        return self.length


def queued(queue: Queue, **fields: object) -> World:
    return World(spec(2, scaling=QUEUE, **fields), metrics={"queue": queue})


def burning(**fields: object) -> FleetSpec:
    return spec(4, template=TEMPLATE.replace(cpu=1.0), scaling=CPU, **fields)


async def sized(world: World, fleet: Fleet, size: int, within: float) -> None:
    """Wait until the fleet wants `size`, then until it has it."""
    await fleet._runtime.until(lambda: fleet.status()["desired"] == size, within, f"{size} are wanted")
    await world.settled(fleet)
    assert len(world.instances) == size


@virtual
async def test_the_size_follows_the_queue() -> None:
    """A long queue brings as many instances as its target asks for; an empty one leaves the fewest allowed."""
    queue = Queue()
    world = queued(queue)
    async with world.deployed() as fleet:
        queue.length = 60
        await sized(world, fleet, 12, within=60)
        queue.length = 1_000
        await sized(world, fleet, 30, within=120)
        queue.length = 0
        await sized(world, fleet, 2, within=180)
        assert fleet.decision is not None
        assert fleet.decision.desired == 2
    reasons = [event.reasons for event in world.events("fleet.scaled")]
    assert all(reasons), "each change says why"


@virtual
async def test_the_size_follows_the_cpu() -> None:
    """Instances that use twice their share are doubled; idle ones are given up after the window."""
    world = World(burning(), usage_period=5.0)
    async with world.deployed() as fleet:
        world.backend.load(Load(cpu=0.95))
        await anyio.sleep(90)
        assert fleet.status()["desired"] >= 8
        world.backend.load(Load(cpu=0.05))
        await sized(world, fleet, 2, within=300)


@virtual
async def test_the_queue_that_the_agents_report_is_the_default() -> None:
    """Without a source of one's own the queue is what the agents say of themselves at /status."""
    health = HealthPolicy(checks=(HttpCheck(path="/status", period=5.0),))
    world = World(spec(2, scaling=QUEUE, health=health))
    async with world.deployed() as fleet:
        for id in world.ids():
            world.backend.load(Load(in_flight=4, queue_length=16), id=id)
        await sized(world, fleet, 8, within=60)


@virtual
@pytest.mark.parametrize("size", [2, 10])
async def test_a_metric_that_cannot_be_read_never_shrinks(size: int) -> None:
    """An outage of the metric's source keeps the size, however long; the outage and its end are events."""
    queue = Queue(5.0 * size)
    world = queued(queue)
    async with world.deployed() as fleet:
        await sized(world, fleet, size, within=60)
        queue.length = None
        await anyio.sleep(3600)
        assert len(world.instances) == size
        assert len(world.events("scaling.unreadable")) == 1
        queue.length = 15
        await sized(world, fleet, 3, within=300)
        assert len(world.events("scaling.readable")) == 1


@virtual
async def test_an_outage_of_usage_never_shrinks() -> None:
    """While the engine cannot be asked what instances use, the fleet keeps its size."""
    world = World(burning(), usage_period=5.0)
    async with world.deployed() as fleet:
        world.backend.load(Load(cpu=0.5))
        await anyio.sleep(60)
        size = fleet.status()["desired"]
        world.faults.unavailable(seconds=1800)
        await anyio.sleep(1790)
        assert fleet.status()["desired"] == size
        assert len(world.instances) == size
        await anyio.sleep(20)
        await world.settled(fleet)
    assert len(world.events("usage.failed")) == 1


@virtual
async def test_an_operator_goes_before_the_autoscaler_in_the_same_turn() -> None:
    """Of several wanted sizes in one turn the operator's is taken; of two autoscalers' the later."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        offer = fleet._runtime.turn.sizing.offer
        why = (Reason("test", "a test wants so"),)
        offer(Intent(Cause.SCALING, 9, why))
        await fleet.scale(6)
        offer(Intent(Cause.SCALING, 3, why))
        await world.settled(fleet)
        assert len(world.ids()) == 6
        offer(Intent(Cause.SCALING, 3, why))
        offer(Intent(Cause.SCALING, 5, why))
        fleet._runtime.wake()
        await anyio.sleep(0.1)
        await world.settled(fleet)
        assert len(world.ids()) == 5
    assert [(event.data["to"], event.data["by"]) for event in world.events("fleet.scaled")] == [
        (6, "operator"),
        (5, "scaling"),
    ]


@virtual
async def test_an_operators_size_is_where_the_autoscaler_goes_on_from() -> None:
    """An operator's size holds until the metrics ask for another."""
    queue = Queue(30)
    world = queued(queue)
    async with world.deployed() as fleet:
        await sized(world, fleet, 6, within=60)
        await fleet.scale(20)
        await anyio.sleep(5)
        assert fleet.status()["desired"] == 20
        await sized(world, fleet, 6, within=300)


@virtual
async def test_a_stopped_fleet_is_not_scaled() -> None:
    """The autoscaler neither starts a stopped fleet nor changes the size that it remembers."""
    queue = Queue(20)
    world = queued(queue)
    async with world.deployed() as fleet:
        await sized(world, fleet, 4, within=60)
        await fleet.stop()
        queue.length = 100
        await anyio.sleep(600)
        assert not world.instances
        await fleet.start(wait=False)
        await sized(world, fleet, 20, within=120)


@virtual
async def test_a_new_manager_keeps_the_window() -> None:
    """The stabilisation window outlives the manager: a restart is no reason to shrink early."""
    queue = Queue(100)
    world = queued(queue)
    async with world.deployed() as fleet:
        await sized(world, fleet, 20, within=120)
        queue.length = 0
        await anyio.sleep(15)
    began = world.now
    async with world.fleet() as fleet:
        await anyio.sleep(25)
        assert fleet.status()["desired"] == 20
        await sized(world, fleet, 2, within=200)
    assert world.now - began > 30


@virtual
async def test_sick_instances_go_first_when_shrinking() -> None:
    """A scale-down takes what does not work before what works."""
    queue = Queue(50)
    world = queued(queue)
    async with world.deployed() as fleet:
        await sized(world, fleet, 10, within=60)
        hung = world.ids()[0]
        queue.length = 40
        await anyio.sleep(50)
        world.faults.hang(hung, sticky=True)
        await anyio.sleep(16)
        await sized(world, fleet, 8, within=200)
        assert hung not in world.ids()
