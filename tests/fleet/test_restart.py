"""Managers die at any point, and the next one goes on: same end, nothing twice, nothing left, budget kept."""

from __future__ import annotations

import functools
import os
import random
import traceback

import anyio
import pytest
from tests.fleet.world import Plan, World, prepare, scale, spec, workloads

from agentfleet import JournalError, OperationRefused, RecoveryPolicy, RolloutPolicy
from agentfleet.core.recovery import RecoveryMemory
from agentfleet.testing import run_virtual, virtual

REPEATABLE = ("deploy", "scale", "upgrade good", "rollback", "recover", "heal")
"""Workloads whose effort does not depend on how fast things go."""
PLACES = [("write", "after"), ("write", "before"), ("action", "before"), ("action", "after")]


async def life(name: str, plan: Plan, downtime: float) -> tuple[dict[str, object], tuple[int, int, int], Plan]:
    """One workload under one plan: the end state, the effort, and the plan with what it has counted."""
    world = prepare(World(plan=plan))
    digest = await world.live(workloads()[name], downtime=downtime)
    digest.pop("slots")  # which of the places are filled depends on who was there when
    return digest, world.effort(), plan


@functools.cache
def undisturbed(name: str) -> tuple[dict[str, object], tuple[int, int, int], dict[str, int]]:
    """The same workload under one manager that lives."""
    digest, effort, plan = run_virtual(life, name, Plan(), 0.0)
    return digest, effort, dict(plan.counts)


def check_crashes(name: str, at: str, side: str, stride: int, loop: str) -> None:
    """Let the manager die at every `stride`-th write or action, and compare each end with the undisturbed one."""
    wanted, effort, counts = undisturbed(name)
    for number in range(1 + counts[at] % stride, counts[at] + 1, stride):
        downtime = (0.0, 5.0)[number % 2]
        digest, spent, plan = run_virtual(life, name, Plan(at, number, side), downtime, backend=loop)
        where = f"{name}: died {side} {at} {number}"
        assert plan.crashed == 1, where
        assert digest == wanted, where
        if name == "heal":  # what is seen draining may be restarting: its place may be filled again meanwhile
            more = spent[0] - effort[0]
            assert 0 <= more <= 1, where
            assert spent[:2] == (effort[0] + more, effort[1] + more), where
        elif name in REPEATABLE:
            assert spent == effort, f"{where}: created, stopped, restarted {spent} instead of {effort}"


