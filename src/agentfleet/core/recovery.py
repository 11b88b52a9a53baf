"""What to do about one sick instance: a ladder, climbed one failed attempt at a time.

restart → replace → replace elsewhere → roll back → ask a human, with back-off between attempts. The memory belongs to
the *slot*, so that a replacement inherits its predecessor's history and a slot that cannot be healed reaches a human.
Whether an action may go ahead now is the governor's business (`core.governor`), not this module's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from agentfleet.core.reason import Reason
from agentfleet.specs import RecoveryPolicy

GUILTY_SHARE = 0.5
"""Share of a revision's instances that must be sick before the revision itself is blamed and rolled back."""


class Remedy(StrEnum):
    """The rungs of the ladder."""

    RESTART = "restart"
    REPLACE = "replace"
    ELSEWHERE = "elsewhere"
    """Replace, away from the node where it fell sick."""
    ROLL_BACK = "roll_back"
    ASK = "ask"
    """Nothing automatic has helped: tell a human, and keep trying at the back-off's limit."""


class Ailment(StrEnum):
    """What is wrong with the instance in a slot."""

    NONE = "none"
    """Healthy."""
    UNPROVEN = "unproven"
    """Starting, or unknown: not a case, but not a success either."""
    SICK = "sick"
    """Runs and is unhealthy."""
    EXITED = "exited"
    LOST = "lost"
    """Its node cannot be reached."""


@dataclass(frozen=True, slots=True)
class Case:
    """One slot as recovery needs to know it."""

    ailment: Ailment
    since: float
    """When the ailment began, in seconds; while unproven, when the instance was created."""
    grace: float = 0.0
    """Seconds that starting may take."""
    late_at: float | None = None
    """While unproven: when it ought to work at last. None: it may work already, only nothing is known of it."""
    placed: bool = True
    """Whether it runs somewhere; while it waits for a place or for its image, another one would wait as well."""
    other_nodes: bool = False
    """Whether there is another node to go to."""
    revision_sick: float = 0.0
    """Share of the revision's instances that are sick or dead, 0 to 1."""
    crowd: float = 1.0
    """How many times more slots are left to a human than may be disrupted at once: they share the further attempts."""
    can_roll_back: bool = False
    """Whether an earlier good revision is kept and no rollback is under way."""


@dataclass(frozen=True, slots=True)
class RecoveryMemory:
    """One slot's history. A slot without a history needs none of it: absent means `RecoveryMemory()`."""

    attempts: int = 0
    acted_at: float | None = None
    healthy_since: float | None = None
    rolled_back: bool = False
    asked: bool = False
    healed: bool = False
    """Whether it was healthy since the last attempt."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "attempts": self.attempts,
            "acted_at": self.acted_at,
            "healthy_since": self.healthy_since,
            "rolled_back": self.rolled_back,
            "asked": self.asked,
            "healed": self.healed,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RecoveryMemory:
        """Read back `to_dict`."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class RecoveryDecision:
    """The next rung, if it is time for it."""

    remedy: Remedy | None
    reasons: tuple[Reason, ...]
    wake: float | None
    """When to ask again if nothing changes before."""


