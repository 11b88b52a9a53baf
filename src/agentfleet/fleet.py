"""Fleet: what users call to run one fleet of agents. Start reading here.

::

    async with Fleet(spec, backend=ProcessBackend()) as fleet:
        await fleet.deploy()
        await fleet.upgrade(version="1.5.0")

`Fleet` states what is wanted and tells what is; the loops behind it (`runtime.Runtime`) make it so. It is the fleet's
single writer: every change of the wanted state goes through one of the methods below, or through an intent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel

from agentfleet.autoscaler import MetricSource, Size
from agentfleet.backends.base import Backend
from agentfleet.clock import Clock, SystemClock
from agentfleet.configstore import ConfigStore
from agentfleet.core.governor import Cause
from agentfleet.core.reason import Reason
from agentfleet.core.rollout import RolloutPhase
from agentfleet.core.scaling import Decision
from agentfleet.dispatch import Dispatcher
from agentfleet.display import Report, table
from agentfleet.endpoints import Endpoints
from agentfleet.errors import ConfigInvalid, JournalError, OperationRefused, RolloutFailed, SpecError
from agentfleet.events import Event
from agentfleet.feed import remembered
from agentfleet.health import HealthMonitor
from agentfleet.instances import Instance
from agentfleet.runtime import Runtime
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import Prober
from agentfleet.sizing import Intent
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.state import FleetState, Revision, first_state
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.journal import Journal
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.telemetry import Telemetry
from agentfleet.view import FleetView


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
        telemetry: Prometheus metrics of what happens; one of its own when omitted. Several fleets may share one.
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
        telemetry: Telemetry | None = None,
        usage_period: float = 5.0,
        seed: int | None = None,
    ) -> None:
        if not isinstance(spec, FleetSpec):
            raise SpecError(f"spec must be a FleetSpec, not {type(spec).__name__}; see FleetSpec.from_yaml")
        if not usage_period > 0:
            raise SpecError(f"usage_period must be more than 0 seconds, not {usage_period!r}")
        self.spec = spec
        self.name = spec.name
        self.clock: Clock = clock or SystemClock()
        self.telemetry = telemetry if telemetry is not None else Telemetry()
        self.journal: Journal = self.telemetry.observing(journal if journal is not None else MemoryJournal())
        if config is None:  # what the journal remembers is there again
            known = remembered(self.journal, self.name)
            records = MemoryConfig(revisions=() if known is None else (known,))
            config = ConfigStore(records, journal=self.journal, clock=self.clock)
        self.config = config
        self._runtime = Runtime(
            spec,
            backend=backend,
            journal=self.journal,
            clock=self.clock,
            config=self.config,
            target=self,
            metrics=metrics or {},
            prober=prober,
            telemetry=self.telemetry,
            usage_period=usage_period,
            seed=seed,
        )
        self._open = False

    async def __aenter__(self) -> Self:
        if self._open:
            raise OperationRefused(f"fleet {self.name} is open already")
        await self._runtime.__aenter__()
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        return await self._runtime.__aexit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------ operations

    async def deploy(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Make the fleet as its spec says: the first time bring it up, later apply what the spec changed.

        Args:
            wait: Return when every instance is healthy; otherwise at once.
            timeout: Seconds to wait; None waits as long as the rollout's own deadline allows.

        Raises:
            RolloutFailed: The instances do not become healthy. Deploying again tries again.
            DeadlineExceeded: `timeout` is over; the deployment goes on.
        """
        self._check_open()
        state, spec, now = self.state, self.spec, self.clock.now()
        if state is None or state.deleted:
            number = 1 if state is None else state.revisions[-1].number + 1
            state = first_state(spec.template, spec.replicas, now, number)
            self._set(state, "fleet.deployed", replicas=spec.replicas, revision=number, version=spec.template.version)
        else:
            if spec.template != state.applied_template:
                state = state.with_revision(spec.template, "deploy", now, spec.rollout.keep_revisions)
            if spec.replicas != state.applied_replicas:
                state = replace(state, replicas=spec.replicas)
            state = replace(state, applied_template=spec.template, applied_replicas=spec.replicas).tried_again(now)
            self._set(state, "fleet.deployed", replicas=state.replicas, revision=state.target)
        if wait:
            await self._rolled_out(state.target, timeout)
            if state.desired:
                await self.ready(timeout=timeout)

    async def upgrade(
        self, version: str | None = None, *, wait: bool = True, timeout: float | None = None, **changes: Any
    ) -> Revision:
        """Roll out a new revision: another version, or any other change of the template (command, env, cpu, …).

        Raises:
            RolloutFailed: It did not work out; where the policy says so the fleet has been rolled back.
            pydantic.ValidationError: A change is not valid; nothing was changed.
            OperationRefused: Nothing would change, the fleet is not deployed, or it was stopped before the end. A fleet
                that is stopped already takes the revision on, and rolls it out when it is started.
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
        return self._revision(state.target)

    async def rollback(self, to: int | None = None, *, wait: bool = True, timeout: float | None = None) -> Revision:
        """Return to a kept revision: the last good one, or any that is named.

        A revision that is left for an older one is not good any more: nothing returns to it by itself.

        Raises:
            OperationRefused: There is no such revision.
            RolloutFailed: It does not work either.
        """
        state = self._deployed()
        if to is not None and type(to) is not int:
            raise SpecError(f"to must be the number of a revision, not {to!r}")
        target = to if to is not None else state.fallback
        if target is None:
            raise OperationRefused(f"fleet {self.name} has no earlier good revision to roll back to")
        if target == state.target:
            raise OperationRefused(f"fleet {self.name} runs revision {target} already")
        before = state.target
        if target < before:
            state = state.with_bad_target()
        state = state.with_target(target, self.clock.now())
        self._set(state, "rollout.started", revision=target, cause="rollback", replaces=before)
        if wait:
            await self._rolled_out(target, timeout)
        return self._revision(target)

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
        self._runtime.turn.sizing.offer(Intent(cause, replicas, tuple(reasons or ())))
        self._runtime.wake()

    async def stop(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Drain and end all instances, and remember the size for `start`."""
        self._set(replace(self._deployed(), running=False), "fleet.stopped")
        if wait:
            await self._runtime.until(lambda: not self.view, timeout, "all instances are gone")

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
        await self._runtime.until(lambda: not self.view, timeout, "all instances are gone")

    async def restart(self, id: str) -> None:
        """Restart one instance in place, now; refused when the disruption budget is spent.

        Raises:
            OperationRefused: No such instance, or the governor holds it; the message says why.
        """
        self._deployed()
        self._runtime.turn.restart(id, self.clock.now())
        self._runtime.wake()

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
        if not isinstance(document, Mapping | BaseModel):
            raise ConfigInvalid(f"the document must be an object with named settings, not {type(document).__name__}")
        stored = await self.config.put(self.name, document, author=author, reason=reason)
        if wait:
            feed = self._runtime.feed
            answered = "all agents have answered"
            await self._runtime.within(timeout, answered, lambda: feed.wait_settled(stored.revision))
        return stored.revision

    # ------------------------------------------------------------------------------------------ reading

    @property
    def state(self) -> FleetState | None:
        """Desired state; None before the first deployment."""
        return self._runtime.desk.state

    @property
    def view(self) -> FleetView:
        """Everything known of the instances. Read it; the fleet's loops write it."""
        return self._runtime.desk.view

    @property
    def monitor(self) -> HealthMonitor:
        """The fleet's health monitor: verdicts, statistics, heartbeats that come by other ways."""
        return self._runtime.monitor

    @property
    def decision(self) -> Decision | None:
        """The autoscaler's last decision."""
        autoscaler = self._runtime.autoscaler
        return autoscaler.last_decision if autoscaler is not None else None

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Every instance that exists, as last seen."""
        return tuple(member.instance for member in self.view.members.values())

    def endpoints(self) -> Endpoints:
        """A live view of the instances that work may be sent to."""
        return self._runtime.endpoints

    @asynccontextmanager
    async def dispatcher(self, **options: Any) -> AsyncIterator[Dispatcher]:
        """A least-loaded dispatcher in front of this fleet, with the tasks that the journal says are open taken up.

        While it is open its depth is the fleet's "queue" metric.

        Args:
            options: Limits of `Dispatcher`, such as `per_instance` and `max_attempts`.
        """
        self._check_open()
        async with (
            HttpClient() as http,
            Dispatcher(
                self.endpoints(), http=http, clock=self.clock, journal=self.journal, fleet=self.name, **options
            ) as dispatcher,
        ):
            await dispatcher.recover()
            self._runtime.queue_depth = lambda: dispatcher.depth
            try:
                yield dispatcher
            finally:
                self._runtime.queue_depth = None

    def status(self) -> Mapping[str, Any]:
        """Where the fleet stands, in numbers."""
        state, counts = self.state, self.view.total_counts()
        return {
            "desired": state.desired if state else 0,
            "good": counts.good,
            "idle": counts.idle,
            "busy": counts.busy,
            "starting": counts.pending + counts.starting + counts.fresh,
            "unknown": counts.unknown,
            "sick": counts.sick,
            "dead": counts.dead,
            "draining": self.view.draining,
            "revision": state.target if state else None,
            "version": state.template.version if state else None,
            "rolling": bool(state and state.rolling),
            "frozen": self._runtime.turn.frozen,
            "tasks_completed": self.view.completed,
            "tasks_failed": self.view.failed,
        }

    def revisions(self) -> tuple[Revision, ...]:
        """Kept revisions, oldest first."""
        return self.state.revisions if self.state is not None else ()

    def events(self, *, after: int | None = None) -> AsyncIterator[Event]:
        """What happens, from the opening of this fleet on (or after a journal position), without end."""
        return self.journal.follow(fleet=self.name, after=self._runtime.first_seq if after is None else after)

    async def logs(self, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines an instance wrote."""
        return await self._runtime.backend.logs(self.name, id, lines=lines)

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
                member.completed,
                member.failed,
                None if member.latency is None else round(member.latency * 1000, 1),
                member.cpu,
                None if member.memory is None else round(member.memory / 2**20, 1),
            )
            for member in self.view.members.values()
        ]
        status = self.status()
        title = f"fleet {self.name}: {status['good']} of {status['desired']} healthy, version {status['version']}"
        columns = (
            "instance",
            "version",
            "is",
            "health",
            "node",
            "restarts",
            "age s",
            "busy",
            "done",
            "failed",
            "ms",
            "cpu",
            "MiB",
        )
        return table(title, columns, sorted(rows, key=lambda row: str(row[0])))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        status = self.status() if self.state is not None else None
        where = "not deployed" if status is None else f"{status['good']} of {status['desired']} healthy"
        return f"<Fleet {self.name}: {where}>"

    async def size(self) -> Size:
        """The present size (what an autoscaler needs to know)."""
        state = self.state
        counts = self.view.total_counts()
        return Size(state.desired if state is not None else 0, counts.total, counts.good)

    # ------------------------------------------------------------------------------------------ waiting

    async def ready(self, *, timeout: float | None = None) -> None:
        """Wait until as many instances as wanted are healthy and no others are there."""

        def enough() -> bool:
            state = self.state
            counts = self.view.total_counts()
            return state is not None and counts.good == counts.total == state.desired

        await self._runtime.until(enough, timeout, "all instances are healthy")

    async def _rolled_out(self, number: int, timeout: float | None) -> None:
        def over() -> bool:
            state = self.state
            assert state is not None
            return not state.desired or not state.rolling

        was_wanted = self.state is not None and self.state.desired > 0
        await self._runtime.until(over, timeout, f"revision {number} is rolled out")
        state = self.state
        assert state is not None
        if state.rolling:
            if was_wanted:
                raise OperationRefused(f"revision {number} is not rolled out yet: the fleet was stopped; start it")
            return
        if state.target != number or state.rollout.phase is RolloutPhase.FAILED:
            why = self._why(number)
            runs = f"the fleet runs revision {state.target} ({state.template.version})"
            raise RolloutFailed(f"revision {number} could not be rolled out: {why}; {runs}")

    def _revision(self, number: int) -> Revision:
        """A revision as it is kept now."""
        found = self._deployed().revision(number)
        assert found is not None
        return found

    def _why(self, number: int) -> str:
        for event in reversed(self.journal.read(fleet=self.name, after=self._runtime.first_seq)):
            if event.kind == "rollout.failed" and event.data.get("revision") == number:
                return "; ".join(reason["text"] for reason in event.reasons)
        return "another revision was asked for meanwhile"

    def _check_open(self) -> None:
        if not self._open:
            raise OperationRefused(f"fleet {self.name} is not open; use it inside 'async with Fleet(...) as fleet:'")

    def _deployed(self) -> FleetState:
        self._check_open()
        state = self.state
        if state is None or state.deleted:
            raise OperationRefused(f"fleet {self.name} is not deployed; await fleet.deploy() first")
        return state

    def _set(self, state: FleetState, kind: str, **data: Any) -> None:
        """Take over a new desired state, recorded before anything is done about it."""
        self._check_open()
        desk = self._runtime.desk
        before, desk.state = desk.state, state
        try:
            self._runtime.record(kind, data=data)
            self._runtime.turn.save()
        except JournalError:
            desk.state = before  # what is not recorded is not wanted
            raise
        self._runtime.wake()
