"""The part of a turn that repairs: ailing slots → `core.recovery` → remedies, once the governor admits them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from agentfleet.core.governor import Cause, Disruption
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import Ailment, Case, RecoveryMemory, Remedy
from agentfleet.desk import Desk, Proposal
from agentfleet.instances import Phase
from agentfleet.recovery import Recovery, Wish
from agentfleet.relocation import Relocations
from agentfleet.sizing import Sizing
from agentfleet.view import GOOD, SERVING, Condition, Member

AILING = (Condition.SICK, Condition.DEAD)


class Repair:
    """Repairs one fleet's instances.

    Args:
        desk: The fleet's working place.
        recovery: The book of ailing slots.
        sizing: Fills the places of replaced instances, and rolls back.
    """

    def __init__(self, desk: Desk, recovery: Recovery, sizing: Sizing) -> None:
        self._desk = desk
        self._recovery = recovery
        self._sizing = sizing
        self.relocations = Relocations(desk, sizing, self)
        self._sick_since: dict[int, float] = {}
        self._lapsed: dict[int, float] = {}
        """When slots' instances ceased to work, or were met not working: their age alone makes none late."""
        self.proved: dict[int, None] = {}
        """Slots that have proved themselves, for good or ill, or are left to a human, since the governor last asked."""

    def changed(self, member: Member, before: Condition | None, now: float) -> None:
        """Take in a changed condition."""
        slot, condition = member.instance.slot, member.condition
        self._recovery.touch(slot)
        if condition is Condition.DRAINING or self._desk.view.holder(slot) is not member:
            return
        if condition in GOOD:
            self._lapsed.pop(slot, None)
        elif before is None or before in GOOD:
            self._lapsed[slot] = now
        if condition in AILING or condition in GOOD:
            self.proved[slot] = None
        if condition in AILING:
            self._sick_since.setdefault(slot, now)
            if (
                before not in AILING and member.instance.phase is not Phase.LOST
            ):  # a lost node is no fault of the revision
                self._sizing.count_failure(member.instance)
        elif condition in GOOD:
            since = self._sick_since.pop(slot, None)
            if since is not None:
                data = {"slot": slot, "seconds": round(now - since, 3)}
                self._desk.record("instance.recovered", member.instance.id, data)

    def not_reached(self, slot: int) -> None:
        """The engine could not be reached, so the last attempt says nothing about the instance: it does not count."""
        if self._recovery.take_back(slot):
            self._remember(slot)

    def undisturbed(self, slot: int) -> None:
        """Nothing was done to the instance in a slot, after all: the disruption is over."""
        self.proved[slot] = None
        self._recovery.touch(slot)

    def knows(self, slot: int) -> bool:
        """Whether a slot has a history."""
        return self._recovery.memory(slot) != RecoveryMemory()

    def touch(self, slot: int) -> None:
        """Look at a slot again in the next turn."""
        self._recovery.touch(slot)

    def next_due(self) -> float | None:
        """When there is something to do even if nothing changes."""
        return self._recovery.next_due()

    def ailing(self, now: float) -> float:
        """For how many seconds the slot that waits longest for a healthy instance has been waiting; 0 if none does.

        A manager that takes a fleet over counts from when it has seen that for itself.
        """
        state = self._desk.state
        if state is None:
            return 0.0
        enough = self._desk.view.total_counts().total >= state.desired and not (state.rolling and state.desired)
        while self._sick_since:
            slot, since = next(iter(self._sick_since.items()))  # the oldest: slots are noted as they fall ill
            if not (enough and self._sizing.is_empty(slot)):
                return max(0.0, now - since)
            del self._sick_since[slot]  # nobody will fill it any more
        return 0.0

    # ------------------------------------------------------------------------------------------ deciding

    def case_of(self, slot: int, now: float) -> Case | None:
        """What recovery needs to know of a slot; None when there is nothing to judge now."""
        desk = self._desk
        member = desk.view.holder(slot)
        if member is None or desk.acted_upon(member.instance.id):
            return None
        instance = member.instance
        ailment = _ailment(member)
        if ailment is Ailment.NONE:
            return Case(ailment, now)
        counts, state = desk.view.counts(instance.revision), desk.wanted
        return Case(
            ailment,
            instance.created_at if ailment is Ailment.UNPROVEN else self._sick_since.get(slot, now),
            grace=desk.spec.health.startup if _is_behind(member) else 0.0,
            late_at=self._late_at(slot, instance.created_at) if _is_behind(member) else None,
            placed=member.condition is not Condition.PENDING,
            other_nodes=self.other_nodes(instance.node),
            revision_sick=(counts.sick + counts.dead) / max(1, counts.total),
            crowd=self._recovery.hopeless / max(1, desk.spec.recovery.budget(state.desired)),
            can_roll_back=instance.revision == state.target
            and state.fallback is not None
            and not state.rollout.is_rollback,
        )

    def _late_at(self, slot: int, created_at: float) -> float:
        """When an instance that does not work yet, or for the moment, has had time enough for it."""
        deadline: float = self._desk.spec.rollout.progress_deadline
        return max(created_at, self._lapsed.get(slot, created_at)) + deadline

    def other_nodes(self, node: str | None) -> bool:
        """Whether an instance could run on another node than this one."""
        return any(each.ready and each.schedulable and each.name != node for each in self._desk.nodes.values())

    def proposals(self, taken: Collection[int], now: float) -> Iterator[Proposal]:
        """Carry out what disturbs nobody; propose the rest.

        Args:
            taken: Slots whose instance is about to be removed anyway.
            now: Seconds.
        """
        for seen in self._recovery.examine(lambda slot: self.case_of(slot, now), now):
            if seen.memory_changed:
                self._remember(seen.slot)
            member = self._desk.view.holder(seen.slot)
            if seen.wish and member and seen.slot not in taken and _is_harmless(member, seen.wish):
                self.apply(seen.wish, member, now)
        for wish in self._foremost_wishes():
            member = self._desk.view.holder(wish.slot)
            if member is not None and wish.slot not in taken:
                yield Proposal(Disruption(wish.slot, Cause.RECOVERY, member.condition in SERVING), member, wish)

    def _foremost_wishes(self) -> list[Wish]:
        """Those of slots that are disrupted already, which cost nothing more, then those that have waited longest.

        Of the latter one more than may be admitted, so that what is held back is recorded; the rest waits unseen.
        """
        book, recovery = self._desk.disruptions, self._recovery
        state, budget = self._desk.wanted, self._desk.spec.recovery.budget(self._desk.wanted.desired)
        under_way = recovery.wishes_of(book)
        allowed = budget if state.governor.frozen_at is None else min(1, budget)
        waiting = recovery.wishes(max(0, allowed - len(book)) + 1)
        return list({wish.slot: wish for wish in (*under_way, *waiting)}.values())

    # ------------------------------------------------------------------------------------------ acting

    def apply(self, wish: Wish, member: Member, now: float, *, asked: bool = False) -> None:
        """Carry out a remedy; `asked`: by an operator, who wants this one and no other."""
        desk, instance = self._desk, member.instance
        self._recovery.acted(wish.slot, wish.remedy, now)
        data = {"slot": wish.slot, "remedy": wish.remedy.value}
        desk.record(f"recovery.{wish.remedy.value}", instance.id, data, wish.reasons)
        self._remember(wish.slot)
        grace = min(desk.spec.recovery.grace, desk.drain_of(instance))
        remedies: dict[Remedy, Callable[[], None]] = {
            Remedy.RESTART: lambda: self._sizing.restart(member, grace),
            Remedy.REPLACE: lambda: self.replace(member, grace),
            Remedy.ELSEWHERE: lambda: self._elsewhere(member, grace, now, asked=asked),
            Remedy.ROLL_BACK: lambda: self._roll_back(wish.reasons, now),
            Remedy.ASK: lambda: self._give_up(wish.slot),
        }
        remedies[wish.remedy]()

    def _give_up(self, slot: int) -> None:
        """The event is the call for help; a slot that waits for a human must not keep others from being repaired."""
        self.proved[slot] = None

    def replace(self, member: Member, grace: float) -> None:
        """End an instance, with so many seconds for its drain; whoever fills its slot inherits its history."""
        self._sizing.vacate(member.instance.slot)
        self._desk.end(member, grace)

    def _elsewhere(self, member: Member, grace: float, now: float, *, asked: bool) -> None:
        if self.relocations.begin(member, grace, now, asked=asked):
            return
        if member.instance.node is not None:
            self._sizing.avoid(member.instance.slot, member.instance.node)
        self.replace(member, grace)

    def _roll_back(self, reasons: tuple[Reason, ...], now: float) -> None:
        fallback = self._desk.wanted.fallback
        if fallback is not None:
            self._sizing.roll_back(fallback, reasons, now)

    def forget(self, slot: int) -> None:
        """The place is given up: who fills it next starts without its history."""
        self._sick_since.pop(slot, None)
        self._lapsed.pop(slot, None)
        known = self._recovery.memory(slot) != RecoveryMemory()
        self._recovery.forget(slot)  # a wish that was never carried out must not meet the next instance either
        if known:
            self._remember(slot)

    def _remember(self, slot: int) -> None:
        self._desk.record(f"state.recovery.{slot}", data=self._recovery.memory(slot).to_dict())


def _ailment(member: Member) -> Ailment:
    condition = member.condition
    if condition in GOOD:
        return Ailment.NONE
    if condition is Condition.SICK:
        return Ailment.SICK
    if condition is Condition.DEAD:
        return Ailment.LOST if member.instance.phase is Phase.LOST else Ailment.EXITED
    return Ailment.UNPROVEN


def _is_behind(member: Member) -> bool:
    """Whether it is known not to work yet; of one whose health is unknown nothing is known."""
    return member.condition in (Condition.PENDING, Condition.STARTING)


def _is_harmless(member: Member, wish: Wish) -> bool:
    """Nothing runs there any more, or nothing is done to what runs."""
    return member.instance.phase is Phase.EXITED or wish.remedy in (Remedy.ASK, Remedy.ROLL_BACK)
