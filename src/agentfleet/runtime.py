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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.actuator import Actuator, Failure
from agentfleet.autoscaler import Autoscaler, MetricSource, ScaleTarget
from agentfleet.backends.base import Announcing, ConfigKeeping, Engine, Relocating, SizeKeeping, WorkloadBackend, own
from agentfleet.clock import Clock
from agentfleet.configstore import ConfigStore
from agentfleet.configuring import Configuring
from agentfleet.core.fence import Fence, NoFence
from agentfleet.core.health import Verdict
from agentfleet.core.reason import Reason
from agentfleet.desk import Desk
from agentfleet.endpoints import Endpoints
from agentfleet.errors import AgentFleetError, BackendUnavailable, NotLeader, OperationRefused
from agentfleet.events import Event
from agentfleet.fencing import Fenced, FencedJournal, allows
from agentfleet.health import HealthMonitor
from agentfleet.instances import AgentStatus, Instance, Phase
from agentfleet.loops import end_loops, only_error
from agentfleet.meter import Meter
from agentfleet.observer import Observer
from agentfleet.postmortem import Postmortem
from agentfleet.recovery import Recovery
from agentfleet.restoring import restore, restore_slots
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import Prober
from agentfleet.sizing import Sizing
from agentfleet.specs import FleetSpec
from agentfleet.state import FleetState
from agentfleet.stores.acks import ConfigAcks
from agentfleet.stores.journal import Journal
from agentfleet.telemetry import Telemetry
from agentfleet.turn import Turn
from agentfleet.view import SERVING, Condition, FleetView
from agentfleet.waiting import Waiting
from agentfleet.workload import WorkloadSizing

SYNC_DEADLINE = 60.0
"""Seconds for the backend's first whole picture."""
_LAPSED = 0.2
"""Seconds between two looks whether a lease that has lapsed was renewed."""
_BURST = 0.05
"""Seconds between two turns at least, where the engine keeps fleets by itself and reports much at once."""


