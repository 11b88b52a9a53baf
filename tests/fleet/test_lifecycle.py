"""What an operator does to a fleet, and what it shows, on a cluster where nothing goes wrong."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from pydantic import ValidationError
from tests.fleet.world import EPOCH, TEMPLATE, World, spec

from agentfleet import (
    AgentTemplate,
    DeadlineExceeded,
    Event,
    Fleet,
    MemoryBackend,
    OperationRefused,
    RolloutPolicy,
    ScalingPolicy,
    SpecError,
    SystemClock,
)
from agentfleet.backends.memory import Load
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.testing import run_virtual, virtual


@virtual
async def test_deploy_brings_up_as_many_as_wanted() -> None:
    """After `deploy` exactly the wanted instances exist, each in a slot of its own, each healthy."""
    world = World(spec(10))
    async with world.fleet() as fleet:
        await fleet.deploy()
        assert fleet.status()["good"] == 10
        assert sorted(each.slot for each in world.instances) == list(range(10))
        await world.settled(fleet)
    assert world.effort() == (10, 0, 0)


@virtual
async def test_deploy_again_changes_nothing() -> None:
    """Applying a spec that is applied already creates, stops and rolls out nothing."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.deploy()
        await world.settled(fleet)
        assert len(fleet.revisions()) == 1
    assert world.effort() == (10, 0, 0)


@virtual
async def test_deploying_a_changed_spec_applies_what_changed() -> None:
    """A newer spec's template is rolled out and its size taken over; what it leaves alone stays as operated."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.scale(12)
        await world.settled(fleet)
    world.spec = spec(template=TEMPLATE.replace(version="2"))  # the same size as before: the operator's 12 stay
    async with world.fleet() as fleet:
        await fleet.deploy()
        await world.settled(fleet)
        assert world.versions == {"2": 12}
    world.spec = spec(6, template=TEMPLATE.replace(version="2"))
    async with world.fleet() as fleet:
        await fleet.deploy()
        await world.settled(fleet)
        assert world.versions == {"2": 6}


@virtual
async def test_stop_remembers_the_size_for_start() -> None:
    """A stopped fleet has no instances and wants none; started again it has its last size, not the spec's."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.scale(7)
        await world.settled(fleet)
        await fleet.stop()
        assert not world.instances
        assert fleet.status()["desired"] == 0
        await anyio.sleep(120)
        assert not world.instances
        await fleet.start()
        await world.settled(fleet)
        assert len(world.instances) == 7


@virtual
async def test_stop_drains_even_those_that_are_busy() -> None:
    """Stopping gives each instance its drain time; those that ignore the signal are killed at its end."""
    world = World(spec(3))
    async with world.deployed() as fleet:
        world.faults.ignore_term()
        began = world.now
        await fleet.stop()
        assert world.now - began == pytest.approx(TEMPLATE.drain, abs=0.5)


@virtual
async def test_delete_forgets_the_fleet_and_a_later_deploy_begins_anew() -> None:
    """After `delete` nothing is left and operations are refused; a new deployment never reuses a revision number."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await fleet.upgrade("2")
        await fleet.delete()
        assert not world.instances
        with pytest.raises(OperationRefused, match="deploy"):
            await fleet.scale(3)
        await fleet.deploy()
        await world.settled(fleet)
        assert world.versions == {"1": 4}
        assert [each.number for each in fleet.revisions()] == [3]


@virtual
async def test_a_manager_that_dies_while_deleting_is_succeeded_by_one_that_goes_on() -> None:
    """A deletion that was begun is finished by the next manager: no instance is left behind."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        world.faults.slow_actions(20.0, actions=("stop",))
        with pytest.raises(DeadlineExceeded):
            await fleet.delete(timeout=1.0)
    assert world.backend.count(world.name) == 4
    async with world.fleet() as fleet:
        await anyio.sleep(60)
        assert not world.instances
        with pytest.raises(OperationRefused):
            await fleet.start()


@virtual
async def test_scale_goes_up_and_down() -> None:
    """The size follows the operator; scaling up creates just what is missing, down removes just what is too much."""
    world = World()
    async with world.deployed() as fleet:
        first = set(world.ids())
        await fleet.scale(16)
        await world.settled(fleet)
        assert first < set(world.ids())
        await fleet.scale(4)
        await world.settled(fleet)
        await fleet.scale(0)
        await world.settled(fleet)
        await fleet.scale(1)
        await world.settled(fleet)
    assert world.effort() == (17, 16, 0)


