"""The autoscaling loop: metrics → `core.scaling` → a fleet. Works alone, with any fleet that can tell and take a size.

    scaler = Autoscaler(policy, target, {"queue": queue_length})
    await scaler.run()                       # or: await scaler.step(), one finite turn

`target` has two methods, `size()` and `scale(replicas, reasons)`; `metrics` maps a metric's name ("cpu", "memory", a
queue target's `source`, a metric target's `metric`) to a function that returns a reading. Whatever fails or does not
answer in time is journaled and retried in the next turn; a metric that cannot be read never shrinks the fleet.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Protocol

import anyio

from agentfleet.clock import Clock, SystemClock
from agentfleet.core.reason import Reason
from agentfleet.core.scaling import Decision, Memory, Observed, committed, decide, name_of
from agentfleet.core.scaling_behavior import Recommendation
from agentfleet.core.scaling_samples import InstanceSamples, MetricFailed, Reading, ResourceAggregate, Total
from agentfleet.errors import SpecError
from agentfleet.events import Event
from agentfleet.specs import ScalingPolicy
from agentfleet.stores.journal import Journal
from agentfleet.waiting import seconds_of

STATE = "state.scaling"
"""Kind of the event that holds the memory; a restarted autoscaler starts from the last one."""

Readable = Reading | float
"""What a metric function may return. A number is fleet-wide (tasks in the queue), or for a per-instance target the
average of all instances (CPU in percent of the request for a CPU target)."""
MetricSource = Callable[[], Readable | Awaitable[Readable]]


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fleet is."""

    spec: int
    """Instances asked for."""
    status: int
    """Instances that exist."""
    ready: int | None = None
    """Instances that are ready for work; needed by targets that hold a metric at a value. None: not known."""


class ScaleTarget(Protocol):
    """Whatever can be scaled."""

    async def size(self) -> Size:
        """The present size."""
        ...

    async def scale(self, replicas: int, reasons: tuple[Reason, ...]) -> None:
        """Ask for `replicas` instances; returns once that is accepted, raises if it is not."""
        ...


