"""The disruption governor: one brake in front of every action that takes a running instance out of service.

Recovery, rollouts and scale-downs all ask here. Three rules, each stated where it is enforced:

- *Budget.* At any instant at most `policy.budget(desired)` instances are out of service by our own doing. A disruption
  is over when its slot is good again, or when the fleet is not short of that many instances any more.
- *Floor.* An instance that serves is only taken when the good ones left are at least `desired - budget` (a
  PodDisruptionBudget's rule), unless it is surplus: then the fleet has enough without it.
- *Storm.* When more instances are sick than the healthy share allows, the cause is not in the instances: disruption
  freezes for a cool-down, and then goes on one at a time until the share recovers. (The storm modes of node-health
  operators, and Envoy's panic threshold, are the models.)

Creating instances and starting dead ones disrupts nobody and is never held.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class GovernorObserved:
    """The fleet as the governor needs to know it."""

    desired: int
    good: int
    """Proven healthy and not leaving."""
    sick: int
    """Unhealthy or dead."""
    restored: tuple[int, ...] = ()
    """Slots that have proved themselves since the last decision: good, or sick again of their own."""
    asked: tuple[Disruption, ...] = ()


@dataclass(frozen=True, slots=True)
class InFlight:
    """A disruption that is not over."""

    slot: int
    cause: Cause
    since: float


@dataclass(frozen=True, slots=True)
class GovernorMemory:
    """What outlives a decision: the disruptions under way and the state of the brake."""

    in_flight: tuple[InFlight, ...] = ()
    frozen_at: float | None = None
    calm_since: float | None = None
    """While frozen: since when the healthy share has been sufficient."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "in_flight": [[item.slot, item.cause.value, item.since] for item in self.in_flight],
            "frozen_at": self.frozen_at,
            "calm_since": self.calm_since,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GovernorMemory:
        """Read back `to_dict`."""
        in_flight = tuple(InFlight(slot, Cause(cause), since) for slot, cause, since in data["in_flight"])
        return cls(in_flight, data["frozen_at"], data["calm_since"])


@dataclass(frozen=True, slots=True)
class GovernorDecision:
    """Which requests may go ahead now, and why the others may not."""

    admitted: tuple[Disruption, ...]
    held: tuple[tuple[Disruption, Reason], ...]
    budget: int
    in_flight: int
    """Disruptions under way, the admitted ones included."""
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
    under_way = _still_under_way(memory.in_flight, observed)
    frozen_at, calm_since, brake = _brake(policy, observed, memory, now)
    thawing = 1 if frozen_at is not None and now >= frozen_at + policy.cooldown else 0
    limit = budget if frozen_at is None else min(budget, thawing)

    slots = {item.slot for item in under_way}
    good, floor = observed.good, observed.desired - budget
    admitted: list[Disruption] = []
    held: list[tuple[Disruption, Reason]] = []
    gone: set[int] = set()
    for request in sorted(observed.asked, key=lambda item: _RANK[item.cause]):
        allowed = budget if request.cause is Cause.OPERATOR else limit
        refusal = _unshrinkable(request, frozen_at)
        if refusal is None and request.surplus and (not request.serving or good > observed.desired):
            gone.add(request.slot)  # nobody waits for it any more
        elif refusal is None:
            refusal = _over_budget(request, slots, allowed, frozen_at) or _below_floor(request, good, floor)
            if refusal is None and request.slot not in slots:
                slots.add(request.slot)
                under_way.append(InFlight(request.slot, request.cause, now))
        if refusal is not None:
            held.append((request, refusal))
            continue
        admitted.append(request)
        good -= request.serving
    in_flight = tuple(item for item in under_way if item.slot not in gone)
    decision = GovernorDecision(
        admitted=tuple(admitted),
        held=tuple(held),
        budget=budget,
        in_flight=len(in_flight),
        frozen=frozen_at is not None,
        reasons=brake,
        wake=_wake(policy, frozen_at, calm_since, now),
    )
    return decision, GovernorMemory(in_flight, frozen_at, calm_since)


def _still_under_way(in_flight: Sequence[InFlight], observed: GovernorObserved) -> list[InFlight]:
    """Drop what is over: restored slots, and the oldest beyond what the fleet is short of."""
    restored = set(observed.restored)
    left = [item for item in in_flight if item.slot not in restored]
    short = max(0, observed.desired - observed.good)
    return left[len(left) - short :] if len(left) > short else left


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


def _over_budget(request: Disruption, slots: set[int], limit: int, frozen_at: float | None) -> Reason | None:
    """A slot that is already out of service costs nothing more."""
    if request.slot in slots or len(slots) < limit:
        return None
    if frozen_at is not None and request.cause is not Cause.OPERATOR:
        return Reason("governor.frozen", "disruption is frozen by a storm", {"in_flight": len(slots), "limit": limit})
    text = f"{len(slots)} of {limit} allowed disruptions are under way"
    return Reason("governor.budget", text, {"in_flight": len(slots), "limit": limit})


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
