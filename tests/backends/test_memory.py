"""The simulated cluster: each fault does what it says, the same seed gives the same history, work grows with change."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance.harness import Watched

from agentfleet.backends.base import Changed, Creation, Observation, Removed, Snapshot
from agentfleet.backends.memory import Load, MemoryBackend
from agentfleet.clock import SystemClock
from agentfleet.core.evidence import Probed
from agentfleet.errors import BackendRefused, BackendUnavailable, Conflict, InstanceGone, SpecError
from agentfleet.health import HealthMonitor
from agentfleet.instances import HealthState, Instance, Node, Phase
from agentfleet.specs import AgentTemplate, Check, CustomCheck, HealthPolicy, HeartbeatCheck, HttpCheck, TcpCheck
from agentfleet.testing import FaultPlan, run_virtual, strategies, virtual

FLEET = "fleet"
EPOCH = 1_000.0
HTTP = HttpCheck(path="/health", timeout=2)
STATUS = HttpCheck(path="/status", timeout=2)


def made(**options: Any) -> MemoryBackend:
    return MemoryBackend(clock=SystemClock(epoch=EPOCH), **options)


def wanted(id: str, *, version: str = "1", fleet: str = FLEET, avoid: tuple[str, ...] = ()) -> Creation:
    return Creation(id, fleet, 0, 1, AgentTemplate(command=("agent",), version=version), avoid)


@asynccontextmanager
async def running(
    count: int = 3, *, version: str = "1", **options: Any
) -> AsyncGenerator[tuple[MemoryBackend, Watched], None]:
    """A backend with instances a, b, c, … that are ready, and a watch that has seen it."""
    async with made(**options) as backend:
        seen = Watched(backend, FLEET, 10_000)
        for id in "abcdefghij"[:count]:
            await backend.create(wanted(id, version=version))
        for id in "abcdefghij"[:count]:
            await seen.ready(id)
        seen.history.clear()
        yield backend, seen
        await seen.close()


async def probe(backend: MemoryBackend, id: str, check: Check = HTTP) -> Probed:
    instance = next(i for i in backend.instances(FLEET) if i.id == id)
    return await backend.prober().probe(instance, 0, check)


# ------------------------------------------------------------------------------------------------ instances


@virtual
async def test_a_start_takes_the_delay_asked_for() -> None:
    async with made(start_delay=(3.0, 4.0)) as backend:
        seen = Watched(backend, FLEET, 100)
        await backend.create(wanted("a"))
        instance = await seen.ready("a")
        assert instance.started_at is not None
        assert 3.0 <= instance.started_at - instance.created_at <= 4.0
        assert instance.ready_at == instance.started_at
        assert instance.address
        await seen.close()


@virtual
async def test_crash() -> None:
    async with running() as (backend, seen):
        assert backend.faults.crash("a", code=137) == 1
        assert (await seen.phase("a", Phase.EXITED)).exit_code == 137
        assert not (await probe(backend, "a")).ok
        assert backend.faults.crash("a") == 0  # no process is left to crash
        assert backend.faults.crash() == 2  # everyone else
        with pytest.raises(InstanceGone):
            backend.faults.crash("nobody")


@virtual
async def test_hang_times_probes_out_and_ignores_sigterm() -> None:
    async with running() as (backend, seen):
        backend.faults.hang("a")
        began = anyio.current_time()
        answer = await probe(backend, "a")
        assert not answer.ok
        assert anyio.current_time() - began == pytest.approx(2)
        assert answer.latency == pytest.approx(2)
        assert (await probe(backend, "a", TcpCheck())).ok
        assert seen.instances["a"].phase is Phase.RUNNING
        began = anyio.current_time()
        await backend.stop(FLEET, "a", grace=20)
        await seen.gone("a")
        assert anyio.current_time() - began == pytest.approx(20)


@virtual
async def test_a_hang_ends_by_time_by_cure_and_by_restart() -> None:
    async with running() as (backend, seen):
        backend.faults.hang("a", seconds=10)
        backend.faults.hang("b")
        backend.faults.hang("c")
        await anyio.sleep(11)
        assert (await probe(backend, "a")).ok
        assert backend.faults.cure("b") == 1
        assert (await probe(backend, "b")).ok
        await backend.restart(FLEET, "c", grace=0)
        await seen.ready("c", restarts=1)
        assert (await probe(backend, "c")).ok


@virtual
async def test_unready_ends_by_time_by_cure_and_with_every_fault() -> None:
    async with running() as (backend, _):

        def ready() -> list[bool]:
            return [each.ready for each in sorted(backend.instances(FLEET), key=lambda each: each.id)]

        backend.faults.unready("a", seconds=10)
        assert backend.faults.unready() == 3
        backend.faults.unready("b", seconds=10)
        await anyio.sleep(5)
        assert ready() == [False] * 3
        assert (await probe(backend, "a")).ok
        await anyio.sleep(10)
        assert ready() == [False, True, False]
        assert backend.faults.cure("a") == 1
        assert ready() == [True, True, False]
        backend.faults.clear()
        assert ready() == [True] * 3


@virtual
async def test_a_renewed_fault_is_not_ended_by_the_first_ones_time() -> None:
    async with running() as (backend, _):
        backend.faults.unhealthy("a", seconds=10)
        await anyio.sleep(5)
        backend.faults.unhealthy("a")
        await anyio.sleep(100)
        assert not (await probe(backend, "a")).ok


@virtual
async def test_sticky_ailments_survive_a_restart() -> None:
    async with running() as (backend, seen):
        backend.faults.unhealthy("a", sticky=True)
        await backend.restart(FLEET, "a", grace=1)
        await seen.ready("a", restarts=1)
        assert (await probe(backend, "a")).error == "HTTP 503"


@virtual
async def test_slow_answers_pass_or_fail_by_the_deadline() -> None:
    async with running() as (backend, _):
        backend.faults.slow(1.5, "a")
        answer = await probe(backend, "a")
        assert (answer.ok, answer.latency) == (True, 1.5)
        backend.faults.slow(2.5, "a")
        assert not (await probe(backend, "a")).ok


@virtual
async def test_unhealthy_by_node() -> None:
    async with running(nodes=3) as (backend, seen):
        node = seen.instances["a"].node
        assert node is not None
        hit = backend.faults.unhealthy(node=node)
        there = [i.id for i in seen.instances.values() if i.node == node]
        assert hit == len(there)
        for id in "abc":
            assert (await probe(backend, id)).ok == (id not in there)


@virtual
async def test_a_stall_shows_in_the_status_alone() -> None:
    async with running() as (backend, _):
        backend.load(Load(in_flight=3))
        backend.faults.stall("a")
        await anyio.sleep(60)
        answer = await probe(backend, "a", STATUS)
        assert answer.ok
        assert answer.status is not None
        assert (answer.status.state, answer.status.in_flight) == ("busy", 3)
        assert answer.status.last_progress == pytest.approx(60)
        other = await probe(backend, "b", STATUS)
        assert other.status is not None
        assert other.status.last_progress == 0


@virtual
async def test_ignoring_sigterm_takes_the_whole_grace() -> None:
    async with running() as (backend, seen):
        backend.faults.ignore_term("a")
        began = anyio.current_time()
        await backend.stop(FLEET, "a", grace=7)
        await seen.gone("a")
        assert anyio.current_time() - began == pytest.approx(7)


@virtual
async def test_probes_suspend_only_for_the_slow() -> None:
    async with running() as (backend, _):
        began = anyio.current_time()
        for check in (HTTP, STATUS, TcpCheck()):
            assert (await probe(backend, "a", check)).ok
        assert anyio.current_time() == began
        assert not (await probe(backend, "a", HeartbeatCheck())).ok


@virtual
async def test_a_probe_of_a_former_process_is_refused() -> None:
    async with running() as (backend, seen):
        before = seen.instances["a"]
        await backend.restart(FLEET, "a", grace=0)
        await seen.ready("a", restarts=1)
        assert (await backend.prober().probe(before, 0, HTTP)).error == "connection refused"


@virtual
async def test_a_custom_check_is_called() -> None:
    """It is the user's own function that answers, whatever ails the instance."""
    asked: list[str] = []

    async def check(instance: Instance) -> bool:
        asked.append(instance.id)
        await anyio.sleep(0.5)
        return instance.id != "b"

    def broken(instance: Instance) -> bool:
        raise RuntimeError(f"no credit for {instance.id}")

    async with running() as (backend, _):
        backend.faults.hang("a")
        good, bad = [await probe(backend, id, CustomCheck(call=check)) for id in "ab"]
        assert asked == ["a", "b"]
        assert (good.ok, good.error) == (True, None)
        assert good.latency == pytest.approx(0.5)
        assert (bad.ok, bad.error) == (False, "the custom check said no")
        assert "no credit for c" in str((await probe(backend, "c", CustomCheck(call=broken))).error)
        late = await probe(backend, "c", CustomCheck(call=check, timeout=0.1))
        assert not late.ok
        assert late.latency == pytest.approx(0.1)


