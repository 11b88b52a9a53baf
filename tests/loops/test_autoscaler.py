"""The autoscaling loop on both event loops, with a clock and a journal of its own: no waiting in real time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from agentfleet.autoscaler import Autoscaler, MetricSource, Size
from agentfleet.core.reason import Reason
from agentfleet.core.scaling import InstanceSamples, Limit, Memory, MetricFailed, ResourceAggregate
from agentfleet.core.scaling_samples import Member, Sample
from agentfleet.errors import BackendUnavailable, JournalError, SpecError
from agentfleet.events import Event
from agentfleet.specs import CpuTarget, MetricTarget, QueueTarget, ScalingBehavior, ScalingPolicy, ScalingRule

pytestmark = pytest.mark.anyio

POLICY = ScalingPolicy(max_replicas=100, targets=(QueueTarget(length=10),))


class ManualClock:
    """Time that passes only in `sleep` and `advance`."""

    def __init__(self) -> None:
        self.time = 1_000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += max(0.0, seconds)
        await anyio.lowlevel.checkpoint()


class ListJournal:
    """The journal's port over a list; it can refuse to write."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.refuses = False

    def append(self, event: Event) -> Event:
        if self.refuses:
            raise JournalError("the disk is full")
        written = Event.from_json(event.to_json())
        self.events.append(written)
        return written

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        return self.events[after:]

    def last_state(self, fleet: str, kind: str) -> Event | None:
        return self.last_states(fleet, "state.").get(kind)

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        return {e.kind: e for e in self.events if e.fleet == fleet and e.kind.startswith(prefix)}

    async def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        for event in self.events[after:]:
            yield event

    def kinds(self, *, states: bool = False) -> list[str]:
        return [event.kind for event in self.events if states or not event.kind.startswith("state.")]


class FakeFleet:
    """A fleet that takes any size at once."""

    def __init__(self, size: int = 10) -> None:
        self.replicas = size
        self.calls: list[int] = []
        self.reasons: tuple[Reason, ...] = ()
        self.size_fails: Exception | None = None
        self.scale_fails: Exception | None = None
        self.hangs = False

    async def size(self) -> Size:
        if self.size_fails is not None:
            raise self.size_fails
        return Size(self.replicas, self.replicas, self.replicas)

    async def scale(self, replicas: int, reasons: tuple[Reason, ...]) -> None:
        self.calls.append(replicas)
        if self.hangs:
            await anyio.sleep_forever()
        if self.scale_fails is not None:
            raise self.scale_fails
        self.replicas, self.reasons = replicas, reasons


class Load:
    """A metric function whose answer a test can change."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.hangs = False

    async def __call__(self) -> Any:
        if self.hangs:
            await anyio.sleep_forever()
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Bench:
    """An autoscaler with everything around it replaced."""

    def __init__(self, policy: ScalingPolicy = POLICY, *, value: Any = 100.0, **options: Any) -> None:
        self.clock, self.journal, self.fleet, self.load = ManualClock(), ListJournal(), FakeFleet(), Load(value)
        self.policy, self.options = policy, options
        self.scaler = self.build()

    def build(self, **metrics: MetricSource) -> Autoscaler:
        return Autoscaler(
            self.policy,
            self.fleet,
            metrics or {"queue": self.load},
            clock=self.clock,
            journal=self.journal,
            name="agents",
            **self.options,
        )

    async def turn(self, value: Any = None) -> int:
        """One step 15 s later; the fleet's size afterwards."""
        if value is not None:
            self.load.value = value
        self.clock.advance(15)
        await self.scaler.step()
        return self.fleet.replicas


async def test_a_turn_scales_the_fleet_and_says_why() -> None:
    bench = Bench()
    assert await bench.turn(150.0) == 15
    assert bench.fleet.reasons[0].code == "scaling.target"
    assert bench.scaler.last_decision is not None
    assert bench.scaler.last_decision.desired == 15
    assert bench.journal.kinds() == ["scaling.decision"]
    event = bench.journal.events[0]
    assert (event.fleet, event.data["desired"], event.reasons[0]["code"]) == ("agents", 15, "scaling.target")


async def test_a_quiet_fleet_writes_no_decisions() -> None:
    bench = Bench()
    for _ in range(20):
        assert await bench.turn(100.0) == 10
    assert bench.journal.kinds() == ["scaling.decision"]  # the beginning of holding, once
    assert bench.fleet.calls == []