class Autoscaler:
    """Keeps a fleet at the size that its metrics ask for.

    Args:
        policy: What to aim at, and how fast to go there. May be replaced between turns.
        target: The fleet.
        metrics: By name, a function (async, or sync and never blocking) that returns a reading.
        clock: Where the time comes from.
        journal: Where decisions and the memory are recorded; without one a restart forgets the stabilisation windows.
        name: The fleet's name in the journal.
        read_timeout: Deadline in seconds of each metric and of `size()`; by default the period, at most 5 s.
        act_timeout: Deadline in seconds of `scale()`.

    Raises:
        SpecError: A target of the policy has no source, a source is no function, or a deadline is no time span.
    """

    def __init__(
        self,
        policy: ScalingPolicy,
        target: ScaleTarget,
        metrics: Mapping[str, MetricSource],
        *,
        clock: Clock | None = None,
        journal: Journal | None = None,
        name: str = "fleet",
        read_timeout: float | str | None = None,
        act_timeout: float | str = 30.0,
    ) -> None:
        _check_sources(policy, metrics)
        self.policy = policy
        self.last_decision: Decision | None = None
        self.name = name
        self._target = target
        self._metrics = dict(metrics)
        self._clock: Clock = SystemClock() if clock is None else clock
        self._journal = journal
        self._read_timeout = None if read_timeout is None else seconds_of(read_timeout, "read_timeout")
        self._act_timeout = seconds_of(act_timeout, "act_timeout")
        self._memory: Memory | None = None
        self._said: object = None
        self._failing: dict[str, str] = {}
        self._hold: str | None = None

    @property
    def memory(self) -> Memory:
        """What the next decision will know of the earlier ones."""
        return self._memory if self._memory is not None else Memory()

    async def run(self) -> None:
        """One turn each `policy.period` seconds, until cancelled; raises `JournalError` like `step`."""
        while True:
            due = self._clock.now() + self.policy.period
            await self.step()
            await self._clock.sleep(due - self._clock.now())

    async def step(self) -> Decision | None:
        """One turn: read, decide, act, record.

        Returns:
            The decision; None if the fleet's size could not be read, so that there was nothing to decide on.

        Raises:
            JournalError: The turn could not be recorded. A decision that could not be recorded was not carried out;
                what is remembered of one that was may be lost.
        """
        if self._memory is None:
            self._memory = self._restored()
        policy, readings = self.policy, _Readings()
        async with anyio.create_task_group() as group:
            group.start_soon(self._read_size, readings)
            for name in dict.fromkeys(name_of(target) for target in policy.targets):
                group.start_soon(self._read, name, readings)
        self._note_failures(readings.failures)
        size = readings.size
        if size is None:
            return None
        now = self._clock.now()
        observed = Observed(
            spec=size.spec,
            status=size.status,
            ready=size.ready,
            readings=tuple(readings.metrics[name_of(target)] for target in policy.targets),
        )
        decision, self._memory = decide(policy, observed, self._memory, now)
        self.last_decision = decision
        self._note_decision(decision)
        if decision.change and await self._act(decision):
            self._memory = committed(policy, decision, self._memory, self._clock.now())
        self._save(self._clock.now())
        return decision

    # ------------------------------------------------------------------------------------------ observe

    async def _read_size(self, readings: _Readings) -> None:
        try:
            with anyio.fail_after(self._deadline):
                readings.size = await self._target.size()
        except Exception as error:  # noqa: BLE001 - the user's own fleet may raise anything
            readings.failures["size"] = _words(error, self._deadline)

    async def _read(self, name: str, readings: _Readings) -> None:
        source = self._metrics.get(name)
        if source is None:
            reading: Reading = MetricFailed(f"no metric source is called {name!r}; there are {sorted(self._metrics)}")
        else:
            try:
                with anyio.fail_after(self._deadline):
                    value = source()
                    reading = _reading(await value if inspect.isawaitable(value) else value)
            except Exception as error:  # noqa: BLE001 - the user's own function may raise anything
                reading = MetricFailed(_words(error, self._deadline))
        readings.metrics[name] = reading
        if isinstance(reading, MetricFailed):
            readings.failures[f"metric {name}"] = reading.reason

    @property
    def _deadline(self) -> float:
        return min(self.policy.period, 5.0) if self._read_timeout is None else self._read_timeout

    # ------------------------------------------------------------------------------------------ act

    async def _act(self, decision: Decision) -> bool:
        try:
            with anyio.fail_after(self._act_timeout):
                await self._target.scale(decision.desired, decision.reasons)
        except Exception as error:  # noqa: BLE001 - the user's own fleet may raise anything
            data = {"desired": decision.desired, "error": _words(error, self._act_timeout)}
            self._record("scaling.failed", data, decision.reasons)
            return False
        return True

    # ------------------------------------------------------------------------------------------ record

    def _record(self, kind: str, data: Mapping[str, Any], reasons: tuple[Reason, ...] = ()) -> None:
        if self._journal is not None:
            words = tuple(reason.to_dict() for reason in reasons)
            self._journal.append(Event(self._clock.now(), self.name, kind, data=data, reasons=words))

    def _note_failures(self, failures: Mapping[str, str]) -> None:
        """Failures and their ends are events; a failure that lasts is not one each turn."""
        for what, why in failures.items():
            if self._failing.get(what) != why:
                self._record("scaling.unreadable", {"what": what, "error": why})
        for what in self._failing.keys() - failures.keys():
            self._record("scaling.readable", {"what": what})
        self._failing = dict(failures)

    def _note_decision(self, decision: Decision) -> None:
        """Changes are events, and so is the beginning of a new reason to hold."""
        hold = None if decision.change else ",".join(reason.code for reason in decision.reasons)
        if decision.change or hold != self._hold:
            self._record("scaling.decision", decision.to_dict(), decision.reasons)
        self._hold = hold

    def _restored(self) -> Memory:
        event = None if self._journal is None else self._journal.last_state(self.name, STATE)
        if event is None:
            return Memory()
        try:
            saved = Memory.from_dict(event.data)
        except ValueError as error:
            self._record("scaling.forgotten", {"error": str(error)})
            return Memory()
        # what was not written since was the same again and again, so its windows begin with this restart
        now = self._clock.now()
        recent = tuple(replace(each, at=now) for each in self._in_window(saved, event.at))
        return replace(saved, recommendations=recent or saved.recommendations)

    def _save(self, now: float) -> None:
        """Write the memory when it says something new: in quiet times each turn repeats the same recommendation.

        What counts of a stabilisation window is the least and the most that was recommended in it.
        """
        memory = self.memory
        recent = [each.replicas for each in self._in_window(memory, now)]
        extent = (min(recent), max(recent)) if recent else None
        said = (extent, memory.added, memory.removed, memory.scaled_to_zero)
        if said != self._said:
            self._record(STATE, memory.to_dict())
            self._said = said

    def _in_window(self, memory: Memory, now: float) -> list[Recommendation]:
        """The recommendations that still bind at `now`."""
        window = max(self.policy.up.stabilization, self.policy.down.stabilization)
        return [each for each in memory.recommendations or () if each.at > now - window]


class _Readings:
    """What one turn has read so far; the reading tasks fill it."""

    def __init__(self) -> None:
        self.size: Size | None = None
        self.metrics: dict[str, Reading] = {}
        self.failures: dict[str, str] = {}


def _check_sources(policy: ScalingPolicy, metrics: Mapping[str, MetricSource]) -> None:
    """Raise `SpecError` unless each target of the policy can be read."""
    for name in dict.fromkeys(name_of(target) for target in policy.targets):
        source = metrics.get(name)
        if source is None:
            known = ", ".join(map(repr, sorted(metrics))) or "none"
            raise SpecError(
                f"the scaling policy has a target for the metric {name!r}, which has no source (there are: {known}); "
                f"give it one: metrics={{{name!r}: source}}, a function that returns a number"
            )
        if not callable(source):
            raise SpecError(f"metrics[{name!r}] must be a function that returns a number, not {source!r:.80}")


def _reading(value: object) -> Reading:
    """What a metric function returned, as a reading; raises TypeError or ValueError if it is none."""
    if isinstance(value, ResourceAggregate | InstanceSamples | Total | MetricFailed):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"a metric function must return a number or a reading, not {type(value).__name__}")
    if value < 0:  # -1 is what many clients say for "unknown"
        raise ValueError(f"{value} cannot be a measurement: it is negative")
    return Total.of(int(value) if isinstance(value, Integral) else float(value))


def _words(error: Exception, deadline: float) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {deadline:g} s"
    return f"{type(error).__name__}: {error}"[:500]
