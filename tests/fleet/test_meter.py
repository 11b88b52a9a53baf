"""What a fleet's metrics say of it: nodes, resources, changes of size, and how long health has been waited for."""

from __future__ import annotations

import anyio
from tests.fleet.test_leadership_fleet import Shared, two_managers, until
from tests.fleet.world import TEMPLATE, World, spec

from agentfleet import Fleet, RecoveryPolicy, RolloutPolicy
from agentfleet.backends.memory import Load
from agentfleet.testing import virtual

HASTY = RolloutPolicy(progress_deadline=60.0)
ASKED = TEMPLATE.replace(cpu=0.5, memory="256Mi")


def metric(fleet: Fleet, name: str, **labels: str) -> float | None:
    return fleet.telemetry.registry.get_sample_value(f"agentfleet_{name}", {"fleet": "a"} | labels)


def outcomes(fleet: Fleet, direction: str) -> dict[str, float | None]:
    words = ("reached", "failed", "overtaken")
    return {word: metric(fleet, "scale_outcomes_total", direction=direction, outcome=word) for word in words}


@virtual
async def test_changes_of_size_are_timed_and_their_ends_counted() -> None:
    world = World(spec(3))
    async with world.deployed() as fleet:
        assert outcomes(fleet, "up") == {"reached": 0, "failed": 0, "overtaken": 0}, "a deployment is none"
        await fleet.scale(6)
        await world.settled(fleet)
        assert outcomes(fleet, "up") == {"reached": 1, "failed": 0, "overtaken": 0}
        took = metric(fleet, "scale_seconds_sum", direction="up")
        assert took is not None
        assert 0 < took < 60
        await fleet.scale(2)
        await world.settled(fleet)
        assert outcomes(fleet, "down") == {"reached": 1, "failed": 0, "overtaken": 0}
        await fleet.stop()
        await fleet.start()
        await world.settled(fleet)
        assert outcomes(fleet, "down")["reached"] == outcomes(fleet, "up")["reached"] == 1, "nor is a rest"
    sizes = [(event.data["from"], event.data["to"]) for event in world.events("resizing.reached")]
    assert sizes == [(3, 6), (6, 2)]


@virtual
async def test_a_size_that_cannot_be_had_fails_once_also_when_nothing_happens_meanwhile() -> None:
    world = World(spec(3, rollout=HASTY))
    async with world.deployed() as fleet:
        world.faults.quota(4)
        await fleet.scale(6)
        await anyio.sleep(300)
        assert outcomes(fleet, "up") == {"reached": 0, "failed": 1, "overtaken": 0}
        times = metric(fleet, "scale_failures_in_a_row")
        assert times is not None
        assert times > 3
        (failed,) = world.events("resizing.failed")
        assert "2 instances are not healthy, and nothing has moved for 60 s" in str(failed.reasons)
        await fleet.scale(7)
        await anyio.sleep(1)
        await fleet.scale(4)
        await world.settled(fleet)
        assert outcomes(fleet, "up") == {"reached": 0, "failed": 1, "overtaken": 1}
        assert outcomes(fleet, "down")["reached"] == 1
        world.faults.quota(None)
        await fleet.scale(5)
        await world.settled(fleet)
        assert metric(fleet, "scale_failures_in_a_row") == 0, "one that succeeds ends the row"


@virtual
async def test_resources_are_those_of_who_could_be_measured() -> None:
    world = World(spec(4, template=ASKED), usage_period=5.0)
    world.backend.load(Load(cpu=0.25, memory=2**27))
    async with world.deployed() as fleet:
        await anyio.sleep(11)
        assert metric(fleet, "resource_used", resource="cpu") == 1.0
        assert metric(fleet, "resource_requested", resource="cpu") == 2.0
        assert metric(fleet, "resource_used", resource="memory") == 4 * 2**27
        assert metric(fleet, "resource_requested", resource="memory") == 4 * 2**28
        world.faults.unavailable()
        await anyio.sleep(11)
        for name in ("resource_used", "resource_requested"):
            assert metric(fleet, name, resource="cpu") is None, "what cannot be measured is unknown, and not as before"
        world.faults.available()
        await world.settled(fleet)
        assert metric(fleet, "resource_used", resource="cpu") == 1.0


