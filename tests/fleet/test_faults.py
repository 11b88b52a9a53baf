"""Faults during each workload, one at a time and together: the fleet ends where it would have, and does no harm."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import anyio
import pytest
from tests.fleet.world import World, prepare, spec, workloads

from agentfleet import BackendUnavailable, Fleet, RolloutPolicy
from agentfleet.testing import Fault, FaultPlan, run_virtual, virtual

HARMLESS: dict[str, Callable[[World], object]] = {
    "lost events": lambda world: world.faults.lose_events(5),
    "doubled events": lambda world: world.faults.double_events(50),
    "reordered events": lambda world: world.faults.reorder_events(12),
    "gap": lambda world: world.faults.gap(),
    "conflict": lambda world: world.faults.conflict(times=3),
    "lost replies": lambda world: world.faults.lose_reply(times=3),
    "slow actions": lambda world: world.faults.slow_actions(4.0, times=20),
    "lagging watch": lambda world: world.faults.lag(3.0),
    "short outage": lambda world: world.faults.unavailable(seconds=20.0),
}
"""Faults that need no action: whoever acts upon them does harm."""

HARMFUL: dict[str, Callable[[World], object]] = {
    "crash": lambda world: [world.faults.crash(id) for id in world.ids()[:1]],
    "hang": lambda world: [world.faults.hang(id) for id in world.ids()[:1]],
    "slow": lambda world: [world.faults.slow(10.0, id) for id in world.ids()[-1:]],
    "partition": lambda world: world.faults.partition("node-2", seconds=40.0),
    "node down": lambda world: world.faults.node_down("node-1", seconds=60.0),
    "refused": lambda world: world.faults.refuse(times=2),
}
"""Faults that cost something to repair."""

STEADY = ("deploy", "scale", "upgrade good", "rollback")
"""Workloads whose effort does not depend on how fast things go."""
MOMENTS = (0.2, 2.5, 4.0)


async def disturbed(
    name: str, faults: list[Callable[[World], object]], moment: float
) -> tuple[dict[str, object], World]:
    """One workload with faults that begin at a moment of it."""
    patient = RolloutPolicy(max_failed=8)  # faults of the engine are not the revision's; bad ones fail all the same
    world = prepare(World(spec(rollout=patient)))
    digests: list[dict[str, object]] = []
    async with anyio.create_task_group() as tasks:

        async def disturb() -> None:
            await anyio.sleep(moment)
            for fault in faults:
                fault(world)
            await anyio.sleep(120.0)
            world.faults.lag(0.0)

        tasks.start_soon(disturb)
        digests.append(await world.live(workloads()[name]))
    world.check()
    digest = digests[0]
    digest.pop("slots")
    return digest, world


@functools.cache
def fault_free(name: str) -> tuple[dict[str, object], tuple[int, int, int]]:
    digest, world = run_virtual(disturbed, name, [], 1.0)
    return digest, world.effort()


@pytest.mark.parametrize("fault", HARMLESS)
@pytest.mark.parametrize("name", workloads())
def test_faults_that_need_no_action_cause_none(name: str, fault: str) -> None:
    """Whatever goes wrong with watch and engine, each workload ends the same, with the same creations and stops."""
    wanted, effort = fault_free(name)
    for moment in MOMENTS:
        digest, world = run_virtual(disturbed, name, [HARMLESS[fault]], moment)
        assert digest == wanted, f"{fault} at {moment}"
        if name in STEADY:
            assert world.effort() == effort, f"{fault} at {moment}: {world.effort()} instead of {effort}"


@pytest.mark.parametrize("fault", HARMFUL)
@pytest.mark.parametrize("name", workloads())
def test_faults_that_harm_are_repaired(name: str, fault: str) -> None:
    """Whatever happens to instances and nodes during a workload, it ends the same."""
    wanted, _ = fault_free(name)
    for moment in MOMENTS:
        digest, _ = run_virtual(disturbed, name, [HARMFUL[fault]], moment)
        assert digest == wanted, f"{fault} at {moment}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", workloads())
def test_faults_together_are_survived(name: str, seed: int) -> None:
    """Any four faults at once leave the same end as none."""
    wanted, _ = fault_free(name)
    rng = random.Random(f"{name}/{seed}")
    every = HARMLESS | HARMFUL
    chosen = rng.sample(sorted(every), 4)
    digest, _ = run_virtual(disturbed, name, [every[fault] for fault in chosen], rng.uniform(0.1, 5.0))
    assert digest == wanted, chosen


@pytest.mark.parametrize("fault", ["lost events", "lost replies", "partition", "crash", "short outage"])
def test_the_other_loop_survives_the_same(fault: str) -> None:
    """A sample of the above on trio."""
    every = HARMLESS | HARMFUL
    for name in ("scale", "upgrade good"):
        wanted, _ = fault_free(name)
        digest, _ = run_virtual(disturbed, name, [every[fault]], 2.5, backend="trio")
        assert digest == wanted


# ------------------------------------------------------------------------------------------------ the engine


@virtual
@pytest.mark.parametrize("seconds", [30.0, 3600.0])
async def test_an_unreachable_engine_causes_nothing(seconds: float) -> None:
    """While the engine is silent nothing is concluded: no restart, no replacement, no smaller fleet."""
    world = World()
    async with world.deployed() as fleet:
        world.faults.unavailable(seconds=seconds)
        await anyio.sleep(seconds - 1)
        assert fleet.status()["good"] == 10
        await anyio.sleep(1)
        await world.settled(fleet)
    assert world.effort() == (10, 0, 0)


@virtual
async def test_what_is_asked_for_in_an_outage_happens_after_it() -> None:
    """Sizes and upgrades asked for while the engine cannot be reached are carried out when it can, without a hurry."""
    world = World()
    async with world.deployed() as fleet:
        world.faults.unavailable(seconds=300.0)
        await fleet.scale(14)
        await anyio.sleep(100)
        await fleet.scale(6)
        before = len(world.events())
        await anyio.sleep(190)
        assert len(world.events()) - before < 200, "attempts come ever more rarely"
        await world.settled(fleet)
        assert len(world.instances) == 6
    assert world.effort() == (10, 4, 0)


@virtual
@pytest.mark.parametrize("action", ["stop", "create", "restart"])
async def test_an_engine_that_refuses_is_asked_ever_more_rarely(action: str) -> None:
    """Refused for an hour, an action is tried a few dozen times, not thousands; then it is done."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        world.faults.refuse(times=None, actions=(action,))  # type: ignore[arg-type]
        before = len(world.events())
        if action == "restart":
            world.faults.hang(world.ids()[0])
        else:
            await fleet.scale(3 if action == "stop" else 5)
        await anyio.sleep(3600)
        assert len(world.events()) - before < 300
        world.faults.allow()
        await anyio.sleep(400)
        await world.settled(fleet)