async def test_a_new_reason_to_hold_is_written() -> None:
    bench = Bench()
    await bench.turn(100.0)
    await bench.turn(10.0)
    await bench.turn(12.0)
    codes = [event.reasons[0]["code"] for event in bench.journal.events if event.kind == "scaling.decision"]
    assert codes == ["scaling.tolerance", "scaling.stabilization"]


@pytest.mark.parametrize(
    "broken",
    [RuntimeError("boom"), MetricFailed("stale"), float("nan"), -1, "7", True, TimeoutError()],
    ids=repr,
)
async def test_a_metric_that_fails_never_shrinks_the_fleet(broken: Any) -> None:
    bench = Bench(
        POLICY.replace(
            down=ScalingBehavior(stabilization=0, rules=(ScalingRule(percent=100),)),
        )
    )
    bench.load.value = broken
    for _ in range(3):
        bench.clock.advance(15)
        decision = await bench.scaler.step()
        assert decision is not None
        assert decision.limit is Limit.METRICS
    assert bench.fleet.calls == []
    assert bench.journal.kinds() == ["scaling.unreadable", "scaling.decision"]
    assert await bench.turn(20.0) == 2
    assert bench.journal.kinds()[2:] == ["scaling.readable", "scaling.decision"]


async def test_a_metric_that_does_not_answer_is_given_up_on() -> None:
    bench = Bench(read_timeout=0.0)
    bench.load.hangs = True
    await bench.turn()
    assert bench.fleet.calls == []
    assert bench.journal.events[0].data == {"what": "metric queue", "error": "no answer within 0 s"}


async def test_a_metric_without_a_source_is_refused_by_name() -> None:
    """A target that could never be read is an error at once, not a fleet that silently never scales."""
    with pytest.raises(
        SpecError, match=r"metric 'queue', which has no source \(there are: 'cpu'\).*metrics=\{'queue': s"
    ):
        Bench().build(cpu=lambda: 3.0)
    with pytest.raises(SpecError, match=r"no source \(there are: none\)"):
        Autoscaler(POLICY, FakeFleet(), {})
    with pytest.raises(SpecError, match=r"metrics\['queue'\] must be a function .* not 5"):
        Bench().build(queue=5)  # type: ignore[arg-type]


async def test_a_replaced_policy_without_a_source_names_those_there_are() -> None:
    bench = Bench()
    bench.scaler.policy = ScalingPolicy(max_replicas=100, targets=(MetricTarget(metric="sessions", average=4),))
    await bench.turn()
    assert "'sessions'" in bench.journal.events[0].data["error"]
    assert "['queue']" in bench.journal.events[0].data["error"]


@pytest.mark.parametrize("field", ["read_timeout", "act_timeout"])
async def test_deadlines_are_time_spans(field: str) -> None:
    def build(value: Any) -> Autoscaler:
        return Autoscaler(POLICY, FakeFleet(), {"queue": lambda: 1.0}, **{field: value})

    build("2s")
    for wrong in ("soon", -1, True, float("nan")):
        with pytest.raises(SpecError, match=field):
            build(wrong)


async def test_sources_may_be_plain_functions_and_return_any_reading() -> None:
    targets = (CpuTarget(utilization=50), MetricTarget(metric="sessions", per_instance=4), QueueTarget(length=10))
    bench = Bench()
    bench.policy = ScalingPolicy(max_replicas=100, targets=targets)
    samples = InstanceSamples([Member(f"i{n}") for n in range(10)], {f"i{n}": Sample(6_000) for n in range(10)})
    bench.scaler = bench.build(
        cpu=lambda: ResourceAggregate.uniform(usage=9_000, request=1000, ready=10),
        sessions=lambda: samples,
        queue=lambda: 120,
    )
    assert await bench.turn() == 18
    assert bench.scaler.last_decision is not None
    assert [p.replicas for p in bench.scaler.last_decision.proposals] == [18, 15, 12]


async def test_a_size_that_cannot_be_read_ends_the_turn() -> None:
    bench = Bench()
    bench.fleet.size_fails = BackendUnavailable("no route")
    for _ in range(2):
        bench.clock.advance(15)
        assert await bench.scaler.step() is None
    assert bench.journal.kinds(states=True) == ["scaling.unreadable"]
    bench.fleet.size_fails = None
    assert await bench.turn(150.0) == 15


