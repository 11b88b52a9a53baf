"""Rolling a fleet to another revision: good ones arrive, bad ones are taken back, and none of it costs capacity."""

from __future__ import annotations

import anyio
import pytest
from tests.fleet.world import World, prepare, spec

from agentfleet import DeadlineExceeded, Fleet, RecoveryPolicy, RolloutFailed, RolloutPolicy
from agentfleet.testing import virtual

READY = RolloutPolicy(min_ready=20.0)


async def lowest(fleet: Fleet, seconds: float) -> int:
    """The fewest healthy instances seen within so many seconds."""
    least = fleet.status()["good"]
    for _ in range(int(seconds / 0.1)):
        await anyio.sleep(0.1)
        least = min(least, fleet.status()["good"])
    return int(least)


@virtual
async def test_an_upgrade_replaces_every_instance_once() -> None:
    """A good upgrade creates each new instance once, stops each old one once, and restarts none."""
    world = World()
    async with world.deployed() as fleet:
        revision = await fleet.upgrade("2", env={"MODE": "new"})
        assert (revision.number, revision.good, revision.cause) == (2, True, "upgrade")
        await world.settled(fleet)
        assert world.versions == {"2": 10}
    assert world.effort() == (20, 10, 0)


@virtual
@pytest.mark.parametrize(
    ("rollout", "least", "most"),
    [
        (RolloutPolicy(max_surge=1, max_unavailable=0), 10, 11),
        (RolloutPolicy(max_surge=0, max_unavailable=1), 9, 10),
        (RolloutPolicy(max_surge="30%", max_unavailable=0), 10, 13),
        (RolloutPolicy(), 8, 13),
    ],
    ids=["one more", "one fewer", "surge", "default"],
)
async def test_a_rollout_stays_within_its_bounds(rollout: RolloutPolicy, least: int, most: int) -> None:
    """While rolling there are never fewer healthy ones than max_unavailable allows, nor more than the surge."""
    world = World(spec(rollout=rollout, recovery=RecoveryPolicy(max_disrupted="50%")))
    async with world.deployed() as fleet:
        seen: list[tuple[int, int]] = []
        await fleet.upgrade("2", wait=False)
        while fleet.status()["rolling"] or world.versions != {"2": 10}:
            seen.append((fleet.status()["good"], fleet.view.total_counts().total))
            await anyio.sleep(0.05)
        assert min(good for good, _ in seen) >= least
        assert max(total for _, total in seen) <= most
        await world.settled(fleet)


@virtual
@pytest.mark.parametrize("version", ["bad-crash", "bad-sick", "bad-dumb"])
async def test_a_bad_upgrade_is_taken_back(version: str) -> None:
    """Crashing, sick and never ready versions end in RolloutFailed; the fleet runs the old one, and stays with it."""
    world = prepare(World(spec(rollout=READY)))
    async with world.deployed() as fleet:
        old = set(world.ids())
        with pytest.raises(RolloutFailed, match="revision 2 could not be rolled out: .*runs revision 1"):
            await fleet.upgrade(version)
        await world.settled(fleet)
        assert world.versions == {"1": 10}
        assert len(old & set(world.ids())) >= 7, "the old ones that still ran were kept"
        recorded = len(world.events())
        await anyio.sleep(1500)
        assert not [event for event in world.events()[recorded:] if event.kind.startswith("rollout")]
    assert len(world.events("rollout.rolled_back")) == 1
    assert len(world.events("rollout.failed")) == 1


@virtual
async def test_a_bad_upgrade_costs_no_more_than_the_budget_allows() -> None:
    """While a bad version comes and goes, the healthy instances stay above what rollout and budget allow."""
    world = prepare(World(spec(rollout=READY)))
    async with world.deployed() as fleet, anyio.create_task_group() as tasks:

        async def attempt() -> None:
            with pytest.raises(RolloutFailed):
                await fleet.upgrade("bad-crash")

        tasks.start_soon(attempt)
        assert await lowest(fleet, 60) >= 8