@virtual
async def test_an_engine_that_never_shows_itself_is_reported() -> None:
    """Opening a fleet on an engine that stays silent fails within its deadline, and leaves nothing behind."""
    world = World(spec(4))
    world.faults.unavailable()
    with pytest.raises(BackendUnavailable, match="no picture"):
        async with world.fleet():
            pass
    assert world.backend.watchers == 0


# ------------------------------------------------------------------------------------------------ nodes


def on_node(world: World, node: str) -> set[str]:
    return {each.id for each in world.instances if each.node == node}


@virtual
@pytest.mark.parametrize("seconds", [20.0, 300.0])
async def test_after_a_partition_each_place_is_filled_once(seconds: float) -> None:
    """Instances cut off are replaced within the budget; when their node is back the old ones go, and none is twice."""
    world = World()
    async with world.deployed() as fleet:
        cut = on_node(world, "node-2")
        world.faults.partition("node-2", seconds=seconds)
        await anyio.sleep(seconds)
        replaced = set(world.backend.stopped)
        await anyio.sleep(5)
        await world.settled(fleet)
        assert replaced <= cut
        assert replaced.isdisjoint(world.ids()), "what was replaced is fenced when it comes back"
        assert cut - replaced <= set(world.ids()), "what was not replaced is kept"
    assert world.watchman.most_disrupted <= 1


