"""Sizing for engines that keep a whole fleet by themselves, as a Kubernetes Deployment does.

Such an engine is told size and revision and does the rest in its own way: it makes instances, rolls them to the target
and fills the places of those that are gone. What is left to do here: judge how the rollout goes, choose who leaves when
the fleet gets smaller (idle before busy, and only as the governor admits), and respect what others tell the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agentfleet.backends.base import AUTOSCALER, Ordered, Workload
from agentfleet.core import contention
from agentfleet.core.contention import ContentionMemory, ContentionObserved
from agentfleet.core.governor import Cause
from agentfleet.core.reason import Reason
from agentfleet.core.rollout import RolloutDecision, RolloutPhase
from agentfleet.desk import Desk, Proposal
from agentfleet.sizing import Intent, Sizing, removals
from agentfleet.state import FleetState
from agentfleet.view import Member


class WorkloadSizing(Sizing):
    """Sizes one fleet and rolls it to its target revision by telling its engine what should be."""

    def __init__(self, desk: Desk, *, engine_scales: bool = False) -> None:
        super().__init__(desk)
        self._engine_scales = engine_scales
        """Whether the size of a running fleet is the engine's own to decide."""
        self._known: Ordered | None = None
        """What the engine says that it has been told."""
        self._sent: Workload | None = None
        """What we have told it last; None: nothing since the start, or it was not accepted."""
        self._accepted = False
        self._leaving: dict[str, None] = {}
        self._yielded: int | None = None
        """The target when somebody else put a strange template in its place, which stays until another is wanted."""
        self._deletion = "none"
        self._contention = ContentionMemory()

    @property
    def must_be_told(self) -> bool:
        """The engine counts its instances by itself."""
        return True

    @property
    def chooses(self) -> bool:
        """Not where nothing tells instances apart, or all of them go: then the size alone is changed."""
        return self._desk.view.informed and self._desk.wanted.desired > 0

    @property
    def settled(self) -> bool:
        """Whether the engine has forgotten a fleet that was deleted."""
        return not self._desk.wanted.deleted or self._deletion == "done"

    # ------------------------------------------------------------------------------------------ what comes in

    def ordered(self, seen: Ordered, now: float) -> None:
        """Take in what the engine has been told; what others told it is adopted and explained, not fought over."""
        state = self._desk.state
        size = self._sent.replicas if self._sent is not None else 0 if state is None else state.desired
        before, self._known = self._known, seen
        if state is None or state.deleted:
            return
        if seen.absent:
            self._miss()
            return
        if seen.trouble is not None and (before is None or before.trouble != seen.trouble):
            self._desk.record("fleet.blocked", data={"revision": state.target, "why": seen.trouble})
        if seen.edit is not None and (before is None or before.edit != seen.edit):
            self._note_foreign(replace(seen, by=seen.edit.by), "template")
        first = before is None
        if self._engine_scales and (seen.by == AUTOSCALER or (first and seen.by is None)):
            if state.running and seen.replicas and seen.replicas != size:
                self._follow_size(seen.replicas, size)
            return
        if seen.by is None:
            return
        if seen.replicas != size:
            self._adopt_size(state, seen, size)
            self._contend(ContentionObserved(rival=seen.by), now)
        if seen.paused != self._desk.wanted.paused:
            self._note_foreign(seen, "paused" if seen.paused else "resumed")
            self._desk.state = replace(self._desk.wanted, paused=seen.paused)
        told = None if self._sent is None or not self._accepted else self._sent.revision
        known = told if told is not None or before is None else before.revision
        if state.target not in {seen.revision, self._yielded} and (first or seen.revision != known):
            self._adopt_revision(seen)

    def _miss(self) -> None:
        """What the engine was told is gone, which is no word about the size: it is wanted, so it is told again."""
        if self._sent is not None and self._accepted:
            self._note_foreign(Ordered(0, by="somebody else"), "deleted")
            self._sent = None

    def _follow_size(self, now: int, before: int) -> None:
        """The engine's own autoscaler has set another size: that is what it is for."""
        if self._sent is not None:
            self._sent = replace(self._sent, replicas=now)
        text = f"{AUTOSCALER} has set the size, which this fleet's spec leaves to it"
        self.offer(Intent(Cause.SCALING, now, (Reason("scaling.cluster", text, {"before": before, "now": now}),)))

    def _adopt_size(self, state: FleetState, seen: Ordered, told: int) -> None:
        reason = self._note_foreign(seen, "scaled", before=told, now=seen.replicas)
        if self._sent is not None:
            self._sent = replace(self._sent, replicas=seen.replicas)
        if not state.running and seen.replicas:  # a stopped fleet that somebody gives a size has been started
            self._desk.state = replace(state, running=True)
        self.offer(Intent(Cause.OPERATOR, seen.replicas, (reason,)))

    def contested(self, now: float) -> bool:
        """As `Sizing.contested`; also ends what has been let alone for long enough."""
        return self._contend(ContentionObserved(), now)

    def _contend(self, observed: ContentionObserved, now: float) -> bool:
        """Note who sets the size; whether our autoscaler is to hold still."""
        if self._engine_scales:
            return False  # ours sleeps
        decision, self._contention = contention.decide(observed, self._contention, now)
        if decision.began is not None:
            self._desk.record("scaling.contested", data={"by": observed.rival}, reasons=(decision.began,))
        if decision.ended is not None:
            self._desk.record("scaling.uncontested", reasons=(decision.ended,))
        return decision.held

    def merge_intents(self, now: float) -> None:
        """As `Sizing.merge_intents`; what the autoscaler sets is remembered."""
        before = self._desk.wanted.replicas
        super().merge_intents(now)
        if self._size_cause is Cause.SCALING and self._desk.wanted.replicas != before:
            self._contend(ContentionObserved(scaled=True), now)

    def _adopt_revision(self, seen: Ordered) -> None:
        state = self._desk.wanted
        now = state.revision(seen.revision) if seen.revision is not None else None
        if now is None:
            self._note_foreign(seen, "template")
            self._yielded = state.target
        else:
            self._note_foreign(seen, "revision", before=state.target, now=now.number)
            if self._sent is not None:
                self._sent = replace(self._sent, revision=now.number, template=now.template)
            self._follow = now.number

    def _note_foreign(self, seen: Ordered, what: str, **numbers: float) -> Reason:
        reason = Reason(f"foreign.{what}", f"{seen.by} has changed what the engine keeps: {what}", numbers)
        self._desk.record("fleet.foreign_change", data={"by": seen.by, "what": what, **numbers}, reasons=(reason,))
        return reason

    _follow: int | None = None

    def step(self, now: float) -> tuple[RolloutDecision, float | None]:
        """As `Sizing.step`; a revision that somebody else returned to becomes the target first."""
        if self._follow is not None:
            paused = self._desk.wanted.paused  # somebody's pause holds, whatever else they did
            self._desk.state = replace(self._desk.wanted.with_target(self._follow, now), paused=paused)
            self._follow = None
        return super().step(now)

    def accepted(self, action: str) -> None:
        """The engine took what it was told."""
        super().accepted(action)
        if action == "apply":
            self._accepted = True
        elif action == "delete":
            self._deletion, self._sent, self._known = "done", None, Ordered(0, absent=True)

    def not_applied(self, now: float) -> None:
        """It did not; it is told again later."""
        super().not_applied(now)
        self._sent = None
        self._deletion = "none"

    # ------------------------------------------------------------------------------------------ size and revision

    def _size(self) -> int:
        """What the engine keeps as far as we know."""
        if self._sent is not None:
            return self._sent.replicas
        return self._known.replicas if self._known is not None else 0

    def _create(self, step: RolloutDecision, now: float) -> bool:  # noqa: ARG002 - not its work
        """The engine creates."""
        return False

    def proposals(self, step: RolloutDecision, now: float) -> Iterator[Proposal]:  # noqa: ARG002 - not its plan
        """Those who should go first when the fleet is to be smaller; the engine retires old revisions by itself."""
        state = self._desk.wanted
        excess = self._size() - state.desired
        if excess <= 0 or now < self._retry_at["apply"]:
            return
        stopped = state.deleted or not state.running
        cause = Cause.OPERATOR if stopped else self._size_cause
        view = self._desk.view
        yield from removals(view.expendable((*self._old(), state.target)), excess, cause)

    def restart(self, member: Member, grace: float) -> None:
        """The engine restarts nothing in place: what is ended is replaced."""
        self.vacate(member.instance.slot)
        self._desk.end(member, grace)

    def remove(self, member: Member, grace: float) -> None:  # noqa: ARG002 - the template says how long it may take
        """An admitted removal: it takes no more work, and goes with the next order."""
        self._desk.disruptions.emptied(member.instance.slot)
        self._desk.view.drain(member.instance.id)
        self._leaving[member.instance.id] = None

    def finish(self, now: float) -> None:
        """Tell the engine what should be, when that has changed."""
        state = self._desk.state
        if state is None or self._known is None or now < self._retry_at["apply"]:
            return
        if state.deleted:
            self._delete()
            return
        self._deletion = "none"
        if self._yielded == state.target:
            return
        self._yielded = None
        self._let_others_stay()
        order = self._order(state)
        if self._sent is None or order != replace(
            self._sent, expendable=order.expendable, indifferent=order.indifferent
        ):
            self._sent, self._accepted = order, False
            self._desk.actuator.apply(order)

    def _order(self, state: FleetState) -> Workload:
        """What the engine should keep: all that are wanted, and those who may not go yet."""
        stay = self._desk.view.total_counts().total
        failed = state.rollout.phase is RolloutPhase.FAILED
        size = max(state.desired, min(self._size(), stay))
        return Workload(
            self._desk.spec,
            state.target,
            state.template,
            size,
            paused=state.paused or (failed and bool(self._old())),  # a failed revision gets no more instances
            expendable=tuple(self._leaving),
            indifferent=not self._desk.view.informed,
            resting=None if state.running or state.deleted else state.replicas,
            same_size=size == self._size() and not self._engine_scales,
        )

    def _let_others_stay(self) -> None:
        """Forget those who have left; if the engine let others go instead, those who were to leave are in service."""
        view = self._desk.view
        self._leaving = {id: None for id in self._leaving if id in view.members}
        if self._sent is None or not self._accepted or len(view) - len(view.isolated) > self._sent.replicas:
            return
        for id in self._sent.expendable:
            if self._leaving.pop(id, self) is None:
                view.keep(id)

    def _delete(self) -> None:
        if self._deletion == "none":
            self._deletion = "asked"
            self._desk.actuator.delete(self._desk.spec.name)
