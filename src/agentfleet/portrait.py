"""How a fleet stands, JSON-ready and as rows: what its leader tells those who look at another manager."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from agentfleet.fleet import Fleet
from agentfleet.specs import FleetSpec
from agentfleet.state import FleetState, Revision
from agentfleet.stores.fleets import InstanceRow
from agentfleet.view import Condition, FleetView, Member

HEARD = tuple(each.value for each in (Condition.FRESH, Condition.IDLE, Condition.BUSY))
"""Statuses of instances that answer."""
_AT_ONCE = 50
"""Instances that have their turn together, at least: a write has its price."""


class Portrait:
    """The rows of one fleet's instances, as they were written last and as they should be.

    What an instance is gets written at the next look. What it uses, and that it was heard, follows for a few instances
    at a time, each in its turn, so that the place where it is written sees a steady trickle.

    Args:
        view: The fleet, as its leader sees it in this term.
        written: The rows that are there from earlier terms.
        heartbeat: Seconds in which every instance has its turn, at least.
    """

    def __init__(self, view: FleetView, written: Iterable[InstanceRow], *, heartbeat: float = 5.0) -> None:
        self._view = view
        self._heartbeat = heartbeat
        self._written = {row.instance_id: row for row in written}
        self._pending = {*self._written, *view.members}
        self._turns: deque[str] = deque()
        self._due = 0.0
        """How many instances should have had their turn by now and have not."""
        self._looked_at: float | None = None
        view.touched = set()

    @property
    def rate(self) -> float:
        """How many instances have their turn in a second, if nothing holds that up."""
        return len(self._view) / self._heartbeat

    def changes(self, now: float, *, share: float = 1.0) -> tuple[list[InstanceRow], list[str]]:
        """The rows that are new or different, and the ids of those that are gone.

        The same is told again until `told` is called.

        Args:
            now: Seconds since the epoch.
            share: Of the usual rate, at which instances have their turn.
        """
        view = self._view
        self._pending |= view.touched or set()
        view.touched = set()
        heard = set(self._next(now, share))
        changed, gone = [], []
        for id in self._pending | heard:
            member = view.members.get(id)
            if member is None:
                if id in self._written:
                    gone.append(id)
                continue
            row = _row(member, self._written.get(id), now, heard=id in heard)
            if row != self._written.get(id):
                changed.append(row)
        return changed, gone

    def told(self, changed: Iterable[InstanceRow], gone: Iterable[str]) -> None:
        """What `changes` said last was written."""
        self._pending.clear()
        self._written |= {row.instance_id: row for row in changed}
        for id in gone:
            self._written.pop(id, None)

    def _next(self, now: float, share: float) -> list[str]:
        """Whose turn it is: some at a time, or all of a small fleet."""
        passed = self._heartbeat if self._looked_at is None else max(0.0, now - self._looked_at)
        self._looked_at = now
        size = len(self._view)
        self._due = min(self._due + passed * self.rate * share, size)
        if not size or self._due < min(size, _AT_ONCE):
            return []
        taken = int(self._due)
        self._due -= taken
        found: list[str] = []
        while len(found) < taken:
            if not self._turns:
                self._turns.extend(self._view.members)
            found.append(self._turns.popleft())
        return found


def _row(member: Member, before: InstanceRow | None, now: float, *, heard: bool) -> InstanceRow:
    """An instance's row. Where it is not its turn, what changes all the time stays as it was written."""
    instance, isolated = member.instance, member.instance.isolated
    status = "pending" if member.condition is None else member.condition.value
    row = InstanceRow(
        instance_id=instance.id,
        status=status,
        node_name=instance.node,
        cpu_usage=None if member.cpu is None else round(member.cpu, 3),
        memory_usage=None if member.memory is None else float(member.memory),
        last_heartbeat=date_of(now) if status in HEARD else None,
        created_at=date_of(instance.created_at),
        version=instance.version,
        revision=instance.revision,
        health=member.health.value,
        restarts=instance.restarts,
        config_revision=member.config_revision,
        detail=instance.trouble if isolated is None else isolated.reason,
    )
    if before is None:
        return row
    speaks = status in HEARD and (heard or before.status not in HEARD)
    beat = row.last_heartbeat if speaks else before.last_heartbeat
    if heard:
        return replace(row, last_heartbeat=beat)
    return replace(row, cpu_usage=before.cpu_usage, memory_usage=before.memory_usage, last_heartbeat=beat)


def date_of(seconds: float) -> datetime:
    """Seconds since the epoch as a date in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


class Phase(StrEnum):
    """A fleet's state in one word, the most urgent first."""

    DELETING = "deleting"
    STOPPED = "stopped"
    FROZEN = "frozen"
    """So many instances are sick that nothing more is disrupted."""
    CREATING = "creating"
    """It was never as its spec says."""
    PAUSED = "paused"
    """A rollout is held where it is."""
    ROLLING = "rolling"
    DEGRADED = "degraded"
    """Instances are sick or dead."""
    SCALING = "scaling"
    """Fewer or more instances than wanted, and none of them sick."""
    RUNNING = "running"
    """As it should be."""


def phase_of(state: FleetState | None, counts: Mapping[str, Any], *, good_once: bool) -> Phase:
    """The phase of a fleet with this wanted state and these counts (`Fleet.status`)."""
    if state is None:
        return Phase.CREATING
    wanted = {
        Phase.DELETING: state.deleted,
        Phase.STOPPED: not state.running,
        Phase.FROZEN: counts["frozen"],
        Phase.CREATING: not good_once,
        Phase.PAUSED: state.paused and state.rolling,
        Phase.ROLLING: state.rolling,
        Phase.DEGRADED: counts["sick"] + counts["dead"] > 0,
        Phase.SCALING: counts["good"] + counts["unknown"] != counts["desired"] or counts["draining"] > 0,
    }
    return next((phase for phase, holds in wanted.items() if holds), Phase.RUNNING)


def picture(fleet: Fleet, identity: str, generation: int) -> dict[str, Any]:
    """What there is to say of a fleet as a whole; equal when nothing has changed.

    Args:
        fleet: Led by this manager.
        identity: The manager's.
        generation: Of the fleet's spec.
    """
    state, counts = fleet.state, fleet.status()
    good_once = state is not None and any(each.good for each in state.revisions)
    return {
        **counts,
        "phase": str(phase_of(state, counts, good_once=good_once)),
        "replicas": 0 if state is None else state.replicas,
        "paused": bool(state and state.paused),
        "running": bool(state and state.running),
        "rollout": None if state is None else str(state.rollout.phase),
        "revisions": [] if state is None else [_revision(each) for each in state.revisions],
        "config_revision": fleet.config_revision,
        "leader": identity,
        "epoch": fleet.epoch,
        "wanted": _wanted(fleet.spec, state, generation),
    }


def _wanted(spec: FleetSpec, state: FleetState | None, generation: int) -> dict[str, Any] | None:
    """Template and size that are wanted, where they are not those of the spec (any more)."""
    if state is None or (state.template == spec.template and state.replicas == spec.replicas):
        return None
    return {"generation": generation, "template": state.template.to_dict(), "replicas": state.replicas}


def _revision(revision: Revision) -> dict[str, Any]:
    image = None if revision.template.kubernetes is None else revision.template.kubernetes.image
    return {
        "number": revision.number,
        "version": revision.template.version,
        "image": image,
        "created_at": revision.created_at,
        "cause": revision.cause,
        "good": revision.good,
    }
