"""How many instances may have a new configuration now, and whether it has to be taken back.

The instances that are given it are on trial. A ring is as many trials as the policy says; the next ring begins when
each of them has either proved the configuration or failed, and few enough have failed. (Staged rollouts with a canary
first, as in Tang et al., "Holistic configuration management at Facebook", SOSP 2015.)

Evidence counts, silence does not: an instance that says nothing proves nothing, so it holds its ring, and it is no
failure either. Three gates stop a rollout: refusals, at once; instances that turn sick, exit or restart, and tasks that
fail, once that has stood for the policy's `confirm` and the other instances do not fare as badly, for an outage of
what all of them need looks the same on trial and off it.

Worked on counts: one decision costs the same at any size. What becomes of one instance's trial is told by `look`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from agentfleet.configspec import ConfigRollout
from agentfleet.core.reason import Reason
from agentfleet.units import share_of

ENOUGH = 0.9
"""Share of a ring with which it is still whole: instances come and go while it bakes."""
FEWEST_TASKS = 20
"""Fewer tasks than these say nothing of how many fail."""
ALIKE = 0.5
"""If the others fail at this share of the trials' rate or more, it is not the configuration."""


class ConfigPhase(StrEnum):
    """Where the rollout of a configuration is."""

    PROGRESSING = "progressing"
    COMPLETE = "complete"
    FAILED = "failed"
    """A gate has stopped it; it goes no further, and back where the policy says so."""
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"
    """Another configuration was published for all."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """How many tasks have ended, and how many of these have failed."""

    ended: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """Share of the failed ones; 0 where there are too few to tell."""
        return self.failed / self.ended if self.ended >= FEWEST_TASKS else 0.0

    def __add__(self, other: Tasks) -> Tasks:
        return Tasks(self.ended + other.ended, self.failed + other.failed)


@dataclass(frozen=True, slots=True)
class ConfigObserved:
    """The fleet as the rollout of a configuration needs to know it."""

    size: int
    """Instances that hold a place."""
    ready: int
    """Those not on trial that could be put on trial now."""
    trials: int = 0
    """Those on trial that are there."""
    proved: int = 0
    """Of these, those that have proved it."""
    spoiled: int = 0
    """And those that have failed and not proved it since; they are not waited for."""
    refused: int = 0
    """All that have ever refused it, also those that are gone."""
    failed: int = 0
    """All that have otherwise ever failed with it, likewise."""
    others: int = 0
    """Instances that are not on trial."""
    others_bad: int = 0
    """Of these, those that are sick or have exited."""
    tasks: Tasks = field(default_factory=Tasks)
    """Of those on trial, since they are."""
    others_tasks: Tasks = field(default_factory=Tasks)
    """Of the others, meanwhile."""
    hold: Reason | None = None
    """Why nothing may be tried or concluded now: the fleet is not seen, is in a storm, or is paused."""

    @property
    def tried(self) -> int:
        """All that were ever on trial and are there, or have failed before they went."""
        return max(self.trials, self.failed + self.refused)


@dataclass(frozen=True, slots=True)
class ConfigMemory:
    """One rollout's history. Times are seconds since the epoch."""

    began_at: float
    ring: int = 0
    """Number of the present ring, from 0."""
    ring_at: float = 0.0
    """When it began."""
    target: int = 0
    """How many instances it is to have; 0 before it has begun."""
    filled: bool = False
    """Whether it has once had them."""
    suspected_at: float | None = None
    """Since when a gate would stop the rollout."""
    phase: ConfigPhase = ConfigPhase.PROGRESSING
    before: Tasks = field(default_factory=Tasks)
    """What the fleet's tasks came to before."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self) | {"phase": self.phase.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConfigMemory:
        """Read back `to_dict`."""
        return cls(**{**data, "phase": ConfigPhase(data["phase"]), "before": Tasks(**data["before"])})


@dataclass(frozen=True, slots=True)
class ConfigDecision:
    """What to do now, and why."""

    phase: ConfigPhase
    release: int = 0
    """How many more instances to put on trial."""
    roll_back: bool = False
    """Whether the content from before is to be published again; said until that is done."""
    forgive: bool = False
    """Whether the failures so far were not the configuration's, so that they do not count."""
    reasons: tuple[Reason, ...] = ()
    wake: float | None = None
    """When to ask again if nothing changes before."""