@virtual
async def test_scaling_down_during_slow_creations_leaves_nothing() -> None:
    """A stop never overtakes the creation that it is to undo."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        world.faults.slow_actions(5.0, actions=("create",))
        await fleet.scale(12)
        await anyio.sleep(1.0)
        await fleet.scale(3)
        await anyio.sleep(20.0)
        world.faults.allow()
        await world.settled(fleet)
        assert len(world.instances) == 3


@virtual
async def test_idle_instances_go_before_busy_ones() -> None:
    """A scale-down removes those without work; busy ones only when no idle ones are left."""
    world = World(spec(10, health={"checks": [{"kind": "http", "path": "/status", "period": 2.0}]}))
    async with world.deployed() as fleet:
        busy = world.ids()[3:8]
        for id in busy:
            world.backend.load(Load(in_flight=2), id=id)
        await anyio.sleep(5)
        assert fleet.status()["busy"] == 5
        await fleet.scale(5)
        await world.settled(fleet)
        assert sorted(world.ids()) == sorted(busy)
        await fleet.scale(3)
        await world.settled(fleet)
        assert set(world.ids()) < set(busy)


@virtual
async def test_restart_keeps_the_instance_and_its_place() -> None:
    """An operator's restart ends one process and starts it again under the same id; nothing else is created."""
    world = World()
    async with world.deployed() as fleet:
        id = world.ids()[4]
        await fleet.restart(id)
        assert id not in fleet.endpoints(), "no work is sent to an instance that was told to restart"
        await world.settled(fleet)
        restarted = next(each for each in world.instances if each.id == id)
        assert restarted.restarts == 1
    assert world.effort() == (10, 0, 1)


@virtual
async def test_the_governor_refuses_a_restart_beyond_the_budget() -> None:
    """While one of ten is being restarted a second restart is refused, and says why; afterwards it is admitted."""
    world = World()
    async with world.deployed() as fleet:
        first, second, *_ = world.ids()
        await fleet.restart(first)
        with pytest.raises(OperationRefused, match="1 of 1 allowed"):
            await fleet.restart(second)
        await anyio.sleep(0.1)
        with pytest.raises(OperationRefused, match="1 of 1 allowed"):
            await fleet.restart(second)
        await world.settled(fleet)
        await fleet.restart(second)
        await world.settled(fleet)
    assert world.effort() == (10, 0, 2)
    assert world.watchman.most_disrupted == 1


