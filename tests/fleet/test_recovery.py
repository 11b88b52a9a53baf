"""Sick instances are healed by the ladder, within the budget, and never by making it worse."""

from __future__ import annotations

from itertools import pairwise

import anyio
import pytest
from tests.fleet.world import HEALTH, World, prepare, spec

from agentfleet import Backoff, HealthPolicy, HttpCheck, RecoveryPolicy, RolloutPolicy
from agentfleet.testing import virtual


@virtual
async def test_a_crashed_instance_is_restarted_in_its_place() -> None:
    """An exit is answered by a restart under the same id, at once; nothing else is touched."""
    world = World()
    async with world.deployed() as fleet:
        id = world.ids()[3]
        world.faults.crash(id)
        await world.settled(fleet, within=10.0)
    assert world.backend.restarted == [id]
    assert world.effort() == (10, 0, 1)
    (recovered,) = world.events("instance.recovered")
    assert recovered.data["seconds"] < 5


@virtual
@pytest.mark.parametrize("fault", ["hang", "unhealthy", "slow"])
async def test_a_sick_instance_is_restarted(fault: str) -> None:
    """One that answers nothing, badly or too late is found by its probes and restarted, and nothing else is done."""
    world = World()
    async with world.deployed() as fleet:
        id = world.ids()[0]
        world.faults.slow(10.0, id) if fault == "slow" else getattr(world.faults, fault)(id)
        await anyio.sleep(30)
        await world.settled(fleet, within=60.0)
    assert world.effort() == (10, 0, 1)


@virtual
async def test_what_was_ready_gets_time_to_be_so_again() -> None:
    """A control plane that was away takes nodes for not ready until it has heard from them: nothing is done."""
    world = World()
    async with world.deployed() as fleet:
        await anyio.sleep(3600)
        assert world.faults.unready(seconds=20.0) == 10
        await anyio.sleep(10)
        assert fleet.status()["good"] < 10, "it is seen"
        await world.settled(fleet, within=60.0)
    assert world.effort() == (10, 0, 0)


@virtual
async def test_who_takes_a_fleet_over_counts_from_what_it_sees_itself() -> None:
    """Nor does it restart at once what was not ready when it came."""
    world = World()
    async with world.deployed():
        await anyio.sleep(3600)
        world.faults.unready(seconds=40.0)
        await anyio.sleep(10)
    async with world.fleet() as fleet:
        await anyio.sleep(10)
        assert fleet.status()["good"] < 10
        await world.settled(fleet, within=60.0)
    assert world.effort() == (10, 0, 0)


@virtual
async def test_what_does_not_get_ready_again_is_restarted() -> None:
    """After a rollout's progress deadline it has failed, however well it answers probes."""
    world = World()
    async with world.deployed() as fleet:
        await anyio.sleep(3600)
        id = world.ids()[0]
        world.faults.unready(id)
        deadline = fleet.spec.rollout.progress_deadline
        await anyio.sleep(deadline - 5)
        assert not world.backend.restarted
        await anyio.sleep(10)
        await world.settled(fleet, within=60.0)
    assert world.backend.restarted == [id]


@virtual
async def test_an_agent_without_progress_is_restarted() -> None:
    """A busy agent that answers well but gets nowhere for `stuck_after` is sick."""
    health = HealthPolicy(checks=(HttpCheck(path="/status", period=5.0),), stuck_after=60.0)
    world = World(spec(4, health=health))
    async with world.deployed() as fleet:
        world.faults.stall(world.ids()[0])
        await anyio.sleep(55)
        assert not world.backend.restarted
        await anyio.sleep(20)
        await world.settled(fleet, within=60.0)
    assert world.effort() == (4, 0, 1)


@virtual
async def test_what_a_restart_does_not_cure_is_replaced() -> None:
    """An ailment that survives restarts is answered by a replacement in the same slot."""
    world = World()
    async with world.deployed() as fleet:
        sick = world.instances[5]
        world.faults.hang(sick.id, sticky=True)
        await anyio.sleep(30)
        await world.settled(fleet)
        assert sick.id not in world.ids()
        assert sick.slot in {each.slot for each in world.instances}
    assert world.effort() == (11, 1, 2)