async def test_a_failed_change_is_written_and_tried_again() -> None:
    bench = Bench()
    bench.fleet.scale_fails = BackendUnavailable("quota")
    assert await bench.turn(150.0) == 10
    assert not bench.scaler.memory.added
    bench.fleet.scale_fails = None
    assert await bench.turn(150.0) == 15
    assert bench.journal.kinds() == ["scaling.decision", "scaling.failed", "scaling.decision"]
    assert bench.fleet.calls == [15, 15]
    assert [event.change for event in bench.scaler.memory.added] == [5]


async def test_a_change_that_hangs_is_given_up_on() -> None:
    bench = Bench(act_timeout=0.0)
    bench.fleet.hangs = True
    await bench.turn(150.0)
    assert bench.journal.kinds()[-1] == "scaling.failed"


async def test_nothing_is_done_that_cannot_be_recorded() -> None:
    bench = Bench()
    bench.journal.refuses = True
    with pytest.raises(JournalError):
        await bench.turn(150.0)
    assert bench.fleet.calls == []


async def test_a_successor_remembers_what_its_predecessor_saw() -> None:
    bench = Bench()
    for _ in range(5):
        await bench.turn(100.0)
    bench.scaler = bench.build()
    for _ in range(15):  # the window counts from what the predecessor wrote last
        assert await bench.turn(10.0) == 10
    for _ in range(6):
        await bench.turn(10.0)
    assert bench.fleet.replicas == 1


async def test_a_successor_keeps_to_the_rates() -> None:
    slow = POLICY.replace(up=ScalingBehavior(stabilization=0, rules=(ScalingRule(count=3, period=600),)))
    bench = Bench(slow)
    assert await bench.turn(500.0) == 13
    bench.scaler = bench.build()
    assert await bench.turn(500.0) == 13
    assert bench.fleet.calls == [13]


async def test_the_memory_is_written_when_it_says_something_new() -> None:
    """Nothing in quiet times; a load that swings between known bounds says nothing new either; a new extreme does."""
    bench = Bench()
    for _ in range(40):
        await bench.turn(100.0)
    states = [event for event in bench.journal.events if event.kind == "state.scaling"]
    assert len(states) == 1
    assert Memory.from_dict(json.loads(states[-1].to_json())["data"]).recommendations
    for _ in range(10):
        await bench.turn(50.0)
        await bench.turn(100.0)
    assert bench.journal.kinds(states=True).count("state.scaling") == 2
    await bench.turn(150.0)
    assert bench.journal.kinds(states=True).count("state.scaling") == 3
    quick = Bench(POLICY.replace(down=ScalingBehavior(stabilization=0, rules=(ScalingRule(percent=100),))))
    for _ in range(40):
        await quick.turn(100.0)
    assert quick.journal.kinds(states=True).count("state.scaling") == 1


async def test_a_memory_that_cannot_be_read_is_forgotten_aloud() -> None:
    bench = Bench()
    bench.journal.append(Event(900.0, "agents", "state.scaling", data={"old": "format"}))
    assert await bench.turn(150.0) == 15
    assert "scaling.forgotten" in bench.journal.kinds()


async def test_it_works_without_a_journal() -> None:
    fleet = FakeFleet()
    scaler = Autoscaler(POLICY, fleet, {"queue": lambda: 150})
    await scaler.step()
    assert fleet.replicas == 15


async def test_the_policy_may_be_replaced_between_turns() -> None:
    bench = Bench()
    await bench.turn(100.0)
    bench.scaler.policy = POLICY.replace(min_replicas=30)
    assert await bench.turn() == 30


async def test_running_takes_a_turn_each_period_until_cancelled() -> None:
    bench = Bench()
    turns = 0

    def counted(scope: anyio.CancelScope) -> Callable[[], Awaitable[float]]:
        async def read() -> float:
            nonlocal turns
            turns += 1
            bench.clock.advance(2)
            if turns == 4:
                scope.cancel()
            return 100.0

        return read

    with anyio.CancelScope() as scope:
        bench.scaler = bench.build(queue=counted(scope))
        await bench.scaler.run()
    assert turns == 4
    assert bench.clock.slept == [13.0] * len(bench.clock.slept)
    assert len(bench.clock.slept) >= 3
