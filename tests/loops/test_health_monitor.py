"""The health monitor: its plan in virtual time with an invented prober, and its eyes on real sockets."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import given, settings
from hypothesis import strategies as st

from agentfleet.clock import SystemClock
from agentfleet.core.health import Probed, Verdict
from agentfleet.errors import OperationRefused
from agentfleet.health import Changes, HealthMonitor, VerdictChange
from agentfleet.instances import AgentStatus, HealthState, Instance, Phase
from agentfleet.specs import Check, CustomCheck, HealthPolicy, HeartbeatCheck, HttpCheck, TcpCheck
from agentfleet.testing import run_virtual, virtual

STARTING, HEALTHY, SUSPECT = HealthState.STARTING, HealthState.HEALTHY, HealthState.SUSPECT
UNHEALTHY, DEAD, UNKNOWN = HealthState.UNHEALTHY, HealthState.DEAD, HealthState.UNKNOWN
EPOCH = 1_700_000_000.0
HTTP = HealthPolicy(checks=(HttpCheck(period=2.0, timeout=1.0, failures=3),), startup=30.0)


def instance(number: int = 1, phase: Phase = Phase.RUNNING, **changes: object) -> Instance:
    fields: dict[str, object] = {"started_at": EPOCH, "address": f"10.0.0.1:{number}", "ready": True} | changes
    return Instance(f"a-{number}", "a", number, 1, "1", phase, EPOCH, **fields)  # type: ignore[arg-type]


class Invented:
    """A prober of a made-up world: each instance answers as told, after as long as told."""

    def __init__(self, clock: SystemClock) -> None:
        self.clock = clock
        self.sick: set[str] = set()
        self.delay: dict[str, float] = defaultdict(float)
        self.asked: list[tuple[float, str, int]] = []
        self.status: AgentStatus | None = None
        self.under_way = 0
        self.most = 0
        self.pairs: set[tuple[str, int]] = set()
        self.credentials: set[str | None] = set()
        self.late: set[tuple[str, int]] = set()
        """Probes under way whose answer comes after their deadline."""

    async def probe(self, instance: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        start = self.clock.now()
        self.credentials.add(credential)
        pair = (instance.id, index)
        assert pair not in self.pairs, "asked twice at once"
        self.asked.append((start, instance.id, index))
        delay = self.delay[instance.id]
        if delay:
            self.pairs.add(pair)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                await anyio.sleep(min(delay, check.deadline))  # type: ignore[union-attr]
            finally:
                self.under_way -= 1
                self.pairs.discard(pair)
        ok = instance.id not in self.sick and delay < check.deadline and pair not in self.late  # type: ignore[union-attr]
        self.late.discard(pair)
        now = self.clock.now()
        return Probed(index, ok, now, now - start, 0.0, None if ok else "sick", self.status)

    def times(self, id: str = "a-1") -> list[float]:
        return [round(at - EPOCH, 6) for at, asked, _ in self.asked if asked == id]


class World:
    """A monitor, its prober and its clock."""

    def __init__(self, policy: HealthPolicy, *, clock: SystemClock | None = None, **options: object) -> None:
        self.clock = clock or SystemClock(EPOCH)
        self.prober = Invented(self.clock)
        self.log: list[tuple[float, str, HealthState]] = []
        self.monitor = HealthMonitor(
            policy,
            prober=self.prober,
            clock=self.clock,
            on_verdict=self.note,
            **options,  # type: ignore[arg-type]
        )

    def note(self, id: str, verdict: Verdict, status: AgentStatus | None) -> None:
        self.log.append((round(self.clock.now() - EPOCH, 3), id, verdict.state))

    def state(self, id: str = "a-1") -> HealthState:
        verdict = self.monitor.verdict(id)
        assert verdict is not None
        return verdict.state

    async def until(self, moment: float) -> None:
        await anyio.sleep(moment - (self.clock.now() - EPOCH))


# ------------------------------------------------------------------------------------------------ the plan


@virtual
async def test_a_life() -> None:
    world = World(HTTP)
    async with world.monitor as monitor:
        monitor.observe(instance(phase=Phase.PENDING, started_at=None, address=None))
        await world.until(5)
        assert world.prober.asked == []
        world.prober.sick = {"a-1"}
        monitor.observe(instance(started_at=EPOCH + 5))
        await world.until(6.9)
        assert world.prober.times() == [5.0, 5.25, 5.5, 5.75, 6.0, 6.25, 6.5, 6.75]
        world.prober.sick = set()
        await world.until(20)
        regular = world.prober.times()[9:]
        assert all(later - before == pytest.approx(2.0) for before, later in pairwise(regular))
        world.prober.sick = {"a-1"}
        await world.until(30)
        assert [state for _, _, state in world.log] == [STARTING, HEALTHY, SUSPECT, UNHEALTHY]
        assert [at for at, _, _ in world.log][:2] == [0.0, 7.0]
        first, third = (at for at, _, state in world.log if state in (SUSPECT, UNHEALTHY))
        assert third - first == pytest.approx(4.0, abs=0.01)
        assert 20 < first <= 22
        monitor.observe(instance(phase=Phase.EXITED, started_at=EPOCH + 5))
        assert world.state() is DEAD
        asked = len(world.prober.asked)
        await world.until(60)
        assert len(world.prober.asked) == asked
        world.prober.sick = set()
        monitor.observe(instance(started_at=EPOCH + 60, restarts=1))
        assert world.state() is STARTING
        await world.until(60.1)
        assert world.state() is HEALTHY
        statistics = monitor.statistics()
        assert statistics.instances == 1
        assert statistics.probes == len(world.prober.asked)
        assert statistics.failures == 8 + 6
        monitor.forget("a-1")
        monitor.forget("a-1")
        assert monitor.verdict("a-1") is None
        assert monitor.memory("a-1") is None
        assert not monitor.beat("a-1")
        await world.until(100)
        assert len(world.prober.asked) == statistics.probes


@virtual
async def test_a_slow_start_is_asked_ever_more_rarely() -> None:
    world = World(HTTP.replace(checks=(HttpCheck(period=10.0),), startup=100.0))
    world.prober.sick = {"a-1"}
    async with world.monitor as monitor:
        monitor.observe(instance())
        await world.until(200)
        times = world.prober.times()
        assert len([at for at in times if at < 80]) < 45
        assert all(later - before <= max(0.26, before / 8 + 0.01) for before, later in pairwise(times))
        late = [at for at in times if at >= 100]
        assert [state for _, _, state in world.log] == [STARTING, UNHEALTHY]
        assert len(late) in (11, 12)  # the failure that reached the threshold is repeated at once


@virtual
async def test_a_thousand_instances_spread_over_the_period() -> None:
    world = World(HTTP)
    async with world.monitor as monitor:
        for number in range(1000):
            monitor.observe(instance(number, started_at=EPOCH - 1000))
        await world.until(10)
        assert all(world.state(f"a-{number}") is HEALTHY for number in range(1000))
        world.prober.asked.clear()
        await world.until(20)
        tenths: dict[int, int] = defaultdict(int)
        for at, _, _ in world.prober.asked:
            tenths[math.floor((at - EPOCH) * 10)] += 1
        assert 4900 <= len(world.prober.asked) <= 5000
        assert max(tenths.values()) < 100
        assert world.prober.most == 0


@virtual
async def test_starting_instances_share_a_bounded_rate() -> None:
    world = World(HTTP)
    world.prober.sick = {f"a-{number}" for number in range(2000)}
    async with world.monitor as monitor:
        for number in range(2000):
            monitor.observe(instance(number))
        await world.until(0.1)
        before = len(world.prober.asked)
        await world.until(2.1)
        assert before == 2000
        assert len(world.prober.asked) - before <= 2000


@virtual
async def test_concurrency_is_bounded_and_no_probe_is_doubled() -> None:
    world = World(HTTP, concurrency=7)
    async with world.monitor as monitor:
        for number in range(50):
            world.prober.delay[f"a-{number}"] = 0.3
            monitor.observe(instance(number, started_at=EPOCH - 1000))
        await world.until(1.0)
        assert monitor.statistics().outstanding == 7
        assert monitor.statistics().queued > 0
        await world.until(20.0)
        assert world.prober.most == 7
        assert len(world.prober.asked) == pytest.approx(20 / 0.3 * 7, abs=20)
        assert all(world.state(f"a-{number}") is HEALTHY for number in range(50))


@virtual
async def test_frozen_instances_are_found_and_do_not_hold_up_the_others() -> None:
    world = World(HTTP)
    async with world.monitor as monitor:
        for number in range(200):
            monitor.observe(instance(number))
        await world.until(5)
        for number in range(0, 200, 2):
            world.prober.delay[f"a-{number}"] = math.inf
        await world.until(5 + 2 * 3 + 2 * 1.01)
        states = [world.state(f"a-{number}") for number in range(200)]
        assert states == [UNHEALTHY, HEALTHY] * 100


@virtual
async def test_the_failure_that_reaches_the_threshold_is_repeated_at_once() -> None:
    world = World(HTTP)
    async with world.monitor as monitor:
        monitor.observe(instance())
        await world.until(10)
        world.prober.delay["a-1"] = math.inf
        asked = len(world.prober.asked)
        await world.until(20)
        first, second, third, fourth = world.prober.times()[asked : asked + 4]
        assert [second - first, third - second, fourth - third] == pytest.approx([2.0, 2.0, 1.0])
        unhealthy = [at for at, _, state in world.log if state is UNHEALTHY]
        assert unhealthy == [pytest.approx(fourth + 1.0, abs=0.01)]


@virtual
async def test_an_answer_to_the_repeated_probe_wipes_out_the_failures() -> None:
    world = World(HTTP)
    original = world.prober.probe

    async def thrice(subject: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        probed = await original(subject, index, check, credential)
        return replace(probed, ok=not 10 <= len(world.prober.asked) < 13)

    world.prober.probe = thrice  # type: ignore[method-assign,assignment]
    async with world.monitor as monitor:
        monitor.observe(instance())
        await world.until(40)
    assert [state for _, _, state in world.log] == [STARTING, HEALTHY, SUSPECT, HEALTHY]
    assert world.prober.times()[11] == world.prober.times()[12]


@settings(max_examples=20)
@given(st.floats(0, 2), st.sampled_from([(1.0, 12.0), (None, 14.0)]), st.booleans())
def test_a_fault_is_found_in_time(phase: float, case: tuple[float | None, float], freezes: bool) -> None:
    """At 2 s × 5: silence within F·P + 2T (T < P) or (F+1)·T + P (T = P), an answer that says no within F·P."""
    timeout, most = case

    async def play() -> None:
        world = World(HealthPolicy(checks=(HttpCheck(period=2.0, failures=5, timeout=timeout),), startup=10.0))
        async with world.monitor as monitor:
            monitor.observe(instance())
            await world.until(10 + phase)
            if freezes:
                world.prober.delay["a-1"] = math.inf
            else:
                world.prober.sick = {"a-1"}
            await anyio.sleep((most if freezes else 10.0) + 0.001)
            assert world.state() is UNHEALTHY

    run_virtual(play)


@virtual
async def test_an_answer_from_the_life_before_is_ignored() -> None:
    world = World(HTTP.replace(checks=(HttpCheck(period=2.0, timeout=1.0, failures=1),), startup=0))
    async with world.monitor as monitor:
        monitor.observe(instance())
        await world.until(3)
        due = world.prober.times()[-1] + 2.0
        world.prober.delay["a-1"] = 0.9
        world.prober.sick = {"a-1"}
        await world.until(due + 0.1)
        assert world.prober.under_way
        monitor.observe(instance(started_at=world.clock.now(), restarts=1))
        world.prober.delay["a-1"] = 0.0
        world.prober.sick = set()
        await world.until(9)
        assert [state for _, _, state in world.log] == [STARTING, HEALTHY, STARTING, HEALTHY]


@virtual
async def test_every_check_is_asked_at_its_own_pace() -> None:
    policy = HealthPolicy(
        checks=(HttpCheck(period=1.0), CustomCheck(call="json:dumps", period=5.0), HeartbeatCheck(min_silence=5.0))
    )
    world = World(policy)
    async with world.monitor as monitor:
        monitor.observe(instance(address=None))
        await world.until(2)
        assert {index for _, _, index in world.prober.asked} == {1}
        monitor.observe(instance())
        assert world.state() is STARTING
        monitor.beat("a-1")
        await world.until(2.1)
        assert world.state() is HEALTHY
        world.prober.asked.clear()
        for _ in range(20):
            await anyio.sleep(1.0)
            monitor.beat("a-1")
        indexes = [index for _, _, index in world.prober.asked]
        assert 19 <= indexes.count(0) <= 21
        assert 3 <= indexes.count(1) <= 5
        await anyio.sleep(4.99)
        assert world.state() is HEALTHY
        await anyio.sleep(0.02)
        assert world.state() is UNHEALTHY
        assert monitor.statistics().beats == 21


@virtual
async def test_callbacks_and_credentials() -> None:
    seen: list[tuple[str, str, AgentStatus | None, float, bool]] = []
    world = World(HTTP, on_status=lambda *news: seen.append(news), credential=lambda subject: f"secret of {subject.id}")
    world.prober.status = AgentStatus("busy")
    async with world.monitor as monitor:
        monitor.observe(instance())
        await anyio.sleep(0.1)
    assert seen == [("a-1", "http", AgentStatus("busy"), 0.0, True)]
    assert world.prober.credentials == {"secret of a-1"}


@virtual
async def test_changes() -> None:
    world = World(HTTP)
    got: list[VerdictChange] = []

    async def read(changes: Changes) -> None:
        got.extend([change async for change in changes])

    async with anyio.create_task_group() as group, world.monitor as monitor:
        lazy = monitor.changes()
        group.start_soon(read, monitor.changes())
        await anyio.sleep(1)
        monitor.observe(instance())
        await anyio.sleep(5)
        monitor.observe(instance(phase=Phase.LOST))
        await anyio.sleep(0.1)
    assert [(change.previous, change.verdict.state) for change in got] == [
        (UNKNOWN, STARTING),
        (STARTING, HEALTHY),
        (HEALTHY, DEAD),
    ]
    rest = [change async for change in lazy]
    assert [(change.id, change.previous, change.verdict.state) for change in rest] == [("a-1", UNKNOWN, DEAD)]


@virtual
async def test_another_policy_from_now_on() -> None:
    world = World(HTTP)
    world.prober.sick = {"a-1"}
    async with world.monitor as monitor:
        monitor.observe(instance(started_at=EPOCH - 1000))
        await world.until(10)
        assert world.state() is UNHEALTHY
        monitor.set_policy(HealthPolicy())
        assert world.state() is HEALTHY
        asked = len(world.prober.asked)
        await world.until(20)
        assert len(world.prober.asked) == asked
        monitor.set_policy(HTTP.replace(checks=(TcpCheck(period=1.0),)))
        await world.until(30)
        assert world.state() is UNHEALTHY


@virtual
async def test_memory_moves_to_another_monitor() -> None:
    policy = HealthPolicy(checks=(HeartbeatCheck(),))
    world = World(policy)
    async with world.monitor as monitor:
        monitor.observe(instance())
        for _ in range(20):
            monitor.beat("a-1")
            await anyio.sleep(1)
        memory = monitor.memory("a-1")
    await anyio.sleep(1000)
    heir = World(policy, clock=world.clock)
    async with heir.monitor as monitor:
        assert monitor.observe(instance(), memory).state is HEALTHY
        await anyio.sleep(2.9)
        assert heir.state() is HEALTHY
        await anyio.sleep(0.2)
        assert heir.state() is UNHEALTHY


class Stalling(SystemClock):
    """A clock that can jump ahead, as it does for who was kept from running meanwhile."""

    jumped = 0.0

    def now(self) -> float:
        return super().now() + self.jumped


@virtual
async def test_a_stalled_monitor_blames_nobody() -> None:
    """The loop stands still for 30 s, again and again, while probes are under way and beats are awaited."""
    clock = Stalling(EPOCH)
    policy = HealthPolicy(checks=(HttpCheck(period=2.0, timeout=1.0, failures=2), HeartbeatCheck()))
    world = World(policy, clock=clock)

    async def beat() -> None:
        while True:
            for number in range(20):
                monitor.beat(f"a-{number}")
            await anyio.sleep(1)

    victims = 0
    async with anyio.create_task_group() as group, world.monitor as monitor:
        for number in range(20):
            world.prober.delay[f"a-{number}"] = 0.9
            monitor.observe(instance(number))
        group.start_soon(beat)
        await anyio.sleep(20)
        for _ in range(20):
            clock.jumped += 30.0
            world.prober.late |= world.prober.pairs
            victims += len(world.prober.late)
            await anyio.sleep(3.2)
        assert victims > 100
        assert {state for _, _, state in world.log} == {STARTING, HEALTHY}
        assert monitor.statistics().stalled >= 20 * 29
        assert monitor.statistics().lag_max >= 29
        world.prober.sick = {"a-7"}
        await anyio.sleep(7)
        assert world.state("a-7") is UNHEALTHY
        group.cancel_scope.cancel()


@virtual
async def test_forgetting_in_a_callback() -> None:
    world = World(HTTP)
    async with world.monitor as monitor:
        world.monitor._on_verdict = lambda *news: monitor.forget(news[0])
        monitor.observe(instance())
        await anyio.sleep(10)
        assert monitor.statistics().instances == 0
        assert world.prober.asked == []


@virtual
async def test_errors_of_the_body_and_of_callbacks_are_raised() -> None:
    world = World(HTTP)
    with pytest.raises(KeyError):
        async with world.monitor:
            raise KeyError("mine")
    with pytest.raises(OperationRefused):
        async with world.monitor:
            pass

    def explode(id: str, verdict: Verdict, status: AgentStatus | None) -> None:
        if verdict.state is HEALTHY:
            raise ZeroDivisionError

    broken = World(HTTP)
    broken.monitor._on_verdict = explode

    async def live() -> None:
        async with broken.monitor as monitor:
            monitor.observe(instance())
            await anyio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await live()
    assert caught.group_contains(ZeroDivisionError)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3), st.sampled_from(Phase), st.integers(0, 3)), max_size=40))
def test_any_order_of_events_leaves_a_sane_plan(events: list[tuple[float, int, Phase, int]]) -> None:
    """Whatever was observed and forgotten: what runs is asked once a period and no oftener, the rest never."""

    async def play() -> None:
        world = World(HTTP.replace(startup=0))
        async with world.monitor as monitor:
            last: dict[str, Instance] = {}
            for gap, number, phase, action in events:
                await anyio.sleep(gap)
                subject = instance(number, phase, restarts=action)
                world.prober.delay[subject.id] = action / 2
                if action == 3:
                    monitor.forget(subject.id)
                    last.pop(subject.id, None)
                    await anyio.sleep(2)  # ids are never used again while a question to the former is open
                else:
                    monitor.observe(subject)
                    last[subject.id] = subject
            await anyio.sleep(5)
            world.prober.asked.clear()
            await anyio.sleep(20)
            for number in range(4):
                known = last.get(f"a-{number}")
                running = known is not None and known.phase in (Phase.RUNNING, Phase.DRAINING)
                times = world.prober.times(f"a-{number}")
                assert (9 <= len(times) <= 11) if running else not times

    for backend in ("asyncio", "trio"):
        run_virtual(play, backend=backend)


@virtual
async def test_half_an_hour_of_lost_probes_and_pauses() -> None:
    """1 % of probes lost, and one instance in ten pauses for 8 s every 10 minutes: not one false alarm at 2 s × 5."""
    world = World(HealthPolicy(checks=(HttpCheck(period=2.0, failures=5),), startup=10.0))
    count = 0
    original = world.prober.probe

    async def lossy(subject: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        nonlocal count
        count += 1
        probed = await original(subject, index, check, credential)
        pausing = subject.slot % 10 == 0 and (probed.at - EPOCH) % 600 < 8
        return replace(probed, ok=False) if (count * 2654435761) % 2**32 < 2**32 // 100 or pausing else probed

    world.prober.probe = lossy  # type: ignore[method-assign,assignment]
    async with world.monitor as monitor:
        for number in range(30):
            monitor.observe(instance(number))
        await world.until(1800)
        assert count > 26_000
        assert not [entry for entry in world.log if entry[2] is UNHEALTHY]


# ------------------------------------------------------------------------------------------------ real sockets


Handler = Callable[[SocketStream], object]


async def serve(answer: Callable[[], bool | None], *, task_status: anyio.abc.TaskStatus[str]) -> None:
    """An agent on a loopback socket: answers 200 while `answer` is true, 500 when false, and freezes at None."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")

    async def handle(stream: SocketStream) -> None:
        async with stream:
            while True:
                try:
                    await stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return
                verdict = answer()
                if verdict is None:
                    await anyio.sleep_forever()
                status = b"200 OK" if verdict else b"500 No"
                await stream.send(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")

    async with listener:
        task_status.started(f"127.0.0.1:{listener.extra(SocketAttribute.local_port)}")
        await listener.serve(handle)


@pytest.mark.anyio
@pytest.mark.integration
async def test_real_agents_that_die_and_freeze() -> None:
    policy = HealthPolicy(checks=(HttpCheck(path="/status", period=0.1, timeout=0.1, failures=2),), startup=60.0)
    frozen: list[bool | None] = [True]
    async with anyio.create_task_group() as group, HealthMonitor(policy) as monitor:
        changes = monitor.changes()
        doomed = anyio.CancelScope()

        async def die(*, task_status: anyio.abc.TaskStatus[str]) -> None:
            with doomed:
                await serve(lambda: True, task_status=task_status)

        addresses = {
            "well": await group.start(serve, lambda: True),
            "freezes": await group.start(serve, lambda: frozen[0]),
            "dies": await group.start(die),
        }
        now = SystemClock().now()
        for name, address in addresses.items():
            monitor.observe(Instance(name, "a", 0, 1, "1", Phase.RUNNING, now, now, address=address))
        with anyio.fail_after(30):
            healthy: set[str] = set()
            async for change in changes:
                if change.verdict.state is HEALTHY:
                    healthy.add(change.id)
                if len(healthy) == 3:
                    break
            frozen[0] = None
            doomed.cancel()
            sick: dict[str, Verdict] = {}
            async for change in changes:
                if change.verdict.state is UNHEALTHY:
                    sick[change.id] = change.verdict
                if {"dies", "freezes"} <= set(sick):
                    break
        assert any("within 0.1 s" in reason.text for reason in sick["freezes"].reasons)
        group.cancel_scope.cancel()
    gc.collect()
