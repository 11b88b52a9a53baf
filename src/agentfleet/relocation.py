"""Replacing instances away from their nodes where the engine places instances by itself: first the successor.

The engine is asked for a stand-in, which is no member of the fleet. When it is ready the two are exchanged, so that the
fleet is never short of one. A stand-in that finds no node, or does not become ready, is given up. Nothing of this is
kept for the next manager: a stand-in that the engine shows and that nobody waits for is ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from agentfleet.core.governor import Cause, Disruption
from agentfleet.core.reason import Reason
from agentfleet.core.rollout import RolloutPhase
from agentfleet.desk import Desk, Proposal
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded, InstanceGone, NotLeader
from agentfleet.instances import Instance, Phase
from agentfleet.sizing import Sizing
from agentfleet.view import GOOD, SERVING, Condition, Member

EXCHANGE = "exchange"
"""`Proposal.going` of an instance whose stand-in is ready."""
ACTIONS = ("stand_in", EXCHANGE, "discard")
"""The actuator's actions whose ends are to be told to `Relocations`."""
UNPLACED = 10.0
"""Seconds for which the engine may say of a stand-in that no node takes it."""
_AGAIN = 30.0
"""Seconds after which a stand-in that was ended and is still there is ended once more: its node may be lost."""

_ENDED = (Phase.EXITED, Phase.LOST)
_UNREACHED = (BackendUnavailable, Conflict, DeadlineExceeded, NotLeader)


@dataclass(slots=True)
class _Move:
    """One instance that is to be replaced elsewhere."""

    slot: int
    revision: int
    node: str
    grace: float
    since: float
    asked: bool
    """By an operator, who does not want it ended if there is no other node for it."""
    stand_in: str | None = None
    exchanging: bool = False
    unplaced_since: float | None = None


class Remedies(Protocol):
    """What recovery does when it does not come to an exchange."""

    def replace(self, member: Member, grace: float) -> None:
        """Replace an instance wherever there is room; `grace` is seconds for its drain."""
        ...

    def undisturbed(self, slot: int) -> None:
        """Nothing was done to the instance in a slot: the disruption is over."""
        ...

    def not_reached(self, slot: int) -> None:
        """The attempt says nothing about it, and does not count."""
        ...


