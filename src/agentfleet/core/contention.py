"""Whether two autoscalers fight over one fleet's size; if so, ours yields.

Where others can set the size of a fleet too (a Deployment's, by `kubectl scale` or a HorizontalPodAutoscaler that
nobody told us of), their word is adopted. If the autoscaler takes it back, and they theirs, and so on, instances are
started and ended for nothing. After a few such rounds ours holds still, until nobody else has set the size for a while.
Who only answers sets nothing meanwhile; the first time that they take ours back after that, it holds still again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agentfleet.core.reason import Reason

FLIPS = 3
"""Rounds within the window that are no fight yet: people try sizes out."""
WINDOW = 600.0
"""Seconds in which rounds are counted, and for which the size must have been left alone before ours goes on."""


@dataclass(frozen=True, slots=True)
class ContentionObserved:
    """What has happened to the size just now; nothing, with the defaults."""

    scaled: bool = False
    """Our autoscaler has set it."""
    rival: str | None = None
    """Who else has set it."""


@dataclass(frozen=True, slots=True)
class ContentionMemory:
    """What is remembered. Times are seconds."""

    scaled: bool = False
    """Our autoscaler has set the size since somebody else did."""
    flips: tuple[float, ...] = ()
    """When others have taken our autoscaler's size back."""
    held_until: float | None = None


@dataclass(frozen=True, slots=True)
class ContentionDecision:
    """Whether the autoscaler's sizes are withheld, and the reason when that begins or ends now."""

    held: bool
    began: Reason | None = None
    ended: Reason | None = None


def decide(
    observed: ContentionObserved, memory: ContentionMemory, now: float
) -> tuple[ContentionDecision, ContentionMemory]:
    """Judge who sets a fleet's size.

    Args:
        observed: What has happened.
        memory: What is remembered; a new one knows of no fight.
        now: Seconds.

    Returns:
        Whether our autoscaler is to hold still, and the memory for the next time.
    """
    memory = replace(memory, flips=tuple(at for at in memory.flips if at > now - WINDOW))
    if observed.scaled:
        memory = replace(memory, scaled=True)
    if observed.rival is not None:
        return _taken_back(observed.rival, memory, now)
    if memory.held_until is not None and now >= memory.held_until:
        text = f"nobody else has set the size for {WINDOW:g} s: the autoscaler goes on"
        ended = Reason("scaling.uncontested", text)
        return ContentionDecision(held=False, ended=ended), ContentionMemory(flips=(now,) * FLIPS)
    return ContentionDecision(held=memory.held_until is not None), memory


def _taken_back(rival: str, memory: ContentionMemory, now: float) -> tuple[ContentionDecision, ContentionMemory]:
    flips = (*memory.flips, now) if memory.scaled else memory.flips
    memory = replace(memory, scaled=False, flips=flips)
    if memory.held_until is not None:
        return ContentionDecision(held=True), replace(memory, held_until=now + WINDOW)
    if len(flips) <= FLIPS:
        return ContentionDecision(held=False), memory
    text = (
        f"{rival} has taken back what the autoscaler set, {len(flips)} times within {WINDOW:g} s: it holds still until"
        f" the size has been left alone for {WINDOW:g} s. Let one of the two scale this fleet: take the scaling policy"
        " away, or the other autoscaler"
    )
    reason = Reason("scaling.contested", text, {"flips": len(flips), "window_s": WINDOW})
    return ContentionDecision(held=True, began=reason), replace(memory, held_until=now + WINDOW)
