"""Configuration documents over REST: what is asked, and what is answered."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from agentfleet.configpublish import DryRun
from agentfleet.configspec import ConfigRollout
from agentfleet.configstatus import ConfigStatus, RingStatus
from agentfleet.core.documents import Change
from agentfleet.rest.base import Answer, Cursor, FieldError, date_of
from agentfleet.rest.clusters import AT_ONCE
from agentfleet.specbase import Spec
from agentfleet.stores.config import ConfigRevision

Reason = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"\S")]
Number = Annotated[int, Field(ge=0, le=2**53)]


class PublishRequest(Spec):
    """A document that is to be the newest."""

    model_config = AT_ONCE

    document: dict[str, Any]
    """Any JSON object. Secrets are named, never written: {"$secret": "name"}."""
    reason: Reason
    """Why, for those who read the history."""
    expect: Number | None = None
    """The revision that it is based on, 0 for none; as If-Match says it, too. null publishes whatever came before."""
    rollout: ConfigRollout | None = None
    """In which rings it reaches the agents, and what stops it and takes it back; null is to all at once."""


class RestoreRequest(Spec):
    """An earlier revision whose content is to be published again."""

    model_config = AT_ONCE

    revision: Annotated[int, Field(ge=1, le=2**53)]
    reason: Reason
    expect: Number | None = None


class CheckRequest(Spec):
    """A document that is only to be checked."""

    model_config = AT_ONCE

    document: dict[str, Any]
    expect: Number | None = None


class ConfigurationHead(Answer):
    """A published revision without its document."""

    revision: int
    published_at: datetime | None
    author: str
    reason: str
    restores: int | None
    """The revision whose content this one brings back."""
    origin: str
    digest: str
    """SHA-256 of the document."""
    hash: str
    """SHA-256 of all that is said here, and of the revision before."""
    previous: str

    @classmethod
    def of(cls, revision: ConfigRevision) -> Self:
        """From what is kept."""
        return cls.made(**_head(revision))


class Configuration(ConfigurationHead):
    """A published revision."""

    document: Any

    @classmethod
    def of(cls, revision: ConfigRevision) -> Self:
        """From what is kept."""
        return cls.made(**_head(revision), document=revision.document)


class ConfigurationHistory(Answer):
    """Revisions, oldest first."""

    items: tuple[ConfigurationHead, ...]
    next: Cursor | None = None


class ChangeAnswer(Answer):
    """One difference between two documents."""

    path: str
    kind: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None

    @classmethod
    def of(cls, change: Change) -> Self:
        """From the library's."""
        return cls.made(path=change.path, kind=change.kind, before=change.before, after=change.after)


class ConfigurationDiff(Answer):
    """What changed from one revision to another."""

    before: int
    after: int
    changes: tuple[ChangeAnswer, ...]


class CheckAnswer(Answer):
    """What a publication would do."""

    ok: bool
    against: int
    """The newest revision, which it was compared with; 0 if there is none."""
    problems: tuple[FieldError, ...]
    changes: tuple[ChangeAnswer, ...]

    @classmethod
    def of(cls, found: DryRun) -> Self:
        """From the library's."""
        return cls.made(
            ok=found.ok,
            against=found.against,
            problems=tuple(FieldError(field=each.path, message=each.message) for each in found.problems),
            changes=tuple(map(ChangeAnswer.of, found.changes)),
        )


class Verified(Answer):
    """Whether what was published is as it was."""

    ok: bool
    checked: int
    """Revisions that were looked at."""
    detail: str | None = None
    """What does not fit."""


class RingAnswer(Answer):
    """How far a configuration that is rolled out in rings has come."""

    revision: int
    base: int
    """The revision that the others keep."""
    phase: str
    ring: int
    """Number of the present ring, from 0."""
    rings: tuple[int | str, ...]
    target: int
    """How many instances the present ring is to have."""
    trials: int
    """Instances that were given it."""
    proved: int
    failed: int
    reasons: tuple[dict[str, Any], ...]
    """Why it is where it is, most decisive first."""

    @classmethod
    def of(cls, status: RingStatus) -> Self:
        """From the library's."""
        return cls.made(**(asdict(status) | {"reasons": tuple(map(dict, status.reasons))}))


class ConfigurationStatus(Answer):
    """Who runs which revision."""

    revision: int
    """The one that is for all; 0 if there is none."""
    trial: int
    """The one that is on trial; 0 if none is."""
    counts: dict[str, int]
    """How many instances run each revision."""
    running: dict[str, int]
    """Which revision each instance has said it runs; 0 is none."""
    refused: dict[str, str]
    """Instances that have refused the newest that they were given, and why."""
    rollout: RingAnswer | None = None
    """The newest rollout in rings; null if there never was one."""

    @classmethod
    def of(cls, status: ConfigStatus) -> Self:
        """From the library's."""
        return cls.made(
            revision=status.revision,
            trial=status.trial,
            counts={str(revision): count for revision, count in status.counts.items()},
            running=dict(status.running),
            refused=dict(status.refused),
            rollout=None if status.rollout is None else RingAnswer.of(status.rollout),
        )


def _head(revision: ConfigRevision) -> dict[str, Any]:
    return {
        "revision": revision.revision,
        "published_at": date_of(revision.at),
        "author": revision.author,
        "reason": revision.reason,
        "restores": revision.restores,
        "origin": revision.origin,
        "digest": revision.digest,
        "hash": revision.hash,
        "previous": revision.previous,
    }
