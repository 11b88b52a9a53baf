"""The part of a turn that keeps size and revision: intents, `core.rollout` → creations, proposals to remove."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from agentfleet.backends.base import Creation, Ordered
from agentfleet.core import rollout
from agentfleet.core.governor import Cause, Disruption
from agentfleet.core.reason import Reason
from agentfleet.core.rollout import RolloutDecision, RolloutObserved, RolloutPhase
from agentfleet.desk import Desk, Proposal
from agentfleet.errors import BackendRefused
from agentfleet.instances import Instance, Phase
from agentfleet.view import EXPENDABLE, SERVING, Condition, Counts, Member

UNFIT = (Condition.DEAD, Condition.SICK, Condition.PENDING, Condition.STARTING)
GOOD = (Condition.FRESH, Condition.IDLE, Condition.BUSY)
CREATED_AT_ONCE = 100
"""Instances that one turn creates at most, each of them journaled; between two turns others have theirs."""
_RANK = {cause: rank for rank, cause in enumerate(Cause)}


@dataclass(frozen=True, slots=True)
class Intent:
    """A wanted size and who wants it; of several in one turn the strongest cause wins, of equals the latest."""

    cause: Cause
    replicas: int
    reasons: tuple[Reason, ...] = ()


class Sizing:
    """Sizes one fleet and rolls it to its target revision."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._intents: list[Intent] = []
        self._size_cause = Cause.SCALING if desk.spec.scaling else Cause.OPERATOR
        self._failures = {"create": 0, "stop": 0, "apply": 0}
        self._retry_at = {"create": 0.0, "stop": 0.0, "apply": 0.0}
        self._avoid: dict[int, str] = {}
        self._vacated: dict[int, None] = {}
        self._reserved: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------ what comes in

    def offer(self, intent: Intent) -> None:
        """Hand in a wanted size for the next turn."""
        self._intents.append(intent)

    @property
    def chooses(self) -> bool:
        """Whether those whose removal is admitted are the ones that go; else the engine takes any as many."""
        return True

    def avoid(self, slot: int, node: str) -> None:
        """Whoever fills this slot next should not run on `node`."""
        self._avoid[slot] = node

    def vacate(self, slot: int) -> None:
        """The instance in this slot is being replaced: the next one fills the same slot and inherits its history."""
        self._vacated[slot] = None

    def reserve(self, slot: int, id: str) -> None:
        """A slot is for this instance and no other, when it comes."""
        self._reserved[id] = slot

    def unreserve(self, id: str) -> None:
        """It does not come."""
        self._reserved.pop(id, None)

    def is_empty(self, slot: int) -> bool:
        """Whether nobody fills a slot."""
        return self._desk.view.holder(slot) is None

    def accepted(self, action: str) -> None:
        """The backend accepted a creation or a stop."""
        if action in self._failures:
            self._failures[action] = 0

    @property
    def failing(self) -> int:
        """How often in a row the engine has not done what the size asks for: made, ended, or taken on."""
        return max(self._failures.values())

    @property
    def must_be_told(self) -> bool:
        """Whether an isolated instance still fills a place for the engine until the engine is told."""
        return False

    @property
    def pending(self) -> bool:
        """Whether a wanted size waits for the next turn."""
        return bool(self._intents)

    @property
    def settled(self) -> bool:
        """Whether the engine itself has nothing left to do for a fleet without instances."""
        return True

    def ordered(self, seen: Ordered, now: float) -> None:
        """What the engine has been told to keep, if it keeps fleets by itself."""

    def place(self, id: str) -> int:
        """The slot for an instance whose engine knows no slots: its own, that of one that is gone, or the lowest."""
        desk = self._desk
        own = self._reserved.pop(id, None)
        held = set(self._reserved.values())
        gone = (*desk.disruptions.unfilled(self.is_empty), *self._vacated)
        slots = (*(() if own is None else (own,)), *(slot for slot in gone if slot not in held))
        slot = next((slot for slot in slots if self.is_empty(slot)), None)
        if slot is None:
            slot = next(slot for slot in desk.view.next_slots(len(held) + 1) if slot not in held)
        self._vacated.pop(slot, None)
        return slot

    def not_applied(self, now: float) -> None:
        """The engine did not accept what the fleet should be."""
        self._wait("apply", now)

    def not_removed(self, now: float) -> None:
        """The backend did not accept a stop."""
        self._wait("stop", now)

    def not_created(self, id: str, error: Exception, now: float) -> None:
        """The backend did not accept an instance."""
        self._wait("create", now)
        member = self._desk.view.members.get(id)
        if member is None:
            return
        if isinstance(error, BackendRefused):
            self.count_failure(member.instance)
        if not member.seen:
            self._desk.view.remove(id)
            self._desk.disruptions.emptied(member.instance.slot)

    def _wait(self, action: str, now: float) -> None:
        """Wait before the next action of this kind, longer each time."""
        self._failures[action] += 1
        self._retry_at[action] = now + self._desk.spec.recovery.backoff.delay(self._failures[action])

    def count_failure(self, instance: Instance) -> None:
        """An instance turned sick, exited, or could not be made; each process counts once, whoever manages it."""
        state = self._desk.state
        if state is not None and state.rolling and instance.revision == state.target:
            self._desk.state = state.with_failure(f"{instance.id}#{instance.restarts}")

    def placed(self, slot: int) -> None:
        """The engine has taken an instance for this slot: where it should not run has been said."""
        self._avoid.pop(slot, None)

    def contested(self, now: float) -> bool:  # noqa: ARG002 - where others set sizes, too, it counts
        """Whether an autoscaler's sizes are withheld, because another takes them back again and again."""
        return False

    def merge_intents(self, now: float) -> None:
        """Take over the strongest of the wanted sizes."""
        contested = self.contested(now)
        intents = [each for each in self._intents if not contested or each.cause is not Cause.SCALING]
        self._intents = []
        if not intents:
            return
        chosen = min(reversed(intents), key=lambda intent: _RANK[intent.cause])
        state = self._desk.wanted
        self._size_cause = chosen.cause
        if chosen.replicas != state.replicas:
            data = {"from": state.replicas, "to": chosen.replicas, "by": chosen.cause.value}
            self._desk.state = replace(state, replicas=chosen.replicas)
            self._desk.record("fleet.scaled", data=data, reasons=chosen.reasons)

    # ------------------------------------------------------------------------------------------ size and rollout

    def step(self, now: float) -> tuple[RolloutDecision, float | None]:
        """Decide size and rollout, follow a rollback at once, and create what is missing.

        Returns:
            The decision, whose removals are still to be proposed, and when to ask again if nothing changes.
        """
        desk = self._desk
        state = desk.wanted
        observed = RolloutObserved(
            desired=state.desired,
            new=desk.view.counts(state.target),
            old=sum((desk.view.counts(each) for each in self._old()), Counts()),
            paused=state.paused,
            failures=state.failures,
            fallback=state.fallback,
        )
        decision, memory = rollout.decide(desk.spec.rollout, observed, state.rollout, now)
        desk.state = replace(state, rollout=memory)
        if decision.phase is not state.rollout.phase:
            self._note_phase(decision, now)
        if decision.phase is RolloutPhase.COMPLETE and observed.new.available >= state.desired > 0:
            self._desk.state = self._desk.wanted.with_good_target()
        if decision.roll_back_to is not None:
            self.roll_back(decision.roll_back_to, decision.reasons, now)
            return self.step(now)
        if self._create(decision, now):
            return decision, now
        dates = [date for date in (decision.wake, *self._retry_at.values()) if date is not None and date > now]
        return decision, min(dates, default=None)

    def roll_back(self, to: int, reasons: Iterable[Reason], now: float) -> None:
        """Make a kept revision the target."""
        before = self._desk.wanted.target
        self._desk.state = self._desk.wanted.with_bad_target().with_target(to, now)
        self._desk.record("rollout.rolled_back", data={"from": before, "to": to}, reasons=tuple(reasons))

    def restart(self, member: Member, grace: float) -> None:
        """Carry out an admitted restart."""
        self._desk.restart(member, grace)

    def remove(self, member: Member, grace: float) -> None:
        """Carry out an admitted removal."""
        self._desk.end(member, grace)

    def finish(self, now: float) -> None:
        """End the turn: hand out what was gathered."""

    def proposals(self, step: RolloutDecision, now: float) -> Iterator[Proposal]:
        """The removals that a step asks for."""
        if now < self._retry_at["stop"]:
            return
        view, state = self._desk.view, self._desk.wanted
        if step.remove_new:
            stopped = state.deleted or not state.running  # an operator's word, whoever sized the fleet before
            cause = Cause.OPERATOR if stopped else self._size_cause
            yield from removals(view.expendable([state.target]), step.remove_new, cause)
        if step.remove_old_unfit:
            yield from removals(view.expendable(self._old(), only=UNFIT), step.remove_old_unfit, Cause.ROLLOUT)
        if step.remove_old_good:  # while a rollout is held, any old one may go
            only = EXPENDABLE if state.paused or not state.rolling else GOOD
            count = min(step.remove_old_good, self._at_most())
            yield from removals(view.expendable(self._old(), only=only), count, Cause.ROLLOUT)

    def _at_most(self) -> int:
        """Removals that could be admitted now, and one more, so that what is held back is recorded."""
        desk, state = self._desk, self._desk.wanted
        spare = max(0, desk.view.total_counts().good - state.desired)
        return spare + max(0, desk.spec.recovery.budget(state.desired) - len(desk.disruptions)) + 1

    def _old(self) -> list[int]:
        target = self._desk.wanted.target
        return [revision for revision in self._desk.view.revisions if revision != target]

    def _note_phase(self, decision: RolloutDecision, now: float) -> None:
        state = self._desk.wanted
        data = {
            "revision": state.target,
            "version": state.template.version,
            "seconds": round(now - state.rollout.started_at, 3),
            "rollback": state.rollout.is_rollback,
        }
        if decision.phase is RolloutPhase.COMPLETE:
            self._desk.record("rollout.completed", data=data)
        elif decision.phase is RolloutPhase.FAILED:
            self._desk.record("rollout.failed", data={**data, "failures": state.failures}, reasons=decision.reasons)

    def _create(self, step: RolloutDecision, now: float) -> bool:
        """Create what a step asks for, some of it: whether there is more to do at once."""
        wanted = step.create_new or step.create_old
        if not wanted or now < self._retry_at["create"]:
            return False
        count = min(wanted, CREATED_AT_ONCE)
        view, state = self._desk.view, self._desk.wanted
        number = state.target
        if step.create_old:
            number = max(self._old(), key=lambda each: view.counts(each).total)
        if state.revision(number) is None:
            return False  # its template is not kept any more: the rollout will bring these places to the target
        # places that were disrupted come first: a disruption is over, and a history goes on, when the slot is filled
        disrupted = self._desk.disruptions.unfilled(self.is_empty)
        vacant = (slot for slot in dict.fromkeys((*disrupted, *self._vacated)) if self.is_empty(slot))
        first = list(islice(vacant, count))
        for slot in first:
            self._vacated.pop(slot, None)
            self._create_one(slot, number, now)
        for slot in view.next_slots(count - len(first)):
            self._create_one(slot, number, now)
        return wanted > count

    def _create_one(self, slot: int, number: int, now: float) -> None:
        desk = self._desk
        revision = desk.wanted.revision(number)
        assert revision is not None
        name, template = desk.spec.name, revision.template
        id = f"{name}-{slot}-{desk.rng.getrandbits(32):08x}"
        away = self._avoid.get(slot)
        desk.view.put(Instance(id, name, slot, number, template.version, Phase.PENDING, created_at=now), seen=False)
        desk.record("instance.created", id, {"slot": slot, "revision": number, "version": template.version})
        desk.actuator.create(Creation(id, name, slot, number, template, (away,) if away else ()))


def removals(candidates: Iterable[Member], count: int, cause: Cause) -> Iterator[Proposal]:
    """Proposals to remove the first `count` of the candidates for good."""
    for member in islice(candidates, count):
        serving = member.condition in SERVING
        yield Proposal(Disruption(member.instance.slot, cause, serving, surplus=True), member)
