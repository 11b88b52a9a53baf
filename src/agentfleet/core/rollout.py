"""How many instances of which revision: sizing a fleet, and rolling it to a new revision.

The arithmetic is that of Kubernetes' Deployment controller (rolling update with maxSurge and maxUnavailable,
minReadySeconds and progressDeadlineSeconds), worked on counts: one decision costs the same at any size. One either adds
or removes, never both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from agentfleet.core.reason import Reason
from agentfleet.specs import RolloutPolicy
from agentfleet.units import share_of
from agentfleet.view import Counts

CHANCE_SHARE = 0.1
"""Failures below this share of the new instances are taken for chance, however many they are."""


class RolloutPhase(StrEnum):
    """Where a rollout is."""

    PROGRESSING = "progressing"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RolloutObserved:
    """The fleet as a rollout needs to know it."""

    desired: int
    new: Counts
    """Instances of the target revision."""
    old: Counts
    """Instances of all other revisions."""
    paused: bool = False
    failures: int = 0
    """Instances of the target revision that turned sick or exited since the rollout began."""
    fallback: int | None = None
    """The last good revision, if it is another than the target and is kept."""


@dataclass(frozen=True, slots=True)
class RolloutMemory:
    """One rollout's history."""

    revision: int
    started_at: float
    progressed_at: float
    best: int | None = None
    """The furthest that the rollout has come, in steps (new ones added, new ones available, old ones gone)."""
    phase: RolloutPhase = RolloutPhase.PROGRESSING
    is_rollback: bool = False
    """A rollback is never rolled back by itself: two bad revisions must not take turns."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "revision": self.revision,
            "started_at": self.started_at,
            "progressed_at": self.progressed_at,
            "best": self.best,
            "phase": self.phase.value,
            "is_rollback": self.is_rollback,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RolloutMemory:
        """Read back `to_dict`."""
        return cls(**{**data, "phase": RolloutPhase(data["phase"])})


@dataclass(frozen=True, slots=True)
class RolloutDecision:
    """What to add or remove now, and where the rollout stands. At most one of the numbers is not zero."""

    create_new: int = 0
    create_old: int = 0
    """While paused: the size is kept with the revision that most instances have."""
    remove_new: int = 0
    remove_old_unfit: int = 0
    """Old instances to which no work is sent, so that no capacity is lost."""
    remove_old_good: int = 0
    phase: RolloutPhase = RolloutPhase.PROGRESSING
    roll_back_to: int | None = None
    reasons: tuple[Reason, ...] = ()
    wake: float | None = None
    """When to ask again if nothing changes before."""

    @property
    def changes(self) -> int:
        """How many instances would be added or removed."""
        return self.create_new + self.create_old + self.remove_new + self.remove_old_unfit + self.remove_old_good


def begin(revision: int, now: float, *, is_rollback: bool = False) -> RolloutMemory:
    """The memory of a rollout that starts now."""
    return RolloutMemory(revision, now, now, is_rollback=is_rollback)


def decide(
    policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float
) -> tuple[RolloutDecision, RolloutMemory]:
    """The next step towards `observed.desired` instances of the target revision.

    Args:
        policy: Surge, unavailability and deadlines.
        observed: Counts by revision.
        memory: This rollout's history.
        now: Seconds.

    Returns:
        The step and the memory for the next one. A rollout that has failed takes no further steps towards the new
        revision; as long as it stands failed, `roll_back_to` says where to return to, when the policy wants that and
        there is a place.
    """
    memory = _judge(policy, observed, memory, now)
    step = _step(policy, observed, memory)
    wake = None
    reasons = step.reasons
    roll_back_to = None
    if memory.phase is RolloutPhase.PROGRESSING and not observed.paused and observed.desired:
        wake = memory.progressed_at + policy.progress_deadline
    elif memory.phase is RolloutPhase.FAILED:
        if policy.auto_rollback and not memory.is_rollback:
            roll_back_to = observed.fallback
        reasons = _failure(policy, observed, memory, now)
    return replace(step, phase=memory.phase, roll_back_to=roll_back_to, reasons=reasons, wake=wake), memory


def _judge(policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float) -> RolloutMemory:
    """Complete, failed, or progressing since when. Complete and failed are final: another rollout must be begun."""
    if memory.phase is not RolloutPhase.PROGRESSING:
        return memory
    if observed.paused or not observed.desired:  # nothing can be proved: the clock of the deadline stands still
        return replace(memory, progressed_at=now, best=None)
    if observed.old.total == 0 and observed.new.available >= observed.desired:
        return replace(memory, phase=RolloutPhase.COMPLETE)
    desired, new = observed.desired, observed.new
    come = 2 * min(new.available, desired) + min(new.total, desired) - observed.old.total
    if memory.best is None or come > memory.best:
        memory = replace(memory, best=come, progressed_at=now)
    elif new.total > desired:
        memory = replace(memory, best=come)  # the fleet was made smaller: measure from what is left of it
    if observed.failures >= _tolerated(policy, observed) or now >= memory.progressed_at + policy.progress_deadline:
        return replace(memory, phase=RolloutPhase.FAILED)
    return memory


def _tolerated(policy: RolloutPolicy, observed: RolloutObserved) -> int:
    """Failures at which the rollout has failed.

    In a large fleet a few instances fail by chance while any rollout lasts, so a tenth of the new ones must.
    """
    return max(policy.max_failed, math.ceil(CHANCE_SHARE * observed.new.total))


def _failure(policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float) -> tuple[Reason, ...]:
    tolerated = _tolerated(policy, observed)
    if observed.failures >= tolerated:
        text = f"{observed.failures} new instances turned sick or exited; {tolerated} are enough to stop"
        return (Reason("rollout.failed_health", text, {"failures": observed.failures, "limit": tolerated}),)
    waited = now - memory.progressed_at
    text = f"no progress for {waited:g} s; the deadline is {policy.progress_deadline:g} s"
    return (Reason("rollout.failed_progress", text, {"waited_s": waited, "deadline_s": policy.progress_deadline}),)


def _step(policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory) -> RolloutDecision:
    desired, new, old = observed.desired, observed.new, observed.old
    if old.total == 0:
        return _resize(desired, new)
    if observed.paused or memory.phase is RolloutPhase.FAILED:
        return _hold_size(desired, new, old, paused=observed.paused)
    surge = share_of(policy.max_surge, desired, round_up=True)
    unavailable = share_of(policy.max_unavailable, desired, round_up=False)
    if surge == 0 and unavailable == 0:
        unavailable = 1  # as Kubernetes resolves two shares that both round to nothing
    total = new.total + old.total
    create = min(desired - new.total, desired + surge - total)
    if create > 0:
        text = f"add {create} of revision {memory.revision}: {new.total} of {desired} are there, surge is {surge}"
        return RolloutDecision(create_new=create, reasons=(Reason("rollout.add", text, {"create": create}),))
    if new.total > desired:
        return RolloutDecision(remove_new=new.total - desired, reasons=(_fewer(new.total - desired, desired),))
    return _retire(desired, unavailable, new, old)


def _retire(desired: int, unavailable: int, new: Counts, old: Counts) -> RolloutDecision:
    """Remove old instances as far as availability allows, those that serve nobody first.

    Instances of unknown health are left alone: they may serve, and prove nothing.
    """
    floor = desired - unavailable
    removable = new.total + old.total - floor - (new.total - new.available)
    unfit = max(0, min(_unfit(old), removable))
    if unfit:
        text = f"remove {unfit} old instances that serve nobody"
        return RolloutDecision(remove_old_unfit=unfit, reasons=(Reason("rollout.clean", text, {"remove": unfit}),))
    good = max(0, min(old.good, removable, new.available + old.good - floor))
    if good:
        text = f"remove {good} old instances: {new.available + old.good} are available, {floor} must stay"
        return RolloutDecision(remove_old_good=good, reasons=(Reason("rollout.retire", text, {"remove": good}),))
    text = f"waiting: {new.available} of {new.total} new ones are available, {floor} must stay"
    return RolloutDecision(reasons=(Reason("rollout.wait", text, {"available": new.available, "floor": floor}),))


def _resize(desired: int, new: Counts) -> RolloutDecision:
    if new.total < desired:
        create = desired - new.total
        return RolloutDecision(
            create_new=create, reasons=(Reason("size.add", f"{new.total} of {desired} are there", {"create": create}),)
        )
    if new.total > desired:
        return RolloutDecision(remove_new=new.total - desired, reasons=(_fewer(new.total - desired, desired),))
    return RolloutDecision()


def _hold_size(desired: int, new: Counts, old: Counts, *, paused: bool) -> RolloutDecision:
    """Keep the size while the mix of revisions must not change."""
    missing = desired - new.total - old.total
    why = "paused" if paused else "the rollout has failed"
    if missing > 0:
        reason = Reason("size.add", f"{why}; {missing} are missing", {"create": missing})
        # a failed revision gets no more instances; while paused the larger side grows
        if paused and new.total > old.total:
            return RolloutDecision(create_new=missing, reasons=(reason,))
        return RolloutDecision(create_old=missing, reasons=(reason,))
    if missing < 0:
        return _shrink(-missing, desired, new, old)
    return RolloutDecision(reasons=(Reason("rollout.held", why, {}),))


def _shrink(excess: int, desired: int, new: Counts, old: Counts) -> RolloutDecision:
    """Fewer of a mix that must not change: those that serve nobody first, then new ones before old."""
    reason = (_fewer(excess, desired),)
    if unfit := _unfit(new):
        return RolloutDecision(remove_new=min(excess, unfit), reasons=reason)
    if unfit := _unfit(old):
        return RolloutDecision(remove_old_unfit=min(excess, unfit), reasons=reason)
    if new.total:
        return RolloutDecision(remove_new=min(excess, new.total), reasons=reason)
    if old.good:
        return RolloutDecision(remove_old_good=min(excess, old.good), reasons=reason)
    text = f"{excess} more than the wanted {desired}, and nothing is known of their health"
    return RolloutDecision(reasons=(Reason("rollout.wait", text, {"remove": excess}),))


def _unfit(counts: Counts) -> int:
    """Those to which no work is sent."""
    return counts.dead + counts.sick + counts.pending + counts.starting


def _fewer(count: int, desired: int) -> Reason:
    return Reason("size.remove", f"{count} more than the wanted {desired}", {"remove": count})