@virtual
async def test_restart_of_what_is_not_there_is_refused() -> None:
    """An unknown instance, or one that is leaving, cannot be restarted."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        with pytest.raises(OperationRefused, match="unknown"):
            await fleet.restart("nobody")
        world.faults.ignore_term()
        await fleet.scale(3)
        await anyio.sleep(1.0)
        leaving = next(id for id, member in fleet.view.members.items() if member.leaving)
        with pytest.raises(OperationRefused, match="leaving"):
            await fleet.restart(leaving)


@virtual
async def test_pause_holds_a_rollout_and_resume_goes_on() -> None:
    """While paused the mix of revisions does not change, but the size is kept; resumed the rollout ends."""
    world = World()
    async with world.deployed() as fleet:
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(0.9)
        await fleet.pause()
        await anyio.sleep(30)
        mixed = world.versions
        assert mixed["2"]
        assert mixed["1"]
        await anyio.sleep(2000)  # longer than the progress deadline: the clock stands still
        assert world.versions == mixed
        world.faults.crash(world.ids()[0])
        await fleet.scale(sum(mixed.values()) + 2)
        await anyio.sleep(60)
        assert fleet.status()["good"] == sum(mixed.values()) + 2
        await fleet.scale(10)
        await fleet.resume()
        await world.settled(fleet)
        assert world.versions == {"2": 10}


@virtual
async def test_status_counts_and_report_lists_every_instance() -> None:
    """`status`, `report` and what a notebook shows agree with the world."""
    world = World(spec(3))
    async with world.fleet() as fleet:
        assert "not deployed" in repr(fleet)
        assert fleet.status()["desired"] == 0
        assert "0 of 0" in str(fleet.report())
        await fleet.deploy()
        status = fleet.status()
        assert [status[key] for key in ("desired", "good", "idle", "busy", "sick", "dead", "draining")] == [
            3,
            3,
            3,
            0,
            0,
            0,
            0,
        ]
        assert (status["revision"], status["version"], status["rolling"], status["frozen"]) == (1, "1", False, False)
        text, html = str(fleet.report()), fleet._repr_html_()
        assert "3 of 3 healthy, version 1" in text
        for instance in world.instances:
            assert instance.id in text
            assert instance.id in html
        assert html.startswith("<table>")
        assert "3 of 3 healthy" in repr(fleet)
        assert {each.id for each in fleet.instances} == set(world.ids())
        assert await fleet.logs(world.ids()[0])


@virtual
async def test_events_tell_what_happens_in_order() -> None:
    """`events` yields each event from the opening on, in the order of the journal, and all of them from a position."""
    world = World(spec(2))
    seen: list[Event] = []
    async with world.fleet() as fleet:
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                async for event in fleet.events():
                    seen.append(event)
                    if event.kind == "rollout.completed":
                        return

            tasks.start_soon(listen)
            await fleet.deploy()
        kinds = [event.kind for event in seen]
        assert kinds[0] == "fleet.deployed"
        assert kinds.count("instance.created") == kinds.count("instance.ready") == 2
        assert [event.seq for event in seen] == sorted(event.seq for event in seen)
        async for event in fleet.events(after=seen[0].seq):
            assert event.seq == seen[0].seq + 1
            break


@virtual
async def test_revisions_are_kept_and_trimmed() -> None:
    """As many old revisions are kept as the policy says, with the newest good one always among them."""
    world = World(spec(2, rollout=RolloutPolicy(keep_revisions=2)))
    async with world.deployed() as fleet:
        for version in ("2", "3", "4", "5"):
            found = await fleet.upgrade(version)
            assert found.template.version == version
        assert [each.template.version for each in fleet.revisions()] == ["3", "4", "5"]
        with pytest.raises(OperationRefused, match="kept are 3, 4, 5"):
            await fleet.rollback(to=1)


@virtual
@pytest.mark.parametrize("size", [-1, 1_000_001, 10**9, 2.0, "3", None, True], ids=str)
async def test_a_bad_size_is_refused_and_changes_nothing(size: object) -> None:
    """Sizes that are no whole number from 0 to a million are refused by name."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        before = fleet.state
        with pytest.raises(SpecError, match="replicas"):
            await fleet.scale(size)  # type: ignore[arg-type]
        await anyio.sleep(10)
        assert fleet.state == before


@virtual
async def test_a_size_outside_the_scaling_policy_is_refused() -> None:
    """What the autoscaler would undo at once is refused, and the message names the bounds."""
    template = TEMPLATE.replace(cpu=1.0)
    world = World(spec(4, template=template, scaling=ScalingPolicy(min_replicas=2, max_replicas=8)))
    async with world.deployed() as fleet:
        for size in (1, 9):
            with pytest.raises(SpecError, match=r"2\.\.8"):
                await fleet.scale(size)
        assert fleet.status()["desired"] == 4


