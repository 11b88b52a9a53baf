"""What the face of a fleet answers to wrong, early, late and repeated requests, on a simulated cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from tests.fleet.world import World, spec

from agentfleet import (
    DeadlineExceeded,
    Fleet,
    MemoryBackend,
    MetricTarget,
    OperationRefused,
    QueueTarget,
    RolloutPolicy,
    ScalingPolicy,
    SpecError,
)
from agentfleet.core.scaling_samples import Total
from agentfleet.testing import virtual

NODES = ("node-1", "node-2", "node-3")

# ------------------------------------------------------------------------------------------------ deleting and stopping


@virtual
async def test_a_deletion_can_be_awaited_again() -> None:
    """While a node is cut off a deletion does not end; awaited again it goes on, and once done it is done at once."""
    world = World(spec(3))
    async with world.deployed() as fleet:
        for node in NODES:
            world.faults.partition(node)
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="all instances are gone"):
                await fleet.delete(timeout="30s")
        for node in NODES:
            world.faults.heal(node)
        await fleet.delete()
        assert not world.instances
        await fleet.delete(timeout=0)
    assert len(world.events("fleet.deleted")) == 1, "it was asked for once"


@virtual
async def test_a_deletion_that_is_overtaken_says_so() -> None:
    """Whoever waits for the end of instances is told when others are wanted, instead of waiting for ever."""
    world = World(spec(3))
    async with world.deployed() as fleet:
        for node in NODES:
            world.faults.partition(node)
        for end, begin in ((fleet.stop, fleet.start), (fleet.delete, fleet.deploy)):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(refused, end, "again before all instances were gone")
                await anyio.sleep(1)
                await begin(wait=False)


# ------------------------------------------------------------------------------------------------ before, after, again


async def refused(call: Callable[[], Awaitable[object]], match: str) -> None:
    with pytest.raises(OperationRefused, match=match):
        await call()


@virtual
async def test_a_fleet_that_is_not_open_has_nothing_to_wait_for() -> None:
    """`ready`, `events` and `logs` say what to do before the opening and after the end; nothing waits for ever."""
    world = World(spec(2))
    fleet = world.fleet()
    calls = (fleet.ready, lambda: anext(fleet.events()), lambda: fleet.logs("a-0"), fleet.delete)
    for call in calls:
        await refused(call, "not open; use it inside 'async with")
    async with fleet:
        await refused(fleet.ready, r"not deployed; await fleet.deploy\(\) first")
        await fleet.deploy()
        await fleet.ready()
    for call in calls:
        await refused(call, "is closed, and a Fleet opens only once; make a new one")


@virtual
async def test_a_fleet_opens_once() -> None:
    """A closed fleet is not opened again; a new one on its journal and backend goes on where it was."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        pass
    await refused(fleet.__aenter__, "make a new one")
    async with world.fleet() as fleet:
        await fleet.ready(timeout=60)
        assert fleet.status()["good"] == 2


@virtual
async def test_who_waits_in_another_task_is_told_of_the_end() -> None:
    """Leaving the fleet ends every waiting for it."""
    world = World(spec(2))
    async with anyio.create_task_group() as tasks, world.deployed() as fleet:
        for node in NODES:
            world.faults.cordon(node)
        await fleet.scale(3)
        await anyio.sleep(1)
        tasks.start_soon(refused, fleet.ready, "closed before all instances are healthy")
        await anyio.sleep(1)


# ------------------------------------------------------------------------------------------------ timeouts

WAITERS: dict[str, Callable[[Fleet, Any], Awaitable[object]]] = {
    "deploy": lambda fleet, timeout: fleet.deploy(timeout=timeout),
    "upgrade": lambda fleet, timeout: fleet.upgrade("9", timeout=timeout),
    "rollback": lambda fleet, timeout: fleet.rollback(to=1, timeout=timeout),
    "stop": lambda fleet, timeout: fleet.stop(timeout=timeout),
    "start": lambda fleet, timeout: fleet.start(timeout=timeout),
    "delete": lambda fleet, timeout: fleet.delete(timeout=timeout),
    "ready": lambda fleet, timeout: fleet.ready(timeout=timeout),
    "configure": lambda fleet, timeout: fleet.configure({"x": 1}, timeout=timeout),
}


@virtual
@pytest.mark.parametrize("name", WAITERS)
async def test_a_wrong_timeout_changes_nothing(name: str) -> None:
    """What is no time span is refused by name before anything is done; durations in words are taken."""
    world = World(spec(2))
    async with world.deployed() as fleet:
        await fleet.upgrade("2", timeout="1m30s")
        before, events = fleet.state, len(world.events())
        for wrong in ("soon", "-1s", -1, True, float("nan"), float("inf"), [30]):
            with pytest.raises(SpecError, match="timeout: write a duration like"):
                await WAITERS[name](fleet, wrong)
        assert fleet.state == before
        assert len(world.events()) == events
        assert await fleet.config.keys() == []
        await WAITERS[name](fleet, "5m")


@virtual
async def test_one_timeout_bounds_the_whole_deployment() -> None:
    """A deployment's `timeout` counts from the call, whatever there is to wait for."""
    world = World(spec(3))
    world.backend.behave(never_ready=True)
    async with world.fleet() as fleet:
        began = world.now
        with pytest.raises(DeadlineExceeded, match="waited 10 s until revision 1 is rolled out and all"):
            await fleet.deploy(timeout=10)
        assert world.now - began == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("wrong", [0, -1, "often", None, True], ids=repr)
def test_a_wrong_usage_period_is_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match="usage_period"):
        Fleet(spec(1), backend=MemoryBackend(), usage_period=wrong)