@virtual
async def test_the_ladder_is_climbed_to_its_end_and_no_further() -> None:
    """Restart, replace, elsewhere, then a call for help, and after it attempts at the back-off's limit."""
    policy = RecoveryPolicy(restarts=2, replacements=1, elsewhere=1, backoff=Backoff(limit=100.0), cooldown=1.0)
    world = World(spec(5, recovery=policy))
    async with world.deployed() as fleet:
        await world.settled(fleet)
        bad, home = world.instances[2].slot, world.instances[2].node
        with anyio.move_on_after(2_000):
            while True:
                for each in world.instances:
                    if each.slot == bad and each.ready:
                        world.faults.crash(each.id)
                await anyio.sleep(1.0)
        mine = [event for event in world.events() if event.data.get("slot") == bad]
        ladder = [event.kind.removeprefix("recovery.") for event in mine if event.kind.startswith("recovery.")]
        assert ladder[:5] == ["restart", "restart", "replace", "elsewhere", "ask"]
        assert set(ladder[5:]) == {"replace"}
        assert len(ladder) <= 5 + 2_000 / 100 + 1
        moved = [event.data["node"] for event in mine if event.kind == "instance.started"]
        assert moved[0] == home
        assert moved[4] != moved[3], "the fourth attempt went to another node"
        await world.settled(fleet)
    assert len(world.events("recovery.ask")) == 1


@virtual
async def test_health_for_long_enough_forgets_the_past() -> None:
    """After `reset_after` of health the next failure begins the ladder anew."""
    world = World(spec(3, recovery=RecoveryPolicy(restarts=1, reset_after=100.0)))
    async with world.deployed() as fleet:
        id = world.ids()[0]
        for _ in range(3):
            world.faults.crash(id)
            await anyio.sleep(150)
        await world.settled(fleet)
    assert world.effort() == (3, 0, 3)


@virtual
async def test_an_instance_that_flaps_is_acted_upon_at_most_once_a_cooldown() -> None:
    """Health that comes and goes at the period of the probes does not feed a restart loop."""
    world = World(spec(5, recovery=RecoveryPolicy(cooldown=120.0)))
    async with world.deployed() as fleet:
        id = world.ids()[0]
        for _ in range(30):
            if id in world.ids():
                world.faults.unhealthy(id, seconds=16.0)
            await anyio.sleep(20)
        await world.settled(fleet)
    times = [e.at for e in world.events("recovery.restart", "recovery.replace") if e.instance == id]
    assert all(later - earlier >= 120 for earlier, later in pairwise(times))


@virtual
async def test_a_storm_freezes_disruption_and_passes() -> None:
    """When nine of ten are sick for two minutes, few are touched meanwhile; the rest get well by themselves."""
    world = World()
    async with world.deployed() as fleet:
        for id in world.ids()[:9]:
            world.faults.unhealthy(id, seconds=120.0, sticky=True)
        await anyio.sleep(25)
        assert fleet.status()["frozen"]
        await anyio.sleep(140)
        await world.settled(fleet)
    touched = {event.instance for event in world.events("recovery.restart", "recovery.replace")}
    assert len(touched) <= 6, "those that fell sick before it was a storm, and one at a time after the cool-down"
    assert world.events("governor.frozen")
    assert world.events("governor.thawed")
    assert world.effort()[0] <= 11


@virtual
async def test_a_short_storm_heals_itself() -> None:
    """When most of the fleet is sick for less than the cool-down, nothing is replaced for it."""
    world = World(spec(20))
    async with world.deployed() as fleet:
        for id in world.ids()[:12]:
            world.faults.unhealthy(id, seconds=30.0)
        await anyio.sleep(60)
        await world.settled(fleet)
    assert world.effort()[:2] == (20, 0)


@virtual
async def test_a_scale_down_waits_for_the_end_of_a_storm_but_a_stop_does_not() -> None:
    """No machine shrinks a fleet in a storm; an operator's stop is obeyed at once."""
    world = World(spec(10, recovery=RecoveryPolicy(cooldown=600.0)))
    async with world.deployed() as fleet:
        world.faults.hang()
        await anyio.sleep(40)
        assert fleet.status()["frozen"]
        with anyio.fail_after(60):
            await fleet.stop()
        assert not world.instances