class Relocations:
    """One fleet's instances that are being replaced elsewhere, and their stand-ins.

    Args:
        desk: The fleet's working place.
        sizing: Keeps the slot for the stand-in.
        remedies: Told what became of the attempt.
    """

    def __init__(self, desk: Desk, sizing: Sizing, remedies: Remedies) -> None:
        self._desk = desk
        self._sizing = sizing
        self._remedies = remedies
        self._moves: dict[str, _Move] = {}
        self._stand_ins: dict[str, Instance] = {}
        self._taken: set[str] = set()
        """Stand-ins that have taken their places, and that the engine does not show so yet."""
        self._discarded: dict[str, float] = {}
        """When the engine was told to end a stand-in."""
        self._failures = 0
        self._retry_at = 0.0

    def begin(self, member: Member, grace: float, now: float, *, asked: bool) -> bool:
        """Have an instance replaced away from its node.

        Args:
            member: Which.
            grace: Seconds for its drain.
            now: Seconds.
            asked: Whether an operator asked for just that.

        Returns:
            Whether that is under way; False where a stand-in is of no use, or there are enough of them.
        """
        desk, instance = self._desk, member.instance
        if not desk.relocates or instance.node is None:
            return False
        move = _Move(instance.slot, instance.revision, instance.node, grace, now, asked)
        why = self._pointless(member, move.revision)
        if why is not None:
            text = f"no stand-in is made, for {why}"
            self._note("elsewhere.failed", instance.id, move, Reason("elsewhere.pointless", text), then="replaced")
            return False
        if not asked and len(self._moves) >= max(1, desk.spec.recovery.budget(desk.wanted.desired)):
            text = "as many stand-ins as instances may be disrupted at once are awaited already"
            self._note("elsewhere.failed", instance.id, move, Reason("elsewhere.crowded", text), then="replaced")
            return False
        self._moves[instance.id] = move
        desk.moving.add(instance.id)
        desk.actuator.stand_in(instance.id, away_from=move.node)
        return True

    # ------------------------------------------------------------------------------------------ what comes in

    def seen(self, stand_in: Instance) -> None:
        """The engine shows a stand-in."""
        self._stand_ins[stand_in.id] = stand_in

    def joined(self, id: str) -> None:
        """An instance is a member; it may have been a stand-in."""
        self._stand_ins.pop(id, None)
        self._taken.discard(id)
        self._discarded.pop(id, None)

    def gone(self, id: str) -> None:
        """An instance or stand-in does not exist any more."""
        self.joined(id)
        self._sizing.unreserve(id)

    def keep_only(self, present: set[str]) -> None:
        """The engine has shown all there is."""
        for id in self._stand_ins.keys() - present:
            self.gone(id)

    def accepted(self, action: str, id: str) -> None:
        """The engine took what it was told."""
        if action == "discard":
            self._failures = 0
        elif action == EXCHANGE and id in self._moves:
            move = self._end(id)
            if move.stand_in in self._stand_ins:
                self._taken.add(move.stand_in)

    def failed(self, action: str, id: str, error: Exception, now: float) -> None:
        """It did not."""
        if action == "discard":
            self._discarded.pop(id, None)
            self._failures += 1
            self._retry_at = now + self._desk.spec.recovery.backoff.delay(self._failures)
        elif id not in self._moves:
            return  # it was called off meanwhile
        elif action == EXCHANGE:
            self._not_exchanged(id, counts=not isinstance(error, _UNREACHED))
        elif isinstance(error, InstanceGone) and id not in self._desk.view.members:
            self._call_off(id, "it is gone")
        elif isinstance(error, _UNREACHED):
            self._spare(self._end(id))
        else:
            self._give_up(id, Reason("elsewhere.refused", f"the engine makes no stand-in: {error}"))

    def _not_exchanged(self, id: str, *, counts: bool) -> None:
        """The instance stays, if it still can; the stand-in may have taken its slot nevertheless."""
        desk, move = self._desk, self._end(id)
        if move.stand_in is not None:
            self._sizing.unreserve(move.stand_in)
        member = desk.view.members.get(id)
        if member is not None and desk.view.holder(move.slot) is not None:
            desk.view.put(replace(member.instance, slot=self._sizing.place(id)))
        desk.view.keep(id)
        self._spare(move, counts=counts)

    # ------------------------------------------------------------------------------------------ the turn

    def proposals(self) -> Iterator[Proposal]:
        """Those that serve and could be exchanged now: the governor may have admitted others since they were begun."""
        for id, move in self._moves.items():
            member = self._desk.view.members.get(id)
            if member is None or member.condition not in SERVING or self._ready(id, move) is None:
                continue
            if self._pointless(member, move.revision) is None and not _recovered(member, move):
                cause = Cause.OPERATOR if move.asked else Cause.RECOVERY
                yield Proposal(Disruption(move.slot, cause, serving=True), member, going=EXCHANGE)

    def exchange(self, member: Member, now: float) -> None:
        """Have the stand-in take the place of an instance."""
        desk, id = self._desk, member.instance.id
        move = self._moves[id]
        stand_in = self._ready(id, move)
        assert stand_in is not None, "it was ready when that was decided"
        move.stand_in, move.exchanging = stand_in.id, True
        more = {"by": stand_in.id, "to": stand_in.node, "seconds": round(now - move.since, 3)}
        desk.record("elsewhere.ready", id, {"slot": move.slot, "node": move.node, **more})
        desk.disruptions.emptied(move.slot)
        self._sizing.reserve(move.slot, stand_in.id)
        desk.view.drain(id)
        desk.actuator.exchange(id, stand_in.id, grace=move.grace)

    def step(self, now: float) -> float | None:
        """Look at all that wait for their stand-ins, and end the stand-ins that nobody waits for.

        Returns:
            When there is something to do even if nothing changes; None if never.
        """
        dates = [self._look(id, move, now) for id, move in tuple(self._moves.items()) if not move.exchanging]
        dates.append(self._discard(now))
        return min((date for date in dates if date is not None), default=None)

    def _look(self, id: str, move: _Move, now: float) -> float | None:
        member = self._desk.view.members.get(id)
        why = self._pointless(member, move.revision)
        if member is None or why is not None:
            self._call_off(id, why or "it is gone")
            return None
        if id in self._desk.actuator.busy:
            return None
        if _recovered(member, move):
            self._call_off(id, "it has recovered by itself")
            return None
        stand_in = self._find(id, move)
        if stand_in is not None and move.stand_in is None:
            move.stand_in = stand_in.id
        if self._ready(id, move) is None:
            return self._wait(id, move, stand_in, now)
        if member.condition in SERVING:
            return self._hold(id, move, now)
        self.exchange(member, now)
        return None

    def _hold(self, id: str, move: _Move, now: float) -> float | None:
        """Wait until the governor admits the exchange, but not for ever: nothing else is done to either meanwhile."""
        until: float = move.since + 2 * self._desk.spec.rollout.progress_deadline
        if now < until:
            return until
        text = "its stand-in is ready, and the governor has held the exchange for too long"
        self._give_up(id, Reason("elsewhere.held", text, {"seconds": now - move.since}))
        return None

    def _wait(self, id: str, move: _Move, stand_in: Instance | None, now: float) -> float | None:
        """Wait on for a stand-in, or give it up."""
        late: float = move.since + self._desk.spec.rollout.progress_deadline
        trouble = None if stand_in is None else stand_in.trouble
        if stand_in is None or stand_in.node is not None or trouble is None:
            move.unplaced_since = None
        elif move.unplaced_since is None:
            move.unplaced_since = now
        hopeless = late if move.unplaced_since is None else move.unplaced_since + UNPLACED
        why = _broken(move, stand_in)
        if why is None and now >= late:
            text = "no stand-in was ready by the rollout's progress_deadline"
            text += "" if trouble is None else f": {trouble}"
            why = Reason("elsewhere.late", text, {"seconds": now - move.since})
        elif why is None and now >= hopeless:
            why = Reason("elsewhere.unplaced", f"no other node takes a stand-in: {trouble}")
        if why is None:
            return min(late, hopeless)
        self._give_up(id, why)
        return None

    def _discard(self, now: float) -> float | None:
        """End the stand-ins that nobody waits for."""
        wanted = {id: move.stand_in for id, move in self._moves.items()}
        dates: list[float] = []
        for id, each in self._stand_ins.items():
            instance = each.stands_in_for or ""
            awaited = instance in wanted and wanted[instance] in (None, id)
            if awaited or id in self._taken or each.phase is Phase.DRAINING or id in self._desk.actuator.busy:
                continue
            due = max(self._retry_at, self._discarded.get(id, -math.inf) + _AGAIN)
            if now < due:
                dates.append(due)
            else:
                self._discarded[id] = now
                self._desk.actuator.discard(id)
        return min(dates, default=None)

    # ------------------------------------------------------------------------------------------ one of them

    def _find(self, id: str, move: _Move) -> Instance | None:
        """The stand-in that is awaited, once it is seen; of several one that runs, and none that is being ended."""
        if move.stand_in is not None:
            return self._stand_ins.get(move.stand_in)
        own = (each for each in self._stand_ins.values() if each.stands_in_for == id and each.id not in self._discarded)
        found = [each for each in own if each.phase is not Phase.DRAINING]
        return min(found, key=lambda each: each.phase in _ENDED, default=None)

    def _ready(self, id: str, move: _Move) -> Instance | None:
        """The stand-in, if the two can be exchanged now."""
        if move.exchanging or id in self._desk.actuator.busy:
            return None
        found = self._find(id, move)
        return found if found is not None and found.ready and found.phase is Phase.RUNNING else None

    def refusal(self, member: Member) -> str | None:
        """Why an operator cannot have an instance replaced elsewhere now; None if it can be tried."""
        if not self._desk.relocates:
            return None
        return (
            "it is on no node yet"
            if member.instance.node is None
            else self._pointless(member, member.instance.revision)
        )

    def _pointless(self, member: Member | None, revision: int) -> str | None:
        """Why a stand-in is not wanted, whatever becomes of it."""
        state = self._desk.wanted
        if state.deleted or not state.running:
            return "the fleet is stopped"
        if member is None or member.condition in (Condition.DRAINING, Condition.ISOLATED):
            return "it leaves the fleet"
        held = state.paused or state.rollout.phase is RolloutPhase.FAILED
        return None if revision == state.target or held else "another revision is wanted"

    def _end(self, id: str) -> _Move:
        self._desk.moving.discard(id)
        return self._moves.pop(id)

    def _call_off(self, id: str, why: str) -> None:
        """There is nothing to be replaced any more."""
        move = self._end(id)
        self._note(
            "elsewhere.called_off", id, move, Reason("elsewhere.pointless", f"its stand-in is not wanted: {why}")
        )
        self._spare(move)

    def _give_up(self, id: str, why: Reason) -> None:
        """There is no stand-in to be had: recovery goes on without, an operator is told."""
        move, member = self._end(id), self._desk.view.members.get(id)
        stays = move.asked or member is None or member.condition in SERVING
        self._note("elsewhere.failed", id, move, why, then="kept" if stays else "replaced")
        if stays or member is None:
            self._spare(move)
        else:
            self._remedies.replace(member, move.grace)

    def _spare(self, move: _Move, *, counts: bool = False) -> None:
        self._remedies.undisturbed(move.slot)
        if not counts:
            self._remedies.not_reached(move.slot)

    def _note(self, kind: str, id: str, move: _Move, why: Reason, **more: str) -> None:
        self._desk.record(kind, id, {"slot": move.slot, "node": move.node, **more}, (why,))


def _recovered(member: Member, move: _Move) -> bool:
    """Whether it has become well by itself, where it was to be repaired."""
    return not move.asked and member.condition in GOOD


def _broken(move: _Move, stand_in: Instance | None) -> Reason | None:
    """Why nothing can come of a stand-in any more."""
    if move.stand_in is not None and (stand_in is None or stand_in.phase is Phase.DRAINING):
        return Reason("elsewhere.removed", f"somebody has ended the stand-in {move.stand_in}")
    if stand_in is not None and stand_in.phase in _ENDED:
        return Reason("elsewhere.broken", f"the stand-in on {stand_in.node} is {stand_in.phase.value}")
    return None