@virtual
async def test_a_version_that_falls_sick_after_its_rollout_is_taken_back() -> None:
    """Recovery blames a revision whose instances stay sick, and rolls back to the good one before."""
    world = prepare(World())
    async with world.deployed() as fleet:
        await fleet.upgrade("bad-sick")
        await anyio.sleep(60)
        await world.settled(fleet)
        assert world.versions == {"1": 10}
        assert world.events("recovery.roll_back")
        good = {each.template.version: each.good for each in fleet.revisions()}
        assert good == {"1": True, "bad-sick": False}, "what was found bad is no place to fall back to"
        with pytest.raises(RolloutFailed, match="runs revision 1 "):
            await fleet.upgrade("bad-crash")
        await world.settled(fleet)
        assert world.versions == {"1": 10}


@virtual
async def test_two_bad_revisions_do_not_take_turns() -> None:
    """When the version that is rolled back to does not work any more either, the fleet stays there."""
    world = prepare(World(spec(4, rollout=RolloutPolicy(progress_deadline=60.0))))
    async with world.deployed() as fleet:
        world.backend.behave(version="1", crash_after=1.0)
        with pytest.raises(RolloutFailed):
            await fleet.upgrade("bad-crash")
        await anyio.sleep(3600)
        assert fleet.status()["revision"] == 1
        assert len(world.events("rollout.rolled_back")) == 1
        world.backend.behave(version="1")
        await world.settled(fleet)


@virtual
async def test_without_automatic_rollback_a_failed_rollout_is_held() -> None:
    """With auto_rollback off the mix stays as it is, at full size, until an operator decides."""
    rollout = RolloutPolicy(auto_rollback=False, min_ready=20.0)
    world = prepare(World(spec(rollout=rollout, recovery=RecoveryPolicy(rollback=False))))
    async with world.deployed() as fleet:
        with pytest.raises(RolloutFailed, match="runs revision 2"):
            await fleet.upgrade("bad-crash")
        await anyio.sleep(300)
        assert fleet.status()["revision"] == 2
        assert world.versions["1"] >= 7
        await fleet.rollback()
        await world.settled(fleet)
        assert world.versions == {"1": 10}


@virtual
async def test_a_first_deployment_that_fails_says_so() -> None:
    """With nothing to fall back to the deployment fails within its deadline, and works once the cause is gone."""
    world = prepare(World(spec(4, rollout=RolloutPolicy(min_ready=5.0))))
    world.backend.behave(version="1", crash_after=1.0)
    async with world.fleet() as fleet:
        with pytest.raises(RolloutFailed, match="revision 1 could not be rolled out: .* exited"):
            await fleet.deploy()
        world.backend.behave(version="1")
        await world.settled(fleet)
        assert world.versions == {"1": 4}


