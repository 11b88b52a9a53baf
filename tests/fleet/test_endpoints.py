"""Where work may be sent: always what serves now, and nothing else."""

from __future__ import annotations

import anyio
from tests.fleet.world import World, spec

from agentfleet import Fleet
from agentfleet.testing import virtual


async def left(fleet: Fleet, id: str, within: float) -> float:
    """Seconds until an instance is no endpoint any more; fails if it still is after `within`."""
    began = anyio.current_time()
    with anyio.fail_after(within):
        while id in fleet.endpoints():
            await fleet.endpoints().changed()
    return anyio.current_time() - began


@virtual
async def test_endpoints_are_the_healthy_instances() -> None:
    """Each healthy instance is there under its id, with the address where it answers."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        endpoints = fleet.endpoints()
        assert {id: each.address for id, each in endpoints.items()} == {i.id: i.address for i in world.instances}
        assert len(endpoints) == 4
        assert all(each.version == "1" and each.node for each in endpoints.values())


@virtual
async def test_instances_that_start_are_no_endpoints() -> None:
    """An instance enters when it has proved healthy, not when it was created."""
    world = World(spec(3))
    world.backend.behave(ready_after=20.0)
    async with world.fleet() as fleet:
        await fleet.deploy(wait=False)
        await anyio.sleep(10)
        assert len(world.instances) == 3
        assert not fleet.endpoints()
        await fleet.ready()
        assert len(fleet.endpoints()) == 3


@virtual
async def test_a_sick_instance_leaves_with_its_verdict() -> None:
    """What is judged unhealthy, or has exited, is no endpoint from that moment on, and comes back when it is well."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        crashed, hung, *_ = world.ids()
        world.faults.crash(crashed)
        assert await left(fleet, crashed, 1.0) == 0
        world.faults.hang(hung)
        await left(fleet, hung, 30.0)
        await world.settled(fleet)
        assert {crashed, hung} <= set(fleet.endpoints())


@virtual
async def test_instances_leave_before_they_are_told_to_drain() -> None:
    """At a scale-down, a rollout and a restart an instance is no endpoint when the engine hears of it."""
    world = World(spec(6))
    seen: list[str] = []
    async with world.deployed() as fleet:
        endpoints = fleet.endpoints()

        def told(id: str) -> None:
            seen.append(id)
            assert id not in endpoints, f"{id} was told to go while work was sent to it"

        world.watchman.stops = told  # type: ignore[method-assign]
        world.watchman.restarts = told  # type: ignore[method-assign]
        await fleet.scale(4)
        await world.settled(fleet, stays=0)
        await fleet.upgrade("2")
        await world.settled(fleet, stays=0)
        await fleet.restart(world.ids()[0])
        await world.settled(fleet, stays=0)
    assert len(seen) == 2 + 4 + 1


@virtual
async def test_lost_instances_leave_and_come_back() -> None:
    """Instances on a node that cannot be reached are no endpoints; what exists after its return is."""
    world = World(spec(6))
    async with world.deployed() as fleet:
        node = world.instances[0].node
        assert node is not None
        on_it = {each.id for each in world.instances if each.node == node}
        world.faults.partition(node, seconds=5.0)
        await anyio.sleep(0.01)
        assert on_it.isdisjoint(fleet.endpoints())
        await world.settled(fleet)
        assert len(fleet.endpoints()) == 6


@virtual
async def test_an_engine_that_cannot_be_reached_takes_no_endpoint_away() -> None:
    """Silence of the engine says nothing of the instances: work goes on."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        world.faults.unavailable(seconds=300.0)
        for _ in range(300):
            await anyio.sleep(1)
            assert len(fleet.endpoints()) == 4


@virtual
async def test_a_restarted_manager_sends_work_on() -> None:
    """A new manager takes what runs for serving before it has probed it: nothing is known against it."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await world.settled(fleet, stays=100)
    async with world.fleet() as fleet:
        assert len(fleet.endpoints()) == 4


@virtual
async def test_whoever_waits_is_woken_by_each_change() -> None:
    """`changed` returns when an instance enters or leaves, and not before."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        with anyio.move_on_after(60) as scope:
            await fleet.endpoints().changed()
        assert scope.cancelled_caught
        await fleet.scale(3)
        with anyio.fail_after(10):
            await fleet.endpoints().changed()
        assert len(fleet.endpoints()) == 3
        assert not fleet.endpoints().exists("nobody")
        assert all(fleet.endpoints().exists(id) for id in fleet.endpoints())
        assert "token" not in repr(next(iter(fleet.endpoints().values())))