@virtual
async def test_a_bad_upgrade_request_changes_nothing() -> None:
    """Unknown fields, bad values and upgrades to the same template are refused; no revision is made."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        with pytest.raises(ValidationError, match="cpus"):
            await fleet.upgrade(cpus=2)
        with pytest.raises(ValidationError, match="drain"):
            await fleet.upgrade(drain="soon")
        with pytest.raises(OperationRefused, match="already"):
            await fleet.upgrade("1")
        with pytest.raises(OperationRefused, match="no earlier good revision"):
            await fleet.rollback()
        with pytest.raises(OperationRefused, match="already"):
            await fleet.rollback(to=1)
        with pytest.raises(OperationRefused, match="not kept"):
            await fleet.rollback(to=9)
        assert len(fleet.revisions()) == 1
        await world.settled(fleet)
    assert world.effort() == (2, 0, 0)


@virtual
async def test_nothing_works_before_deploy_or_outside_the_with_block() -> None:
    """Operations on a fleet that is not deployed or not open are refused with the way out."""
    world = World(spec(2))
    fleet = world.fleet()
    with pytest.raises(OperationRefused, match="async with"):
        await fleet.deploy()
    async with fleet:
        for call in (fleet.stop, fleet.start, fleet.pause, fleet.resume, fleet.delete, fleet.upgrade, fleet.rollback):
            with pytest.raises(OperationRefused, match="deploy"):
                await call()
        with pytest.raises(OperationRefused, match="deploy"):
            await fleet.restart("x")
        with pytest.raises(OperationRefused, match="open already"):
            await fleet.__aenter__()
    with pytest.raises(OperationRefused, match="async with"):
        await fleet.deploy()


@virtual
async def test_an_error_in_the_block_leaves_it_as_it_is() -> None:
    """What the user's own code raises inside `async with fleet` comes out as it is, in no exception group."""
    world = World(spec(2))
    with pytest.raises(LookupError, match="mine"):
        async with world.fleet() as fleet:
            await fleet.deploy()
            raise LookupError("mine")


@virtual
async def test_waiting_has_a_deadline_and_the_operation_goes_on() -> None:
    """When `timeout` is over the call says so; what was asked for happens all the same."""
    world = World(spec(3))
    async with world.fleet() as fleet:
        with pytest.raises(DeadlineExceeded, match="it goes on"):
            await fleet.deploy(timeout=0.1)
        await world.settled(fleet)


def test_leaving_the_block_leaves_no_task() -> None:
    """After `async with` the event loop has the tasks that it had before, also when the fleet was busy."""

    async def main() -> None:
        before = len(asyncio.all_tasks())
        clock = SystemClock(EPOCH)
        backend = MemoryBackend(clock=clock)
        async with Fleet(spec(20), backend=backend, journal=MemoryJournal(), clock=clock) as fleet:
            await fleet.deploy()
            await fleet.upgrade("2", wait=False)
            await anyio.sleep(0.7)
        assert len(asyncio.all_tasks()) == before
        assert backend.watchers == 0

    run_virtual(main)


@virtual
async def test_the_same_seed_gives_the_same_life() -> None:
    """Two fleets with the same seed have the same events; ids of another seed differ."""

    async def life(seed: int) -> list[tuple[float, str, str | None]]:
        world = World(spec(3), seed=seed)
        async with world.deployed() as fleet:
            await fleet.scale(5)
            await world.settled(fleet)
        return [(round(event.at, 6), event.kind, event.instance) for event in world.events()]

    start = anyio.current_time()
    one = await life(1)
    assert anyio.current_time() > start
    assert {id for _, _, id in one}.isdisjoint({id for _, _, id in await life(2)} - {None})


def test_one_seed_is_one_history() -> None:
    """The same seed on the same loop gives the same events at the same times."""

    async def life() -> list[str]:
        world = World(spec(5), seed=3)
        async with world.deployed() as fleet:
            await fleet.upgrade("2")
            await fleet.scale(8)
            await world.settled(fleet)
        return [event.to_json() for event in world.events()]

    assert run_virtual(life) == run_virtual(life)


@virtual
async def test_restarted_managers_with_one_seed_never_reuse_an_id() -> None:
    """A manager with its predecessor's seed makes other ids than that one did."""
    world = World(spec(3), seed=5)
    seen: set[str] = set()
    for version in ("1", "2", "3"):
        async with world.fleet() as fleet:
            await fleet.deploy()
            if version != "1":
                await fleet.upgrade(version)
            await world.settled(fleet)
            assert seen.isdisjoint(world.ids())
            seen.update(world.ids())
    world.check()


@virtual
async def test_two_fleets_share_a_cluster_and_a_journal() -> None:
    """Fleets of other names do not disturb each other."""
    clock = SystemClock(EPOCH)
    backend, journal = MemoryBackend(clock=clock), MemoryJournal()
    other = spec(4, name="two", template=AgentTemplate(command=("b",)))
    one = Fleet(spec(3, name="one"), backend=backend, journal=journal, clock=clock)
    two = Fleet(other, backend=backend, journal=journal, clock=clock)
    async with one, two:
        await one.deploy()
        await two.deploy()
        await one.stop()
        assert backend.count("one") == 0
        assert backend.count("two") == 4