@virtual
async def test_a_fleets_custom_check_decides_its_health() -> None:
    sick: set[str] = set()
    policy = HealthPolicy(checks=(CustomCheck(call=lambda instance: instance.id not in sick, period=1.0, failures=2),))
    async with (
        running() as (backend, seen),
        HealthMonitor(policy, prober=backend.prober(), clock=SystemClock(epoch=EPOCH)) as monitor,
    ):

        def judged() -> dict[str, HealthState]:
            return {id: verdict.state for id in "ab" if (verdict := monitor.verdict(id)) is not None}

        for instance in seen.instances.values():
            monitor.observe(instance)
        await anyio.sleep(5)
        assert judged() == {"a": HealthState.HEALTHY, "b": HealthState.HEALTHY}
        sick.add("b")
        await anyio.sleep(5)
        assert judged() == {"a": HealthState.HEALTHY, "b": HealthState.UNHEALTHY}


# ------------------------------------------------------------------------------------------------ versions


@virtual
async def test_bad_versions() -> None:
    async with made() as backend:
        seen = Watched(backend, FLEET, 1_000)
        backend.behave(version="crashing", crash_after=5, exit_code=42)
        backend.behave(version="sickening", unhealthy_after=5)
        backend.behave(version="lazy", never_ready=True)
        backend.behave(version="late", ready_after=30)
        backend.behave(version="slow", slow=1)
        for version in ("crashing", "sickening", "lazy", "late", "slow", "good"):
            await backend.create(wanted(version, version=version))
        crashed = await seen.phase("crashing", Phase.EXITED)
        assert crashed.exit_code == 42
        assert crashed.started_at is not None
        await anyio.sleep(10)
        assert not (await probe(backend, "sickening")).ok
        assert (await probe(backend, "slow")).latency == 1
        late = await seen.ready("late")
        assert late.started_at is not None
        assert late.ready_at == pytest.approx(late.started_at + 30)
        assert not seen.instances["lazy"].ready
        assert not (await probe(backend, "lazy", HttpCheck(path="/ready"))).ok
        assert (await probe(backend, "good")).ok
        await backend.restart(FLEET, "crashing", grace=0)
        await seen.phase("crashing", Phase.RUNNING)
        await seen.phase("crashing", Phase.EXITED)  # again and again
        await seen.close()