def begin(now: float, before: Tasks | None = None) -> ConfigMemory:
    """The memory of a rollout that starts now; `before` is what the fleet's tasks came to until then."""
    return ConfigMemory(now, ring_at=now, before=before or Tasks())


def decide(
    policy: ConfigRollout, observed: ConfigObserved, memory: ConfigMemory, now: float
) -> tuple[ConfigDecision, ConfigMemory]:
    """The next step of a rollout.

    Args:
        policy: Rings and gates.
        observed: The fleet's counts.
        memory: This rollout's history.
        now: Seconds since the epoch.

    Returns:
        The step and the memory for the next one. Failed is final: another revision must be published.
    """
    if memory.phase is ConfigPhase.FAILED:
        return ConfigDecision(memory.phase, roll_back=policy.auto_rollback), memory
    if memory.phase is not ConfigPhase.PROGRESSING:
        return ConfigDecision(memory.phase), memory
    stopped = _refusals(policy, observed)
    if stopped is None:
        suspicion = _health(policy, observed) or _errors(policy, observed, memory)
        if suspicion is not None:
            return _suspect(policy, observed, memory, now, suspicion)
        memory = replace(memory, suspected_at=None)
        return _go_on(policy, observed, memory, now)
    return _fail(policy, memory, stopped)


# ------------------------------------------------------------------------------------------------ the gates


def limit_of(policy: ConfigRollout, tried: int) -> int:
    """Failures with which a rollout has failed, when so many have tried it: at least one, at most all."""
    return max(1, min(share_of(policy.max_failed, tried, round_up=True), tried))


def _refusals(policy: ConfigRollout, observed: ConfigObserved) -> Reason | None:
    limit = limit_of(policy, observed.tried)
    if observed.refused < limit:
        return None
    text = f"{observed.refused} of {observed.tried} instances have refused it; {limit} are enough to stop"
    return Reason("config.failed_refusals", text, {"refused": observed.refused, "limit": limit})


def _health(policy: ConfigRollout, observed: ConfigObserved) -> Reason | None:
    limit, failed = limit_of(policy, observed.tried), observed.failed + observed.refused
    if failed < limit or not observed.failed:
        return None
    text = f"{failed} of {observed.tried} instances turned sick, exited or restarted with it; {limit} are enough"
    return Reason("config.failed_health", text, {"failed": failed, "limit": limit})


def _errors(policy: ConfigRollout, observed: ConfigObserved, memory: ConfigMemory) -> Reason | None:
    share, usual = observed.tasks.share, max(memory.before.share, observed.others_tasks.share)
    if share <= usual + policy.max_errors:
        return None
    text = f"{share:.0%} of the tasks fail with it, {usual:.0%} without it; {policy.max_errors:.0%} more are allowed"
    return Reason("config.failed_errors", text, {"share": share, "usual": usual, "allowed": policy.max_errors})