class Runtime:
    """One fleet's parts and loops. See `Fleet` for the arguments."""

    def __init__(
        self,
        spec: FleetSpec,
        *,
        backend: Engine,
        journal: Journal,
        clock: Clock,
        config: ConfigStore,
        acks: ConfigAcks,
        remember_config: bool,
        target: ScaleTarget,
        metrics: Mapping[str, MetricSource],
        prober: Prober | None,
        telemetry: Telemetry,
        usage_period: float,
        seed: int | None,
        fence: Fence | None = None,
        standby: bool = False,
    ) -> None:
        self.name = spec.name
        self.backend = backend
        self.fence: Fence = NoFence() if fence is None else fence
        self._alone = fence is None
        self._standby = standby
        self._announce = backend.announce if isinstance(backend, Announcing) else None
        self.journal = journal if fence is None else FencedJournal(journal, fence)
        self.telemetry = telemetry
        self.clock = clock
        self.http = HttpClient()
        self.first_seq = 0
        """Position of the journal at the opening."""
        self.waiting = Waiting(spec.name)
        self.postmortem = Postmortem(self._rolling, self._revision_of, self._last_lines)
        self._open = self._was_opened = False
        self._wake = anyio.Event()
        self._stack = AsyncExitStack()

        rng = random.Random(seed if seed is not None else os.urandom(16))  # noqa: S311 - names and jitter, no secrets
        view = FleetView(min_ready=spec.rollout.min_ready, on_serving=self._serving_changed)
        actuator = Actuator(backend, self.name, clock=clock, rng=rng, on_done=self._action_done, fence=self.fence)
        self.desk = Desk(spec, view, actuator, self.record, rng, relocates=isinstance(backend, Relocating))
        self.recovery = Recovery(spec.recovery)
        self._rest = _BURST if isinstance(backend, WorkloadBackend) else 0.0
        self.engine_scales = isinstance(backend, SizeKeeping) and backend.keeps_size(spec)
        """Whether the size is the engine's own to decide."""
        sizing = (
            WorkloadSizing(self.desk, engine_scales=self.engine_scales)
            if isinstance(backend, WorkloadBackend)
            else Sizing(self.desk)
        )
        self.turn = Turn(self.desk, self.recovery, sizing)
        self.endpoints = Endpoints(view, credential=self._credential, admits=self._is_configured)
        self.monitor = HealthMonitor(
            spec.health,
            prober=prober or own(backend, "prober"),
            clock=clock,
            on_verdict=self._judged,
            on_status=self._reported,
        )
        self._observer = Observer(
            self.desk, self.turn, clock, watch_health=self._watch_health, forget_health=self._forget_health
        )
        self.configuring = Configuring(
            config,
            self.desk,
            self.turn,
            acks=acks,
            http=own(backend, "network") or self.http,
            clock=clock,
            record=self.record,
            credential=self._credential,
            on_met=self.endpoints.refresh,
            keep=self._keep_config if isinstance(backend, ConfigKeeping) else None,
            remember=remember_config,
            fence=self.fence,
            sees=lambda: self._observer.synced,
        )
        self.feed = self.configuring.feed
        self.autoscaler: Autoscaler | None = None
        self.meter = Meter(
            self.desk,
            backend,
            clock=clock,
            telemetry=telemetry,
            lag=lambda: self.monitor.statistics().lag_p99,
            fence=self.fence,
            ailing=self.turn.repair.ailing,
            failing=lambda: sizing.failing,
            period=usage_period,
        )
        if spec.scaling is not None and not self.engine_scales:
            sources = {**self.meter.sources, **metrics}
            self.autoscaler = Autoscaler(
                spec.scaling, target, sources, clock=clock, journal=self.journal, name=self.name
            )

    # ------------------------------------------------------------------------------------------ life

    def check_open(self) -> None:
        """Raise `OperationRefused` unless the fleet is open, `NotLeader` unless it may be acted upon now."""
        if self._was_opened:
            self.fence.ensure()
        if self._open:
            return
        if self._was_opened:
            raise OperationRefused(
                f"fleet {self.name} is closed, and a Fleet opens only once; make a new one, which goes on from the same"
                " journal, and use it inside 'async with Fleet(...) as fleet:'"
            )
        raise OperationRefused(f"fleet {self.name} is not open; use it inside 'async with Fleet(...) as fleet:'")

    def deployed(self) -> FleetState:
        """The wanted state; raises `OperationRefused` unless the fleet is open and deployed."""
        self.check_open()
        state = self.desk.state
        if state is None or state.deleted:
            raise OperationRefused(f"fleet {self.name} is not deployed; await fleet.deploy() first")
        return state

    def check_scalable(self) -> None:
        """Raise `OperationRefused` where the size is the engine's own to decide."""
        if self.engine_scales:
            raise OperationRefused(
                f"fleet {self.name} is scaled by the cluster's own autoscaler, which would undo this: deploy a spec"
                " with other scaling.min_replicas and scaling.max_replicas, or without template.kubernetes.autoscaler"
            )

    async def __aenter__(self) -> Self:
        if self._open:
            raise OperationRefused(f"fleet {self.name} is open already")
        if self._was_opened:
            self.check_open()
        self._was_opened = True
        async with AsyncExitStack() as stack:
            if self._alone:  # else it is open, and outlasts the terms
                await stack.enter_async_context(self.backend)
            stack.push_async_callback(self.http.aclose)
            await stack.enter_async_context(self.monitor)
            if not self._standby:
                self._fence_backend()
                self.first_seq = restore(self.journal, self.desk, self.turn, self.configuring, self.clock.now())
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            stack.push_async_exit(partial(end_loops, tasks))
            self.desk.actuator.bind(tasks)
            self.postmortem.bind(tasks)
            tasks.start_soon(self._observe, name=f"observe {self.name}")
            await self._first_picture()
            if not self._standby:
                restore_slots(self.journal, self.desk, self.turn, self.recovery)
                self._act(tasks)
            self._stack = stack.pop_all()
        self._open = True
        return self

    def _act(self, tasks: TaskGroup) -> None:
        """Begin to take turns."""
        tasks.start_soon(self._turns, name=f"turns {self.name}")
        tasks.start_soon(self.meter.run, name=f"usage {self.name}")
        tasks.start_soon(self.configuring.run, name=f"config {self.name}")
        if self.autoscaler is not None:
            tasks.start_soon(self._scale_when_running, name=f"autoscaler {self.name}")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        try:
            self.fence.ensure()
        except NotLeader as deposed:
            self.waiting.close(deposed)
        else:
            self.waiting.close()
        try:
            return await self._stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            cause = only_error(group)
            if isinstance(cause, AgentFleetError):  # one loop has ended the fleet: its error is what users can catch
                raise cause from group
            raise

    async def _first_picture(self) -> None:
        """Wait for the backend's first whole picture: before it, nothing may be decided."""
        with anyio.move_on_after(SYNC_DEADLINE) as scope:
            while not self._observer.synced:
                await self.waiting.pulse()
        if scope.cancelled_caught:
            raise BackendUnavailable(f"the backend showed no picture of fleet {self.name} within {SYNC_DEADLINE:g} s")

    # ------------------------------------------------------------------------------------------ the loops

    async def _observe(self) -> None:
        async with aclosing(self._watch()) as seen:
            async for observation in seen:
                self._observer.take(observation)
                self.wake()
                self.waiting.beat()

    def _watch(self) -> Any:
        return self.backend.watch(self.name)

    async def _turns(self) -> None:
        while True:
            self._wake = anyio.Event()
            if not allows(self.fence):  # the term goes on, or it ends and these loops with it
                with anyio.move_on_after(_LAPSED):
                    await self._wake.wait()
                continue
            if isinstance(self.journal, FencedJournal):
                self.journal.settle()
            began, at = time.perf_counter(), self.clock.now()
            due = self.turn.take(at)
            self.meter.note_turn(time.perf_counter() - began)
            self.waiting.beat()
            with anyio.move_on_after(None if due is None else max(0.0, due - self.clock.now())):
                await self._wake.wait()
            if self._rest and (rest := at + self._rest - self.clock.now()) > 0:
                await self.clock.sleep(rest)

    def wake(self) -> None:
        """Have a turn taken soon."""
        self._wake.set()

    async def until(self, reached: Callable[[], bool], timeout: float | None, what: str) -> None:
        """Wait until something is so; see `Waiting.until`."""
        await self.waiting.until(reached, timeout, what)

    async def _scale_when_running(self) -> None:
        """The autoscaler sleeps while the fleet is stopped or not deployed, and while another one scales against it."""
        assert self.autoscaler is not None
        while True:
            await self.clock.sleep(self.autoscaler.policy.period)
            state = self.desk.state
            runs = state is not None and state.running and not state.deleted
            if runs and allows(self.fence) and not self.turn.sizing.contested(self.clock.now()):
                await self.autoscaler.step()

    # ------------------------------------------------------------------------------------------ what comes in

    def _watch_health(self, instance: Instance) -> None:
        if self._standby:
            return  # it is probed by who leads
        self.monitor.observe(instance)
        if instance.phase is Phase.RUNNING and instance.isolated is None:
            self.feed.feed(instance, adopted=not self._observer.synced)
        elif instance.isolated is not None or instance.phase in (Phase.DRAINING, Phase.EXITED):
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

    def _reported(self, id: str, check: str, status: AgentStatus | None, latency: float, ok: bool) -> None:
        self._observer.probed(id, status, latency, ok=ok)
        self.telemetry.observe_probe(self.name, check, latency, ok=ok)

    def _serving_changed(self, id: str) -> None:
        member = self.desk.view.members.get(id)
        if member is not None and member.condition in SERVING:
            self.feed.feed(member.instance)  # it answers now: no reason to wait with its configuration
        elif member is not None and member.condition is Condition.ISOLATED:
            self.feed.forget(id)  # it is not to be changed any more, and nobody is to wait for its answer
        self.endpoints.refresh(id)

    def _action_done(self, action: str, id: str, error: Failure | None, seconds: float) -> None:
        if error is None:
            self.telemetry.observe_action(self.name, action, seconds)
            self.turn.succeeded(action, id)
            if action == "stop":
                self._observer.stopped(id)
            elif action == "delete" and not self.desk.wanted.deleted:
                self.feed.keep_again()  # it was deployed anew meanwhile, and the engine may have forgotten it since
        else:
            data = {"action": action, "error": type(error).__name__, "message": str(error)}
            self.record("action.failed", id, data | {"seconds": round(seconds, 3)})
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
        event = Event(self.clock.now(), self.name, kind, instance, data or {}, written)
        if self._standby:
            return event
        event = self.journal.append(event)
        self.postmortem.note(event)
        if self._announce is not None and allows(self.fence):
            self._announce(event)
        return event

    def _fence_backend(self) -> None:
        """Let a backend that fences its own requests know in which term they are made."""
        if isinstance(self.backend, Fenced) and not self._alone:
            self.backend.fenced(self.name, self.fence)

    async def _keep_config(self, revision: int, document: Any) -> None:
        assert isinstance(self.backend, ConfigKeeping), "the feed was told so"
        self.fence.ensure()
        await self.backend.configure(self.desk.spec, revision, document)

    def _is_configured(self, id: str) -> bool:
        return self.feed.met(id)

    def _rolling(self) -> int | None:
        state = self.desk.state
        return state.target if state is not None and state.rolling else None

    def _revision_of(self, id: str) -> int | None:
        member = self.desk.view.members.get(id)
        return None if member is None else member.instance.revision

    async def _last_lines(self, id: str) -> Sequence[str]:
        return await self.backend.logs(self.name, id, lines=5)

    def _credential(self, id: str) -> str | None:
        return self.backend.credential(self.name, id)