# ------------------------------------------------------------------------------------------------ nodes


@virtual
async def test_partitioned_instances_are_lost_and_return() -> None:
    async with running(nodes=2) as (backend, seen):
        node = seen.instances["a"].node
        assert node is not None
        backend.faults.partition(node, seconds=60)
        lost = await seen.phase("a", Phase.LOST)
        assert not lost.ready
        snapshot = seen.history[-1]
        assert isinstance(snapshot, Snapshot)
        assert {n.name for n in snapshot.nodes if not n.ready} == {node}
        assert "a" in backend.running(FLEET)  # it goes on, unseen
        assert not (await probe(backend, "a")).ok
        assert "a" not in await backend.usage(FLEET)
        back = await seen.phase("a", Phase.RUNNING)
        assert (back.ready, back.restarts) == (True, 0)


@virtual
async def test_nothing_is_seen_of_a_partitioned_node_and_all_when_it_is_back() -> None:
    async with running(nodes=1) as (backend, seen):
        backend.faults.partition("node-1")
        await seen.phase("a", Phase.LOST)
        backend.faults.crash("a", code=9)
        await backend.stop(FLEET, "b", grace=5)
        await backend.restart(FLEET, "c", grace=5)
        before = dict(seen.instances)
        await anyio.sleep(100)
        assert {i.id: i for i in backend.instances(FLEET)} == before
        backend.faults.heal("node-1")
        assert (await seen.phase("a", Phase.EXITED)).exit_code == 9
        await seen.gone("b")
        await seen.ready("c", restarts=1)


