"""RECORD: the port to where configuration documents are kept, and what one kept revision looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ConfigRevision:
    """One published document. It never changes: the document is kept as text, and each `document` is a fresh copy."""

    key: str
    revision: int
    """From 1, rising with each publication of the key, never used twice."""
    text: str
    """The document as compact JSON; ready to be sent."""
    at: float
    """When it was published, in seconds since the epoch."""
    author: str
    reason: str
    restores: int | None = None
    """The revision whose content this one brings back, if it is a rollback."""
    origin: str = ""
    """Where it was published from, such as the address of a client; empty when nobody said."""
    previous: str = ""
    """The `hash` of the revision before it; empty for the first, and for those of stores that kept none."""
    rollout: str = ""
    """How it reaches the fleet in steps, as JSON of a `ConfigRollout`; empty: it is for all at once."""
    base: int = 0
    """The revision that the others keep, and that is gone back to, while it is rolled out in steps."""
    request: str = ""
    """Tells the request that published it from all others, so that it is done once however often it is sent; or empty.
    No part of the `hash`: it says nothing of what was published."""

    @property
    def document(self) -> Any:
        """The document as plain data, yours to change."""
        return json.loads(self.text)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hex: equal documents have equal digests."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def hash(self) -> str:
        """SHA-256 of all that is said here, that of the revision before included: who alters one breaks the chain."""
        said = [self.key, self.revision, self.text, self.at, self.author, self.reason, self.restores, self.origin]
        steps = [self.rollout, self.base] if self.rollout else []  # hashes from before there were any stay right
        return hashlib.sha256(json.dumps([*said, self.previous, *steps]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """How far the newest rollout of a key in steps has come: who may have the new revision, and what is remembered.

    Written by the fleet's leader, by compare and set; read by whoever delivers configuration.
    """

    key: str
    version: int
    """From 1, one more with each write."""
    revision: int
    """The revision that is rolled out."""
    base: int
    """The one that the others keep."""
    phase: str
    """See `core.configrollout.ConfigPhase`."""
    trials: Mapping[str, Any] = field(default_factory=dict)
    """The instances that are to have the revision, and what is remembered of each."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What the decision remembers, JSON-ready."""
    reasons: Sequence[Mapping[str, Any]] = ()
    """Why it is where it is."""
    epoch: int = 0
    """Of the leader who wrote it; 0 where there is one manager only."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RolloutRecord:
        """Read back `dataclasses.asdict`."""
        return cls(**{**data, "reasons": tuple(data.get("reasons", ()))})


@dataclass(frozen=True, slots=True)
class ConfigMarks:
    """What is kept of a key beside its revisions, to tell whether they are those that were appended."""

    newest: int
    """Number of the newest revision, as it was noted when that was appended; 0 if there is none."""
    dropped: str | None = None
    """The `hash` of the revision before the oldest that must be there: the one that was dropped last because there were
    too many, or "" if none ever was; None where nobody notes it."""
    stray: int | None = None
    """Number of a revision that no append has put there, beyond the newest or before the first; None if there is none.
    Nothing else that the records say counts it, and it keeps nobody from appending: one that is in the way is moved to
    a number below 1, where it stays as evidence."""


class ConfigRecords(Protocol):
    """Where revisions are kept. One conformance suite (`tests/stores`) runs against every implementation.

    Every method may raise `ConfigError` when the place cannot be reached.
    """

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """Keep a revision, all or nothing, if `expect` is the newest revision of its key (0: there is none).

        Raises:
            ConfigConflict: Another revision is the newest; nothing was kept.
        """
        ...

    async def newest(self, key: str) -> ConfigRevision | None:
        """The newest revision of a key; None if there is none."""
        ...

    async def find(self, key: str, revision: int) -> ConfigRevision | None:
        """One revision; None if it never was, or is kept no longer."""
        ...

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        """Up to `limit` kept revisions greater than `revision`, oldest first."""
        ...

    async def marks(self, key: str) -> ConfigMarks:
        """What is kept beside a key's revisions."""
        ...

    async def requested(self, key: str, request: str) -> ConfigRevision | None:
        """The kept revision that a request has published; None if there is none."""
        ...

    async def keys(self) -> Sequence[str]:
        """Every key that has a revision, sorted."""
        ...

    async def changed(self, key: str, revision: int, version: int | None = None) -> None:
        """Wait until the newest revision of a key is greater than `revision`. May return early, never late.

        With `version` also until the key's rollout record has a greater one.
        """
        ...

    async def rollout(self, key: str) -> RolloutRecord | None:
        """How far the newest rollout of a key has come; None if there never was one."""
        ...

    async def advance(self, record: RolloutRecord, *, expect: int) -> None:
        """Write how far a rollout has come, if `expect` is the version of the record before (0: there is none).

        Raises:
            ConfigConflict: Somebody else has written; nothing was kept.
            NotLeader: A leader of a later epoch has written; nothing was kept.
        """
        ...
