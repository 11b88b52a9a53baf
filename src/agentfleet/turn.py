"""One turn of a fleet: merge what is wanted, decide, hand out actions, record. Synchronous, so nothing interleaves.

The order within a turn is fixed: size and rollout propose, recovery proposes, the governor admits, the admitted actions
are handed to the actuator. A turn costs what changed since the last one, not what the fleet holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from agentfleet.actuator import Actuator
from agentfleet.backends.base import Creation
from agentfleet.core import governor, rollout
from agentfleet.core.governor import Cause, Disruption, GovernorDecision, GovernorObserved
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import Ailment, Case, RecoveryMemory, Remedy
from agentfleet.core.rollout import RolloutDecision, RolloutObserved, RolloutPhase
from agentfleet.errors import BackendRefused, OperationRefused
from agentfleet.instances import Instance, Node, Phase
from agentfleet.recovery import Recovery, Wish
from agentfleet.specs import FleetSpec
from agentfleet.state import FleetState
from agentfleet.view import EXPENDABLE, GOOD, SERVING, Condition, Counts, FleetView, Member

Record = Callable[..., None]
"""`record(kind, instance=None, data=None, reasons=())`: writes one event of this fleet."""

REMOVABLE_UNFIT = (Condition.DEAD, Condition.SICK, Condition.PENDING, Condition.STARTING)
REMOVABLE_GOOD = (Condition.FRESH, Condition.IDLE, Condition.BUSY)


@dataclass(frozen=True, slots=True)
class Intent:
    """A wanted size and who wants it; of several in one turn the strongest cause wins."""

    cause: Cause
    replicas: int
    reasons: tuple[Reason, ...] = ()


class Turn:
    """Takes one fleet's turns.

    Args:
        spec: The fleet's policies.
        view: What is known of its instances.
        recovery: The book of ailing slots.
        actuator: Carries actions out.
        record: Writes events.
        rng: Makes instance ids.
    """

    def __init__(
        self,
        spec: FleetSpec,
        *,
        view: FleetView,
        recovery: Recovery,
        actuator: Actuator,
        record: Record,
        rng: random.Random,
    ) -> None:
        self.state: FleetState | None = None
        self.nodes: dict[str, Node] = {}
        self.frozen = False
        self._spec = spec
        self._view = view
        self._recovery = recovery
        self._actuator = actuator
        self._record = record
        self._rng = rng
        self._intents: list[Intent] = []
        self._concluded: dict[int, None] = {}
        self._avoid: dict[int, str] = {}
        self._sick_since: dict[int, float] = {}
        self._held: dict[int, str] = {}
        self._asked: list[Disruption] = []
        self._victims: dict[int, tuple[Member, str]] = {}
        self._size_cause = Cause.SCALING if spec.scaling else Cause.OPERATOR
        self._create_failures = 0
        self._create_after = 0.0
        self._recorded: FleetState | None = None

    # ------------------------------------------------------------------------------------------ what comes in

    def offer(self, intent: Intent) -> None:
        """Hand in a wanted size for the next turn."""
        self._intents.append(intent)

    def changed(self, member: Member, before: Condition | None, now: float) -> None:
        """Say that a member's condition changed (from `before`, None when it is new)."""
        slot, condition = member.instance.slot, member.condition
        if condition is Condition.DRAINING:
            self._recovery.touch(slot)
            return
        if self._view.holder(slot) is not member:
            return
        self._recovery.touch(slot)
        ailing = condition in (Condition.SICK, Condition.DEAD)
        if ailing:
            self._sick_since.setdefault(slot, now)
            if before not in (Condition.SICK, Condition.DEAD):
                self._count_failure(member.instance.revision)
        if condition in GOOD:
            self._healed(member, now)
        if ailing or condition in GOOD:
            self._concluded[slot] = None

    def gone(self, member: Member) -> None:
        """Say that a member does not exist any more."""
        self._recovery.touch(member.instance.slot)

    def failed(self, action: str, id: str, error: Exception, now: float) -> None:
        """Say that an action failed for good."""
        member = self._view.members.get(id)
        if action == "create":
            self._create_failures += 1
            self._create_after = now + self._spec.recovery.backoff.delay(self._create_failures)
            if isinstance(error, BackendRefused) and member is not None:
                self._count_failure(member.instance.revision)
            if member is not None and not member.seen:
                self._view.remove(id)
        elif action == "stop":
            self._view.keep(id)
        if member is not None:
            self._recovery.touch(member.instance.slot)

    def succeeded(self, action: str, id: str) -> None:
        """Say that an action was accepted."""
        if action == "create":
            self._create_failures = 0
        member = self._view.members.get(id)
        if member is not None:
            self._recovery.touch(member.instance.slot)

    def _count_failure(self, revision: int) -> None:
        state = self.state
        if state is not None and state.rolling and revision == state.target:
            self.state = replace(state, failures=state.failures + 1)

    def _healed(self, member: Member, now: float) -> None:
        slot = member.instance.slot
        since = self._sick_since.pop(slot, None)
        if since is not None:
            self._record("instance.recovered", member.instance.id, {"slot": slot, "seconds": round(now - since, 3)})

    def restart(self, id: str, now: float) -> None:
        """Restart one instance on an operator's word, if the governor admits it.

        Raises:
            OperationRefused: There is no such instance, it is busy, or it is held.
        """
        member = self._view.members.get(id)
        if member is None or member.condition is Condition.DRAINING or id in self._actuator.busy:
            raise OperationRefused(f"instance {id} cannot be restarted: it is unknown, leaving, or being acted upon")
        slot, reason = member.instance.slot, Reason("operator.restart", "an operator asked for it")
        if member.instance.phase is not Phase.EXITED:
            self._victims = {slot: (member, Remedy.RESTART.value)}
            self._asked = [Disruption(slot, Cause.OPERATOR, member.condition in SERVING)]
            verdict = self._govern(now)
            if verdict.held:
                raise OperationRefused(f"instance {id} is not restarted now: {verdict.held[0][1]}")
        self._apply(Wish(slot, Remedy.RESTART, (reason,)), member, now)
        self.save()

    # ------------------------------------------------------------------------------------------ the turn

    def take(self, now: float) -> float | None:
        """Take one turn.

        Returns:
            When the next one is due even if nothing changes; None if never.
        """
        ripe = self._view.ripen(now)
        if self.state is None:
            return ripe
        self._merge_intents()
        self._asked, self._victims = [], {}
        step, wake = self._roll(now)
        self._create(step, now)
        self._propose_removals(step)
        self._propose_remedies(now)
        verdict = self._govern(now)
        for disruption in verdict.admitted:
            self._carry_out(disruption, now)
        self.save()
        retry = self._create_after if self._create_after > now else None
        dates = (ripe, wake, retry, verdict.wake, self._recovery.next_due())
        return min((date for date in dates if date is not None), default=None)

    def _merge_intents(self) -> None:
        """The strongest cause wins; of equals the latest."""
        intents, self._intents = self._intents, []
        state = self.state
        if not intents or state is None:
            return
        ranks = {cause: rank for rank, cause in enumerate(Cause)}
        chosen = min(reversed(intents), key=lambda intent: ranks[intent.cause])
        self._size_cause = chosen.cause
        if chosen.replicas != state.replicas:
            data = {"from": state.replicas, "to": chosen.replicas, "by": chosen.cause.value}
            self.state = replace(state, replicas=chosen.replicas)
            self._record("fleet.scaled", data=data, reasons=chosen.reasons)

    # ------------------------------------------------------------------------------------------ size and rollout

    def _old(self, target: int) -> list[int]:
        return [revision for revision in self._view.revisions if revision != target]

    def _roll(self, now: float) -> tuple[RolloutDecision, float | None]:
        """Decide size and rollout; follow a rollback at once."""
        state = self.state
        assert state is not None
        observed = RolloutObserved(
            desired=state.desired,
            new=self._view.counts(state.target),
            old=sum((self._view.counts(each) for each in self._old(state.target)), Counts()),
            paused=state.paused,
            failures=state.failures,
            fallback=state.fallback,
        )
        decision, memory = rollout.decide(self._spec.rollout, observed, state.rollout, now)
        began = state.rollout.phase
        self.state = state = replace(state, rollout=memory)
        if decision.phase is not began:
            self._phase_changed(state, decision, now)
        if decision.roll_back_to is not None:
            self._roll_back(decision.roll_back_to, decision.reasons, now)
            return self._roll(now)
        return decision, decision.wake

    def _phase_changed(self, state: FleetState, decision: RolloutDecision, now: float) -> None:
        data = {
            "revision": state.target,
            "version": state.template.version,
            "seconds": round(now - state.rollout.started_at, 3),
            "rollback": state.rollout.is_rollback,
        }
        if decision.phase is RolloutPhase.COMPLETE:
            self.state = state.with_good_target()
            self._record("rollout.completed", data=data)
        elif decision.phase is RolloutPhase.FAILED:
            self._record("rollout.failed", data={**data, "failures": state.failures}, reasons=decision.reasons)

    def _roll_back(self, to: int, reasons: Iterable[Reason], now: float) -> None:
        assert self.state is not None
        before = self.state.target
        self.state = self.state.with_target(to, now)
        self._record("rollout.rolled_back", data={"from": before, "to": to}, reasons=tuple(reasons))

    def _create(self, step: RolloutDecision, now: float) -> None:
        count = step.create_new or step.create_old
        if not count or now < self._create_after:
            return
        state = self.state
        assert state is not None
        number = state.target
        if step.create_old:
            number = max(self._old(state.target), key=lambda each: self._view.counts(each).total)
        revision = state.revision(number)
        if revision is None:
            return  # its template is not kept any more: the rollout will bring these places to the target
        for slot in self._view.next_slots(count):
            self._create_one(slot, number, now)

    def _create_one(self, slot: int, number: int, now: float) -> None:
        assert self.state is not None
        revision = self.state.revision(number)
        assert revision is not None
        name = self._spec.name
        id = f"{name}-{slot}-{self._rng.getrandbits(32):08x}"
        away = self._avoid.pop(slot, None)
        creation = Creation(id, name, slot, number, revision.template, (away,) if away else ())
        version = revision.template.version
        self._view.put(Instance(id, name, slot, number, version, Phase.PENDING, created_at=now), seen=False)
        self._record("instance.created", id, {"slot": slot, "revision": number, "version": version})
        self._actuator.create(creation)

    def _propose_removals(self, step: RolloutDecision) -> None:
        state = self.state
        assert state is not None
        old = self._old(state.target)
        if step.remove_new:
            self._ask_removal(self._view.expendable([state.target]), step.remove_new, self._size_cause)
        if step.remove_old_unfit:
            unfit = self._view.expendable(old, only=REMOVABLE_UNFIT)
            self._ask_removal(unfit, step.remove_old_unfit, Cause.ROLLOUT)
        if step.remove_old_good:
            good = self._view.expendable(old, only=REMOVABLE_GOOD if not state.paused else EXPENDABLE)
            self._ask_removal(good, step.remove_old_good, Cause.ROLLOUT)

    def _ask_removal(self, candidates: Iterable[Member], count: int, cause: Cause) -> None:
        for member in islice(candidates, count):
            slot = member.instance.slot
            self._victims[slot] = (member, "remove")
            serving = member.condition in SERVING
            self._asked.append(Disruption(slot, cause, serving, surplus=True))

    # ------------------------------------------------------------------------------------------ recovery

    def case_of(self, slot: int, now: float) -> Case | None:
        """What recovery needs to know of a slot; None when there is nothing to judge now."""
        member = self._view.holder(slot)
        if member is None or member.instance.id in self._actuator.busy:
            return None
        instance, condition = member.instance, member.condition
        if condition in GOOD:
            return Case(Ailment.NONE, now)
        if condition is Condition.SICK:
            ailment = Ailment.SICK
        elif condition is Condition.DEAD:
            ailment = Ailment.LOST if instance.phase is Phase.LOST else Ailment.EXITED
        else:
            return Case(Ailment.UNPROVEN, now)
        counts = self._view.counts(instance.revision)
        state = self.state
        return Case(
            ailment,
            self._sick_since.get(slot, now),
            other_nodes=self._other_nodes(instance.node),
            revision_sick=(counts.sick + counts.dead) / max(1, counts.total),
            can_roll_back=state is not None
            and instance.revision == state.target
            and state.fallback is not None
            and not state.rollout.is_rollback,
        )

    def _other_nodes(self, node: str | None) -> bool:
        known = self.nodes.get(node) if node is not None else None
        usable = sum(1 for each in self.nodes.values() if each.ready and each.schedulable) if self.nodes else 0
        return usable > (1 if known is not None and known.ready and known.schedulable else 0)

    def _propose_remedies(self, now: float) -> None:
        for seen in self._recovery.examine(lambda slot: self.case_of(slot, now), now):
            if seen.memory_changed:
                self._remember(seen.slot)
            member = self._view.holder(seen.slot)
            if seen.wish and member and seen.slot not in self._victims and self._is_harmless(member, seen.wish):
                self._apply(seen.wish, member, now)
        assert self.state is not None
        # one more than the budget, so that what is held back is recorded; the rest waits unseen
        for wish in self._recovery.wishes(self._spec.recovery.budget(self.state.desired) + 1):
            member = self._view.holder(wish.slot)
            if member is not None and wish.slot not in self._victims:
                self._victims[wish.slot] = (member, wish.remedy.value)
                self._asked.append(Disruption(wish.slot, Cause.RECOVERY, member.condition in SERVING))

    def _is_harmless(self, member: Member, wish: Wish) -> bool:
        """Nothing runs there any more, or nothing is done to what runs."""
        return member.instance.phase is Phase.EXITED or wish.remedy in (Remedy.ASK, Remedy.ROLL_BACK)

    def _apply(self, wish: Wish, member: Member, now: float) -> None:
        instance, remedy = member.instance, wish.remedy
        data: dict[str, Any] = {"slot": wish.slot, "remedy": remedy.value}
        self._recovery.acted(wish.slot, remedy, now)
        self._held.pop(wish.slot, None)
        self._record(f"recovery.{remedy.value}", instance.id, data, wish.reasons)
        self._remember(wish.slot)
        grace = min(self._spec.recovery.grace, self._template_drain(instance))
        if remedy is Remedy.RESTART:
            self._actuator.restart(instance.id, grace=grace)
        elif remedy in (Remedy.REPLACE, Remedy.ELSEWHERE):
            if remedy is Remedy.ELSEWHERE and instance.node is not None:
                self._avoid[wish.slot] = instance.node
            self._end(member, grace)
        elif remedy is Remedy.ROLL_BACK and self.state is not None and self.state.fallback is not None:
            self._roll_back(self.state.fallback, wish.reasons, now)

    def _remember(self, slot: int) -> None:
        self._record(f"state.recovery.{slot}", data=self._recovery.memory(slot).to_dict())

    # ------------------------------------------------------------------------------------------ governor and action

    def _govern(self, now: float) -> GovernorDecision:
        state = self.state
        assert state is not None
        counts = self._view.total_counts()
        observed = GovernorObserved(
            desired=state.desired,
            good=counts.good,
            sick=counts.sick + counts.dead,
            restored=tuple(self._concluded),
            asked=tuple(self._asked),
        )
        self._concluded.clear()
        decision, memory = governor.decide(self._spec.recovery, observed, state.governor, now)
        self.state = replace(state, governor=memory)
        if decision.frozen is not self.frozen:
            self.frozen = decision.frozen
            kind = "governor.frozen" if decision.frozen else "governor.thawed"
            self._record(kind, data={"budget": decision.budget}, reasons=decision.reasons)
        held = {}
        for request, reason in decision.held:
            held[request.slot] = reason.code
            if self._held.get(request.slot) != reason.code:
                member, what = self._victims[request.slot]
                data = {"slot": request.slot, "cause": request.cause.value, "action": what}
                self._record("governor.held", member.instance.id, data, (reason,))
        self._held = held
        return decision

    def _carry_out(self, disruption: Disruption, now: float) -> None:
        member, what = self._victims[disruption.slot]
        counted = not disruption.surplus or disruption.serving
        if counted and self.state is not None:
            budget = self._spec.recovery.budget(self.state.desired)
            data = {"slot": disruption.slot, "cause": disruption.cause.value, "action": what, "budget": budget}
            data["in_flight"] = len(self.state.governor.in_flight)
            self._record("governor.admitted", member.instance.id, data)
        if what == "remove":
            self._record("instance.removing", member.instance.id, {"cause": disruption.cause.value})
            self._forget(disruption.slot)
            self._end(member, self._template_drain(member.instance))
            return
        wish = self._recovery.wish(disruption.slot)
        if wish is not None:
            self._apply(wish, member, now)

    def _forget(self, slot: int) -> None:
        """The place is given up: who fills it next starts without its history."""
        self._sick_since.pop(slot, None)
        if self._recovery.memory(slot) != RecoveryMemory():
            self._recovery.forget(slot)
            self._remember(slot)

    def _end(self, member: Member, grace: float) -> None:
        self._view.drain(member.instance.id)
        self._actuator.stop(member.instance.id, grace=grace)

    def _template_drain(self, instance: Instance) -> float:
        assert self.state is not None
        revision = self.state.revision(instance.revision)
        return revision.template.drain if revision is not None else self.state.template.drain

    # ------------------------------------------------------------------------------------------ record

    def save(self) -> None:
        """Journal the state when it changed, so that the next manager takes up here."""
        state = self.state
        if state is not None and state != self._recorded:
            self._recorded = state
            self._record("state.fleet", data=state.to_dict())

    def restore(self, state: FleetState) -> None:
        """Take up an earlier manager's state."""
        self.state = self._recorded = state
        self.frozen = state.governor.frozen_at is not None

    def summary(self) -> Mapping[str, Any]:
        """Where the fleet stands, in numbers."""
        state = self.state
        counts = self._view.total_counts()
        return {
            "desired": state.desired if state else 0,
            "good": counts.good,
            "idle": counts.idle,
            "busy": counts.busy,
            "starting": counts.pending + counts.starting + counts.fresh,
            "unknown": counts.unknown,
            "sick": counts.sick,
            "dead": counts.dead,
            "draining": self._view.draining,
            "revision": state.target if state else None,
            "version": state.template.version if state else None,
            "rolling": bool(state and state.rolling),
            "frozen": self.frozen,
        }
