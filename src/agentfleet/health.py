"""HealthMonitor: probes and heartbeats of thousands of instances → `core.health` → verdicts. Usable on its own.

::

    async with HealthMonitor(policy) as monitor:
        monitor.observe(instance)
        async for change in monitor.changes():
            print(change.id, change.verdict.state, *change.verdict.reasons)

One agenda (a heap) says what is due next, however many instances there are; a few workers, as many as the prober keeps
waiting and never more than `concurrency`, do it. Instances are probed at a phase of their own, by a hash of their
id, so that a thousand of them never ask at once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self
from weakref import WeakSet

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import Clock, SystemClock
from agentfleet.core.health import Beat, HealthMemory, Probed, Seen, Signal, Tick, Verdict, decide
from agentfleet.errors import OperationRefused
from agentfleet.instances import AgentStatus, HealthState, Instance, Phase
from agentfleet.signals.changes import Changes, VerdictChange
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import Prober, SocketProber
from agentfleet.signals.rounds import GRAIN, Agenda, Workers
from agentfleet.specs import CustomCheck, HealthPolicy, HeartbeatCheck

__all__ = ["Changes", "HealthMonitor", "HealthStatistics", "VerdictChange"]

_EAGER = 0.25
"""Seconds between probes of an instance that has just started, so that its readiness is seen at once."""
_EAGER_RATE = 1000.0
"""Such probes a second in all."""
_SLOTS = 128
"""Instants of a period at which probes are begun: even enough for the network, and one wake-up does for many."""
_TICK = -1

OnVerdict = Callable[[str, Verdict, AgentStatus | None], None]
OnStatus = Callable[[str, str, AgentStatus | None, float, bool], None]


@dataclass(frozen=True, slots=True)
class HealthStatistics:
    """What the monitor does. Spans are in seconds.

    Attributes:
        instances: Instances observed now.
        outstanding: Probes under way.
        queued: Probes that are due and wait for one of the others to end.
        probes: Probes ended so far.
        failures: Of these, failed.
        beats: Heartbeats heard so far.
        lag_p99: 99th percentile of the monitor's own lateness, over its last 1,024 waits.
        lag_max: The most ever.
        stalled: Time in which the monitor could not work, in total; it counts against no instance.
    """

    instances: int
    outstanding: int
    queued: int
    probes: int
    failures: int
    beats: int
    lag_p99: float
    lag_max: float
    stalled: float


class _Watched:
    """One instance, and what is planned for it."""

    __slots__ = ("busy", "deaf", "eager", "instance", "memory", "plan", "planned_at", "tick_at", "verdict")

    def __init__(self, instance: Instance, memory: HealthMemory, now: float) -> None:
        self.instance = instance
        self.memory = memory
        self.verdict = Verdict(memory.state, memory.since, ())
        self.plan = 0
        """Number of the present plan; agenda entries of earlier plans are void. -1 when forgotten."""
        self.planned_at = now
        self.tick_at: float | None = None
        self.busy = 0
        """Bit set of the checks whose probe is under way."""
        self.deaf = 0.0
        """The monitor's stalled time at the last beat or tick."""
        self.eager = False

    def askable(self) -> bool:
        return self.instance.phase in (Phase.RUNNING, Phase.DRAINING)


_Job = tuple[_Watched, int, int]
"""Whom to ask, number of the check (or the tick), number of the plan."""


