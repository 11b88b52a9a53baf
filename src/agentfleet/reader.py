"""The reading side of a fleet: what users look at. Nothing here changes anything.

`Fleet` inherits it, and adds what is done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from agentfleet import outcome
from agentfleet.autoscaler import Size
from agentfleet.core.scaling import Decision
from agentfleet.display import Report, table
from agentfleet.endpoints import Endpoints
from agentfleet.events import Event
from agentfleet.health import HealthMonitor
from agentfleet.instances import Instance, Isolation
from agentfleet.reign import Reign
from agentfleet.runtime import Runtime
from agentfleet.state import FleetState, Revision
from agentfleet.view import FleetView, Member
from agentfleet.waiting import Timeout, timeout_of

_COLUMNS = (
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


class FleetReader:
    """What a fleet shows of itself. Values are as last seen; reading them waits for nothing, but for `logs`."""

    _reign: Reign

    @property
    def _runtime(self) -> Runtime:
        """The fleet's parts and loops; others in each term of a lease."""
        return self._reign.runtime

    @property
    def leads(self) -> bool:
        """Whether this manager may act now; without `leases`, whether it is open."""
        return self._reign.leads

    async def leading(self, *, timeout: Timeout = None) -> None:
        """Wait until this manager leads the fleet and has taken over what its predecessor left.

        Args:
            timeout: How long to wait, in seconds or like "30s"; None waits for as long as it takes.

        Raises:
            OperationRefused: The fleet is not open, or was closed meanwhile.
            DeadlineExceeded: `timeout` is over; it still stands for the lease.
        """
        await self._reign.until_leading(timeout_of(timeout))

    @property
    def epoch(self) -> int:
        """The epoch in which this manager leads; 0 while it does not, and without `leases`."""
        return self._runtime.fence.epoch if self.leads else 0

    async def deposed(self) -> None:
        """Wait until this manager leads no more; without `leases` until the fleet is closed.

        Raises:
            OperationRefused: The fleet is not open, or was closed meanwhile.
        """
        await self._reign.until_deposed()

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

    @property
    def isolated(self) -> Mapping[str, Isolation]:
        """The instances that are set apart for examination, by id: since when, until when, and why."""
        members = (self.view.members[id] for id in self.view.isolated)
        found = ((member.instance.id, member.instance.isolated) for member in members)
        return {id: isolation for id, isolation in found if isolation is not None}

    def endpoints(self) -> Endpoints:
        """A live view of the instances that work may be sent to."""
        return self._runtime.endpoints

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
            "isolated": len(self.view.isolated),
            "revision": state.target if state else None,
            "version": state.template.version if state else None,
            "rolling": bool(state and state.rolling),
            "frozen": self._runtime.turn.frozen,
            "tasks_completed": self.view.completed,
            "tasks_failed": self.view.failed,
        }

    @property
    def config_revision(self) -> int:
        """The configuration that is being delivered; 0 if there is none."""
        return self._runtime.feed.revision

    def revisions(self) -> tuple[Revision, ...]:
        """Kept revisions, oldest first."""
        return self.state.revisions if self.state is not None else ()

    def events(self, *, after: int | None = None) -> AsyncIterator[Event]:
        """What happens, from the opening of this fleet on (or after a journal position), without end.

        Raises:
            OperationRefused: The fleet is not open; `fleet.journal` is read at any time.
        """
        runtime = self._runtime
        runtime.check_open()
        return runtime.journal.follow(fleet=runtime.name, after=runtime.first_seq if after is None else after)

    async def logs(self, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines an instance wrote.

        Raises:
            OperationRefused: The fleet is not open.
            BackendError: There is no such instance, or the backend cannot be asked.
        """
        self._runtime.check_open()
        return await self._runtime.backend.logs(self._runtime.name, id, lines=lines)

    async def ready(self, *, timeout: Timeout = None) -> None:
        """Wait until as many instances as wanted are healthy and no others hold a place; some may still be draining.

        Args:
            timeout: How long to wait, in seconds or like "30s"; None waits for as long as it takes.

        Raises:
            SpecError: `timeout` is no time span.
            OperationRefused: The fleet is not open or not deployed, or was closed meanwhile.
            DeadlineExceeded: `timeout` is over.
        """
        seconds = timeout_of(timeout)
        self._runtime.deployed()
        await outcome.ready(self._runtime, seconds)

    async def rolled_out(self, revision: int, *, timeout: Timeout = None) -> None:
        """Wait until the rollout of a revision is over, whoever began it; of a paused one there is none to wait for.

        Args:
            revision: Its number.
            timeout: How long to wait, in seconds or like "30s"; None waits as long as the rollout's deadline allows.

        Raises:
            RolloutFailed: It failed, or another revision is wanted by now.
            OperationRefused: The fleet is not open or not deployed, or was closed or stopped meanwhile.
            DeadlineExceeded: `timeout` is over.
        """
        seconds = timeout_of(timeout)
        state = self._runtime.deployed()
        await outcome.rolled_out(self._runtime, state, seconds, number=revision)

    async def brought_up(self, *, timeout: Timeout = None) -> None:
        """Wait until what the last deployment asked for is so; raises like `deploy`."""
        seconds = timeout_of(timeout)
        await outcome.brought_up(self._runtime, self._runtime.deployed(), seconds)

    async def emptied(self, *, timeout: Timeout = None) -> None:
        """Wait until no instance is left; raises like `stop`."""
        seconds = timeout_of(timeout)
        self._runtime.check_open()
        await outcome.emptied(self._runtime, seconds)

    def report(self) -> Report:
        """The fleet as a table, one row per instance."""
        now = self._runtime.clock.now()
        status = self.status()
        title = (
            f"fleet {self._runtime.name}: {status['good']} of {status['desired']} healthy, version {status['version']}"
        )
        rows = (_row(member, now) for member in self.view.members.values())
        return table(title, _COLUMNS, sorted(rows, key=lambda row: str(row[0])))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        status = self.status() if self.state is not None else None
        where = "not deployed" if status is None else f"{status['good']} of {status['desired']} healthy"
        return f"<Fleet {self._runtime.name}: {where}>"

    async def size(self) -> Size:
        """The present size (what an autoscaler needs to know)."""
        state = self.state
        counts = self.view.total_counts()
        return Size(state.desired if state is not None else 0, counts.total, counts.good)


def _row(member: Member, now: float) -> tuple[object, ...]:
    """One instance, in the order of `_COLUMNS`."""
    instance = member.instance
    return (
        instance.id,
        instance.version,
        member.condition,
        member.health,
        instance.node,
        instance.restarts,
        None if instance.started_at is None else round(now - instance.started_at),
        member.in_flight,
        member.completed,
        member.failed,
        None if member.latency is None else round(member.latency * 1000, 1),
        member.cpu,
        None if member.memory is None else round(member.memory / 2**20, 1),
    )
