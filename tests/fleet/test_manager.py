"""Managers of many fleets: whoever is asked, the leader does it; whoever dies, another goes on; nothing twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Self

import anyio
import pytest
from tests.fleet.managers import QUICK, Platform, until
from tests.fleet.world import Crash, spec

from agentfleet import (
    AgentTemplate,
    BackendUnavailable,
    Conflict,
    CpuTarget,
    DeadlineExceeded,
    Fleet,
    JournalError,
    MemoryBackend,
    MemoryJournal,
    NotFound,
    OperationRefused,
    Phase,
    RolloutPolicy,
    ScalingPolicy,
    SpecError,
)
from agentfleet.core.sharing import SharingPolicy
from agentfleet.events import Event
from agentfleet.manager import FleetManager
from agentfleet.operations import Caller, Kind, Operation, Status
from agentfleet.stores.fleets import Picture
from agentfleet.testing import run_virtual, virtual

ENDED = (Status.SUCCEEDED, Status.FAILED)


def idle(manager: FleetManager) -> bool:
    """Whether it has no fleet open."""
    return not manager.health().leads and not manager.health().stands_by


@virtual
async def test_whoever_is_asked_the_leader_does_it() -> None:
    there = Platform()
    async with there.manager("m1") as first, there.manager("m2") as second:
        created = await first.create(spec(4), by=Caller("ann", "10.0.0.1", "k1"))
        assert (created.kind, created.status) == (Kind.CREATE, Status.ACCEPTED)
        done = await second.finished(created.id, timeout="5m")
        assert (done.status, done.outcome["revision"]) == (Status.SUCCEEDED, 1)
        story: list[tuple[Kind, dict[str, Any], dict[str, Any]]] = [
            (Kind.SCALE, {"replicas": 6}, {"replicas": 6}),
            (Kind.DEPLOY, {"version": "2"}, {"revision": 2, "version": "2"}),
            (Kind.ROLLBACK, {}, {"revision": 1, "version": "1"}),
            (Kind.DEPLOY, {"changes": {"env": {"MODE": "fast"}}}, {"revision": 3, "version": "1"}),
            (Kind.STOP, {}, {}),
            (Kind.START, {}, {}),
            (Kind.PAUSE, {}, {}),
            (Kind.RESUME, {}, {}),
        ]
        for number, (kind, arguments, outcome) in enumerate(story):
            asked, other = (first, second) if number % 2 else (second, first)
            operation = await asked.request("a", kind, arguments)
            done = await other.finished(operation.id, timeout="10m")
            assert done.status is Status.SUCCEEDED, done
            assert {**outcome, "begun": True} == dict(done.outcome)
        victim = (await first.instances("a"))[0].instance_id
        done = await there.ask(second, Kind.RESTART, instance=victim)
        assert done.status is Status.SUCCEEDED
        assert [each.kind for each in await first.operations("a", limit=2)] == [Kind.RESTART, Kind.RESUME]
        leading = [each for each in (first, second) if each.health().leads]
        assert len(leading) == 1
        await until(lambda: there.store.status(done.fleet)["good"] == 6)
        record = await second.get("a")
        assert (record.status["good"], record.status["phase"], record.status["version"]) == (6, "running", "1")
        assert record.status["leader"] == leading[0].identity
        done = await there.ask(first, Kind.DELETE)
        assert done.status is Status.SUCCEEDED
        for each in (first, second):
            with pytest.raises(NotFound):
                await each.get("a")
            await until(partial(idle, each))
        assert (await second.operation(done.id)).status is Status.SUCCEEDED


@virtual
async def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    there = Platform()
    policy = ScalingPolicy(min_replicas=2, max_replicas=5, targets=(CpuTarget(utilization=50),))
    wanted = spec(3, template=AgentTemplate(command=("agent",), cpu="1"), scaling=policy)
    async with there.manager() as manager:
        await manager.finished((await manager.create(wanted)).id)
        before = (await manager.operations("a"), await manager.get("a"))
        with pytest.raises(OperationRefused, match="already"):
            await manager.create(wanted)
        bad: list[tuple[Kind, dict[str, Any], str]] = [
            (Kind.SCALE, {"replicas": 9}, "max_replicas"),
            (Kind.SCALE, {"replicas": -1}, "replicas"),
            (Kind.SCALE, {"replicas": "many"}, "replicas"),
            (Kind.SCALE, {}, "replicas"),
            (Kind.SCALE, {"replicas": 3, "wait": True}, "wait"),
            (Kind.DEPLOY, {}, "version"),
            (Kind.DEPLOY, {"changes": {"colour": "red"}}, "colour"),
            (Kind.DEPLOY, {"changes": {"cpu": "lots"}}, "cpu"),
            (Kind.ROLLBACK, {"revision": 0}, "revision"),
            (Kind.ISOLATE, {"instance": "x"}, "reason"),
            (Kind.RESTART, {}, "instance"),
            (Kind.CREATE, {}, "kind"),
        ]
        for kind, arguments, named in bad:
            with pytest.raises(SpecError, match=named):
                await manager.request("a", kind, arguments)
        for call in (manager.get, manager.instances, manager.operations):
            with pytest.raises(NotFound, match="b"):
                await call("b")
        with pytest.raises(NotFound):
            await manager.request("b", Kind.PAUSE)
        with pytest.raises(Conflict, match="generation 1"):
            await manager.apply("a", wanted.replace(replicas=4), expect=7)
        with pytest.raises(SpecError, match="name"):
            await manager.apply("a", wanted.replace(name="b"))
        after = (await manager.operations("a"), await manager.get("a"))
        assert after[0] == before[0]
        assert (after[1].spec, after[1].generation) == (before[1].spec, 1)
        for kind, arguments, error in (
            (Kind.ROLLBACK, {}, "OperationRefused"),
            (Kind.ROLLBACK, {"revision": 12}, "OperationRefused"),
            (Kind.RESTART, {"instance": "nobody"}, "OperationRefused"),
        ):
            done = await there.ask(manager, kind, **arguments)
            assert (done.status, done.outcome["error"]) == (Status.FAILED, error), "known to the leader alone"
            assert done.outcome["message"]
        with pytest.raises(DeadlineExceeded, match="goes on"):
            await manager.finished((await manager.request("a", Kind.SCALE, {"replicas": 5})).id, timeout=0.01)


@virtual
async def test_another_spec_is_taken_on_with_the_instances_that_there_are() -> None:
    there = Platform()
    async with there.manager() as manager:
        await manager.finished((await manager.create(spec(3))).id)
        before = {row.instance_id for row in await manager.instances("a")}
        calmer = spec(3, rollout=RolloutPolicy(max_surge=1, max_unavailable=0))
        done = await manager.finished((await manager.apply("a", calmer, expect=1)).id)
        assert done.status is Status.SUCCEEDED
        fleet = manager.fleet((await manager.get("a")).id)
        assert fleet is not None
        assert fleet.spec == calmer
        assert {each.id for each in fleet.instances} == before, "only a policy has changed"
        several = [await manager.apply("a", spec(size)) for size in (4, 5, 6)]
        ends = [await manager.finished(each.id) for each in several]
        assert ends[-1].status is Status.SUCCEEDED
        assert all(each.status in ENDED for each in ends)
        await anyio.sleep(2)
        record = await manager.get("a")
        assert (record.generation, record.status["good"]) == (5, 6)


@virtual
async def test_the_spec_that_is_applied_is_what_runs_whatever_was_deployed_before() -> None:
    there = Platform()
    async with there.manager() as manager:
        await manager.finished((await manager.create(spec(3))).id)
        assert (await manager.get("a")).wanted == spec(3)
        await there.ask(manager, Kind.DEPLOY, version="5")
        await there.ask(manager, Kind.SCALE, replicas=4)
        record = await manager.get("a")
        assert (record.wanted.template.version, record.wanted.replicas) == ("5", 4)
        assert record.spec == spec(3), "what was applied last"
        done = await manager.finished((await manager.apply("a", spec(3))).id)
        assert (done.status, done.outcome["version"], done.outcome["revision"]) == (Status.SUCCEEDED, "1", 3)
        fleet = manager.fleet(done.fleet)
        assert fleet is not None
        assert [each.version for each in fleet.instances if each.phase is not Phase.DRAINING] == ["1"] * 3
        assert (await manager.get("a")).wanted == spec(3)
        await there.ask(manager, Kind.DEPLOY, version="6")
        wanted = (await manager.get("a")).wanted
        before = {row.instance_id for row in await manager.instances("a")}
        done = await manager.finished((await manager.apply("a", wanted.replace(rollout=RolloutPolicy(max_surge=1)))).id)
        assert (done.status, done.outcome["version"], done.outcome["revision"]) == (Status.SUCCEEDED, "6", 4)
        fleet = manager.fleet(done.fleet)
        assert fleet is not None
        assert {each.id for each in fleet.instances} == before, "what runs already is not rolled out again"
        await there.ask(manager, Kind.ROLLBACK, revision=3)
        assert (await manager.get("a")).wanted.template.version == "1"


@virtual
async def test_what_a_paused_or_stopped_fleet_took_on_is_held_and_not_said_to_be_rolled_out() -> None:
    there = Platform()
    async with there.manager() as manager:
        await manager.finished((await manager.create(spec(3))).id)
        for hold, go_on, version in ((Kind.PAUSE, Kind.RESUME, "2"), (Kind.STOP, Kind.START, "3")):
            await there.ask(manager, hold)
            done = await there.ask(manager, Kind.DEPLOY, version=version)
            assert (done.status, done.outcome.get("held"), done.outcome["version"]) == (
                Status.SUCCEEDED,
                True,
                version,
            )
            fleet = manager.fleet(done.fleet)
            assert fleet is not None
            assert version not in {each.version for each in fleet.instances}
            await there.ask(manager, go_on)
            await fleet.rolled_out(done.outcome["revision"])
            assert version in {each.version for each in fleet.instances}
        await there.ask(manager, Kind.PAUSE)
        applied = await manager.finished((await manager.apply("a", spec(3))).id)
        assert (applied.status, applied.outcome.get("held")) == (Status.SUCCEEDED, True)
        await there.ask(manager, Kind.RESUME)
        assert "held" not in (await there.ask(manager, Kind.DEPLOY, version="4")).outcome


@virtual
async def test_the_size_of_a_fleet_with_an_autoscaler_is_no_part_of_its_spec() -> None:
    there = Platform()
    policy = ScalingPolicy(min_replicas=2, max_replicas=8, targets=(CpuTarget(utilization=50),))
    wanted = spec(2, template=AgentTemplate(command=("agent",), cpu="1"), scaling=policy)
    async with there.manager() as manager:
        await manager.finished((await manager.create(wanted)).id)
        await there.ask(manager, Kind.SCALE, replicas=5)
        fleet = manager.fleet((await manager.get("a")).id)
        assert fleet is not None
        assert (await manager.get("a")).wanted == wanted
        done = await manager.finished((await manager.apply("a", wanted)).id)
        assert done.status is Status.SUCCEEDED
        assert fleet.status()["desired"] == 5, "and what is applied does not set it back"


@virtual
async def test_a_leader_dies_amid_a_rollout_and_another_ends_the_operation() -> None:
    there = Platform()
    async with there.managers() as managers:
        first = await managers.start("m1")
        await first.finished((await first.create(spec(8))).id)
        second = await managers.start("m2")
        deploy = await second.request("a", Kind.DEPLOY, {"version": "2"})
        await until(lambda: bool(there.store.kept(deploy.id).outcome.get("begun")))
        managers.kill("m1")
        done = await second.finished(deploy.id, timeout="10m")
        assert (done.status, done.outcome["revision"]) == (Status.SUCCEEDED, 2)
        assert done.epoch > 1
        fleet = second.fleet(done.fleet)
        assert fleet is not None
        assert {each.version for each in fleet.instances if each.phase is not Phase.DRAINING} == {"2"}
        assert there.kinds("rollout.started") == ["rollout.started"], "it goes on, and is not begun again"


async def story(there: Platform) -> list[Operation]:
    """A life of one fleet, asked for by people who ask again when nobody answers; managers come back when they die."""
    asked: list[Operation] = []
    done = anyio.Event()

    async def keep_managing() -> None:
        for number in range(100):
            try:
                async with there.manager(f"m{number}"):
                    await done.wait()
            except Crash:
                continue
            return

    async def people() -> None:
        async def ask(key: str, kind: Kind, **arguments: Any) -> Operation:
            front = FleetManager(there.store, backend=there.backend, journal=there.journal, clock=there.clock)
            by = Caller("ann", key=key)
            if kind is Kind.CREATE:
                operation = await front.create(spec(3), by=by)
            else:
                operation = await front.request("a", kind, arguments, by=by)
            await until(lambda: not there.store.kept(operation.id).open, 900)
            asked.append(there.store.kept(operation.id))
            return asked[-1]

        await ask("1", Kind.CREATE)
        await ask("2", Kind.SCALE, replicas=5)
        await ask("3", Kind.DEPLOY, version="2")
        record = await there.store.find("a")
        await until(lambda: len(there.store.seen(record.id)) == 5)
        await ask("4", Kind.RESTART, instance=there.store.seen(record.id)[0])
        await ask("5", Kind.ROLLBACK)
        await ask("6", Kind.DELETE)
        done.set()

    async with there.backend, anyio.create_task_group() as tasks:
        tasks.start_soon(keep_managing)
        await people()
    return asked


def told(operations: list[Operation]) -> list[tuple[Kind, Status, int | None]]:
    return [(each.kind, each.status, each.outcome.get("revision")) for each in operations]


def effort(there: Platform) -> dict[str, int]:
    """What happened to the fleet, whoever managed it."""
    kinds = [each.kind for each in there.journal.read()]
    return {
        kind: kinds.count(kind) for kind in ("rollout.started", "rollout.completed", "fleet.scaled", "fleet.deleted")
    }


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_manager_may_die_at_any_write_about_an_operation(side: str) -> None:
    calm = Platform()
    wanted = told(run_virtual(story, calm))
    assert {status for _, status, _ in wanted} == {Status.SUCCEEDED}
    restarts = calm.kinds("recovery.restart").count("recovery.restart")
    for number in range(1, calm.store.writes + 1):
        there = Platform()
        there.store.dies_at = (number, side)
        found = told(run_virtual(story, there))
        assert there.store.died == 1
        unknown = [replace_status(each) for each in found]
        assert unknown == wanted, (number, side)
        assert effort(there) == effort(calm), (number, side)
        assert there.kinds("recovery.restart").count("recovery.restart") <= restarts, "nothing is done twice"


def replace_status(each: tuple[Kind, Status, int | None]) -> tuple[Kind, Status, int | None]:
    """A restart whose manager died is reported as failed, because nobody knows; all else is done to its end."""
    kind, status, revision = each
    return (kind, Status.SUCCEEDED if kind is Kind.RESTART else status, revision)


@virtual
async def test_a_store_that_is_down_stops_nothing_that_runs() -> None:
    there = Platform()
    async with there.manager() as manager:
        await manager.finished((await manager.create(spec(5))).id)
        fleet = manager.fleet((await manager.get("a")).id)
        assert fleet is not None
        before = {each.id: each.restarts for each in fleet.instances}
        there.store.down = True
        await anyio.sleep(60)
        health = manager.health()
        assert not health.ready
        assert "has not answered" in str(health.reason)
        with pytest.raises(BackendUnavailable):
            await manager.request("a", Kind.SCALE, {"replicas": 7})
        there.backend.faults.crash(min(before))
        await anyio.sleep(60)
        assert fleet.status()["good"] == 5, "and what breaks is mended"
        there.store.down = False
        done = await there.ask(manager, Kind.SCALE, replicas=7)
        assert done.status is Status.SUCCEEDED
        assert manager.health().ready
        assert set(before) <= {each.id for each in fleet.instances}


class Unwritable(MemoryJournal):
    """A journal that takes nothing for a while: from one of its writes on."""

    def __init__(self) -> None:
        super().__init__()
        self.takes: int | None = None
        """How many more writes it takes; None is all."""
        self.refused = 0

    def append(self, event: Event) -> Event:
        if self.takes == 0:
            self.refused += 1
            raise JournalError("simulated: the journal takes nothing")
        if self.takes is not None:
            self.takes -= 1
        return super().append(event)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("takes", [0, 1, 2, 8])
@virtual
async def test_an_outage_of_the_journal_ends_no_deletion(takes: int, shared: bool) -> None:
    there = Platform()
    there.journal = journal = Unwritable()
    async with there.manager(leases=there.leases if shared else None) as manager:
        fleet = (await manager.finished((await manager.create(spec(3))).id)).fleet
        await until(lambda: there.store.status(fleet)["good"] == 3)
        asked = await manager.request("a", Kind.DELETE)
        journal.takes = takes
        await anyio.sleep(60)
        assert there.store.kept(asked.id).status is Status.RUNNING
        assert 2 < journal.refused < 30, "it is tried again and again, and not all the time"
        journal.takes = None
        done = await manager.finished(asked.id, timeout="1m")
        assert (done.status, dict(done.outcome)) == (Status.SUCCEEDED, {"begun": True})
        with pytest.raises(NotFound):
            await manager.get("a")
        await until(partial(idle, manager))
    assert not there.backend.instances("a")


@virtual
async def test_a_deletion_that_has_failed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Platform()

    async def refuse(fleet: Fleet) -> None:
        raise OperationRefused(f"fleet {fleet.name} cannot be deleted now")

    async with there.manager() as manager:
        await manager.finished((await manager.create(spec(3))).id)
        with monkeypatch.context() as patch:
            patch.setattr(Fleet, "delete", refuse)
            done = await there.ask(manager, Kind.DELETE)
        assert (done.status, done.outcome["message"]) == (Status.FAILED, "fleet a cannot be deleted now")
        with pytest.raises(OperationRefused, match="delete it again"):
            await manager.request("a", Kind.STOP)
        done = await there.ask(manager, Kind.DELETE)
        assert done.status is Status.SUCCEEDED
        with pytest.raises(NotFound):
            await manager.get("a")


@virtual
async def test_one_fleet_that_cannot_be_opened_leaves_the_others_alone() -> None:
    there = Platform()
    broken = True

    def engine(namespace: str) -> MemoryBackend:
        if namespace == "bad" and broken:
            raise BackendUnavailable("no such cluster")
        return there.backend

    async with there.manager(backend=engine) as manager:
        lost = await manager.create(spec(1, name="lost"), namespace="bad")
        good = await manager.create(spec(2, name="good"))
        assert (await manager.finished(good.id)).status is Status.SUCCEEDED
        health = manager.health()
        assert (health.leads, health.ready) == (1, True)
        assert "no such cluster" in health.closed["lost"]
        broken = False
        assert (await manager.finished(lost.id, timeout="1m")).status is Status.SUCCEEDED
        assert manager.health().closed == {}


class Slow(MemoryBackend):
    """An engine that cannot be reached, and takes its time to say so."""

    async def __aenter__(self) -> Self:
        await anyio.sleep(100)
        raise BackendUnavailable("no answer")


class Broken(MemoryBackend):
    """An engine with a bug."""

    async def __aenter__(self) -> Self:
        raise RuntimeError("a bug in the engine")


@virtual
async def test_an_engine_that_is_slow_or_broken_holds_up_its_own_fleets_alone() -> None:
    there = Platform()
    engines = {"slow": Slow(), "broken": Broken(), "good": there.backend}
    async with there.manager(backend=engines.__getitem__) as manager:
        asked = {name: await manager.create(spec(1, name=name), namespace=name) for name in ("slow", "broken", "none")}
        for number in range(20):
            await manager.create(spec(1, name=f"slow-{number}"), namespace="slow")
        good = await manager.create(spec(2, name="good"), namespace="good")
        assert (await manager.finished(good.id, timeout=30)).status is Status.SUCCEEDED
        closed = manager.health().closed
        assert "a bug in the engine" in closed["broken"]
        assert "KeyError" in closed["none"]
        await until(lambda: "no answer" in manager.health().closed.get("slow", ""))
        engines |= dict.fromkeys(asked, there.backend)
        for each in asked.values():
            assert (await manager.finished(each.id, timeout=300)).status is Status.SUCCEEDED
        assert manager.health().closed == {}


@virtual
async def test_managers_share_the_fleets_and_take_each_others_over() -> None:
    there = Platform()
    names = [f"f{number}" for number in range(12)]
    async with there.managers() as managers:
        first = await managers.start("m1", sharing=QUICK)
        for name in names:
            await first.finished((await first.create(spec(2, name=name))).id)
        assert first.health().leads == len(names)
        second = await managers.start("m2", sharing=QUICK)
        await anyio.sleep(90)
        shares = (first.health().leads, second.health().leads)
        assert sum(shares) == len(names)
        assert min(shares) >= 2, shares
        assert there.kinds("manager.deposed") == [], "nothing was torn from anybody"
        await anyio.sleep(60)
        assert (first.health().leads, second.health().leads) == shares, "and then it stays so"
        assert set(first.peers) == {"m1", "m2"}
        managers.kill("m2")
        await until(lambda: first.health().leads == len(names))
        managers.leave("m1")
        third = await managers.start("m3")
        await until(lambda: third.health().leads == len(names))
        for name in names:
            done = await third.finished((await third.request(name, Kind.SCALE, {"replicas": 3})).id, timeout="5m")
            assert done.status is Status.SUCCEEDED
        stopped = [each for each in there.journal.read() if each.kind in ("instance.stopped", "recovery.restart")]
        assert stopped == [], "no instance has noticed"


@virtual
async def test_who_has_handed_a_fleet_over_takes_it_back_at_once_when_the_other_leaves() -> None:
    there = Platform()
    async with there.managers() as managers:
        seldom = SharingPolicy(settle=5.0, every=30.0)
        first = await managers.start("m1", sharing=seldom)
        for number in range(16):
            await first.finished((await first.create(spec(2, name=f"f{number}"))).id)
        second = await managers.start("m2", sharing=seldom)
        await until(lambda: second.health().leads == 1)
        await anyio.sleep(0.5)
        managers.leave("m2")
        left = anyio.current_time()
        await until(lambda: first.health().leads == 16)
        assert anyio.current_time() - left < 1.5
        assert there.kinds("manager.deposed") == []


@virtual
async def test_a_manager_alone_goes_on_with_fleets_that_were_shared() -> None:
    there = Platform()
    async with there.manager("m1") as manager:
        created = await manager.finished((await manager.create(spec(2))).id)
        assert created.epoch > 0
    async with there.manager("m2", leases=None) as manager:
        scaled = await there.ask(manager, Kind.SCALE, replicas=3)
        assert (scaled.status, scaled.epoch) == (Status.SUCCEEDED, created.epoch)
        await until(lambda: there.store.status(scaled.fleet)["good"] == 3)
    async with there.manager("m3") as manager:
        paused = await there.ask(manager, Kind.PAUSE)
        assert paused.status is Status.SUCCEEDED
        assert paused.epoch > created.epoch, "and is shared again"
        assert (await there.ask(manager, Kind.DELETE)).status is Status.SUCCEEDED


@virtual
async def test_a_manager_that_the_store_refuses_says_so_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    there = Platform()
    async with there.manager("m1") as manager:
        made = await manager.finished((await manager.create(spec(1))).id)
        await there.store.report([Picture(made.fleet, 99)], at=there.clock.now())
        with pytest.raises(DeadlineExceeded):
            await manager.finished((await manager.request("a", Kind.PAUSE)).id, timeout=300)
        told = [each for each in caplog.messages if "the store refuses it" in each]
        assert 10 <= len(told) <= 60, "not at every attempt of a second"
        assert "epoch 99" in told[0] or "another manager" in told[0]


@virtual
async def test_a_leader_remembers_no_operations_that_have_ended() -> None:
    there = Platform()
    async with there.manager() as manager:
        fleet = (await manager.finished((await manager.create(spec(1))).id)).fleet
        for number in range(20):
            assert (await there.ask(manager, Kind.SCALE, replicas=1 + number % 2)).status is Status.SUCCEEDED
        managed = manager._loops.managed[fleet]
        assert managed.waiting == 0
        assert len(managed._taken) <= 1
        assert there.kinds("fleet.scaled") == ["fleet.scaled"] * 19, "and does none of them twice"


@virtual
async def test_what_is_written_does_not_grow_with_the_fleets() -> None:
    """One report a second has all that has changed; where nothing changes, one every few seconds has the heartbeats."""
    counts: dict[int, int] = {}
    for fleets in (1, 10):
        there = Platform()
        async with there.manager() as manager:
            for number in range(fleets):
                await manager.finished((await manager.create(spec(20, name=f"f{number}"))).id)
            await anyio.sleep(30)
            there.store.reports = 0
            await anyio.sleep(60)
            counts[fleets] = there.store.reports
    assert counts[1] <= counts[10] <= 60
    assert counts[1] <= 20


@virtual
async def test_a_fleet_of_the_same_name_is_another_one() -> None:
    there = Platform()
    async with there.manager() as manager:
        old = await manager.create(spec(2))
        await manager.finished(old.id)
        assert (await there.ask(manager, Kind.DELETE)).status is Status.SUCCEEDED
        new = await manager.create(spec(3))
        assert new.fleet != old.fleet
        assert (await manager.finished(new.id)).status is Status.SUCCEEDED
        await anyio.sleep(2)
        with pytest.raises(NotFound):
            await manager.get(old.fleet)
        assert len(await manager.instances(new.fleet)) == 3


@virtual
async def test_a_manager_says_what_is_wrong_with_its_arguments_and_opens_once() -> None:
    there = Platform()
    with pytest.raises(SpecError, match="period"):
        FleetManager(there.store, backend=there.backend, journal=there.journal, period=0)
    with pytest.raises(SpecError, match="backend"):
        FleetManager(there.store, backend="kubernetes", journal=there.journal)  # type: ignore[arg-type]
    async with there.manager() as manager:
        assert manager.health().reason is None
    assert not manager.health().ready
    with pytest.raises(OperationRefused, match="once"):
        await manager.__aenter__()
    there.store.down = True


def test_operations_end_once() -> None:
    operation = Operation("1", "f", "a", Kind.SCALE, {"replicas": 1}, Caller(), 1.0)
    ended = operation.moved(Status.RUNNING, 2.0).moved(Status.SUCCEEDED, 3.0)
    assert (ended.started_at, ended.finished_at) == (2.0, 3.0)
    for status in Status:
        with pytest.raises(ValueError, match="cannot follow"):
            ended.moved(status, 4.0)
    with pytest.raises(ValueError, match="cannot follow"):
        operation.moved(Status.SUCCEEDED, 2.0)
    again = replace(operation, id="2", created_at=9.0)
    assert again.fingerprint == operation.fingerprint
    assert replace(operation, arguments={"replicas": 2}).fingerprint != operation.fingerprint
