"""One turn of a fleet: merge what is wanted, decide, hand out actions, record. Synchronous, so nothing interleaves.

The order within a turn is fixed: size and rollout propose, recovery proposes, the governor admits, the admitted actions
are handed to the actuator. A turn costs what changed since the last one, not what the fleet holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentfleet import relocation
from agentfleet.core import governor
from agentfleet.core.governor import Cause, Disruption, GovernorDecision, GovernorObserved
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import Remedy
from agentfleet.desk import Desk, Proposal
from agentfleet.errors import (
    BackendRefused,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    NotLeader,
    OperationRefused,
)
from agentfleet.instances import Isolation, Phase
from agentfleet.isolation import Isolations
from agentfleet.recovery import Recovery, Wish
from agentfleet.repair import Repair
from agentfleet.sizing import Intent, Sizing
from agentfleet.state import FleetState
from agentfleet.view import SERVING, Condition, Member

_DONE = {
    Remedy.RESTART: "restarted",
    Remedy.REPLACE: "replaced",
    Remedy.ELSEWHERE: "replaced elsewhere",
}


class Turn:
    """Takes one fleet's turns.

    Args:
        desk: The fleet's working place.
        recovery: The book of ailing slots.
        sizing: Keeps size and revision, in the way of the engine.
    """

    def __init__(self, desk: Desk, recovery: Recovery, sizing: Sizing) -> None:
        self._desk = desk
        self.sizing = sizing
        self.repair = Repair(desk, recovery, self.sizing)
        self.relocations = self.repair.relocations
        self.isolations = Isolations(desk, self.sizing)
        self.frozen = False
        self._held: dict[object, str] = {}
        self._recorded: FleetState | None = None
        self._progress: Mapping[str, Any] = {}

    # ------------------------------------------------------------------------------------------ what comes in

    def changed(self, member: Member, before: Condition | None, now: float) -> None:
        """Say that a member's condition changed (from `before`, None when it is new)."""
        self.repair.changed(member, before, now)

    def moved(self, member: Member) -> None:
        """Say that a member's phase changed, or that it is gone."""
        slot = member.instance.slot
        self.repair.touch(slot)
        if self.sizing.is_empty(slot):
            self._desk.disruptions.emptied(slot)
            if self.repair.knows(slot):
                self.sizing.vacate(slot)  # its history goes on with whoever comes next

    def succeeded(self, action: str, id: str) -> None:
        """Say that an action was accepted."""
        self.sizing.accepted(action)
        self.relocations.accepted(action, id)
        member = self._desk.view.members.get(id)
        if member is not None and member.instance.isolated is not None:
            self.isolations.accepted()
        if action == "create" and member is not None:
            self.sizing.placed(member.instance.slot)
        self._touch(id)

    def failed(self, action: str, id: str, error: Exception, now: float) -> None:
        """Say that an action failed for good."""
        if action in ("apply", "delete"):
            self.sizing.not_applied(now)
            return
        if action in relocation.ACTIONS:
            self.relocations.failed(action, id, error, now)
            return
        isolated = self._desk.view.members.get(id)
        if isolated is not None and isolated.instance.isolated is not None:  # its slot is another's by now
            self._desk.view.keep(id)
            self.isolations.failed(now)
            return
        self._touch(id, undisturbed=isinstance(error, (BackendRefused, Conflict, NotLeader)))
        if action == "create":
            self.sizing.not_created(id, error, now)
            return
        self._desk.view.keep(id)
        member = self._desk.view.members.get(id)
        if member is not None and isinstance(error, BackendUnavailable | DeadlineExceeded | NotLeader):
            self.repair.not_reached(member.instance.slot)
        if action == "stop":
            self.sizing.not_removed(now)

    def _touch(self, id: str, *, undisturbed: bool = False) -> None:
        """Look at an instance's slot again; a disruption that was refused is over."""
        member = self._desk.view.members.get(id)
        if member is not None:
            self.repair.touch(member.instance.slot)
            if undisturbed:
                self.repair.proved[member.instance.slot] = None

    # ------------------------------------------------------------------------------------------ the turn

    def heed(self, intent: Intent, now: float) -> None:
        """Take over a user's wanted size now, so that it is recorded; it still goes before what comes this turn."""
        self.sizing.offer(intent)
        self.sizing.merge_intents(now)
        self.sizing.offer(intent)
        self.save()

    def take(self, now: float) -> float | None:
        """Take one turn.

        Returns:
            When the next one is due even if nothing changes; None if never.
        """
        desk = self._desk
        ripe = desk.view.ripen(now)
        if desk.state is None:
            return ripe
        self.sizing.merge_intents(now)
        step, wake = self.sizing.step(now)
        proposals = {each.disruption.slot: each for each in self.sizing.proposals(step, now)}
        for each in self.repair.proposals(proposals.keys(), now):
            proposals.setdefault(each.disruption.slot, each)
        for each in self.relocations.proposals():
            proposals.setdefault(each.disruption.slot, each)
        verdict = self._govern(proposals, now)
        for disruption in verdict.admitted:
            self._carry_out(proposals[disruption.slot], verdict, now)
        moving = self.relocations.step(now)
        self.sizing.finish(now)
        apart = self.isolations.step(now)
        self.save()
        dates = (ripe, wake, apart, moving, verdict.wake, self.repair.next_due())
        return min((date for date in dates if date is not None), default=None)

    # ------------------------------------------------------------------------------------------ an operator's word

    def remedy(self, id: str, remedy: Remedy, now: float) -> None:
        """Restart or replace one instance on an operator's word, if the governor admits it.

        Raises:
            OperationRefused: There is no such instance, it is busy or isolated, or it is held; or there is no other
                node for it to go to, or it is to go anyway.
        """
        done = _DONE[remedy]
        member = self._placed(id, done)
        node, slot = member.instance.node, member.instance.slot
        if remedy is Remedy.ELSEWHERE and not self.repair.other_nodes(node):
            where = "an unknown node" if node is None else node
            raise OperationRefused(
                f"instance {id} on {where} is not {done}: no other node is ready; without elsewhere=True it is"
                " replaced wherever there is room"
            )
        if remedy is Remedy.ELSEWHERE and (why := self.relocations.refusal(member)) is not None:
            raise OperationRefused(f"instance {id} is not {done}: {why}; try again later, or without elsewhere=True")
        reason = Reason(f"operator.{remedy.value}", "an operator asked for it")
        wish = Wish(slot, remedy, (reason,))
        self._admit(Proposal(Disruption(slot, Cause.OPERATOR, member.condition in SERVING), member, wish), done, now)
        self.repair.apply(wish, member, now, asked=True)
        self.save()

    def put_on_trial(self, members: Sequence[Member], now: float) -> tuple[list[Member], Reason | None]:
        """Which of these instances may be given something on trial now, and why not the others.

        They are at risk from now on, for as long as `recovery.settle` at most (`desk.disruptions.safe` ends it).
        """
        asked = {each.instance.slot: each for each in members}
        proposals = {
            slot: Proposal(
                Disruption(slot, Cause.CONFIG, each.condition in SERVING, risk=True), each, going="configure"
            )
            for slot, each in asked.items()
        }
        verdict = self._govern(proposals, now, note=False)
        until = now + self._desk.spec.recovery.settle
        for disruption in verdict.admitted:
            self._desk.disruptions.risk(disruption.slot, until)
        held = next((reason for _, reason in verdict.held), None)
        return [asked[disruption.slot] for disruption in verdict.admitted], held

    def isolate(self, id: str, isolation: Isolation, now: float) -> None:
        """Set one instance apart on an operator's word, if the governor admits it; raises like `remedy`."""
        member = self._placed(id, "isolated")
        slot = member.instance.slot
        request = Disruption(slot, Cause.OPERATOR, member.condition in SERVING)
        self._admit(Proposal(request, member, going="isolate"), "isolated", now)
        self.isolations.begin(member, isolation)
        self.repair.touch(slot)  # nobody is there any more whom a remedy could help
        self.save()

    def release(self, id: str, now: float) -> None:
        """Have an isolated instance end; raises `OperationRefused` when it is not isolated."""
        member = self._desk.view.members.get(id)
        if member is None or member.instance.isolated is None:
            raise OperationRefused(f"instance {id} cannot be released: it is not isolated; see fleet.isolated")
        self.isolations.release(member, "released", now)

    def _placed(self, id: str, done: str) -> Member:
        """An instance that can be acted upon."""
        member = self._desk.view.members.get(id)
        if member is not None and member.instance.isolated is not None:
            raise OperationRefused(f"instance {id} cannot be {done}: it is isolated; await fleet.release({id!r}) first")
        if member is None or member.condition is Condition.DRAINING or self._desk.acted_upon(id):
            raise OperationRefused(f"instance {id} cannot be {done}: it is unknown, leaving, or being acted upon")
        return member

    def _admit(self, proposal: Proposal, done: str, now: float) -> None:
        """Ask the governor, unless nothing runs there any more."""
        instance = proposal.member.instance
        if instance.phase is Phase.EXITED:
            return
        verdict = self._govern({proposal.disruption.slot: proposal}, now, note=False)
        if verdict.held:
            raise OperationRefused(f"instance {instance.id} is not {done} now: {verdict.held[0][1]}")
        self._note_admitted(proposal, verdict)

    # ------------------------------------------------------------------------------------------ the governor

    def _govern(self, proposals: Mapping[int, Proposal], now: float, *, note: bool = True) -> GovernorDecision:
        desk = self._desk
        state, counts, book = desk.wanted, desk.view.total_counts(), desk.disruptions
        self._strike_out_what_is_over()
        observed = GovernorObserved(
            desired=state.desired,
            good=counts.good,
            sick=counts.sick + counts.dead,
            under_way=len(book) + book.at_risk(now),
            known=frozenset(slot for slot in proposals if slot in book),
            asked=tuple(each.disruption for each in proposals.values()),
        )
        decision, memory = governor.decide(desk.spec.recovery, observed, state.governor, now)
        if memory != state.governor:
            desk.state = replace(state, governor=memory)
        book.end(decision.ended)
        for disruption in decision.begun:
            book.begin(disruption.slot, disruption.cause, now)
        if decision.frozen is not self.frozen:
            self.frozen = decision.frozen
            kind = "governor.frozen" if decision.frozen else "governor.thawed"
            desk.record(kind, data={"budget": decision.budget}, reasons=decision.reasons)
        if note:  # else its own caller is told
            self._note_held(proposals, decision)
        return decision

    def _strike_out_what_is_over(self) -> None:
        """Disruptions end when the slot has proved itself, when nobody will fill it, or when the fleet has enough."""
        desk, state, counts = self._desk, self._desk.wanted, self._desk.view.total_counts()
        book = desk.disruptions
        book.end(self.repair.proved)
        self.repair.proved.clear()
        if not state.rolling and counts.total >= state.desired:  # nobody will fill an empty place any more
            book.end(book.unfilled(self.sizing.is_empty))
        book.keep_newest(governor.surviving(len(book), state.desired, counts.good))

    def _note_held(self, proposals: Mapping[int, Proposal], decision: GovernorDecision) -> None:
        """Record what is withheld and why: each remedy once, and once for a whole rollout or scale-down."""
        held: dict[object, str] = {}
        for request, reason in decision.held:
            key: object = request.cause if request.surplus else request.slot
            if key not in held and self._held.get(key) != reason.code:
                each = proposals[request.slot]
                data = {"slot": request.slot, "cause": request.cause.value, "action": each.action}
                self._desk.record("governor.held", each.member.instance.id, data, (reason,))
            held[key] = reason.code
        self._held = held

    def _carry_out(self, proposal: Proposal, verdict: GovernorDecision, now: float) -> None:
        desk, disruption, instance = self._desk, proposal.disruption, proposal.member.instance
        if not disruption.surplus or disruption.serving:
            self._note_admitted(proposal, verdict)
        if proposal.wish is not None:
            self.repair.apply(proposal.wish, proposal.member, now)
            return
        if proposal.going == relocation.EXCHANGE:
            self.relocations.exchange(proposal.member, now)
            return
        if self.sizing.chooses or not disruption.surplus:
            desk.record("instance.removing", instance.id, {"slot": disruption.slot, "cause": disruption.cause.value})
        self.repair.forget(disruption.slot)
        self.sizing.remove(proposal.member, desk.drain_of(instance))

    def _note_admitted(self, proposal: Proposal, verdict: GovernorDecision) -> None:
        disruption = proposal.disruption
        data = {"slot": disruption.slot, "cause": disruption.cause.value, "action": proposal.action}
        data |= {"budget": verdict.budget, "in_flight": verdict.in_flight}
        self._desk.record("governor.admitted", proposal.member.instance.id, data)

    # ------------------------------------------------------------------------------------------ the record

    def save(self) -> None:
        """Journal the state when it changed, so that the next manager takes up here."""
        state = self._desk.state
        if state is None:
            return
        lasting, progress = state.lasting(), state.progress()
        if lasting != self._recorded:
            self._desk.record("state.fleet", data=state.to_dict())
        elif progress != self._progress:  # what changes often is written without the templates
            self._desk.record("state.progress", data=progress)
        self._recorded, self._progress = lasting, progress

    def restore(self, state: FleetState) -> None:
        """Take up an earlier manager's state."""
        self._desk.state = state
        self._recorded, self._progress = state.lasting(), state.progress()
        self.frozen = state.governor.frozen_at is not None