@virtual
async def test_a_node_that_is_gone_for_good_is_replaced_elsewhere() -> None:
    """When a node never comes back the fleet is whole again on the others."""
    world = World()
    async with world.deployed() as fleet:
        world.faults.node_down("node-1")
        await anyio.sleep(600)
        assert fleet.status()["good"] == 10
        world.faults.heal("node-1")
        await world.settled(fleet)


@virtual
async def test_when_all_nodes_seem_lost_nothing_is_done() -> None:
    """A fleet of which everything is lost at once is frozen: nearly all of it is left alone, and comes back."""
    world = World()
    async with world.deployed() as fleet:
        before = set(world.ids())
        for node in ("node-1", "node-2", "node-3"):
            world.faults.partition(node, seconds=25.0)
        await anyio.sleep(20)
        assert fleet.status()["frozen"]
        await anyio.sleep(10)
        await world.settled(fleet)
        assert len(before & set(world.ids())) >= 9
    assert world.watchman.most_disrupted <= 1


@virtual
async def test_a_partition_in_mid_rollout_leaves_one_version() -> None:
    """Old instances that were cut off during the upgrade do not outlive it."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(1.0)
        world.faults.partition("node-3", seconds=200.0)
        await anyio.sleep(210)
        await world.settled(fleet)
        assert world.versions == {"2": 10}


# ------------------------------------------------------------------------------------------------ others


@virtual
async def test_what_others_do_is_noticed_and_put_right() -> None:
    """An instance that somebody else removes is created again; one that somebody else adds is taken away."""
    world = World(spec(5))
    async with world.deployed() as fleet:
        gone = world.ids()[2]
        world.watchman._ordered["stop"].add(gone)
        await world.backend.stop(world.name, gone, grace=0)
        await anyio.sleep(5)
        await world.settled(fleet)
        await add_stranger(world, fleet)
        await anyio.sleep(5)
        await world.settled(fleet)
    assert world.effort() == (7, 2, 0)


async def add_stranger(world: World, fleet: Fleet) -> None:
    from agentfleet.backends.base import Creation  # noqa: PLC0415

    assert fleet.state is not None
    world.watchman._ordered["create"].add("stranger")
    await world.backend.create(Creation("stranger", world.name, 3, 1, fleet.state.template))


@virtual
async def test_a_created_instance_that_is_removed_unseen_is_not_missed_for_ever() -> None:
    """Created and deleted while the watch loses events: the next snapshot tells, and the place is filled."""
    world = World(spec(5))
    async with world.deployed() as fleet:
        world.faults.lose_events(10_000)
        await fleet.scale(6)
        await anyio.sleep(1)
        new = next(each.id for each in world.instances if each.slot == 5)
        world.watchman._ordered["stop"].add(new)
        await world.backend.stop(world.name, new, grace=0)
        await anyio.sleep(2)
        world.faults.clear()
        await anyio.sleep(60)
        await world.settled(fleet)
        assert new not in world.ids()
        assert len(world.instances) == 6


@virtual
async def test_slow_creations_are_not_taken_for_lost_ones() -> None:
    """A creation that takes longer than any snapshot's lag is waited for, not repeated."""
    world = World(spec(3))
    async with world.deployed() as fleet:
        world.faults.slow_actions(25.0, times=2, actions=("create",))
        await fleet.scale(5)
        for _ in range(24):
            await anyio.sleep(1)
            world.faults.gap()
        await anyio.sleep(10)
        await world.settled(fleet)
    assert world.effort() == (5, 0, 0)


@virtual
async def test_a_fault_plan_is_survived() -> None:
    """A plan with a bit of everything, ten minutes long, costs the fleet nothing that lasts."""
    kinds = ("crash", "hang", "slow", "unhealthy", "partition", "node_down", "unavailable", "gap", "lose_events")
    plan = FaultPlan(tuple(Fault(60.0 * n, kind, target=n, count=3) for n, kind in enumerate(kinds)))  # type: ignore[arg-type]
    world = World()
    async with world.deployed() as fleet:
        await plan.run(world.backend, world.name, world.clock)
        await world.settled(fleet)