def decide(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> tuple[RecoveryDecision, RecoveryMemory]:
    """Judge one slot.

    A remedy that is returned has not happened yet: when the governor admits it and it is carried out, the caller
    takes `acted(memory, remedy, now)` as the new memory; when it is held, the memory stays and it is asked again.

    Args:
        policy: The ladder and its waiting times.
        case: What is seen in the slot.
        memory: The slot's history.
        now: Seconds.
    """
    if case.ailment is Ailment.NONE:
        return _while_healthy(policy, memory, now)
    memory = replace(memory, healthy_since=None) if memory.healthy_since is not None else memory
    if case.ailment is Ailment.UNPROVEN:
        return _while_unproven(policy, case, memory, now)
    due, why = _due(policy, case, memory)
    if now < due:
        return RecoveryDecision(None, (why,), due), memory
    remedy, reason = _rung(policy, case, memory)
    return RecoveryDecision(remedy, (reason,), None), memory


def acted(memory: RecoveryMemory, remedy: Remedy, now: float) -> RecoveryMemory:
    """The slot's history after a remedy was carried out."""
    return RecoveryMemory(
        attempts=memory.attempts + 1,
        acted_at=now,
        healthy_since=None,
        rolled_back=memory.rolled_back or remedy is Remedy.ROLL_BACK,
        asked=memory.asked or remedy is Remedy.ASK,
    )


def _while_healthy(
    policy: RecoveryPolicy, memory: RecoveryMemory, now: float
) -> tuple[RecoveryDecision, RecoveryMemory]:
    if memory == RecoveryMemory():
        return RecoveryDecision(None, (), None), memory
    since = now if memory.healthy_since is None else memory.healthy_since
    if now >= since + policy.reset_after:  # the same sum as `wake`, so that waking then finds it true
        reason = Reason("recovery.forgotten", "healthy for long enough: earlier failures are forgotten")
        return RecoveryDecision(None, (reason,), None), RecoveryMemory()
    return RecoveryDecision(None, (), since + policy.reset_after), replace(memory, healthy_since=since, healed=True)


def _while_unproven(
    policy: RecoveryPolicy, case: Case, memory: RecoveryMemory, now: float
) -> tuple[RecoveryDecision, RecoveryMemory]:
    """After an attempt, an instance that proves nothing within `settle` has not been healed by it.

    One that was healthy since was healed: if it is unknown now (the manager has restarted, say), that is no failure.
    Nor is it to start slowly; but one that is known not to work when it is late has failed like any other.
    """
    if memory.acted_at is None or memory.healed:
        until, why = case.late_at, Reason("recovery.starting", "waiting for it to begin its work")
    else:
        began = max(memory.acted_at, case.since)  # a replacement may have come long after the attempt
        until = began + max(policy.settle, case.grace, _wait(policy, case, memory))
        if not case.placed and case.late_at is not None:
            until = max(until, case.late_at)
        why = Reason("recovery.settling", "waiting for the last attempt to show", {"left_s": until - now})
    if until is None:
        return RecoveryDecision(None, (), None), memory
    if now < until:
        return RecoveryDecision(None, (why,), until), memory
    remedy, why = _rung(policy, case, memory)
    return RecoveryDecision(remedy, (why,), None), memory


def _wait(policy: RecoveryPolicy, case: Case, memory: RecoveryMemory) -> float:
    """The back-off after the last attempt; once a human was told its limit, longer the more slots are so.

    So a whole fleet that cannot be healed is tried no more often than the few instances that its budget allows.
    """
    return policy.backoff.limit * max(1.0, case.crowd) if memory.asked else policy.backoff.delay(memory.attempts)


def _due(policy: RecoveryPolicy, case: Case, memory: RecoveryMemory) -> tuple[float, Reason]:
    """When the next attempt may be made."""
    if memory.acted_at is None:
        return case.since, Reason("recovery.first", "first attempt")
    wait = _wait(policy, case, memory)
    if case.ailment is Ailment.SICK:
        wait = max(wait, policy.cooldown)  # it runs: acting again at once would only feed a restart loop
    due = memory.acted_at + wait
    numbers = {"attempts": memory.attempts, "wait_s": wait}
    return due, Reason("recovery.backoff", f"attempt {memory.attempts + 1} waits {wait:g} s after the last", numbers)


def _rung(policy: RecoveryPolicy, case: Case, memory: RecoveryMemory) -> tuple[Remedy, Reason]:
    attempts = memory.attempts
    numbers = {"attempts": attempts, "revision_sick": case.revision_sick}
    if memory.asked:
        return Remedy.REPLACE, Reason("recovery.again", "a human was told; trying again meanwhile", numbers)
    places = policy.restarts + policy.replacements + (policy.elsewhere if case.other_nodes else 0)
    if case.ailment is Ailment.LOST and attempts < places:
        remedy = Remedy.ELSEWHERE if case.other_nodes else Remedy.REPLACE
        return remedy, Reason("recovery.lost", "its node cannot be reached: a restart there is impossible", numbers)
    if not case.placed and attempts < places:
        remedy = Remedy.ELSEWHERE if case.other_nodes else Remedy.REPLACE
        return remedy, Reason("recovery.late", "it runs nowhere yet and is late: there is nothing to restart", numbers)
    if attempts < policy.restarts:
        return Remedy.RESTART, Reason("recovery.restart", f"{case.ailment.value}: restart in place", numbers)
    if attempts < policy.restarts + policy.replacements:
        return Remedy.REPLACE, Reason("recovery.replace", f"restarts have not helped ({attempts}): replace", numbers)
    if attempts < places:
        return Remedy.ELSEWHERE, Reason("recovery.elsewhere", "replacing has not helped: try another node", numbers)
    if policy.rollback and case.can_roll_back and not memory.rolled_back and case.revision_sick >= GUILTY_SHARE:
        text = f"{case.revision_sick:.0%} of the revision is sick and nothing has helped: roll back"
        return Remedy.ROLL_BACK, Reason("recovery.roll_back", text, numbers)
    return Remedy.ASK, Reason("recovery.ask", f"{attempts} attempts have not helped: a human is needed", numbers)