@pytest.mark.parametrize(("at", "side"), PLACES, ids=[f"{side} {at}" for at, side in PLACES])
@pytest.mark.parametrize("name", workloads())
def test_a_manager_may_die_at_any_write_or_action(name: str, at: str, side: str) -> None:
    """Wherever the manager dies, the next one ends where it would have, with the same creations and stops.

    At about eight places; at each place there is with HYPOTHESIS_PROFILE=thorough (many minutes).
    """
    _, _, counts = undisturbed(name)
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    check_crashes(name, at, side, stride=1 if thorough else max(1, counts[at] // 8), loop="asyncio")


@pytest.mark.parametrize("name", REPEATABLE)
def test_a_manager_may_die_on_trio(name: str) -> None:
    """The same law on the other event loop."""
    check_crashes(name, "write", "after", stride=29, loop="trio")


@pytest.mark.parametrize("name", workloads())
def test_managers_may_die_again_and_again(name: str) -> None:
    """Ten managers that each die within the next twenty writes leave no more behind than one."""
    wanted, effort, _ = undisturbed(name)
    rng = random.Random(name)  # seeded: the same deaths each time

    async def main() -> None:
        plan = Plan("write", rng.randint(1, 20), "after", gaps=[rng.randint(1, 20) for _ in range(9)])
        world = prepare(World(plan=plan))
        digest = await world.live(workloads()[name], downtime=1.0)
        digest.pop("slots")
        assert plan.crashed >= 2
        assert digest == wanted
        if name in ("deploy", "scale", "upgrade good", "rollback"):
            assert world.effort()[:2] == effort[:2]

    run_virtual(main)


@virtual
async def test_an_abandoned_manager_lets_the_next_one_go_on() -> None:
    """A manager that is cancelled in mid-rollout leaves it to the next, which ends it."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(0.9)
    mixed = world.versions
    assert set(mixed) == {"1", "2"}
    async with world.fleet() as fleet:
        assert fleet.status()["rolling"]
        await world.settled(fleet)
        assert world.versions == {"2": 10}
    assert world.effort() == (20, 10, 0)
    world.check()


@virtual
async def test_a_long_absence_is_no_lack_of_progress() -> None:
    """While nobody manages the fleet its rollout's deadline stands still: it goes on instead of rolling back."""
    world = World(spec(rollout=RolloutPolicy(progress_deadline=60.0)))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(0.9)
    await anyio.sleep(10_000)
    async with world.fleet() as fleet:
        await world.settled(fleet)
        assert world.versions == {"2": 10}
    assert not world.events("rollout.failed")


@virtual
async def test_a_healthy_fleet_does_not_notice_a_new_manager() -> None:
    """Nothing is created, stopped or restarted when a manager takes over a fleet that is as wanted."""
    world = World()
    async with world.deployed() as fleet:
        await world.settled(fleet)
    for downtime in (0.0, 10.0, 100_000.0):
        await anyio.sleep(downtime)
        async with world.fleet() as fleet:
            await world.settled(fleet)
    assert world.effort() == (10, 0, 0)


@virtual
async def test_what_happened_meanwhile_is_found_and_repaired() -> None:
    """Crashes, hangs and losses while nobody managed the fleet are repaired by the next manager."""
    world = World()
    async with world.deployed() as fleet:
        ids = world.ids()
    world.faults.crash(ids[1])
    world.faults.hang(ids[2])
    await world.backend.__aenter__()  # somebody else removes one
    world.watchman._ordered["stop"].add(ids[3])
    await world.backend.stop(world.name, ids[3], grace=0)
    await world.backend.__aexit__(None, None, None)
    async with world.fleet() as fleet:
        await anyio.sleep(40)
        await world.settled(fleet)
    assert world.effort() == (11, 1, 2)


@virtual
async def test_recovery_goes_on_where_it_was() -> None:
    """Attempts made by an earlier manager count: the ladder is not begun anew by each of its successors."""
    world = World(spec(4, recovery=RecoveryPolicy(restarts=2, replacements=2, elsewhere=0)))
    async with world.deployed():
        world.backend.behave(version="1", crash_after=1.0)
        slot, id = 2, next(each.id for each in world.instances if each.slot == 2)
        world.faults.crash(id)
    for _ in range(40):
        async with world.fleet():
            await anyio.sleep(10)
    remedies = [event.kind for event in world.events() if event.data.get("slot") == slot and "recovery" in event.kind]
    assert remedies[:5] == ["recovery.restart"] * 2 + ["recovery.replace"] * 2 + ["recovery.ask"]
    assert remedies.count("recovery.ask") == 1
    world.check()


@virtual
async def test_a_replacement_inherits_its_history_across_managers() -> None:
    """When the manager dies between the end of an instance and its replacement, the attempts are not forgotten."""
    world = World(spec(6, recovery=RecoveryPolicy(restarts=0, replacements=3)))
    async with world.deployed() as fleet:
        victim = world.instances[0]
        world.faults.refuse(times=None, actions=("create",))
        world.faults.hang(victim.id)
        await anyio.sleep(40)
        assert len(world.instances) == 5
    world.faults.allow()
    async with world.fleet() as fleet:
        assert fleet._runtime.recovery.memory(victim.slot) != RecoveryMemory()
        assert fleet._runtime.recovery.memory(victim.slot).attempts == 1
        await world.settled(fleet)
        assert victim.slot in {each.slot for each in world.instances}


@virtual
async def test_a_disruption_under_way_counts_for_the_next_manager() -> None:
    """What the last manager took out of service uses up the budget of the next one, too."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        first, second, *_ = world.ids()
        world.backend.behave(version="1", start_delay=(30.0, 30.0))
        await fleet.restart(first)
        await anyio.sleep(2)
    async with world.fleet() as fleet:
        await anyio.sleep(2)
        with pytest.raises(OperationRefused, match="1 of 1 allowed"):
            await fleet.restart(second)
        await world.settled(fleet)
        await fleet.restart(second)
        await world.settled(fleet)
    world.check()


@virtual
async def test_a_fleet_that_cannot_record_does_not_act() -> None:
    """When the journal fails the manager stops with its error; it takes no action that is not recorded."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await world.settled(fleet)
    before = world.effort()

    def fail(number: int) -> None:
        raise JournalError("the disk is full")

    with pytest.raises((JournalError, ExceptionGroup)) as raised:  # a group when several loops met it
        async with world.fleet() as fleet:
            await fleet.scale(8)
            world.plan.begin = fail  # type: ignore[method-assign, assignment]
            await anyio.sleep(100)
    assert "the disk is full" in "".join(traceback.format_exception(raised.value))
    assert world.effort() == before


@virtual
async def test_a_stopped_or_paused_fleet_stays_so() -> None:
    """A new manager neither starts a stopped fleet nor resumes a paused rollout."""
    world = World(spec(6))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(0.9)
        await fleet.pause()
        await anyio.sleep(30)
    mixed = world.versions
    async with world.fleet() as fleet:
        await anyio.sleep(100)
        assert world.versions == mixed
        await fleet.stop()
    async with world.fleet() as fleet:
        await anyio.sleep(100)
        assert not world.instances
        await fleet.start(wait=False)
        await fleet.resume()
        await world.settled(fleet)
        assert world.versions == {"2": 6}


@virtual
async def test_a_size_that_was_asked_for_is_kept() -> None:
    """A recorded size outlives the manager that took it; `deploy` of the same spec does not undo it."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await scale(9)(world, fleet)
    async with world.fleet() as fleet:
        await fleet.deploy()
        await world.settled(fleet)
        assert len(world.instances) == 9
