"""Whether a change of a fleet's size comes about: how long it took, that it fails, that another has overtaken it.

A larger size is reached when so many instances are proven healthy, a smaller one when no more hold a place. As with a
rollout, what moves is not failing: only a span without any progress is (Kubernetes' progressDeadlineSeconds). Nothing
is done about it here: whoever decides sizes goes on, and whoever watches learns how often and how fast that works.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from agentfleet.core.reason import Reason
from agentfleet.specs import RolloutPolicy


class Outcome(StrEnum):
    """How a change of size ended."""

    REACHED = "reached"
    FAILED = "failed"
    """Nothing has moved for the rollout's progress_deadline; the size is still wanted."""
    OVERTAKEN = "overtaken"
    """Another size, or no fleet at all, is wanted now."""


@dataclass(frozen=True, slots=True)
class ResizingObserved:
    """A fleet as this needs to know it."""

    wanted: int | None
    """The size of a running fleet; None while it is stopped, being deleted, or not deployed."""
    good: int
    """Instances that are proven healthy."""
    placed: int
    """Instances that hold a place; those that are leaving hold none."""


@dataclass(frozen=True, slots=True)
class Resizing:
    """A change of size that is under way. Times are seconds."""

    before: int
    wanted: int
    began: float
    progressed: float
    best: int
    """The nearest that it has come: instances that are still missing, or still too many."""

    @property
    def direction(self) -> str:
        """Which way: "up" or "down"."""
        return "up" if self.wanted > self.before else "down"


@dataclass(frozen=True, slots=True)
class ResizingMemory:
    """What is remembered: the size that was wanted last (None: of a fleet that did not run), and what is under way."""

    wanted: int | None = None
    under_way: Resizing | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A change of size that is over."""

    resizing: Resizing
    outcome: Outcome
    seconds: float
    reason: Reason


@dataclass(frozen=True, slots=True)
class ResizingDecision:
    """What has ended, in order, and when to look again even if nothing changes."""

    ended: tuple[Ended, ...] = ()
    wake: float | None = None


def decide(
    policy: RolloutPolicy, observed: ResizingObserved, memory: ResizingMemory, now: float
) -> tuple[ResizingDecision, ResizingMemory]:
    """Follow a fleet's size.

    Args:
        policy: Its `progress_deadline` says after how many seconds without progress a change has failed.
        observed: The fleet now.
        memory: What is remembered; a new one begins without a change under way.
        now: Seconds.

    Returns:
        What has ended, each with its reason, and the memory for the next time.
    """
    ended: list[Ended] = []
    under_way, wanted = memory.under_way, observed.wanted
    if wanted != memory.wanted:
        if under_way is not None:
            ended.append(_overtaken(under_way, wanted, now))
        under_way = None
        if wanted is not None and memory.wanted is not None:
            under_way = Resizing(memory.wanted, wanted, now, now, _missing(memory.wanted, wanted, observed))
    if under_way is None:
        return ResizingDecision(tuple(ended)), ResizingMemory(wanted)
    missing = _missing(under_way.before, under_way.wanted, observed)
    if missing < under_way.best:
        under_way = replace(under_way, best=missing, progressed=now)
    over = _judge(policy, under_way, missing, now)
    if over is not None:
        return ResizingDecision((*ended, over)), ResizingMemory(wanted)
    wake = under_way.progressed + policy.progress_deadline
    return ResizingDecision(tuple(ended), wake), ResizingMemory(wanted, under_way)


def _missing(before: int, wanted: int, observed: ResizingObserved) -> int:
    """How far the fleet is from the size: 0 when it is reached."""
    return max(0, wanted - observed.good if wanted > before else observed.placed - wanted)


def _judge(policy: RolloutPolicy, change: Resizing, missing: int, now: float) -> Ended | None:
    seconds = max(0.0, now - change.began)
    numbers = {"before": change.before, "wanted": change.wanted, "seconds": round(seconds, 3)}
    if not missing:
        text = f"size {change.wanted} was reached in {seconds:.3g} s"
        return Ended(change, Outcome.REACHED, seconds, Reason("resizing.reached", text, numbers))
    if now >= change.progressed + policy.progress_deadline:
        what = "are not healthy" if change.direction == "up" else "are still there"
        text = f"{missing} instances {what}, and nothing has moved for {policy.progress_deadline:g} s"
        return Ended(change, Outcome.FAILED, seconds, Reason("resizing.failed", text, {**numbers, "missing": missing}))
    return None


def _overtaken(change: Resizing, wanted: int | None, now: float) -> Ended:
    seconds = max(0.0, now - change.began)
    what = "the fleet is not to run" if wanted is None else f"size {wanted} is wanted"
    text = f"{what} before size {change.wanted} was reached"
    numbers = {"before": change.before, "wanted": change.wanted, "seconds": round(seconds, 3)}
    return Ended(change, Outcome.OVERTAKEN, seconds, Reason("resizing.overtaken", text, numbers))