@virtual
async def test_the_budget_bounds_what_is_disrupted_at_once() -> None:
    """Of thirty with a budget of ten per cent never more than three are being restarted, whatever falls sick."""
    world = World(spec(30, recovery=RecoveryPolicy(max_disrupted="10%")))
    async with world.deployed() as fleet:
        for id in world.ids()[:12]:
            world.faults.hang(id, sticky=True)
        await anyio.sleep(60)
        await world.settled(fleet)
    assert 1 <= world.watchman.most_disrupted <= 3


@virtual
async def test_without_a_budget_nothing_that_runs_is_disrupted() -> None:
    """With max_disrupted 0 sick instances are reported and left alone; what has exited is started again."""
    world = World(spec(4, recovery=RecoveryPolicy(max_disrupted=0)))
    async with world.deployed() as fleet:
        hung, crashed, *_ = world.ids()
        world.faults.hang(hung)
        world.faults.crash(crashed)
        await anyio.sleep(300)
        assert world.backend.restarted == [crashed]
        assert fleet.status()["sick"] == 1
        assert world.events("governor.held")
        world.faults.cure()
        await world.settled(fleet)


@virtual
async def test_what_is_held_back_is_recorded_once() -> None:
    """A remedy that waits for the budget is an event with its reason, and not one each turn."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        world.backend.behave(version="1", start_delay=(40.0, 40.0))
        for id in world.ids()[:2]:
            world.faults.hang(id)
        await anyio.sleep(100)
        held = world.events("governor.held")
        assert [event.reasons[0]["code"] for event in held] == ["governor.budget"]
        await anyio.sleep(300)
        await world.settled(fleet)


@virtual
async def test_a_bad_revision_among_good_ones_is_blamed_and_not_the_instances() -> None:
    """When most of a revision stays sick and nothing helps, the revision is rolled back, exactly once."""
    world = prepare(World(spec(6, recovery=RecoveryPolicy(restarts=1, replacements=0, elsewhere=0, cooldown=10.0))))
    async with world.deployed() as fleet:
        await fleet.upgrade("2")
        world.backend.behave(version="2", crash_after=5.0)
        world.faults.crash(fleet=world.name)
        await anyio.sleep(60)
        await world.settled(fleet)
        assert world.versions == {"1": 6}
    assert len(world.events("recovery.roll_back")) == 1


@virtual
async def test_a_remedy_that_waited_does_not_meet_the_next_instance() -> None:
    """A first remedy that is still held when its place is given up is given up with it."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        world.backend.behave(version="1", start_delay=(40.0, 40.0))
        for id in world.ids()[:2]:
            world.faults.hang(id)
        await anyio.sleep(30)
        (held,) = world.events("governor.held")
        runtime = fleet._runtime
        assert [wish.slot for wish in runtime.recovery.wishes(9)] == [held.data["slot"]]
        runtime.turn.repair.forget(held.data["slot"])
        assert not runtime.recovery.wishes(9)
        world.faults.cure()
        await anyio.sleep(300)
        await world.settled(fleet)


@virtual
async def test_one_that_never_gets_going_is_replaced() -> None:
    """An instance that finds no place, long after the last rollout, is a case once it is late, and not before."""
    world = World(spec(3, rollout=RolloutPolicy(progress_deadline=120.0)))
    async with world.deployed() as fleet:
        world.backend.behave(version="1", start_delay=(1e6, 1e6))
        await fleet.scale(4)
        await anyio.sleep(110)
        assert not world.events("recovery.replace")
        assert not world.events("recovery.elsewhere")
        world.backend.behave(version="1", start_delay=(1.0, 1.0))
        await anyio.sleep(30)
        await world.settled(fleet)
        (elsewhere,) = world.events("recovery.elsewhere")
        assert elsewhere.reasons[0]["code"] == "recovery.late"


