"""Mirrors a fleet into the tables `cluster_config` and `agent_instances`, for other programs to read (F18).

::

    async with Database(url) as database, Fleet(spec, backend=backend) as fleet:
        mirror = FleetMirror(fleet, SqlFleets(database))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mirror.run)

However many instances there are, the database sees one transaction a period with what has changed, and one statement
every few seconds that notes what instances use and that they were heard. The rows are a picture: nothing is decided
from them.
"""

from __future__ import annotations

import logging

from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.events import Event
from agentfleet.fleet import Fleet
from agentfleet.portrait import Portrait, date_of
from agentfleet.stores.sql.fleets import ClusterRow, SqlFleets, cluster_row
from agentfleet.waiting import period_of

log = logging.getLogger(__name__)


class FleetMirror:
    """Keeps a fleet's rows true while its manager leads.

    Args:
        fleet: An open fleet.
        tables: Where its rows are kept.
        namespace: What tells it from other fleets of its name; the Kubernetes namespace, by custom.
        period: Time between two looks at what has changed, in seconds or like "1s".
        heartbeat: Time between two notes of all heartbeats, likewise; longer in fleets of more than 5,000 instances.
    """

    def __init__(
        self,
        fleet: Fleet,
        tables: SqlFleets,
        *,
        namespace: str = "default",
        period: float | str = 1.0,
        heartbeat: float | str = 5.0,
    ) -> None:
        self._fleet = fleet
        self._tables = tables
        self._namespace = namespace
        self._period = period_of(period, "period")
        self._heartbeat = period_of(heartbeat, "heartbeat")
        self._portrait: Portrait | None = None
        self._cluster: ClusterRow | None = None
        self._failing = False

    @property
    def cluster(self) -> ClusterRow:
        """The fleet's row."""
        state = self._fleet.state
        first = state.revisions[0].created_at if state is not None and state.revisions else None
        made = None if first is None else date_of(first)
        return cluster_row(self._fleet.spec, namespace=self._namespace, created_at=made)

    async def run(self) -> None:
        """Mirror until cancelled. A database that fails is tried again each period, and journaled once."""
        while True:
            if self._fleet.leads:
                try:
                    await self.write()
                except (BackendUnavailable, DeadlineExceeded) as error:
                    self._note(error)
                else:
                    self._failing = False
            else:
                self._portrait = self._cluster = None  # another writes meanwhile: begin anew when it is our turn again
            await self._fleet.clock.sleep(self._period)

    async def write(self) -> None:
        """Write what has changed since the last time.

        Raises:
            BackendUnavailable: The database cannot be reached; what has changed is written the next time.
            DeadlineExceeded: It gave no connection in time; likewise.
        """
        now, state = self._fleet.clock.now(), self._fleet.state
        view, cluster = self._fleet.view, self.cluster
        if state is not None and state.deleted and not view:
            await self._tables.remove(cluster.id)
            self._portrait = self._cluster = None
            return
        if cluster != self._cluster:
            await self._tables.put(cluster)
            self._cluster = cluster
        if self._portrait is None:
            written = await self._tables.instances(cluster.id)
            self._portrait = Portrait(view, written, heartbeat=self._heartbeat)
        changed, gone = self._portrait.changes(now)
        if changed or gone:
            await self._tables.write(cluster.id, changed, gone)
        self._portrait.told(changed, gone)

    def _note(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning("the tables of fleet %s cannot be written: %s", self._fleet.name, error)
            data = {
                "error": type(error).__name__,
                "message": "the database failed; the manager's log has more",
            }
            event = Event(self._fleet.clock.now(), self._fleet.name, "mirror.failed", data=data)
            self._fleet.journal.append(event)
