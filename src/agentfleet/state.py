"""What a fleet wants and remembers: the part that must outlive its manager.

One frozen value, replaced as a whole by the single writer (`fleet.Fleet`). What lasts is journaled as "state.fleet"
when it changed, what changes often as the small "state.progress", disruptions under way each by itself
(`disruptions`). A manager that starts on the same journal takes it up and goes on without a twitch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agentfleet.core.governor import GovernorMemory
from agentfleet.core.rollout import RolloutMemory, RolloutPhase, begin
from agentfleet.errors import OperationRefused
from agentfleet.specs import AgentTemplate


@dataclass(frozen=True, slots=True)
class Revision:
    """One version of the template that was or is run."""

    number: int
    template: AgentTemplate
    created_at: float
    cause: str
    """Why it exists: "deploy", "upgrade", …"""
    good: bool = False
    """Whether it was once rolled out completely."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "number": self.number,
            "template": self.template.to_dict(),
            "created_at": self.created_at,
            "cause": self.cause,
            "good": self.good,
        }


@dataclass(frozen=True, slots=True)
class FleetState:
    """Desired state and decision memories of one fleet.

    Attributes:
        replicas: Instances wanted while the fleet runs; kept through a stop.
        running: False after `stop`.
        paused: Whether the rollout is paused.
        target: Number of the revision that is wanted.
        revisions: Kept revisions, oldest first; a number is never used again.
        rollout: Memory of the present or last rollout.
        failed: Processes of the target that failed since the rollout began, each by instance and restarts.
        governor: Memory of the disruption governor's brake.
        applied_template: The template of the last applied spec, to tell what a newer spec changes.
        applied_replicas: Likewise.
        deleted: Whether the fleet is being or has been deleted.
    """

    replicas: int
    target: int
    revisions: tuple[Revision, ...]
    rollout: RolloutMemory
    applied_template: AgentTemplate
    applied_replicas: int
    running: bool = True
    paused: bool = False
    failed: tuple[str, ...] = ()
    governor: GovernorMemory = field(default_factory=GovernorMemory)
    deleted: bool = False

    @property
    def desired(self) -> int:
        """Instances wanted now."""
        return self.replicas if self.running and not self.deleted else 0

    def revision(self, number: int) -> Revision | None:
        """A kept revision."""
        return next((each for each in self.revisions if each.number == number), None)

    @property
    def template(self) -> AgentTemplate:
        """The wanted template."""
        found = self.revision(self.target)
        assert found is not None, "the target revision is always kept"
        return found.template

    @property
    def fallback(self) -> int | None:
        """The newest good revision other than the target."""
        return next(
            (each.number for each in reversed(self.revisions) if each.good and each.number != self.target), None
        )

    @property
    def failures(self) -> int:
        """How many processes of the target have failed since the rollout began."""
        return len(self.failed)

    @property
    def rolling(self) -> bool:
        """Whether a rollout is under way."""
        return self.rollout.phase is RolloutPhase.PROGRESSING

    # Each change below returns a new state; none of them acts.

    def with_revision(self, template: AgentTemplate, cause: str, now: float, keep: int) -> FleetState:
        """Begin a rollout to a new revision; a paused fleet stays paused."""
        number = self.revisions[-1].number + 1
        kept = _trim((*self.revisions, Revision(number, template, now, cause)), number, keep)
        return replace(self, target=number, revisions=kept, rollout=begin(number, now), failed=())

    def tried_again(self, now: float) -> FleetState:
        """Begin a failed rollout anew, because somebody asked for it."""
        if self.rollout.phase is not RolloutPhase.FAILED:
            return self
        return replace(self, rollout=begin(self.target, now), failed=())

    def with_target(self, number: int, now: float) -> FleetState:
        """Begin a rollback to a kept revision.

        Raises:
            OperationRefused: The revision is not kept.
        """
        if self.revision(number) is None:
            kept = ", ".join(str(each.number) for each in self.revisions)
            raise OperationRefused(f"revision {number} is not kept; kept are {kept}")
        return replace(self, target=number, rollout=begin(number, now, is_rollback=True), failed=(), paused=False)

    def with_failure(self, process: str) -> FleetState:
        """Note that a process of the target has failed; one that is known to have failed counts no more."""
        return self if process in self.failed else replace(self, failed=(*self.failed, process))

    def with_good_target(self) -> FleetState:
        """Note that the target has been rolled out completely."""
        return self._with_target_marked(good=True)

    def with_bad_target(self) -> FleetState:
        """Note that the target does not work after all, so that nothing falls back to it by itself."""
        return self._with_target_marked(good=False)

    def _with_target_marked(self, *, good: bool) -> FleetState:
        if all(each.good is good for each in self.revisions if each.number == self.target):
            return self
        marked = (replace(each, good=good) if each.number == self.target else each for each in self.revisions)
        return replace(self, revisions=tuple(marked))

    def taken_over(self, now: float) -> FleetState:
        """The state as a new manager takes it up: while nobody managed it, its rollout's deadline stood still."""
        rollout = replace(self.rollout, progressed_at=now, best=None) if self.rolling else self.rollout
        return replace(self, rollout=rollout)

    def lasting(self) -> FleetState:
        """The state without what changes from turn to turn: to tell whether it must be written anew."""
        still = replace(self.rollout, progressed_at=0.0, best=None)
        return replace(self, rollout=still, failed=(), governor=GovernorMemory())

    def progress(self) -> dict[str, Any]:
        """What changes often and must outlive the manager all the same."""
        return {"failed": self.failed, "governor": self.governor.to_dict()}

    def with_progress(self, data: Mapping[str, Any]) -> FleetState:
        """Take back a `progress` that is newer than the rest."""
        return replace(self, failed=tuple(data["failed"]), governor=GovernorMemory.from_dict(data["governor"]))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "replicas": self.replicas,
            "target": self.target,
            "revisions": [each.to_dict() for each in self.revisions],
            "rollout": self.rollout.to_dict(),
            "applied_template": self.applied_template.to_dict(),
            "applied_replicas": self.applied_replicas,
            "running": self.running,
            "paused": self.paused,
            "failed": self.failed,
            "governor": self.governor.to_dict(),
            "deleted": self.deleted,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FleetState:
        """Read back `to_dict`."""
        revisions = tuple(
            Revision(**{**each, "template": AgentTemplate.parse(each["template"], source="the journaled template")})
            for each in data["revisions"]
        )
        return cls(
            **{
                **data,
                "revisions": revisions,
                "failed": tuple(data["failed"]),
                "rollout": RolloutMemory.from_dict(data["rollout"]),
                "applied_template": AgentTemplate.parse(data["applied_template"], source="the journaled template"),
                "governor": GovernorMemory.from_dict(data["governor"]),
            }
        )


def first_state(template: AgentTemplate, replicas: int, now: float, number: int = 1) -> FleetState:
    """The state of a fleet that is deployed for the first time, or for the first time since it was deleted."""
    return FleetState(
        replicas=replicas,
        target=number,
        revisions=(Revision(number, template, now, "deploy"),),
        rollout=begin(number, now),
        applied_template=template,
        applied_replicas=replicas,
    )


def _trim(revisions: tuple[Revision, ...], target: int, keep: int) -> tuple[Revision, ...]:
    """Keep the target, the newest good one, and the newest `keep` others."""
    good = next((each.number for each in reversed(revisions) if each.good), None)
    newest = {each.number for each in revisions[-(keep + 1) :]}
    return tuple(each for each in revisions if each.number in newest or each.number in (target, good))
