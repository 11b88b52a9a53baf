"""What a `ConfigStore` is told with a document, and what it says of one that it was only asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentfleet.configspec import ConfigRollout
from agentfleet.core.documents import Change, Problem
from agentfleet.stores.config import ConfigRevision


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a publication would do.

    Attributes:
        problems: Why it would be refused; empty if it would not.
        changes: Differences from the revision that is the newest now (all added if there is none).
        against: Number of that revision; 0 if there is none.
    """

    problems: tuple[Problem, ...]
    changes: tuple[Change, ...]
    against: int

    @property
    def ok(self) -> bool:
        """Whether the document would be published."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Publication:
    """What is said with a document: who publishes it, why, and how."""

    author: str
    reason: str
    origin: str = ""
    restores: int | None = None
    rollout: ConfigRollout | None = None
    request: str = ""

    @property
    def steps(self) -> str:
        """How it is rolled out, as it is kept."""
        return "" if self.rollout is None else self.rollout.to_json()

    def told(self) -> dict[str, Any]:
        """What events tell of it."""
        data: dict[str, Any] = {"author": self.author, "reason": self.reason, "restores": self.restores}
        data |= {"origin": self.origin} if self.origin else {}
        return data | ({"rings": list(self.rollout.rings)} if self.rollout is not None else {})

    def fits(self, found: ConfigRevision) -> bool:
        """Whether a revision may have come from this very request."""
        said = (self.author, self.reason, self.restores, self.steps)
        return (found.author, found.reason, found.restores, found.rollout) == said


class Done(Exception):
    """The request has published this revision already."""

    def __init__(self, revision: ConfigRevision) -> None:
        super().__init__(revision.revision)
        self.revision = revision