class HealthMonitor:
    """Watches instances, and says when the belief about one changes.

    Args:
        policy: How health is judged.
        prober: Asks the instances; by default over the network, with a client of the monitor's own.
        clock: Where time comes from.
        on_verdict: Called with id, verdict and the agent's status on each change of a verdict. Must not block; an
            exception ends the monitor.
        on_status: Called with id, kind of check ("http", "tcp" or "custom"), status (None where the check asks for
            none), latency in seconds and success after each probe. Same rules.
        credential: Gives the bearer token that an instance wants to see.
        concurrency: Probes under way at any instant, at most.
    """

    def __init__(
        self,
        policy: HealthPolicy,
        *,
        prober: Prober | None = None,
        clock: Clock | None = None,
        on_verdict: OnVerdict | None = None,
        on_status: OnStatus | None = None,
        credential: Callable[[Instance], str | None] | None = None,
        concurrency: int = 256,
    ) -> None:
        self._policy = policy
        self._listening = _listens(policy)
        self._clock = clock if clock is not None else SystemClock()
        self._http: HttpClient | None = None
        if prober is None:
            self._http = HttpClient(max_body=2**20)
            prober = SocketProber(self._http, self._clock)
        self._prober: Prober = prober
        self._on_verdict = on_verdict
        self._on_status = on_status
        self._credential = credential
        self._watched: dict[str, _Watched] = {}
        self._agenda: Agenda[_Job] = Agenda(self._clock)
        self._workers: Workers[_Job] = Workers(self._probe, concurrency)
        self._subscribers: WeakSet[Changes] = WeakSet()
        self._eager = 0
        self._group: TaskGroup | None = None
        self._probes = self._failures = self._beats = 0

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise OperationRefused("this monitor runs or has run already; make another one")
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._workers.start(self._group)
        self._group.start_soon(self._agenda.run, self._due, self._workers.wake, self._is_waiting)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        self._group.cancel_scope.cancel()
        try:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                return await self._group.__aexit__(kind, error, trace)
            await self._group.__aexit__(None, None, None)  # the body's own error stays as it is, not in a group
            return None
        finally:
            for subscriber in self._subscribers:
                subscriber.end()
            if self._http is not None:
                await self._http.aclose()

    # -------------------------------------------------------------------------------------------- what users call

    def observe(self, instance: Instance, memory: HealthMemory | None = None) -> Verdict:
        """Watch an instance, or take note of how the backend sees it now.

        Args:
            instance: As the backend last saw it.
            memory: What another monitor remembered of it (`HealthMonitor.memory`), when it is new to this one. The
                time since then counts as time in which nobody listened.
        """
        now = self._clock.now()
        watched = self._watched.get(instance.id)
        if watched is None:
            watched = self._watched[instance.id] = _Watched(instance, memory or HealthMemory(), now)
            self._deafness(watched, now)
            if memory is not None:
                self._decide(watched, Tick(now, math.inf), now)
            before = None
        else:
            self._excuse(watched, now)
            before = (watched.askable(), watched.instance.address, watched.memory.started_at, watched.memory.restarts)
            watched.instance = instance
        sight = Seen(instance.phase, now, instance.started_at, instance.restarts, instance.ready)
        self._decide(watched, sight, now)
        after = (watched.askable(), watched.instance.address, watched.memory.started_at, watched.memory.restarts)
        if before != after:
            self._replan(watched, now)
        return watched.verdict

    def forget(self, id: str) -> None:
        """Watch this instance no more; unknown ids are ignored."""
        watched = self._watched.pop(id, None)
        if watched is not None:
            watched.plan = -1
            self._count_eager(watched, eager=False)

    def beat(self, id: str) -> bool:
        """Take note of a heartbeat; whether the instance is observed."""
        watched = self._watched.get(id)
        if watched is None:
            return False
        now = self._clock.now()
        self._beats += 1
        self._deafness(watched, now)
        self._decide(watched, Beat(now), now)
        return True

    def verdict(self, id: str) -> Verdict | None:
        """What is believed of an instance, None if it is not observed."""
        watched = self._watched.get(id)
        return watched.verdict if watched is not None else None

    def memory(self, id: str) -> HealthMemory | None:
        """What would have to be remembered of an instance, None if it is not observed."""
        watched = self._watched.get(id)
        return watched.memory if watched is not None else None

    def changes(self) -> Changes:
        """The verdicts that change from now on."""
        changes = Changes()
        self._subscribers.add(changes)
        return changes

    def set_policy(self, policy: HealthPolicy) -> None:
        """Judge by another policy from now on. Costs a moment for each instance."""
        self._policy = policy
        self._listening = _listens(policy)
        now = self._clock.now()
        for watched in list(self._watched.values()):
            self._decide(watched, Tick(now, self._deafness(watched, now)), now)
            self._replan(watched, now, at_once=False)

    def statistics(self) -> HealthStatistics:
        """How the monitor itself does."""
        lag_p99, lag_max = self._agenda.lag()
        return HealthStatistics(
            instances=len(self._watched),
            outstanding=self._workers.outstanding,
            queued=self._workers.queued,
            probes=self._probes,
            failures=self._failures,
            beats=self._beats,
            lag_p99=lag_p99,
            lag_max=lag_max,
            stalled=self._agenda.stalled(self._clock.now()),
        )

    # -------------------------------------------------------------------------------------------- deciding

    def _decide(self, watched: _Watched, signal: Signal, now: float, status: AgentStatus | None = None) -> Verdict:
        verdict, watched.memory = decide(self._policy, signal, watched.memory, now)
        if verdict.wake is not None and (watched.tick_at is None or verdict.wake < watched.tick_at):
            watched.tick_at = verdict.wake
            self._agenda.put(verdict.wake, (watched, _TICK, 0))
        before = watched.verdict
        if verdict.state is HealthState.HEALTHY and before.state is HealthState.HEALTHY and before.reasons:
            return verdict  # by far the commonest case; the first verdict's reasons still hold
        watched.verdict = verdict
        self._count_eager(watched, eager=verdict.state is HealthState.STARTING and watched.askable())
        if verdict.state is not before.state or verdict.since != before.since:
            for subscriber in self._subscribers:
                subscriber.put(VerdictChange(watched.instance.id, verdict, before.state, status))
            if self._on_verdict is not None:
                self._on_verdict(watched.instance.id, verdict, status)
        return verdict

    def _tick(self, watched: _Watched, due: float, now: float) -> None:
        if watched.plan < 0 or watched.tick_at != due:
            return  # forgotten, or an earlier tick was found necessary meanwhile
        watched.tick_at = None
        at = max(now, due)
        self._decide(watched, Tick(at, self._deafness(watched, now)), at)

    def _deafness(self, watched: _Watched, now: float) -> float:
        """Seconds since the last beat or tick in which this monitor could not have heard a beat."""
        stalled = self._agenda.stalled(now)
        lag, watched.deaf = stalled - watched.deaf, stalled
        return lag

    def _excuse(self, watched: _Watched, now: float) -> None:
        """Tell the instance's judge of a stall before anything else makes it look at the silence."""
        lag = self._deafness(watched, now) if self._listening else 0.0
        if lag > 0:
            self._decide(watched, Tick(now, lag), now)

    def _count_eager(self, watched: _Watched, *, eager: bool) -> None:
        self._eager += eager - watched.eager
        watched.eager = eager

    # -------------------------------------------------------------------------------------------- planning

    def _replan(self, watched: _Watched, now: float, *, at_once: bool = True) -> None:
        """Begin anew: it has started, restarted, moved or stopped, or is judged by other rules."""
        if watched.plan < 0:
            return  # a callback has just forgotten it
        watched.plan += 1
        watched.planned_at = now
        for index in range(len(self._policy.checks)):
            if not watched.busy >> index & 1:
                self._ask(watched, index, now if at_once else self._next(watched, index, now, now))

    def _ask(self, watched: _Watched, index: int, due: float) -> None:
        """Put a probe on the agenda, if the check is one that is asked for and the instance can be reached."""
        check = self._policy.checks[index]
        reachable = watched.instance.address is not None or isinstance(check, CustomCheck)
        if watched.askable() and reachable and not isinstance(check, HeartbeatCheck):
            self._agenda.put(due, (watched, index, watched.plan))

    def _next(self, watched: _Watched, index: int, asked: float, now: float) -> float:
        """When to ask again, after a question at `asked` that is over `now`."""
        check = self._policy.checks[index]
        if isinstance(check, HeartbeatCheck):
            return math.inf
        age = now - watched.planned_at
        if watched.eager and age < self._policy.startup:
            # at first four times a second, then ever more rarely, so that readiness is seen within an eighth of the
            # time it took
            return float(now + min(check.period, max(_EAGER, age / 8, self._eager / _EAGER_RATE)))
        slot = zlib.crc32(f"{watched.instance.id}/{index}".encode()) % _SLOTS
        phase = slot / _SLOTS * check.period
        asked += GRAIN  # it may have been asked this much before its slot
        due = (math.floor((asked - phase) / check.period) + 1) * check.period + phase
        if due <= asked:  # by rounding
            due += check.period
        return float(max(due, now))  # a question that took longer than the period costs no further slot

    def _due(self, due: float, job: _Job, now: float) -> None:
        watched, index, plan = job
        if index == _TICK:
            self._tick(watched, due, now)
        elif plan == watched.plan:
            watched.busy |= 1 << index
            self._workers.put(job)

    def _is_waiting(self) -> bool:
        return bool(self._workers.outstanding or self._workers.queued) or self._listening

    # -------------------------------------------------------------------------------------------- probing

    async def _probe(self, job: _Job) -> None:
        watched, index, plan = job
        checks = self._policy.checks
        now = asked = self._clock.now()
        again = False
        if plan == watched.plan:
            instance = watched.instance
            credential = self._credential(instance) if self._credential is not None else None
            stalled = self._agenda.stalled(asked)
            probed = await self._prober.probe(instance, index, checks[index], credential)
            now = self._clock.now()
            self._probes += 1
            self._failures += not probed.ok
            if plan == watched.plan:
                again = self._take(watched, checks[index].kind, probed, self._agenda.stalled(now) - stalled, now)
        watched.busy &= ~(1 << index)
        if plan == watched.plan:
            self._ask(watched, index, now if again else self._next(watched, index, asked, now))
        elif watched.plan >= 0 and index < len(self._policy.checks):
            self._ask(watched, index, self._clock.now())  # it has restarted meanwhile: ask the new life

    def _take(self, watched: _Watched, kind: str, probed: Probed, lag: float, now: float) -> bool:
        """Judge a probe that has ended; whether it is to be repeated at once."""
        if self._on_status is not None:
            self._on_status(watched.instance.id, kind, probed.status, probed.latency, probed.ok)
        self._excuse(watched, now)
        heard = replace(probed, lag=probed.lag + lag) if lag > 0 else probed
        return self._decide(watched, heard, now, probed.status).again


def _listens(policy: HealthPolicy) -> bool:
    return any(isinstance(check, HeartbeatCheck) for check in policy.checks)
