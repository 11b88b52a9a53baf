"""The running fleet: puts the parts together, runs their loops, and carries what one says to the others.

`Fleet` (the face) and the parts (the rooms) know nothing of each other but through here. What flows:

    backend.watch ─→ Observer ─→ view ─→ Turn ─→ Actuator ─→ backend
    probes ─→ HealthMonitor ─→ Observer        Turn ─→ journal
    Autoscaler ─→ intents ─→ Turn              view ─→ Endpoints, ConfigFeed
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.actuator import Actuator
from agentfleet.autoscaler import Autoscaler, MetricSource, ScaleTarget
from agentfleet.backends.base import Backend
from agentfleet.clock import Clock
from agentfleet.configstore import ConfigStore
from agentfleet.core.health import Verdict
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import RecoveryMemory
from agentfleet.core.scaling_samples import Reading, Total
from agentfleet.desk import Desk
from agentfleet.endpoints import Endpoints
from agentfleet.errors import AgentFleetError, BackendError, BackendUnavailable, DeadlineExceeded
from agentfleet.events import Event
from agentfleet.feed import ConfigFeed, remembered
from agentfleet.health import HealthMonitor
from agentfleet.instances import AgentStatus, Instance, Phase
from agentfleet.observer import Observer
from agentfleet.recovery import Recovery
from agentfleet.resources import FleetMetrics
from agentfleet.signals.http import HttpClient, Requests
from agentfleet.signals.probes import Prober
from agentfleet.specs import FleetSpec
from agentfleet.state import FleetState
from agentfleet.stores.journal import Journal
from agentfleet.telemetry import Telemetry
from agentfleet.turn import Turn
from agentfleet.view import EXPENDABLE, SERVING, FleetView

SYNC_DEADLINE = 60.0
"""Seconds for the backend's first whole picture."""


