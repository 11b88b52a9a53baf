"""Fleet: what users call to run one fleet of agents. Start reading here.

::

    async with Fleet(spec, backend=ProcessBackend()) as fleet:
        await fleet.deploy()
        await fleet.upgrade(version="1.5.0")

`Fleet` states what is wanted and tells what is; the loops behind it (`runtime.Runtime`) make it so. It is the fleet's
single writer: every change of the wanted state goes through one of the methods below, or through an intent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from agentfleet import outcome
from agentfleet.autoscaler import MetricSource
from agentfleet.backends.base import Backend, WorkloadBackend
from agentfleet.clock import Clock, SystemClock
from agentfleet.configstore import ConfigStore
from agentfleet.core.governor import Cause
from agentfleet.core.leadership import LeasePolicy
from agentfleet.core.reason import Reason
from agentfleet.errors import JournalError, OperationRefused, SpecError
from agentfleet.reign import Reign
from agentfleet.runtime import Runtime
from agentfleet.services import AgentServices
from agentfleet.signals.probes import Prober
from agentfleet.sizing import Intent
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.state import FleetState, Revision, first_state
from agentfleet.stores.acks import ConfigAcks, MemoryAcks
from agentfleet.stores.config_journaled import JournaledConfig
from agentfleet.stores.journal import Journal
from agentfleet.stores.leases import LeaseStore
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.telemetry import Telemetry
from agentfleet.waiting import Timeout, period_of, timeout_of


class Fleet(AgentServices):
    """A fleet of agents: deploy it, and it is kept as its spec says.

    Args:
        spec: What is wanted. `deploy` applies it.
        backend: Where the instances live; opened and closed with the fleet.
        journal: What happened and what must outlive the manager; in memory when omitted. A fleet that starts on the
            journal of an earlier manager takes up its state and its instances.
        clock: Where the time comes from.
        metrics: Sources for metric targets by name, in place of or beside the built-in "cpu", "memory" and "queue".
        config: Where the agents' configuration is published, under the fleet's name; a store of its own when omitted.
        acks: Where it is kept which revision each instance runs, by its own word; in memory when omitted.
        prober: How instances are probed; by default as the backend says, else over the network.
        telemetry: Prometheus metrics of what happens; one of its own when omitted. Several fleets may share one.
        usage_period: Time between measurements of what instances use, in seconds or like "5s".
        seed: Makes instance ids and jitter reproducible.
        leases: Where the fleet's lease is kept, when several managers share it: only the one that holds it acts, and
            the others raise `NotLeader` until their turn comes; see `leading`. They share the journal. None: this
            manager is alone.
        identity: How the other managers see this one; the host's name when omitted.
        lease_policy: How fast the lease changes hands.

    A `timeout` is a number of seconds, a duration like "30s", or None for no deadline; anything else is refused with
    `SpecError` before anything is changed. It bounds the waiting alone: what was asked for goes on.

    Raises:
        SpecError: An argument is not usable, or the scaling policy names a metric that has no source.
    """

    def __init__(
        self,
        spec: FleetSpec,
        *,
        backend: Backend | WorkloadBackend,
        journal: Journal | None = None,
        clock: Clock | None = None,
        metrics: Mapping[str, MetricSource] | None = None,
        config: ConfigStore | None = None,
        acks: ConfigAcks | None = None,
        prober: Prober | None = None,
        telemetry: Telemetry | None = None,
        usage_period: float | str = 5.0,
        seed: int | None = None,
        leases: LeaseStore | None = None,
        identity: str | None = None,
        lease_policy: LeasePolicy | None = None,
    ) -> None:
        if not isinstance(spec, FleetSpec):
            raise SpecError(f"spec must be a FleetSpec, not {type(spec).__name__}; see FleetSpec.from_yaml")
        if not hasattr(backend, "watch"):
            raise SpecError(f"backend must be a backend such as ProcessBackend(), not {backend!r:.80}")
        if journal is not None and not hasattr(journal, "append"):
            raise SpecError(f"journal must be a journal such as JsonlJournal(path), not {journal!r:.80}")
        if clock is not None and not hasattr(clock, "sleep"):
            raise SpecError(f"clock must have now() and sleep(), as SystemClock has, not {clock!r:.80}")
        if metrics is not None and not isinstance(metrics, Mapping):
            raise SpecError(f"metrics must map names to functions, not {metrics!r:.80}")
        self.spec = spec
        self.name = spec.name
        self.clock: Clock = clock or SystemClock()
        self.telemetry = telemetry if telemetry is not None else Telemetry()
        self.journal: Journal = self.telemetry.observing(journal if journal is not None else MemoryJournal())
        own = None if config is not None else JournaledConfig(self.journal, self.name, self.clock)
        config = config if config is not None else ConfigStore(own, journal=self.journal, clock=self.clock)
        self._own_config = own
        self.acks: ConfigAcks = acks if acks is not None else MemoryAcks()
        self.config = config
        make = partial(
            Runtime,
            spec,
            backend=backend,
            journal=self.journal,
            clock=self.clock,
            config=self.config,
            acks=self.acks,
            remember_config=own is None,
            target=self,
            metrics=metrics or {},
            prober=prober,
            telemetry=self.telemetry,
            usage_period=period_of(usage_period, "usage_period"),
            seed=seed,
        )
        self._reign = Reign(
            make,
            backend=backend,
            leases=leases,
            identity=identity,
            policy=lease_policy,
            clock=clock,
            telemetry=self.telemetry,
            before=self._catch_up,
        )

    async def __aenter__(self) -> Self:
        await self._reign.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._reign.__aexit__(kind, error, trace)

    # ------------------------------------------------------------------------------------------ operations

    async def deploy(self, *, wait: bool = True, timeout: Timeout = None) -> None:
        """Make the fleet as its spec says: the first time bring it up, later apply what the spec changed.

        A paused fleet takes a changed template on, and rolls it out when it is resumed.

        Args:
            wait: Return when every instance is healthy, and a rollout, unless it is paused, is over; otherwise at once.
            timeout: How long to wait for all of that; None waits as long as the rollout's own deadline allows.

        Raises:
            RolloutFailed: The instances do not become healthy. Deploying again tries again.
            DeadlineExceeded: `timeout` is over; the deployment goes on.
        """
        seconds = timeout_of(timeout)
        self._runtime.check_open()
        state, spec, now = self.state, self.spec, self.clock.now()
        if state is None or state.deleted:
            number = 1 if state is None else state.revisions[-1].number + 1
            state = first_state(spec.template, spec.replicas, now, number)
            self._set(state, "fleet.deployed", replicas=spec.replicas, revision=number, version=spec.template.version)
            self._runtime.feed.keep_again()
        else:
            if spec.template not in (state.applied_template, state.template):
                state = state.with_revision(spec.template, "deploy", now, spec.rollout.keep_revisions)
            if spec.replicas != state.applied_replicas and not self._runtime.engine_scales:
                state = replace(state, replicas=spec.replicas)
            state = replace(state, applied_template=spec.template, applied_replicas=spec.replicas).tried_again(now)
            self._set(state, "fleet.deployed", replicas=state.replicas, revision=state.target)
        if wait:
            await outcome.brought_up(self._runtime, state, seconds)

    async def upgrade(
        self, version: str | None = None, *, wait: bool = True, timeout: Timeout = None, **changes: Any
    ) -> Revision:
        """Roll out a new revision: another version, or any other change of the template (command, env, cpu, …).

        A fleet that is stopped or paused takes the revision on, stays as it is, and rolls it out when it is started or
        resumed; there is nothing to wait for then. A pause that comes later prolongs the wait.

        Args:
            version: The new version; None keeps it.
            wait: Return when the rollout is over; otherwise at once.
            timeout: How long to wait; None waits as long as the rollout's own deadline allows.
            changes: Other fields of the template and their new values.

        Raises:
            RolloutFailed: It did not work out; where the policy says so the fleet has been rolled back. The message
                tells how many instances failed, and of the last one how.
            pydantic.ValidationError: A change is not valid; nothing was changed.
            OperationRefused: Nothing would change, the fleet is not deployed, or it was stopped before the end.
            DeadlineExceeded: `timeout` is over; the rollout goes on.
        """
        seconds = timeout_of(timeout)
        state = self._runtime.deployed()
        if version is not None:
            changes["version"] = version
        template: AgentTemplate = state.template.replace(**changes)
        if template == state.template:
            raise OperationRefused(f"fleet {self.name} runs this template already (revision {state.target})")
        state = state.with_revision(template, "upgrade", self.clock.now(), self.spec.rollout.keep_revisions)
        told = {"version": template.version, "cause": "upgrade", "paused": state.paused}
        self._set(state, "rollout.started", revision=state.target, **told)
        if wait:
            await outcome.rolled_out(self._runtime, state, seconds)
        return self._revision(state.target)

    async def rollback(self, to: int | None = None, *, wait: bool = True, timeout: Timeout = None) -> Revision:
        """Return to a kept revision: the last good one, or any that is named.

        A revision that is left for an older one is not good any more: nothing returns to it by itself.

        Args:
            to: Number of the revision; None is the last good one.
            wait: Return when the rollout is over; otherwise at once.
            timeout: How long to wait; None waits as long as the rollout's own deadline allows.

        Raises:
            SpecError: `to` is no number of a revision; nothing was changed.
            OperationRefused: There is no such revision, or the fleet is paused.
            RolloutFailed: It does not work either.
            DeadlineExceeded: `timeout` is over; the rollout goes on.
        """
        seconds = timeout_of(timeout)
        state = self._runtime.deployed()
        if state.paused:
            raise OperationRefused(f"fleet {self.name} is paused, so nothing rolls back; await fleet.resume() first")
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
            await outcome.rolled_out(self._runtime, state, seconds)
        return self._revision(target)

    async def scale(self, replicas: int, reasons: Sequence[Reason] | None = None) -> None:
        """Ask for another size; returns at once, when that is recorded.

        **With a scaling policy this size does not last.** An operator's word goes before the autoscaler's in the same
        turn; from the next `scaling.period` on the autoscaler goes on from there, and returns to what the metrics ask
        for as fast as the policy's windows and rules allow. To hold a size, change the policy: deploy a spec with other
        `min_replicas` and `max_replicas`. (0 lasts: a fleet that was scaled to 0 stays there. Any size does
        while the autoscaler holds still, because somebody else scales against it on the engine: `scaling.contested`.)

        Args:
            replicas: Instances wanted.
            reasons: Given by the autoscaler; leave it out.

        Raises:
            SpecError: Not a whole number, negative, or outside the scaling policy's bounds.
            OperationRefused: The fleet is not deployed, or the cluster's own autoscaler keeps its size.
        """
        self._runtime.deployed()
        self._runtime.check_scalable()
        if reasons is None:
            self.spec.check_size(replicas)
            self._runtime.turn.heed(Intent(Cause.OPERATOR, replicas), self.clock.now())
        else:  # an autoscaler that ends before the next turn decides again
            self._runtime.turn.sizing.offer(Intent(Cause.SCALING, replicas, tuple(reasons)))
        self._runtime.wake()

    async def stop(self, *, wait: bool = True, timeout: Timeout = None) -> None:
        """Drain and end all instances, and remember the size for `start`.

        Args:
            wait: Return when no instance is left; otherwise at once. An instance whose node cannot be reached is there
                until the backend says that it is gone.
            timeout: How long to wait; None waits for as long as that takes.

        Raises:
            OperationRefused: The fleet is not deployed, or was started again meanwhile.
            DeadlineExceeded: `timeout` is over; stopping goes on. Stopping again waits again.
        """
        seconds = timeout_of(timeout)
        self._set(replace(self._runtime.deployed(), running=False), "fleet.stopped")
        if wait:
            await outcome.emptied(self._runtime, seconds)

    async def start(self, *, wait: bool = True, timeout: Timeout = None) -> None:
        """Bring a stopped fleet back to its size.

        Args:
            wait: Return when as many instances as wanted are healthy; otherwise at once.
            timeout: How long to wait; None waits for as long as that takes.

        Raises:
            OperationRefused: The fleet is not deployed.
            DeadlineExceeded: `timeout` is over; starting goes on.
        """
        seconds = timeout_of(timeout)
        state = self._runtime.deployed()
        self._set(replace(state, running=True), "fleet.started", replicas=state.replicas)
        if wait:
            await outcome.ready(self._runtime, seconds)

    async def pause(self) -> None:
        """Hold the rollout where it is, and those to come, until `resume`; size and health are still kept."""
        self._set(replace(self._runtime.deployed(), paused=True), "fleet.paused")

    async def resume(self) -> None:
        """Go on with a paused rollout."""
        self._set(replace(self._runtime.deployed(), paused=False), "fleet.resumed")

    async def delete(self, *, timeout: Timeout = None) -> None:
        """Drain and end all instances and forget the fleet; its journal stays. Deleting again waits again.

        Args:
            timeout: How long to wait until no instance is left; None waits for as long as that takes. An instance whose
                node cannot be reached is there until the backend says that it is gone.

        Raises:
            OperationRefused: The fleet was never deployed, or was deployed anew meanwhile.
            DeadlineExceeded: `timeout` is over; the deletion goes on.
        """
        seconds = timeout_of(timeout)
        state = self.state
        if state is None or not state.deleted:
            self._set(replace(self._runtime.deployed(), deleted=True), "fleet.deleted")
        self._runtime.check_open()
        await outcome.emptied(self._runtime, seconds)

    # ------------------------------------------------------------------------------------------ inside

    async def _catch_up(self) -> None:
        """Have a store of our own know what another manager has published since."""
        if self._own_config is not None:
            self._own_config.recall()

    def _revision(self, number: int) -> Revision:
        """A revision as it is kept now."""
        found = self._runtime.deployed().revision(number)
        assert found is not None
        return found

    def _set(self, state: FleetState, kind: str, **data: Any) -> None:
        """Take over a new desired state, recorded before anything is done about it."""
        self._runtime.check_open()
        desk = self._runtime.desk
        before, desk.state = desk.state, state
        try:
            self._runtime.record(kind, data=data)
            self._runtime.turn.save()
        except JournalError:
            desk.state = before  # what is not recorded is not wanted
            raise
        self._runtime.wake()
