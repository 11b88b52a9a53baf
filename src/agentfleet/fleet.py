"""Fleet: one fleet's desired state and the loop that keeps it. Start reading here.

::

    async with Fleet(spec, backend=ProcessBackend()) as fleet:
        await fleet.deploy()
        await fleet.upgrade(version="1.5.0")

`Fleet` composes the parts: an `Observer` takes in what is seen, a `Turn` decides and acts, a `HealthMonitor` probes, an
`Autoscaler` and the operator's methods below hand in intents. It is the fleet's single writer.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import anyio

from agentfleet.actuator import Actuator
from agentfleet.autoscaler import Autoscaler, MetricSource, Size
from agentfleet.backends.base import Backend
from agentfleet.clock import Clock, SystemClock
from agentfleet.configstore import ConfigStore
from agentfleet.core.governor import Cause
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import RecoveryMemory
from agentfleet.core.rollout import RolloutPhase
from agentfleet.core.scaling import Decision
from agentfleet.display import Report, table
from agentfleet.endpoints import Endpoints
from agentfleet.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    OperationRefused,
    RolloutFailed,
    SpecError,
)
from agentfleet.events import Event
from agentfleet.feed import ConfigFeed
from agentfleet.health import HealthMonitor
from agentfleet.instances import AgentStatus, Instance, Phase
from agentfleet.observer import Observer
from agentfleet.recovery import Recovery
from agentfleet.resources import FleetMetrics
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import Prober
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.state import FleetState, Revision, first_state
from agentfleet.stores.journal import Journal
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.turn import Intent, Turn
from agentfleet.view import SERVING, FleetView

SYNC_DEADLINE = 60.0
"""Seconds for the backend's first whole picture."""