@virtual
async def test_rollback_goes_to_any_kept_revision() -> None:
    """Without a number `rollback` goes to the last good revision, with one to any that is kept."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        for version in ("2", "3", "4"):
            await fleet.upgrade(version)
        await fleet.rollback(to=2)
        assert world.versions == {"2": 4}
        await fleet.rollback(to=1)
        assert world.versions == {"1": 4}
        found = await fleet.rollback()
        assert found.template.version == "3", "4 and 2 were left for older ones, so they are not good any more"
        await world.settled(fleet)
        assert world.versions == {"3": 4}


@virtual
async def test_no_progress_ends_in_a_rollback_at_the_deadline() -> None:
    """New instances that cannot be placed are waited for as long as progress_deadline says, and no longer."""
    world = World(spec(4, rollout=RolloutPolicy(max_unavailable=0, progress_deadline=120.0)))
    async with world.deployed() as fleet:
        for node in ("node-1", "node-2", "node-3"):
            world.faults.cordon(node)
        began = world.now
        with pytest.raises(RolloutFailed, match="no progress for 120 s"):
            await fleet.upgrade("2")
        assert world.now - began == pytest.approx(120, abs=15)
        for node in ("node-1", "node-2", "node-3"):
            world.faults.cordon(node, schedulable=True)
        await world.settled(fleet)
        assert world.versions == {"1": 4}


@virtual
@pytest.mark.parametrize("limit", [10, 11])
async def test_an_upgrade_that_the_quota_forbids_is_taken_back(limit: int) -> None:
    """Creations that are refused count as failures: the rollout rolls back and the old instances go on."""
    world = World(spec(rollout=RolloutPolicy(max_surge=3, max_unavailable=0)))
    async with world.deployed() as fleet:
        world.faults.quota(limit)
        if limit == 10:
            with pytest.raises(RolloutFailed, match="exited; 3 are enough"):
                await fleet.upgrade("2", timeout=600)
            assert world.versions["1"] == 10
        else:
            world.faults.refuse(times=3, actions=("create",), reason="no such command")
            with pytest.raises(RolloutFailed):
                await fleet.upgrade("2", timeout=600)
        await world.settled(fleet)
        assert world.versions == {"1": 10}
        assert fleet.status()["good"] == 10


@virtual
async def test_a_deployment_beyond_the_quota_fails_and_completes_when_it_is_lifted() -> None:
    """A first deployment that is refused fails instead of hanging; the size is kept on being asked for."""
    world = World(spec(6))
    world.faults.quota(2)
    async with world.fleet() as fleet:
        with pytest.raises(RolloutFailed):
            await fleet.deploy(timeout=600)
        await anyio.sleep(100)
        assert len(world.instances) == 2
        world.faults.quota(None)
        await world.settled(fleet)
        assert len(world.instances) == 6


@virtual
async def test_the_last_of_several_upgrades_wins() -> None:
    """Upgrades that overtake each other end at the last; the waiter of an earlier one is told."""
    world = World()
    async with world.deployed() as fleet, anyio.create_task_group() as tasks:

        async def overtaken() -> None:
            with pytest.raises(RolloutFailed, match="another revision was asked for"):
                await fleet.upgrade("2")

        tasks.start_soon(overtaken)
        await anyio.sleep(0.7)
        await fleet.upgrade("3")
        await fleet.upgrade("4", wait=False)
        await anyio.sleep(0.7)
        await fleet.upgrade("5")
        await world.settled(fleet)
        assert world.versions == {"5": 10}


@virtual
async def test_a_rollback_in_the_middle_of_an_upgrade_keeps_what_still_runs() -> None:
    """Turning back half-way ends at the old version, and the old instances that were left are kept."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(1.3)
        left = {each.id for each in world.instances if each.version == "1"}
        await fleet.rollback()
        await world.settled(fleet)
        assert world.versions == {"1": 10}
        assert left & set(world.ids())


@virtual
async def test_scaling_while_rolling_ends_at_both() -> None:
    """A size that changes in mid-rollout, up and down, ends at the last size and the new version."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        for size in (20, 3, 14):
            await fleet.scale(size)
            await anyio.sleep(0.8)
        await world.settled(fleet)
        assert world.versions == {"2": 14}


@virtual
async def test_a_stopped_fleet_can_be_upgraded() -> None:
    """An upgrade of a stopped fleet takes effect at its start; a revision that never ran is no proven one."""
    world = prepare(World(spec(4)))
    async with world.deployed() as fleet:
        await fleet.stop()
        await fleet.upgrade("2")
        assert [each.good for each in fleet.revisions()] == [True, False]
        await fleet.start()
        await world.settled(fleet)
        assert world.versions == {"2": 4}
        assert [each.good for each in fleet.revisions()] == [True, True]


@virtual
async def test_waiting_for_an_upgrade_can_time_out() -> None:
    """`timeout` bounds the waiting only: the upgrade goes on to its end."""
    world = World()
    async with world.deployed() as fleet:
        with pytest.raises(DeadlineExceeded, match="revision 2 is rolled out"):
            await fleet.upgrade("2", timeout=0.5)
        await world.settled(fleet)
        assert world.versions == {"2": 10}


@virtual
async def test_a_handful_of_chance_failures_does_not_stop_a_large_rollout() -> None:
    """In a fleet of 100 a few crashes during the rollout are taken for chance."""
    world = World(spec(100))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(4)
        new = [each.id for each in world.instances if each.version == "2" and each.ready]
        assert len(new) > 40
        for id in new[:4]:
            world.faults.crash(id)
        await anyio.sleep(10)
        await world.settled(fleet)
        assert world.versions == {"2": 100}