@virtual
async def test_a_failed_node_takes_its_processes_with_it() -> None:
    async with running(nodes=1) as (backend, seen):
        backend.faults.node_down("node-1", seconds=30)
        await seen.phase("a", Phase.LOST)
        assert backend.running(FLEET) == ()
        assert (await seen.phase("a", Phase.EXITED)).exit_code is None


@virtual
async def test_placement_is_even_and_keeps_away_where_it_can() -> None:
    async with running(6, nodes=[Node("x"), Node("y"), Node("z", schedulable=False)]) as (backend, seen):
        assert sorted(str(i.node) for i in seen.instances.values()) == ["x"] * 3 + ["y"] * 3
        await backend.create(wanted("g", avoid=("x",)))
        await backend.create(wanted("h", avoid=("x", "y")))
        assert (await seen.ready("g")).node == "y"
        assert (await seen.ready("h")).node in {"x", "y"}
        backend.faults.cordon("x")
        backend.faults.cordon("z", schedulable=True)
        for id in ("k", "l", "m"):
            await backend.create(wanted(id))
            assert (await seen.ready(id)).node == "z"


@virtual
async def test_who_finds_no_room_waits_for_it() -> None:
    async with running(4, nodes=2, capacity_per_node=2) as (backend, seen):
        await backend.create(wanted("late"))
        await backend.create(wanted("later"))
        await anyio.sleep(100)
        assert backend.count(FLEET, Phase.PENDING) == 2
        await backend.stop(FLEET, "late", grace=0)
        await backend.stop(FLEET, "a", grace=5)
        await seen.ready("later")


# ------------------------------------------------------------------------------------------------ the engine


@virtual
async def test_an_unavailable_engine_is_silent_and_then_tells_all() -> None:
    async with running() as (backend, seen):
        backend.faults.unavailable(seconds=60)
        backend.faults.crash("a")
        with anyio.move_on_after(59):
            await seen.next()
            pytest.fail("the watch was to be silent")
        with pytest.raises(BackendUnavailable):
            await backend.create(wanted("d"))
        snapshot = await seen.next()
        assert isinstance(snapshot, Snapshot)
        assert seen.instances["a"].phase is Phase.EXITED
        await backend.create(wanted("d"))


@virtual
async def test_lost_events_are_repaired_by_a_snapshot() -> None:
    async with running(resync=30) as (backend, seen):
        backend.faults.lose_events(1)
        began = anyio.current_time()
        backend.faults.crash("a")
        backend.faults.crash("b")
        await seen.phase("b", Phase.EXITED)
        assert seen.instances["a"].phase is Phase.RUNNING
        await seen.phase("a", Phase.EXITED)
        assert isinstance(seen.history[-1], Snapshot)
        assert anyio.current_time() - began == pytest.approx(30)


@virtual
async def test_a_repair_that_falls_into_an_outage_waits_for_its_end() -> None:
    async with running(resync=30) as (backend, seen):
        backend.faults.lose_events(1)
        backend.faults.reorder_events(5, within=30)
        backend.faults.crash("a")
        backend.faults.crash("b")
        backend.faults.unavailable(seconds=60)
        began = anyio.current_time()
        await seen.phase("a", Phase.EXITED)
        assert anyio.current_time() - began == pytest.approx(60)