class Runtime:
    """One fleet's parts and loops. See `Fleet` for the arguments."""

    def __init__(
        self,
        spec: FleetSpec,
        *,
        backend: Backend,
        journal: Journal,
        clock: Clock,
        config: ConfigStore,
        target: ScaleTarget,
        metrics: Mapping[str, MetricSource],
        prober: Prober | None,
        telemetry: Telemetry,
        usage_period: float,
        seed: int | None,
    ) -> None:
        self.name = spec.name
        self.backend = backend
        self.journal = journal
        self.telemetry = telemetry
        self.clock = clock
        self.http = HttpClient()
        self.first_seq = 0
        """Position of the journal at the opening."""
        self.queue_depth: Callable[[], int] | None = None
        """Tasks of an open dispatcher; without one the agents' own word is taken."""
        self._usage_period = usage_period
        self._usage_failing = False
        self._sampled: tuple[float, float] | None = None
        self._wake = anyio.Event()
        self._pulse = anyio.Event()
        self._stack = AsyncExitStack()

        rng = random.Random(seed if seed is not None else os.urandom(16))  # noqa: S311 - names and jitter, no secrets
        view = FleetView(min_ready=spec.rollout.min_ready, on_serving=self._serving_changed)
        actuator = Actuator(backend, self.name, clock=clock, rng=rng, on_done=self._action_done)
        self.desk = Desk(spec, view, actuator, self.record, rng)
        self.recovery = Recovery(spec.recovery)
        self.turn = Turn(self.desk, self.recovery)
        self.endpoints = Endpoints(view, credential=self._credential, admits=self._is_configured)
        self.monitor = HealthMonitor(
            spec.health,
            prober=prober or _own_prober(backend),
            clock=clock,
            on_verdict=self._judged,
            on_status=self._reported,
        )
        self._observer = Observer(
            self.desk, self.turn, clock, watch_health=self._watch_health, forget_health=self._forget_health
        )
        self.feed = ConfigFeed(
            config,
            self.name,
            http=_own_network(backend) or self.http,
            clock=clock,
            record=self.record,
            credential=self._credential,
            on_met=self.endpoints.refresh,
        )
        self.autoscaler: Autoscaler | None = None
        self._metrics = own = FleetMetrics(view, self._requests, lambda: self._sampled)
        if spec.scaling is not None:
            sources: dict[str, MetricSource] = {"cpu": own.cpu, "memory": own.memory, "queue": self._queue, **metrics}
            self.autoscaler = Autoscaler(spec.scaling, target, sources, clock=clock, journal=journal, name=self.name)

    # ------------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.backend)
            stack.push_async_callback(self.http.aclose)
            await stack.enter_async_context(self.monitor)
            self._restore()
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            stack.push_async_exit(partial(_end, tasks))
            self.desk.actuator.bind(tasks)
            tasks.start_soon(self._observe, name=f"observe {self.name}")
            await self._first_picture()
            tasks.start_soon(self._turns, name=f"turns {self.name}")
            tasks.start_soon(self._measure, name=f"usage {self.name}")
            tasks.start_soon(self.feed.run, name=f"config {self.name}")
            if self.autoscaler is not None:
                tasks.start_soon(self._scale_when_running, name=f"autoscaler {self.name}")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return await self._stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            cause = _only(group)
            if isinstance(cause, AgentFleetError):  # one loop has ended the fleet: its error is what users can catch
                raise cause from group
            raise

    def _restore(self) -> None:
        """Take up what an earlier manager left in the journal."""
        state = self.journal.last_state(self.name, "state.fleet")
        data = {} if state is None else {"revision": state.data["target"], "replicas": state.data["replicas"]}
        self.first_seq = self.record("manager.started", data=data).seq
        if state is None:
            return
        self.desk.rng.seed(f"{self.desk.rng.random()}/{self.first_seq}")  # the same seed, but never the same ids again
        self.turn.restore(FleetState.from_dict(dict(state.data)).taken_over(self.clock.now()))
        config = remembered(self.journal, self.name)
        if config is not None:
            self.feed.restore(config)

    async def _first_picture(self) -> None:
        """Wait for the backend's first whole picture: before it, nothing may be decided."""
        with anyio.move_on_after(SYNC_DEADLINE) as scope:
            while not self._observer.synced:
                await self._pulse.wait()
        if scope.cancelled_caught:
            raise BackendUnavailable(f"the backend showed no picture of fleet {self.name} within {SYNC_DEADLINE:g} s")
        if self.desk.state is None:
            return
        slots = {member.instance.slot for member in self.desk.view.members.values()}
        # an empty place has its history, too; the surge of a rollout may have put it beyond the wanted size
        for slot in sorted(slots.union(range(2 * self.desk.state.desired))):
            found = self.journal.last_state(self.name, f"state.recovery.{slot}")
            memory = RecoveryMemory() if found is None else RecoveryMemory.from_dict(dict(found.data))
            if memory != RecoveryMemory():
                self.recovery.restore(slot, memory)
                self.turn.sizing.vacate(slot)

    # ------------------------------------------------------------------------------------------ the loops

    async def _observe(self) -> None:
        async with aclosing(self._watch()) as seen:
            async for observation in seen:
                self._observer.take(observation)
                self.wake()
                self._beat()

    def _watch(self) -> Any:
        return self.backend.watch(self.name)

    async def _turns(self) -> None:
        while True:
            self._wake = anyio.Event()
            began = time.perf_counter()
            due = self.turn.take(self.clock.now())
            self._measure_turn(time.perf_counter() - began)
            self._beat()
            with anyio.move_on_after(None if due is None else max(0.0, due - self.clock.now())):
                await self._wake.wait()

    def _measure_turn(self, seconds: float) -> None:
        """Bring the gauges up to date: where the fleet stands after this turn, and what the turn cost."""
        state, counts, telemetry = self.desk.state, self.desk.view.total_counts(), self.telemetry
        by_condition = {each.value: getattr(counts, each.value) for each in EXPENDABLE}
        telemetry.set_instances(self.name, {**by_condition, "draining": self.desk.view.draining})
        telemetry.set_desired(self.name, state.desired if state is not None else 0)
        telemetry.set_rollout(self.name, _rollout_word(state))
        telemetry.observe_turn(self.name, seconds)

    def wake(self) -> None:
        """Have a turn taken soon."""
        self._wake.set()

    async def until(self, reached: Callable[[], bool], timeout: float | None, what: str) -> None:
        """Wait until something is so; looks again after each turn.

        Raises:
            DeadlineExceeded: It is not so within `timeout` seconds.
        """

        async def wait() -> None:
            while not reached():
                await self._pulse.wait()

        await self.within(timeout, what, wait)

    async def within(self, timeout: float | None, what: str, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait for `wait`, raising `DeadlineExceeded` after `timeout` seconds."""
        try:
            with anyio.fail_after(timeout):
                await wait()
        except TimeoutError as error:
            raise DeadlineExceeded(f"fleet {self.name}: waited {timeout:g} s until {what}; it goes on") from error

    def _beat(self) -> None:
        """Let those look again who wait for the fleet to get somewhere."""
        pulse, self._pulse = self._pulse, anyio.Event()
        pulse.set()

    async def _measure(self) -> None:
        """Measure usage again and again; what cannot be measured stays unknown."""
        last = self.clock.now()
        while True:
            await self.clock.sleep(self._usage_period)
            try:
                with anyio.fail_after(max(1.0, self._usage_period)):
                    usage = await self.backend.usage(self.name)
            except (BackendError, TimeoutError) as error:
                if not self._usage_failing:
                    self.record("usage.failed", data={"error": str(error)})
                self._usage_failing = True
                continue
            self._usage_failing = False
            now = self.clock.now()
            self.telemetry.set_prober_lag(self.name, self.monitor.statistics().lag_p99)
            for id, each in usage.items():
                self.desk.view.measure(id, each)
            self._sampled, last = (now, now - last), now

    async def _scale_when_running(self) -> None:
        """The autoscaler sleeps while the fleet is stopped, paused by hand or not deployed."""
        assert self.autoscaler is not None
        while True:
            await self.clock.sleep(self.autoscaler.policy.period)
            state = self.desk.state
            if state is not None and state.running and not state.deleted:
                await self.autoscaler.step()

    # ------------------------------------------------------------------------------------------ what comes in

    def _watch_health(self, instance: Instance) -> None:
        self.monitor.observe(instance)
        if instance.phase is Phase.RUNNING:
            self.feed.feed(instance, adopted=not self._observer.synced)
        elif instance.phase in (Phase.DRAINING, Phase.EXITED):
            self.feed.forget(instance.id)
        self.endpoints.refresh(instance.id)

    def _forget_health(self, id: str) -> None:
        self.monitor.forget(id)
        self.feed.forget(id)
        self.endpoints.refresh(id)
        self.endpoints.notify()

    def _judged(self, id: str, verdict: Verdict, status: AgentStatus | None) -> None:
        self._observer.judged(id, verdict, status)
        self.wake()

    def _reported(self, id: str, status: AgentStatus | None, latency: float, ok: bool) -> None:
        self._observer.probed(id, status, latency, ok=ok)
        self.telemetry.observe_probe(self.name, "probe", latency, ok=ok)

    def _serving_changed(self, id: str) -> None:
        member = self.desk.view.members.get(id)
        if member is not None and member.condition in SERVING:
            self.feed.feed(member.instance)  # it answers now: no reason to wait with its configuration
        self.endpoints.refresh(id)

    def _action_done(self, action: str, id: str, error: BackendError | DeadlineExceeded | None, seconds: float) -> None:
        if error is None:
            self.telemetry.observe_action(self.name, action, seconds)
            self.turn.succeeded(action, id)
            if action == "stop":
                self._observer.stopped(id)
        else:
            data = {
                "action": action,
                "error": type(error).__name__,
                "message": str(error),
                "seconds": round(seconds, 3),
            }
            self.record("action.failed", id, data)
            self.turn.failed(action, id, error, self.clock.now())
        self.wake()

    def record(
        self,
        kind: str,
        instance: str | None = None,
        data: Mapping[str, Any] | None = None,
        reasons: Sequence[Reason] = (),
    ) -> Event:
        """Journal one event of this fleet."""
        written = tuple(reason.to_dict() for reason in reasons)
        return self.journal.append(Event(self.clock.now(), self.name, kind, instance, data or {}, written))

    def _is_configured(self, id: str) -> bool:
        return self.feed.met(id)

    def _queue(self) -> Reading:
        return self._metrics.queue() if self.queue_depth is None else Total.of(self.queue_depth())

    def _credential(self, id: str) -> str | None:
        return self.backend.credential(self.name, id)

    def _requests(self) -> tuple[float | None, int | None]:
        state = self.desk.state
        template = state.template if state is not None else self.desk.spec.template
        return template.cpu, template.memory


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one error that a group holds, however deep; None if it holds several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


async def _end(
    tasks: TaskGroup, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> bool | None:
    """Cancel the loops and wait for their end; the body's own error stays as it is, not in a group."""
    tasks.cancel_scope.cancel()
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return await tasks.__aexit__(kind, error, trace)
    await tasks.__aexit__(None, None, None)
    return None


def _own_network(backend: Backend) -> Requests | None:
    """Likewise for requests to its agents."""
    make = getattr(backend, "network", None)
    return make() if make is not None else None


def _rollout_word(state: FleetState | None) -> str:
    """Where the rollout stands, in the words of the metric."""
    if state is None:
        return "none"
    if state.rolling:
        return "paused" if state.paused else "progressing"
    return "rolled_back" if state.rollout.is_rollback else state.rollout.phase.value


def _own_prober(backend: Backend) -> Prober | None:
    """The prober of a backend whose instances have no sockets (a simulation)."""
    make = getattr(backend, "prober", None)
    return make() if make is not None else None
