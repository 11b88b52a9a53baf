"""OBSERVE: takes what the backend, the probes and the agents say into the view, and notes what is new about it.

It decides nothing. Whatever changes an instance's condition is told to the turn; whatever a person would ask about
later becomes an event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentfleet.backends.base import Changed, Observation, Ordered, Removed, Snapshot
from agentfleet.clock import Clock
from agentfleet.core.health import Verdict
from agentfleet.desk import Desk
from agentfleet.instances import NO_SLOT, AgentStatus, HealthState, Instance, Phase
from agentfleet.turn import Turn
from agentfleet.view import Condition, Member

UNSEEN_GRACE = 10.0
"""Seconds for which a snapshot that lacks an instance we just created may simply be older than it."""


class Observer:
    """Keeps one fleet's view true.

    Args:
        desk: The fleet's working place.
        turn: Told of changed conditions.
        clock: Dates what is seen.
        watch_health: Called with each instance as it looks now, so that it is probed.
        forget_health: Called with the id of each instance that is gone.
    """

    def __init__(
        self,
        desk: Desk,
        turn: Turn,
        clock: Clock,
        *,
        watch_health: Callable[[Instance], None],
        forget_health: Callable[[str], None],
    ) -> None:
        self._desk = desk
        self._view = desk.view
        self._record = desk.record
        self._turn = turn
        self._clock = clock
        self._watch_health = watch_health
        self._forget_health = forget_health
        self._lacked: set[str] = set()
        """Instances of our own making that the last snapshot did not show."""
        self._doubted: dict[str, float] = {}
        """When the present run of failures of an instance began."""
        self.synced = False
        """Whether a whole picture has been seen yet; before that nothing may be decided."""

    # ------------------------------------------------------------------------------------------ the backend

    def take(self, seen: Observation) -> None:
        """Take in one observation of the backend."""
        if isinstance(seen, Changed):
            self._put(seen.instance)
        elif isinstance(seen, Removed):
            self._remove(seen.id)
        elif isinstance(seen, Ordered):
            self._turn.sizing.ordered(seen, self._clock.now())
        else:
            self._replace_all(seen)

    def _replace_all(self, snapshot: Snapshot) -> None:
        self._desk.nodes = {node.name: node for node in snapshot.nodes}
        present = {instance.id for instance in snapshot.instances}
        now = self._clock.now()
        self._lacked.clear()
        for id, member in tuple(self._view.members.items()):
            if id in present:
                continue
            young = not member.leaving and now - member.instance.created_at < UNSEEN_GRACE
            if not member.seen and (young or id in self._desk.actuator.busy):
                self._lacked.add(id)
            else:
                self._remove(id)
        self._turn.relocations.keep_only(present)
        for instance in snapshot.instances:
            self._put(instance)
        self.synced = True

    def stopped(self, id: str) -> None:
        """A stop was accepted: an instance that nobody ever saw, and that the last snapshot lacked, is gone."""
        member = self._view.members.get(id)
        if member is not None and not member.seen and id in self._lacked:
            self._remove(id)

    def _put(self, instance: Instance) -> None:
        if instance.stands_in_for is not None:
            if instance.id in self._view:  # somebody has made one of a member behind our back
                self._remove(instance.id)
            self._turn.relocations.seen(instance)
            return
        self._turn.relocations.joined(instance.id)
        known = self._view.members.get(instance.id)
        instance = self._turn.isolations.seen(instance)
        if instance.slot == NO_SLOT:
            slot = NO_SLOT if known is None else known.instance.slot
            returned = known is not None and known.instance.isolated is not None and instance.isolated is None
            if instance.isolated is None and (slot == NO_SLOT or returned):  # an isolated one holds no place
                slot = self._turn.sizing.place(instance.id)
            instance = replace(instance, slot=slot)
        before = None if known is None else known.condition
        was = None if known is None else known.instance
        if was == instance and known is not None and known.seen:
            return
        member = self._view.put(instance)
        self._watch_health(instance)
        self._note(instance, was)
        self._tell(member, before)
        if was is not None and was.phase is not instance.phase:
            self._turn.moved(member)  # lost or exited: worth the same, and yet another remedy helps

    def _note(self, instance: Instance, was: Instance | None) -> None:
        """Write down what became of the process."""
        phase = instance.phase
        if instance.trouble is not None and (was is None or was.trouble is None):
            told = {"slot": instance.slot, "revision": instance.revision, "why": instance.trouble}
            self._record("instance.blocked", instance.id, told)
        if was is not None and was.phase is phase and was.started_at == instance.started_at:
            return
        data = {"slot": instance.slot, "revision": instance.revision, "version": instance.version}
        if phase is Phase.RUNNING:
            data |= {"address": instance.address, "node": instance.node, "restarts": instance.restarts}
            self._record("instance.started", instance.id, data)
        elif phase is Phase.EXITED:
            self._record("instance.exited", instance.id, {**data, "exit_code": instance.exit_code})
        elif phase is Phase.LOST:
            self._record("instance.lost", instance.id, {**data, "node": instance.node})

    def _remove(self, id: str) -> None:
        self._turn.relocations.gone(id)
        member = self._view.remove(id)
        if member is None:
            return
        self._forget_health(id)
        self._turn.isolations.gone(id)
        self._doubted.pop(id, None)
        self._record("instance.removed", id, {"slot": member.instance.slot})
        self._turn.moved(member)

    # ------------------------------------------------------------------------------------------ health and work

    def judged(self, id: str, verdict: Verdict, status: AgentStatus | None) -> None:
        """Take in a changed verdict."""
        member = self._view.members.get(id)
        if member is None:
            return
        before, was = member.condition, member.health
        if status is not None:
            self._view.report(id, status)
        self._view.judge(id, verdict.state, self._clock.now())
        if verdict.state is not was:
            self._note_verdict(member, verdict, was)
        self._tell(member, before)

    def _note_verdict(self, member: Member, verdict: Verdict, was: HealthState) -> None:
        instance, state = member.instance, verdict.state
        if state is HealthState.SUSPECT:
            self._doubted.setdefault(instance.id, self._clock.now())
            return
        doubted = self._doubted.pop(instance.id, None)
        data: dict[str, Any] = {"slot": instance.slot, "revision": instance.revision}
        if state is HealthState.HEALTHY and was is not HealthState.SUSPECT:
            started = instance.started_at or instance.created_at
            data["after_s"] = round(self._clock.now() - started, 3)
            self._record("instance.ready", instance.id, data)
        elif state is HealthState.UNHEALTHY:
            if doubted is not None:
                data["detection_s"] = round(self._clock.now() - doubted, 3)
            self._record("instance.unhealthy", instance.id, data, verdict.reasons)

    def probed(self, id: str, status: AgentStatus | None, latency: float, *, ok: bool) -> None:
        """Take in a probe's answer: how long it took, and what the agent says of itself if it was asked."""
        member = self._view.members.get(id)
        if member is None:
            return
        if ok:
            member.latency = latency
        if status is not None:
            self._view.report(id, status)

    def _tell(self, member: Member, before: Condition | None) -> None:
        if member.condition is not before:
            self._turn.changed(member, before, self._clock.now())