@virtual
async def test_doubled_events() -> None:
    async with running() as (backend, seen):
        backend.faults.double_events(1)
        backend.faults.crash("a")
        backend.faults.crash("b")
        await seen.phase("b", Phase.EXITED)
        assert [o.instance.id for o in seen.history if isinstance(o, Changed)] == ["a", "a", "b"]


@virtual
async def test_reordered_events_keep_each_instances_order() -> None:
    async with running(10) as (backend, seen):
        backend.faults.reorder_events(30, within=50)
        for id in "abcdefghij":
            await backend.stop(FLEET, id, grace=5)
        for id in "abcdefghij":
            await seen.gone(id)
            assert seen.phases(id) == [Phase.DRAINING]
        order = [
            o.id if isinstance(o, Removed) else o.instance.id for o in seen.history if isinstance(o, Changed | Removed)
        ]
        assert order[:10] != list("abcdefghij")
        assert len(order) == 20


@virtual
async def test_lagging_events_come_late_and_whole() -> None:
    async with running() as (backend, seen):
        backend.faults.lag(45)
        began = anyio.current_time()
        backend.faults.crash("a")
        await seen.phase("a", Phase.EXITED)
        assert anyio.current_time() - began == pytest.approx(45)
        backend.faults.lag(0)
        backend.faults.crash("b")
        await seen.phase("b", Phase.EXITED)


@virtual
async def test_a_gap_is_followed_by_a_snapshot() -> None:
    async with running() as (backend, seen):
        backend.faults.crash("a")
        backend.faults.gap()
        assert isinstance(await seen.next(), Snapshot)
        assert seen.instances["a"].phase is Phase.EXITED


@virtual
async def test_a_reader_that_falls_far_behind_gets_a_snapshot() -> None:
    async with running(2) as (backend, seen):
        for _ in range(1_000):
            await backend.restart(FLEET, "a", grace=0)
            await anyio.sleep(5)
            backend.instances(FLEET)
        observation = await seen.next()
        assert isinstance(observation, Snapshot)
        assert seen.instances["a"].restarts == 1_000


@virtual
async def test_an_abandoned_watch_is_forgotten() -> None:
    async with made() as backend:
        stream = backend.watch(FLEET)
        await anext(stream)
        assert backend.watchers == 1
        del stream
        assert backend.watchers == 0


@virtual
async def test_a_second_manager_takes_over_where_time_has_gone_on() -> None:
    backend = made()
    backend.behave(version="1", crash_after=100)
    async with backend:
        await backend.create(wanted("a"))
    with pytest.raises(BackendUnavailable):
        await backend.create(wanted("b"))
    await anyio.sleep(500)
    async with backend:
        seen = Watched(backend, FLEET, 10)
        await seen.next()
        a = seen.instances["a"]
        assert a.phase is Phase.EXITED
        assert a.started_at is not None
        assert a.started_at < EPOCH + 10
        await seen.close()


@virtual
async def test_two_managers_at_once_and_the_first_leaves() -> None:
    backend = made()
    async with backend:
        async with backend:
            pass
        await backend.create(wanted("a"))
        seen = Watched(backend, FLEET, 10)
        await seen.ready("a")
        await seen.close()


# ------------------------------------------------------------------------------------------------ actions


@virtual
async def test_conflict_and_refusal_have_no_effect() -> None:
    async with running() as (backend, seen):
        backend.faults.conflict()
        with pytest.raises(Conflict):
            await backend.stop(FLEET, "a", grace=0)
        backend.faults.refuse(times=2, actions=("create",), reason="no GPU left")
        await backend.stop(FLEET, "b", grace=0)
        for _ in range(2):
            with pytest.raises(BackendRefused, match="no GPU left"):
                await backend.create(wanted("d"))
        await backend.create(wanted("e"))
        await seen.ready("e")
        assert set(seen.instances) == {"a", "c", "e"}


@virtual
async def test_a_lost_reply_hides_an_effect() -> None:
    async with running() as (backend, seen):
        backend.faults.lose_reply()
        with pytest.raises(BackendUnavailable):
            await backend.create(wanted("d"))
        await backend.create(wanted("d"))
        assert (await seen.ready("d")).restarts == 0
        assert backend.count(FLEET) == 4