# ------------------------------------------------------------------------------------------------ metrics


def scaled_on(*targets: QueueTarget | MetricTarget) -> ScalingPolicy:
    return ScalingPolicy(min_replicas=1, max_replicas=9, targets=targets)


def test_a_metric_without_a_source_is_refused_when_the_fleet_is_made() -> None:
    """A target that could never be read is an error that names the metric and the fix; "queue" is built in."""
    for target, name in ((MetricTarget(metric="lag", average=3), "lag"), (QueueTarget(length=3, source="q"), "q")):
        wanted = spec(2, scaling=scaled_on(target))
        with pytest.raises(SpecError, match=f"metric '{name}', which has no source.*metrics={{'{name}': source}}"):
            Fleet(wanted, backend=MemoryBackend())
        Fleet(wanted, backend=MemoryBackend(), metrics={name: lambda: 3.0})
    Fleet(spec(2, scaling=scaled_on(QueueTarget(length=3))), backend=MemoryBackend())


@virtual
async def test_the_queue_of_several_dispatchers_is_added_up() -> None:
    """Each open dispatcher counts, and closing one takes away its own tasks alone."""
    async with World(spec(2)).fleet() as fleet:
        queue: Callable[[], object] = fleet._runtime.meter.sources["queue"]
        async with fleet.dispatcher() as outer:
            for number in range(3):
                outer.submit_nowait(f"outer-{number}", number)
            async with fleet.dispatcher() as inner:
                assert inner.depth == 0, "the other one's tasks are not taken up"
                inner.submit_nowait("inner", None)
                assert queue() == Total.of(4)
            assert queue() == Total.of(3)
        assert queue() != Total.of(3)


# ------------------------------------------------------------------------------------------------ pausing


@virtual
async def test_a_paused_fleet_takes_a_revision_on_and_stays_paused() -> None:
    """An upgrade of a paused fleet returns at once, says so in its event, and is rolled out by `resume`."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await fleet.pause()
        found = await fleet.upgrade("2", timeout=1)
        assert (found.number, found.good) == (2, False)
        await anyio.sleep(600)
        assert world.versions == {"1": 4}
        assert world.events("rollout.started")[-1].data["paused"] is True
        await fleet.deploy(timeout=60)  # a manager that comes back does so
        assert world.versions == {"1": 4}
        await fleet.resume()
        await world.settled(fleet)
        assert world.versions == {"2": 4}
        await fleet.upgrade("3")
        assert world.events("rollout.started")[-1].data["paused"] is False


@virtual
async def test_a_paused_fleet_does_not_roll_back() -> None:
    """A rollback would lift the pause, so it is refused with the way out, and nothing is changed."""
    world = World(spec(4))
    async with world.deployed() as fleet:
        await fleet.upgrade("2")
        await fleet.pause()
        before = fleet.state
        await refused(fleet.rollback, r"is paused.*await fleet.resume\(\) first")
        assert fleet.state == before
        await fleet.resume()
        await fleet.rollback()
        assert world.versions == {"1": 4}


@virtual
async def test_recovery_that_gives_a_revision_up_ends_a_pause() -> None:
    """A pause holds what operators ask for; it does not keep a fleet on a revision that does not work."""
    world = World(spec(4))
    world.backend.behave(version="2", unhealthy_after=30.0)
    async with world.deployed() as fleet:
        await fleet.upgrade("2")
        await fleet.pause()
        await anyio.sleep(900)
        assert world.events("recovery.roll_back")
        await world.settled(fleet)
        assert world.versions == {"1": 4}


@virtual
async def test_a_pause_in_the_middle_prolongs_the_wait() -> None:
    """Who waits for an upgrade waits through a pause, and is answered when the upgrade is over."""
    world = World(spec(4))
    async with world.deployed() as fleet, anyio.create_task_group() as tasks:

        async def pause() -> None:
            await anyio.sleep(0.9)
            await fleet.pause()
            await anyio.sleep(100)
            await fleet.resume()

        began = world.now
        tasks.start_soon(pause)
        assert (await fleet.upgrade("2")).good
        assert world.now - began > 100


# ------------------------------------------------------------------------------------------------ a foreign backend


@virtual
async def test_an_error_of_a_foreign_backend_is_a_failed_action(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend should not raise is journaled as a failed action and measured as unknown; the fleet goes on."""
    world = World(spec(3, rollout=RolloutPolicy(progress_deadline=300.0)), usage_period=5.0)
    troubles = 3
    create = world.backend.create

    async def broken(*_: object, **__: object) -> Any:
        raise KeyError("pod")

    async def sometimes(creation: Any) -> None:
        nonlocal troubles
        if troubles:
            troubles -= 1
            await broken()
        await create(creation)

    monkeypatch.setattr(world.backend, "create", sometimes)
    monkeypatch.setattr(world.backend, "usage", broken)
    async with world.fleet() as fleet:
        await fleet.deploy()
        await world.settled(fleet)
    failed = world.events("action.failed")
    assert [event.data["error"] for event in failed] == ["BackendError"] * 3
    assert "the backend raised KeyError" in failed[0].data["message"]
    assert len(world.events("usage.failed")) == 1


def test_an_argument_of_the_wrong_kind_is_named_at_once() -> None:
    """Nothing is made of what cannot work."""
    wrong: list[dict[str, Any]] = [{"backend": "process"}, {"journal": "x"}, {"clock": 3}, {"metrics": [1]}]
    for arguments in wrong:
        (name,) = arguments
        with pytest.raises(SpecError, match=name):
            Fleet(spec(1), **{"backend": MemoryBackend(), **arguments})