class Fleet:
    """A fleet of agents: deploy it, and it is kept as its spec says.

    Args:
        spec: What is wanted. `deploy` applies it.
        backend: Where the instances live; opened and closed with the fleet.
        journal: What happened and what must outlive the manager; in memory when omitted. A fleet that starts on the
            journal of an earlier manager takes up its state and its instances.
        clock: Where the time comes from.
        metrics: Sources for metric targets by name, in place of or beside the built-in "cpu", "memory" and "queue".
        config: Where the agents' configuration is published, under the fleet's name; a store of its own when omitted.
        prober: How instances are probed; by default as the backend says, else over the network.
        usage_period: Seconds between measurements of what instances use.
        seed: Makes instance ids and jitter reproducible.
    """

    def __init__(
        self,
        spec: FleetSpec,
        *,
        backend: Backend,
        journal: Journal | None = None,
        clock: Clock | None = None,
        metrics: Mapping[str, MetricSource] | None = None,
        config: ConfigStore | None = None,
        prober: Prober | None = None,
        usage_period: float = 5.0,
        seed: int | None = None,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.journal: Journal = journal if journal is not None else MemoryJournal()
        self.clock: Clock = clock or SystemClock()
        self.backend = backend
        self.config = config if config is not None else ConfigStore(journal=self.journal, clock=self.clock)
        self.http = HttpClient()
        rng = random.Random(seed if seed is not None else os.urandom(16))  # noqa: S311 - names and jitter, no secrets
        self._usage_period = usage_period
        self._wake = anyio.Event()
        self._pulse = anyio.Event()
        self._sampled: tuple[float, float] | None = None
        self._usage_failing = False
        self._open = False
        self._first_seq = 0

        self.view = FleetView(min_ready=spec.rollout.min_ready, on_serving=self._serving_changed)
        self._endpoints = Endpoints(self.view, self._credential)
        self._actuator = Actuator(backend, self.name, clock=self.clock, rng=rng, on_done=self._action_done)
        self.recovery = Recovery(spec.recovery)
        self._turn = Turn(
            spec, view=self.view, recovery=self.recovery, actuator=self._actuator, record=self._record, rng=rng
        )
        self.monitor = HealthMonitor(
            spec.health,
            prober=prober or _own_prober(backend),
            clock=self.clock,
            on_verdict=self._judged,
            on_status=self._reported,
        )
        self._observer = Observer(
            self.view,
            self._turn,
            self._record,
            self.clock,
            watch_health=self._watch_health,
            forget_health=self._forget_health,
        )
        self.feed = ConfigFeed(
            self.config,
            self.name,
            http=self.http,
            clock=self.clock,
            record=self._record,
            credential=self._credential,
        )
        own = FleetMetrics(self.view, self._requests, lambda: self._sampled)
        sources: dict[str, MetricSource] = {"cpu": own.cpu, "memory": own.memory, "queue": own.queue}
        self.autoscaler = (
            Autoscaler(
                spec.scaling,
                self,
                {**sources, **(metrics or {})},
                clock=self.clock,
                journal=self.journal,
                name=self.name,
            )
            if spec.scaling is not None
            else None
        )
        self._stack = AsyncExitStack()

    # ------------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        if self._open:
            raise OperationRefused(f"fleet {self.name} is open already")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.backend)
            stack.push_async_callback(self.http.aclose)
            await stack.enter_async_context(self.monitor)
            self._restore()
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            self._actuator.bind(tasks)
            tasks.start_soon(self._observe, name=f"observe {self.name}")
            await self._first_picture()
            tasks.start_soon(self._turns, name=f"turns {self.name}")
            tasks.start_soon(self._measure, name=f"usage {self.name}")
            tasks.start_soon(self.feed.run, name=f"config {self.name}")
            if self.autoscaler is not None:
                tasks.start_soon(self._scale_when_running, name=f"autoscaler {self.name}")
            self._stack = stack.pop_all()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        return await self._stack.__aexit__(kind, error, trace)

    def _restore(self) -> None:
        """Take up what an earlier manager left in the journal."""
        last = self.journal.read()[-1:]
        self._first_seq = last[0].seq if last else 0
        state = self.journal.last_state(self.name, "state.fleet")
        if state is None or state.data["deleted"]:
            return
        self._turn.restore(FleetState.from_dict(dict(state.data)))
        config = self.journal.last_state(self.name, "state.config")
        if config is not None:
            self.feed.restore(dict(config.data))
        self._record("manager.started", data={"revision": state.data["target"], "replicas": state.data["replicas"]})

    async def _first_picture(self) -> None:
        with anyio.move_on_after(SYNC_DEADLINE) as scope:
            while not self._observer.synced:
                await self._pulse.wait()
        if scope.cancelled_caught:
            raise BackendUnavailable(f"the backend showed no picture of fleet {self.name} within {SYNC_DEADLINE:g} s")
        for member in self.view.members.values():
            slot = member.instance.slot
            found = self.journal.last_state(self.name, f"state.recovery.{slot}")
            if found is not None and self._turn.state is not None:
                self.recovery.restore(slot, RecoveryMemory.from_dict(dict(found.data)))

    # ------------------------------------------------------------------------------------------ the loops

    async def _observe(self) -> None:
        async with aclosing(self._watch()) as seen:
            async for observation in seen:
                self._observer.take(observation)
                self._wake.set()
                if self._observer.synced and not self._open:
                    self._beat()

    def _watch(self) -> Any:
        return self.backend.watch(self.name)

    async def _turns(self) -> None:
        while True:
            self._wake = anyio.Event()
            due = self._turn.take(self.clock.now())
            self._beat()
            with anyio.move_on_after(None if due is None else max(0.0, due - self.clock.now())):
                await self._wake.wait()

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
                    self._record("usage.failed", data={"error": str(error)})
                self._usage_failing = True
                continue
            self._usage_failing = False
            now = self.clock.now()
            for id, each in usage.items():
                self.view.measure(id, each)
            self._sampled, last = (now, now - last), now

    async def _scale_when_running(self) -> None:
        """The autoscaler sleeps while the fleet is stopped, paused by hand or not deployed."""
        assert self.autoscaler is not None
        while True:
            state = self._turn.state
            if state is not None and state.running and not state.deleted:
                await self.autoscaler.step()
            await self.clock.sleep(self.autoscaler.policy.period)

    # ------------------------------------------------------------------------------------------ what comes in

    def _watch_health(self, instance: Instance) -> None:
        self.monitor.observe(instance)
        self._endpoints.refresh(instance.id)
        if instance.phase in (Phase.DRAINING, Phase.EXITED):
            self.feed.forget(instance.id)

    def _forget_health(self, id: str) -> None:
        self.monitor.forget(id)
        self.feed.forget(id)
        self._endpoints.refresh(id)
        self._endpoints.notify()

    def _judged(self, id: str, verdict: Any, status: AgentStatus | None) -> None:
        self._observer.judged(id, verdict, status)
        self._wake.set()

    def _reported(self, id: str, status: AgentStatus | None, latency: float, ok: bool) -> None:
        del latency, ok
        if status is not None:
            self._observer.reported(id, status)

    def _serving_changed(self, id: str) -> None:
        self._endpoints.refresh(id)
        member = self.view.members.get(id)
        if member is not None and member.condition in SERVING:
            self.feed.feed(member.instance)

    def _action_done(self, action: str, id: str, error: BackendError | DeadlineExceeded | None, seconds: float) -> None:
        if error is None:
            self._turn.succeeded(action, id)
        else:
            data = {
                "action": action,
                "error": type(error).__name__,
                "message": str(error),
                "seconds": round(seconds, 3),
            }
            self._record("action.failed", id, data)
            self._turn.failed(action, id, error, self.clock.now())
        self._wake.set()

    def _record(
        self,
        kind: str,
        instance: str | None = None,
        data: Mapping[str, Any] | None = None,
        reasons: Sequence[Reason] = (),
    ) -> None:
        written = tuple(reason.to_dict() for reason in reasons)
        self.journal.append(Event(self.clock.now(), self.name, kind, instance, data or {}, written))

    def _credential(self, id: str) -> str | None:
        return self.backend.credential(self.name, id)

    def _requests(self) -> tuple[float | None, int | None]:
        state = self._turn.state
        template = state.template if state is not None else self.spec.template
        return template.cpu, template.memory

    # ------------------------------------------------------------------------------------------ operations

    async def deploy(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Make the fleet as its spec says: the first time bring it up, later apply what the spec changed.

        Args:
            wait: Return when every instance is healthy; otherwise at once.
            timeout: Seconds to wait; None waits as long as the rollout's own deadline allows.

        Raises:
            RolloutFailed: The instances do not become healthy.
            DeadlineExceeded: `timeout` is over; the deployment goes on.
        """
        self._check_open()
        state, spec, now = self._turn.state, self.spec, self.clock.now()
        if state is None or state.deleted:
            state = first_state(spec.template, spec.replicas, now)
            self._set(state, "fleet.deployed", replicas=spec.replicas, revision=1, version=spec.template.version)
        else:
            if spec.template != state.applied_template:
                state = state.with_revision(spec.template, "deploy", now, spec.rollout.keep_revisions)
            if spec.replicas != state.applied_replicas:
                state = replace(state, replicas=spec.replicas)
            state = replace(state, applied_template=spec.template, applied_replicas=spec.replicas)
            self._set(state, "fleet.deployed", replicas=state.replicas, revision=state.target)
        if wait:
            await self._rolled_out(state.target, timeout)

    async def upgrade(
        self, version: str | None = None, *, wait: bool = True, timeout: float | None = None, **changes: Any
    ) -> Revision:
        """Roll out a new revision: another version, or any other change of the template (command, env, cpu, …).

        Raises:
            RolloutFailed: It did not work out; where the policy says so the fleet has been rolled back.
            pydantic.ValidationError: A change is not valid; nothing was changed.
            OperationRefused: Nothing would change, or the fleet is not deployed.
        """
        state = self._deployed()
        if version is not None:
            changes["version"] = version
        template: AgentTemplate = state.template.replace(**changes)
        if template == state.template:
            raise OperationRefused(f"fleet {self.name} runs this template already (revision {state.target})")
        state = state.with_revision(template, "upgrade", self.clock.now(), self.spec.rollout.keep_revisions)
        self._set(state, "rollout.started", revision=state.target, version=template.version, cause="upgrade")
        if wait:
            await self._rolled_out(state.target, timeout)
        found = state.revision(state.target)
        assert found is not None
        return found

    async def rollback(self, to: int | None = None, *, wait: bool = True, timeout: float | None = None) -> Revision:
        """Return to a kept revision: the last good one, or any that is named.

        Raises:
            OperationRefused: There is no such revision.
            RolloutFailed: It does not work either.
        """
        state = self._deployed()
        target = to if to is not None else state.fallback
        if target is None:
            raise OperationRefused(f"fleet {self.name} has no earlier good revision to roll back to")
        if target == state.target:
            raise OperationRefused(f"fleet {self.name} runs revision {target} already")
        before = state.target
        state = state.with_target(target, self.clock.now())
        self._set(state, "rollout.started", revision=target, cause="rollback", replaces=before)
        if wait:
            await self._rolled_out(target, timeout)
        found = state.revision(target)
        assert found is not None
        return found

    async def scale(self, replicas: int, reasons: Sequence[Reason] | None = None) -> None:
        """Ask for another size; returns at once.

        An operator's word goes before the autoscaler's in the same turn; later the autoscaler goes on from there.

        Args:
            replicas: Instances wanted.
            reasons: Given by the autoscaler; leave it out.

        Raises:
            SpecError: Not a whole number, negative, or outside the scaling policy's bounds.
            OperationRefused: The fleet is not deployed.
        """
        self._deployed()
        if type(replicas) is not int or not 0 <= replicas <= 1_000_000:  # True is an int, and no size
            raise SpecError(f"replicas must be a whole number from 0 to 1,000,000, not {replicas!r}")
        policy = self.spec.scaling
        if policy is not None and reasons is None and not policy.min_replicas <= replicas <= policy.max_replicas:
            raise SpecError(
                f"replicas ({replicas}) is outside scaling.min_replicas..max_replicas "
                f"({policy.min_replicas}..{policy.max_replicas}): the autoscaler would undo it; change the policy"
            )
        cause = Cause.OPERATOR if reasons is None else Cause.SCALING
        self._turn.offer(Intent(cause, replicas, tuple(reasons or ())))
        self._wake.set()

    async def stop(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Drain and end all instances, and remember the size for `start`."""
        self._set(replace(self._deployed(), running=False), "fleet.stopped")
        if wait:
            await self._until(lambda: not self.view, timeout, "all instances are gone")

    async def start(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Bring a stopped fleet back to its size."""
        state = self._deployed()
        self._set(replace(state, running=True), "fleet.started", replicas=state.replicas)
        if wait:
            await self.ready(timeout=timeout)

    async def pause(self) -> None:
        """Hold the rollout where it is; size and health are still kept."""
        self._set(replace(self._deployed(), paused=True), "fleet.paused")

    async def resume(self) -> None:
        """Go on with a paused rollout."""
        self._set(replace(self._deployed(), paused=False), "fleet.resumed")

    async def delete(self, *, timeout: float | None = None) -> None:
        """Drain and end all instances and forget the fleet; its journal stays."""
        self._set(replace(self._deployed(), deleted=True), "fleet.deleted")
        await self._until(lambda: not self.view, timeout, "all instances are gone")

    async def restart(self, id: str) -> None:
        """Restart one instance in place, now; refused when the disruption budget is spent.

        Raises:
            OperationRefused: No such instance, or the governor holds it; the message says why.
        """
        self._deployed()
        self._turn.restart(id, self.clock.now())
        self._wake.set()

    async def configure(
        self,
        document: object,
        *,
        author: str = "operator",
        reason: str = "configure",
        wait: bool = True,
        timeout: float | None = None,
    ) -> int:
        """Publish a configuration and push it to every agent.

        Args:
            document: Plain JSON values, or a pydantic model; validated by what is registered for the fleet's name.
            author: Who changes it.
            reason: Why.
            wait: Return when every running agent has acknowledged or refused it.
            timeout: Seconds to wait.

        Returns:
            The new revision.

        Raises:
            ConfigInvalid: The document fails validation; nothing was changed.
            DeadlineExceeded: Not everybody has answered in time; the push goes on.
        """
        self._check_open()
        stored = await self.config.put(self.name, document, author=author, reason=reason)
        if wait:
            await self._within(timeout, "all agents have answered", self.feed.wait_settled, stored.revision)
        return stored.revision

    # ------------------------------------------------------------------------------------------ reading

    @property
    def state(self) -> FleetState | None:
        """Desired state; None before the first deployment."""
        return self._turn.state

    @property
    def decision(self) -> Decision | None:
        """The autoscaler's last decision."""
        return self.autoscaler.last_decision if self.autoscaler is not None else None

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Every instance that exists, as last seen."""
        return tuple(member.instance for member in self.view.members.values())

    def endpoints(self) -> Endpoints:
        """A live view of the instances that work may be sent to."""
        return self._endpoints

    def status(self) -> Mapping[str, Any]:
        """Where the fleet stands, in numbers."""
        return self._turn.summary()

    def revisions(self) -> tuple[Revision, ...]:
        """Kept revisions, oldest first."""
        return self._turn.state.revisions if self._turn.state is not None else ()

    async def events(self, *, after: int | None = None) -> AsyncIterator[Event]:
        """What happens, from the opening of this fleet on (or after a journal position), without end."""
        start = self._first_seq if after is None else after
        async with aclosing(self.journal.follow(fleet=self.name, after=start)) as seen:  # type: ignore[type-var]
            async for event in seen:
                yield event

    async def logs(self, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines an instance wrote."""
        return await self.backend.logs(self.name, id, lines=lines)

    def report(self) -> Report:
        """The fleet as a table, one row per instance."""
        now = self.clock.now()
        rows = [
            (
                member.instance.id,
                member.instance.version,
                member.condition,
                member.health,
                member.instance.node,
                member.instance.restarts,
                None if member.instance.started_at is None else round(now - member.instance.started_at),
                member.in_flight,
                member.cpu,
                None if member.memory is None else round(member.memory / 2**20, 1),
            )
            for member in self.view.members.values()
        ]
        status = self.status()
        title = f"fleet {self.name}: {status['good']} of {status['desired']} healthy, version {status['version']}"
        columns = ("instance", "version", "is", "health", "node", "restarts", "age s", "busy", "cpu", "MiB")
        return table(title, columns, sorted(rows, key=lambda row: str(row[0])))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        status = self.status() if self._turn.state is not None else None
        where = "not deployed" if status is None else f"{status['good']} of {status['desired']} healthy"
        return f"<Fleet {self.name}: {where}>"

    async def size(self) -> Size:
        """The present size (what an autoscaler needs to know)."""
        state = self._turn.state
        counts = self.view.total_counts()
        return Size(state.desired if state is not None else 0, counts.total, counts.good)

    # ------------------------------------------------------------------------------------------ waiting

    async def ready(self, *, timeout: float | None = None) -> None:
        """Wait until as many instances as wanted are healthy and no others are there."""

        def enough() -> bool:
            state = self._turn.state
            counts = self.view.total_counts()
            return state is not None and counts.good == counts.total == state.desired

        await self._until(enough, timeout, "all instances are healthy")

    async def _rolled_out(self, number: int, timeout: float | None) -> None:
        def over() -> bool:
            state = self._turn.state
            assert state is not None
            return state.rollout.phase is not RolloutPhase.PROGRESSING

        await self._until(over, timeout, f"revision {number} is rolled out")
        state = self._turn.state
        assert state is not None
        if state.target != number or state.rollout.phase is RolloutPhase.FAILED:
            why = self._why(number)
            runs = f"the fleet runs revision {state.target} ({state.template.version})"
            raise RolloutFailed(f"revision {number} could not be rolled out: {why}; {runs}")

    def _why(self, number: int) -> str:
        for event in reversed(self.journal.read(fleet=self.name, after=self._first_seq)):
            if event.kind == "rollout.failed" and event.data.get("revision") == number:
                return "; ".join(reason["text"] for reason in event.reasons)
        return "another revision was asked for meanwhile"

    async def _until(self, reached: Callable[[], bool], timeout: float | None, what: str) -> None:
        async def wait() -> None:
            while not reached():
                await self._pulse.wait()

        self._check_open()
        await self._within(timeout, what, wait)

    async def _within(self, timeout: float | None, what: str, wait: Callable[..., Any], *arguments: Any) -> None:
        try:
            with anyio.fail_after(timeout):
                await wait(*arguments)
        except TimeoutError as error:
            raise DeadlineExceeded(f"fleet {self.name}: waited {timeout:g} s until {what}; it goes on") from error

    def _check_open(self) -> None:
        if not self._open:
            raise OperationRefused(f"fleet {self.name} is not open; use it inside 'async with Fleet(...) as fleet:'")

    def _deployed(self) -> FleetState:
        self._check_open()
        state = self._turn.state
        if state is None or state.deleted:
            raise OperationRefused(f"fleet {self.name} is not deployed; await fleet.deploy() first")
        return state

    def _set(self, state: FleetState, kind: str, **data: Any) -> None:
        """Take over a new desired state, recorded before anything is done about it."""
        self._check_open()
        self._record(kind, data=data)
        self._turn.state = state
        self._turn.save()
        self._wake.set()


def _own_prober(backend: Backend) -> Prober | None:
    """The prober of a backend whose instances have no sockets (a simulation)."""
    make = getattr(backend, "prober", None)
    return make() if make is not None else None