@virtual
async def test_slow_actions_can_be_cancelled_without_effect() -> None:
    async with running() as (backend, _):
        backend.faults.slow_actions(30, times=2)
        with anyio.move_on_after(29) as scope:
            await backend.create(wanted("d"))
        assert scope.cancelled_caught
        assert backend.count(FLEET) == 3
        began = anyio.current_time()
        await backend.create(wanted("d"))
        assert anyio.current_time() - began == pytest.approx(30)
        await backend.create(wanted("e"))
        assert anyio.current_time() - began == pytest.approx(30)


@virtual
async def test_quotas() -> None:
    async with running() as (backend, _):
        backend.faults.quota(4, fleet=FLEET)
        backend.faults.quota(5)
        await backend.create(wanted("d"))
        await backend.create(wanted("d"))  # it exists, so nothing is created
        with pytest.raises(BackendRefused, match="4 of 4"):
            await backend.create(wanted("e"))
        await backend.create(wanted("x", fleet="other"))
        with pytest.raises(BackendRefused, match="in all"):
            await backend.create(wanted("y", fleet="other"))
        backend.faults.quota(None)
        await backend.create(wanted("y", fleet="other"))


@virtual
async def test_ids_belong_to_one_fleet() -> None:
    async with running() as (backend, _):
        with pytest.raises(BackendRefused, match="unique"):
            await backend.create(wanted("a", fleet="other"))
        await backend.stop("other", "a", grace=0)
        assert backend.count(FLEET) == 3


@virtual
async def test_what_is_being_stopped_does_not_come_back() -> None:
    async with running() as (backend, seen):
        await backend.stop(FLEET, "a", grace=20)
        with pytest.raises(Conflict):
            await backend.restart(FLEET, "a", grace=20)
        await seen.gone("a")


# ------------------------------------------------------------------------------------------------ loads and logs


@virtual
async def test_loads_from_the_special_to_the_general() -> None:
    async with running() as (backend, _):
        backend.load(Load(cpu=1.0))
        backend.load(lambda _, now: Load(cpu=2.0, memory=int(now - EPOCH)), fleet=FLEET)
        backend.load(Load(cpu=3.0), id="a")
        used = await backend.usage(FLEET)
        assert {id: u.cpu for id, u in used.items()} == {"a": 3.0, "b": 2.0, "c": 2.0}
        assert used["b"].memory > 0