def _suspect(
    policy: ConfigRollout, observed: ConfigObserved, memory: ConfigMemory, now: float, suspicion: Reason
) -> tuple[ConfigDecision, ConfigMemory]:
    """Judge only what stands for a while, and not what befalls the others as well."""
    bad, failed = observed.others_bad, observed.failed + observed.refused
    if suspicion.code == "config.failed_health" and bad * observed.tried >= ALIKE * failed * observed.others > 0:
        text = f"{bad} of {observed.others} instances without it are sick, too: it is not held against it"
        reason = Reason("config.excused", text, {"others_bad": bad, "others": observed.others})
        return ConfigDecision(memory.phase, forgive=True, reasons=(reason, suspicion)), replace(
            memory, suspected_at=None
        )
    since = now if memory.suspected_at is None else memory.suspected_at
    memory = replace(memory, suspected_at=since)
    if now < since + policy.confirm:
        text = f"looking at it for {policy.confirm:g} s before it is judged"
        waiting = Reason("config.suspected", text, {"since": since})
        return ConfigDecision(memory.phase, reasons=(waiting, suspicion), wake=since + policy.confirm), memory
    return _fail(policy, memory, suspicion)


def _fail(policy: ConfigRollout, memory: ConfigMemory, reason: Reason) -> tuple[ConfigDecision, ConfigMemory]:
    memory = replace(memory, phase=ConfigPhase.FAILED)
    return ConfigDecision(memory.phase, roll_back=policy.auto_rollback, reasons=(reason,)), memory


# ------------------------------------------------------------------------------------------------ the rings


def _go_on(
    policy: ConfigRollout, observed: ConfigObserved, memory: ConfigMemory, now: float
) -> tuple[ConfigDecision, ConfigMemory]:
    if observed.hold is not None or not observed.size:
        nobody = Reason("config.no_instances", "there is no instance that could try it")
        return ConfigDecision(memory.phase, reasons=(observed.hold or nobody,)), memory
    if not memory.target:
        memory = replace(memory, target=_target(policy, observed, memory.ring))
    goal = min(memory.target, observed.size)
    least = math.ceil(round(ENOUGH * goal, 9))
    if not memory.filled or observed.trials < least:
        missing = min(goal - observed.trials, observed.ready)
        if missing > 0:
            text = f"ring {memory.ring}: {missing} more are given it; {observed.trials} of {goal} have it"
            return ConfigDecision(
                memory.phase, release=missing, reasons=(Reason("config.release", text, {"release": missing}),)
            ), replace(memory, filled=False)
        if observed.trials < least:
            text = f"ring {memory.ring}: {observed.trials} of {goal} have it, and no other is well enough to try it"
            numbers = {"trials": observed.trials, "target": goal}
            return ConfigDecision(memory.phase, reasons=(Reason("config.short", text, numbers),)), memory
        memory = replace(memory, filled=True)
    waiting = observed.trials - observed.proved - observed.spoiled
    if waiting > 0 or not observed.proved:
        text = f"ring {memory.ring}: {observed.proved} of {observed.trials} have proved it"
        numbers = {"proved": observed.proved, "trials": observed.trials, "failed": observed.failed + observed.refused}
        return ConfigDecision(memory.phase, reasons=(Reason("config.wait", text, numbers),)), memory
    return _advance(policy, observed, memory, now)


def _target(policy: ConfigRollout, observed: ConfigObserved, ring: int) -> int:
    """Instances that a ring is to have; never fewer than have it already, as where 1 % follow upon 2 instances."""
    share = share_of(policy.rings[ring], observed.size, round_up=True)
    return max(1, min(max(share, observed.trials), observed.size))


def _advance(
    policy: ConfigRollout, observed: ConfigObserved, memory: ConfigMemory, now: float
) -> tuple[ConfigDecision, ConfigMemory]:
    numbers = {"ring": memory.ring, "proved": observed.proved, "failed": observed.failed + observed.refused}
    proved = Reason("config.proved", f"ring {memory.ring}: {observed.proved} instances have proved it", numbers)
    if memory.ring + 1 >= len(policy.rings):
        memory = replace(memory, phase=ConfigPhase.COMPLETE)
        return ConfigDecision(memory.phase, reasons=(proved,)), memory
    memory = replace(memory, ring=memory.ring + 1, ring_at=now, target=0, filled=False)
    return ConfigDecision(memory.phase, reasons=(proved,), wake=now), memory
