"""The disruption governor: one brake in front of every action that takes a running instance out of service.

Recovery, rollouts and scale-downs all ask here. Three rules, each stated where it is enforced:

- *Budget.* At any instant at most `policy.budget(desired)` instances are out of service by our own doing. A disruption
  is over when its slot is good again, or when the fleet is not short of that many instances any more. The caller keeps
  the book of disruptions under way (`agentfleet.disruptions`) and tells their number, so that a decision costs what is
  asked and not what is under way.
- *Floor.* An instance that serves is only taken when the good ones left are at least `desired - budget` (a
  PodDisruptionBudget's rule), unless it is surplus: then the fleet has enough without it.
- *Storm.* When more instances are sick than the healthy share allows, the cause is not in the instances: disruption
  freezes for a cool-down, and then goes on one at a time until the share recovers. (The storm modes of node-health
  operators, and Envoy's panic threshold, are the models.)

Creating instances and starting dead ones disrupts nobody and is never held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agentfleet.core.reason import Reason
from agentfleet.specs import RecoveryPolicy

STORM_MINIMUM = 3
"""Fewer sick instances than this are never a storm: in a fleet of two, one sick is half of it."""


class Cause(StrEnum):
    """Who asks for a disruption, in the order in which they are served."""

    OPERATOR = "operator"
    RECOVERY = "recovery"
    ROLLOUT = "rollout"
    SCALING = "scaling"
    CONFIG = "config"


_RANK = {cause: rank for rank, cause in enumerate(Cause)}


@dataclass(frozen=True, slots=True)
class Disruption:
    """A request to take one running instance out of service."""

    slot: int
    cause: Cause
    serving: bool
    """Whether work is sent to it now, so that taking it costs capacity."""
    surplus: bool = False
    """Whether nobody will fill its place: a scale-down, or an old revision that is being retired."""
    risk: bool = False
    """Whether it stays in service and may only fall out of it, as one that is given a configuration on trial: it counts
    for as long as the caller counts it as under way, and enters no book."""


@dataclass(frozen=True, slots=True)
class GovernorObserved:
    """The fleet as the governor needs to know it."""

    desired: int
    good: int
    """Proven healthy and not leaving."""
    sick: int
    """Unhealthy or dead."""
    under_way: int = 0
    """Disruptions in the book, but for those that are over (see `surviving`), and instances at risk."""
    known: frozenset[int] = frozenset()
    """Which of the asked slots are in the book: disrupting them again costs nothing more."""
    asked: tuple[Disruption, ...] = ()


@dataclass(frozen=True, slots=True)
class GovernorMemory:
    """What outlives a decision: the state of the brake."""

    frozen_at: float | None = None
    calm_since: float | None = None
    """While frozen: since when the healthy share has been sufficient."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"frozen_at": self.frozen_at, "calm_since": self.calm_since}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GovernorMemory:
        """Read back `to_dict`."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class GovernorDecision:
    """Which requests may go ahead now, and why the others may not."""

    admitted: tuple[Disruption, ...]
    held: tuple[tuple[Disruption, Reason], ...]
    budget: int
    in_flight: int
    """Disruptions under way after this decision, the admitted ones included."""
    begun: tuple[Disruption, ...]
    """Those of the admitted that enter the book."""
    ended: tuple[int, ...]
    """Slots that leave the book, because nobody will fill them any more."""
    frozen: bool
    reasons: tuple[Reason, ...]
    wake: float | None
    """When to ask again if nothing changes before."""


def decide(
    policy: RecoveryPolicy, observed: GovernorObserved, memory: GovernorMemory, now: float
) -> tuple[GovernorDecision, GovernorMemory]:
    """Admit or hold each asked disruption.

    Args:
        policy: `max_disrupted`, `freeze_below` and `cooldown` are used.
        observed: The fleet's counts and the requests.
        memory: From the last decision.
        now: Seconds.

    Returns:
        The decision and the memory for the next one. Requests are served in the order of their causes, then as given.
    """
    budget = policy.budget(observed.desired)
    frozen_at, calm_since, brake = _brake(policy, observed, memory, now)
    thawing = 1 if frozen_at is not None and now >= frozen_at + policy.cooldown else 0
    limit = budget if frozen_at is None else min(budget, thawing)

    good, floor = observed.good, observed.desired - budget
    admitted: list[Disruption] = []
    held: list[tuple[Disruption, Reason]] = []
    begun: dict[int, Disruption] = {}
    risks: set[int] = set()
    ended: set[int] = set()
    for request in sorted(observed.asked, key=lambda item: _RANK[item.cause]):
        slot = request.slot
        refusal = _unshrinkable(request, frozen_at)
        if refusal is None and request.surplus and (not request.serving or good > observed.desired):
            ended.add(slot)  # nobody waits for it any more
        elif refusal is None:
            known = slot in observed.known or slot in begun
            allowed = budget if request.cause is Cause.OPERATOR else limit
            under_way = observed.under_way + len(begun) + len(risks)
            refusal = None if known else _over_budget(request, under_way, allowed, frozen_at)
            refusal = refusal or _below_floor(request, good, floor)
            if refusal is None and request.risk:
                risks.add(slot)
            elif refusal is None and not known:
                begun[slot] = request
        if refusal is not None:
            held.append((request, refusal))
            continue
        admitted.append(request)
        good -= request.serving
    decision = GovernorDecision(
        admitted=tuple(admitted),
        held=tuple(held),
        begun=tuple(request for slot, request in begun.items() if slot not in ended),
        ended=tuple(sorted(ended)),
        budget=budget,
        in_flight=observed.under_way - len(ended & observed.known) + len(begun.keys() - ended) + len(risks),
        frozen=frozen_at is not None,
        reasons=brake,
        wake=_wake(policy, frozen_at, calm_since, now),
    )
    return decision, GovernorMemory(frozen_at, calm_since)


def surviving(under_way: int, desired: int, good: int) -> int:
    """How many of the disruptions under way can still be: the fleet is short of so many; older ones are over.

    Args:
        under_way: Disruptions in the book, without the slots that have proved themselves since, for good or ill.
        desired: Instances wanted.
        good: Instances proven healthy and not leaving.
    """
    return min(under_way, max(0, desired - good))


def _brake(
    policy: RecoveryPolicy, observed: GovernorObserved, memory: GovernorMemory, now: float
) -> tuple[float | None, float | None, tuple[Reason, ...]]:
    """Whether disruption is frozen: (frozen since, calm since, why)."""
    size = max(observed.desired, observed.good + observed.sick, 1)
    share = (size - observed.sick) / size  # one rounding: a share of exactly freeze_below is no storm
    storm = observed.sick >= STORM_MINIMUM and share < policy.freeze_below
    numbers = {"sick": observed.sick, "size": size, "healthy_share": share, "freeze_below": policy.freeze_below}
    if storm:
        frozen_at = now if memory.frozen_at is None else memory.frozen_at
        text = f"{observed.sick} of {size} are sick: disruption is frozen until the healthy share recovers"
        return frozen_at, None, (Reason("governor.frozen", text, numbers),)
    if memory.frozen_at is None:
        return None, None, ()
    calm_since = now if memory.calm_since is None else memory.calm_since
    if now >= calm_since + policy.cooldown:  # the same sum as `wake`, so that waking then finds it true
        return None, None, (Reason("governor.thawed", "the healthy share has held for the cool-down", numbers),)
    text = "the healthy share has recovered; waiting for the cool-down"
    return memory.frozen_at, calm_since, (Reason("governor.cooling", text, numbers),)


def _unshrinkable(request: Disruption, frozen_at: float | None) -> Reason | None:
    """Surplus costs no capacity, but a fleet in a storm is not shrunk by a machine."""
    if frozen_at is not None and request.surplus and request.cause is Cause.SCALING:
        return Reason("governor.frozen", "no scale-down while the fleet is in a storm")
    return None


def _over_budget(request: Disruption, under_way: int, limit: int, frozen_at: float | None) -> Reason | None:
    if under_way < limit:
        return None
    if frozen_at is not None and request.cause is not Cause.OPERATOR:
        return Reason("governor.frozen", "disruption is frozen by a storm", {"in_flight": under_way, "limit": limit})
    text = f"{under_way} of {limit} allowed disruptions are under way"
    return Reason("governor.budget", text, {"in_flight": under_way, "limit": limit})


def _below_floor(request: Disruption, good: int, floor: int) -> Reason | None:
    if request.serving and good - 1 < floor:
        return Reason("governor.floor", f"{good} are good and {floor} must stay", {"good": good, "floor": floor})
    return None


def _wake(policy: RecoveryPolicy, frozen_at: float | None, calm_since: float | None, now: float) -> float | None:
    if frozen_at is None:
        return None
    dates = [frozen_at + policy.cooldown]
    if calm_since is not None:
        dates.append(calm_since + policy.cooldown)
    ahead = [date for date in dates if date > now]
    return min(ahead) if ahead else None