@virtual
async def test_logs_tell_the_story() -> None:
    async with running() as (backend, _):
        backend.faults.crash("a", code=3)
        for number in range(1_000):
            backend.log("a", f"line {number}")
        lines = await backend.logs(FLEET, "a", lines=3)
        assert [line.split(" ", 1)[1] for line in lines] == ["line 997", "line 998", "line 999"]
        assert len(await backend.logs(FLEET, "a", lines=100_000)) == 200
        assert [line.split(" ", 1)[1] for line in await backend.logs(FLEET, "b")] == ["started version 1"]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("start_delay", [(2, 1), -1, math.nan, math.inf, "5s", (1,), (1, 2, 3), (1, "2"), True]),
        ("crash_after", [-1, "5s", math.nan, math.inf, True, (1, 2)]),
        ("unhealthy_after", [-0.1, "5s", [1]]),
        ("ready_after", [-1, None, "5s"]),
        ("slow", [-1, None, math.inf]),
        ("exit_code", [None, 1.5, "1", True]),
        ("never_ready", [None, 1, "yes"]),
        ("ignores_term", [0]),
        ("version", [2, ["1"]]),
    ],
)
def test_bad_behavior_is_named(field: str, values: list[Any]) -> None:
    backend = made()
    for value in values:
        with pytest.raises(SpecError, match=f"^{field}: write "):
            backend.behave(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start_delay", (2, 1)), ("stop_delay", -1), ("stop_delay", None), ("nodes", -1), ("nodes", True),
        ("nodes", [Node("a"), Node("a")]), ("capacity_per_node", -1), ("capacity_per_node", 1.5), ("resync", None),
        ("seed", "x"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"^{field}: "):
        made(**{field: value})


@virtual
async def test_one_number_is_an_exact_delay() -> None:
    async with made(start_delay=5, stop_delay=1.5) as backend:
        backend.behave(version="slow", start_delay=7.0)
        seen = Watched(backend, FLEET, 100)
        for id, version, start in (("a", "1", 5), ("b", "slow", 7)):
            await backend.create(wanted(id, version=version))
            instance = await seen.ready(id)
            assert instance.started_at == pytest.approx(instance.created_at + start)
        began = anyio.current_time()
        await backend.stop(FLEET, "a", grace=10)
        await seen.gone("a")
        assert anyio.current_time() == pytest.approx(began + 1.5)
        await seen.close()


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(ValueError, match="no node 'moon'; there are node-1"):
        run_virtual(_partition_the_moon)


async def _partition_the_moon() -> None:
    made().faults.partition("moon")


# ------------------------------------------------------------------------------------------------ laws


async def _story(plan: FaultPlan, seed: int, backend_seed: int) -> tuple[list[Observation], dict[str, Instance]]:
    """Act, let a plan of faults happen, and read until all is quiet; the history, and the watcher's final view."""
    clock = SystemClock(epoch=EPOCH)
    async with MemoryBackend(seed=backend_seed, clock=clock, resync=20) as backend:
        seen = Watched(backend, FLEET, 10_000)

        async def act() -> None:
            for number in range(20):
                action = (seed >> number) % 3
                try:
                    if action == 0 or number < 5:
                        await backend.create(wanted(f"i{number}"))
                    elif action == 1:
                        await backend.stop(FLEET, f"i{number // 2}", grace=3)
                    else:
                        await backend.restart(FLEET, f"i{number // 2}", grace=3)
                except (BackendUnavailable, BackendRefused, Conflict, InstanceGone):
                    pass
                await clock.sleep(7)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(act)
            tasks.start_soon(plan.run, backend, FLEET, clock)
            with anyio.move_on_after(plan.duration + 400):
                while True:
                    await seen.next()
        assert seen.instances == {instance.id: instance for instance in backend.instances(FLEET)}
        assert sum(backend.count(FLEET, phase) for phase in Phase) == backend.count(FLEET) == len(seen.instances)
        await seen.close()
        return seen.history, seen.instances


@settings(max_examples=40)
@given(strategies.fault_plans(within=150), st.integers(0, 2**32))
def test_a_watcher_ends_with_the_truth_whatever_went_wrong(plan: FaultPlan, seed: int) -> None:
    run_virtual(_story, plan, seed, 0)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@settings(max_examples=10)
@given(plan=strategies.fault_plans(within=150), seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_history(loop: str, plan: FaultPlan, seed: int) -> None:
    first = run_virtual(_story, plan, seed, 5, backend=loop)
    assert run_virtual(_story, plan, seed, 5, backend=loop) == first
    assert run_virtual(_story, plan, seed, 6, backend=loop) != first


def _lines_to_run(count: int) -> int:
    """Lines of the simulation executed while `count` instances come and go."""
    lines = 0

    def local(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return local

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return local if "backends/memory" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run_virtual(_come_and_go, count)
    finally:
        sys.settrace(before)
    return lines


async def _come_and_go(count: int) -> None:
    """Create `count` instances, see them run, stop them, see them go."""
    async with made() as backend:
        seen = Watched(backend, FLEET, 10_000)
        await seen.next()
        for number in range(count):
            await backend.create(wanted(f"i{number}"))
        await seen.until(lambda: backend.count(FLEET, Phase.RUNNING) == count)
        for number in range(count):
            await backend.stop(FLEET, f"i{number}", grace=5)
        await seen.until(lambda: not seen.instances and backend.count(FLEET) == 0)
        assert backend.steps == 2 * count  # a start and an end each
        assert len(seen.history) == 1 + 4 * count  # pending, running, draining, removed
        await seen.close()


def test_ten_thousand_instances_come_and_go() -> None:
    run_virtual(_come_and_go, 10_000)


def test_work_grows_with_change_not_with_size() -> None:
    assert _lines_to_run(1_500) < 10 * _lines_to_run(150) * 1.2