@virtual
async def test_a_fleet_beyond_healing_is_not_tried_for_ever_at_full_rate() -> None:
    """Twenty crash loops are left to a human; then all of them together make no more attempts than the budget's few."""
    recovery = RecoveryPolicy(max_disrupted=2, backoff=Backoff(initial=1.0, limit=60.0), freeze_below=0.0)
    world = World(spec(20, recovery=recovery))
    async with world.deployed():
        world.backend.behave(version="1", crash_after=1.0)
        world.faults.crash(fleet=world.name)
        await anyio.sleep(3_000)
        assert len(world.events("recovery.ask")) == 20
        before = sum(world.effort()[1:])
        await anyio.sleep(6_000)
        attempts = sum(world.effort()[1:]) - before
        assert 0 < attempts <= 2 * (6_000 / 60) * 2 + 20


@virtual
async def test_no_healthy_instance_is_given_for_a_sick_one() -> None:
    """When nothing new can be placed, healing evicts nobody: the healthy ones stay as they are."""
    world = World(spec(6, health=HEALTH, recovery=RecoveryPolicy(restarts=1, replacements=1)))
    async with world.deployed() as fleet:
        for node in ("node-1", "node-2", "node-3"):
            world.faults.cordon(node)
        sick = world.ids()[0]
        well = set(world.ids()) - {sick}
        world.faults.hang(sick, sticky=True)
        await anyio.sleep(2_000)
        assert well <= set(world.ids())
        assert fleet.status()["good"] == 5
        assert world.effort()[0] <= 6 + 2_000 / 60
        for node in ("node-1", "node-2", "node-3"):
            world.faults.cordon(node, schedulable=True)
        await world.settled(fleet)


@virtual
async def test_a_slow_starter_is_given_its_time() -> None:
    """After a restart an agent that needs three minutes has them, as the health policy says."""
    health = HealthPolicy(checks=(HttpCheck(period=5.0, timeout=2.0),), startup=600.0)
    world = World(spec(3, health=health, rollout=RolloutPolicy(progress_deadline=900.0)))
    async with world.deployed() as fleet:
        world.backend.behave(version="1", start_delay=180.0)
        world.faults.crash(world.ids()[0])
        await anyio.sleep(400)
        await world.settled(fleet)
        assert sum(world.effort()[1:]) == 1


@virtual
async def test_a_lost_node_is_no_fault_of_the_new_version() -> None:
    """A machine that goes down in the middle of an upgrade takes new instances with it; the upgrade goes on."""
    world = prepare(World(spec(12, rollout=RolloutPolicy(max_failed=2))))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(8)
        world.faults.node_down("node-1")
        await anyio.sleep(600)
        world.faults.heal("node-1")
        await world.settled(fleet)
        assert world.versions == {"2": 12}
        assert not world.events("rollout.rolled_back")


@virtual
async def test_where_not_to_go_is_remembered_through_a_refused_create() -> None:
    """A replacement elsewhere that is refused once still keeps away from the node that it fled."""
    recovery = RecoveryPolicy(restarts=0, replacements=0, elsewhere=1)
    world = World(spec(1, health=HEALTH, recovery=recovery), nodes=2)
    async with world.deployed() as fleet:
        (before,) = fleet.instances
        world.faults.refuse(times=1, actions=("create",))
        world.faults.hang(before.id, sticky=True)
        await anyio.sleep(120)
        await world.settled(fleet)
        (after,) = fleet.instances
        assert after.node != before.node


@virtual
async def test_one_failure_counts_once_however_many_managers_see_it() -> None:
    """Managers that come and go during a rollout do not add up one sick instance to a failed version."""
    recovery = RecoveryPolicy(restarts=0, replacements=0, elsewhere=0, rollback=False)
    rollout = RolloutPolicy(min_ready=300.0, progress_deadline=3_000.0)
    world = prepare(World(spec(4, health=HEALTH, recovery=recovery, rollout=rollout)))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(30)
        world.faults.hang(next(each.id for each in fleet.instances if each.version == "2"), sticky=True)
        await anyio.sleep(40)
        assert fleet.state is not None
        assert fleet.state.failures == 1
    for _ in range(3):
        async with world.fleet() as fleet:
            await anyio.sleep(40)
            assert fleet.state is not None
            assert fleet.state.failures == 1