@virtual
async def test_nodes_are_counted_by_state() -> None:
    world = World(spec(3), nodes=4)
    async with world.deployed() as fleet:
        assert [metric(fleet, "nodes", state=each) for each in ("ready", "cordoned", "not_ready")] == [4, 0, 0]
        world.faults.cordon("node-1")
        world.faults.node_down("node-2")
        await anyio.sleep(60)
        assert [metric(fleet, "nodes", state=each) for each in ("ready", "cordoned", "not_ready")] == [2, 1, 1]
        world.faults.cordon("node-1", schedulable=True)
        world.faults.heal("node-2")
        await world.settled(fleet)
        assert [metric(fleet, "nodes", state=each) for each in ("ready", "cordoned", "not_ready")] == [4, 0, 0]


@virtual
async def test_how_long_health_is_waited_for_grows_with_time_alone() -> None:
    world = World(spec(3, recovery=RecoveryPolicy(max_disrupted=0)), usage_period=5.0)
    async with world.deployed() as fleet:
        assert metric(fleet, "ailing_seconds") == 0
        sick = world.ids()[0]
        world.faults.unhealthy(sick, sticky=True)
        await anyio.sleep(900)
        waited = metric(fleet, "ailing_seconds")
        assert waited is not None
        assert 800 < waited < 900, "nothing may be disrupted, so nothing is done"
        world.faults.cure(sick)
        await world.settled(fleet)
        assert metric(fleet, "ailing_seconds") == 0
        assert world.events("instance.recovered")


@virtual
async def test_a_place_that_nobody_will_fill_is_not_waited_for() -> None:
    world = World(spec(3, recovery=RecoveryPolicy(max_disrupted=0)), usage_period=5.0)
    async with world.deployed() as fleet:
        world.faults.unhealthy(world.ids()[0], sticky=True)
        await anyio.sleep(60)
        assert metric(fleet, "ailing_seconds")
        await fleet.scale(2)
        await world.settled(fleet)
        assert metric(fleet, "ailing_seconds") == 0
        await fleet.stop()
        assert metric(fleet, "ailing_seconds") == 0
        await fleet.start()
        await world.settled(fleet)
        assert not world.events("instance.recovered"), "who comes next was never ill"


@virtual
async def test_who_was_deposed_shows_no_old_picture() -> None:
    there = Shared()
    async with two_managers(there) as (first, way, second):
        await first.deploy()
        assert metric(first, "instances", state="idle") == 6
        assert metric(second, "instances", state="idle") is None
        way.cut = True
        await until(lambda: second.leads)
        await second.ready(timeout=60)
        assert metric(second, "instances", state="idle") == 6
        await until(lambda: metric(first, "leading_epoch") == 0, 6)
        for name, labels in (("instances", {"state": "idle"}), ("desired_replicas", {}), ("nodes", {"state": "ready"})):
            assert metric(first, name, **labels) is None, name
        assert metric(first, "turn_seconds_count"), "what it has counted stays"


@virtual
async def test_a_lapse_takes_the_picture_back_until_it_is_over() -> None:
    """It cannot be known meanwhile whether another leads; and nothing of the picture is lost by that."""
    there = Shared()
    async with there.manager("one") as (fleet, way):
        await fleet.leading(timeout=5)
        await fleet.deploy()
        await fleet.configure({"a": 1})
        before = {**standing(fleet)}
        assert before["instances"] == 6
        assert before["config_published_revision"] == 1
        way.cut = True
        await until(lambda: metric(fleet, "leading_epoch") == 0)
        assert set(standing(fleet).values()) == {None}
        way.cut = False
        await until(lambda: standing(fleet) == before)
        assert metric(fleet, "leading_epoch") == 1
    assert len(there.events("manager.leads")) == 1, "it was a lapse, and no change of leaders"


def standing(fleet: Fleet) -> dict[str, float | None]:
    """Some of what says how a fleet stands."""
    found = {"instances": metric(fleet, "instances", state="idle"), "nodes": metric(fleet, "nodes", state="ready")}
    return found | {name: metric(fleet, name) for name in ("desired_replicas", "config_published_revision")}
