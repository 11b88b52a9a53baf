"""RECORD: the port to the audit, one in memory, and what an entry is: who asked for which change, and what came of it.

Entries are only added, and the oldest dropped when there are too many. Each holds the hash of the one before, so that
who alters, removes or puts in one breaks the chain; `verify` finds where. Who may write all of it can make another
chain: whether it is the one that was written says only what is kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Protocol

from agentfleet.errors import SpecError


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change that somebody asked for.

    Attributes:
        at: Seconds since the epoch.
        actor: Who.
        credential: By which token: its id, never the token.
        origin: Address that it came from.
        request: Id of the request.
        method: "POST", "PUT" or "DELETE".
        path: What was asked.
        fleet: Name of the fleet concerned, if there is one.
        operation: Id of the operation that it became.
        status: What was answered.
        detail: In words, for what was refused.
        seq: Its place, from 1; 0 while it is not kept.
        previous: Hash of the entry before.
    """

    at: float
    actor: str
    credential: str
    origin: str
    request: str
    method: str
    path: str
    fleet: str | None
    operation: str | None
    status: int
    detail: str = ""
    seq: int = 0
    previous: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of all that is said here."""
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()


KEEP = 100_000
"""Entries that are kept where nobody says otherwise: so many are verified within seconds."""


STRAY = (
    "it is no part of the chain, and is not shown; keep a copy of the row, find out who could write to the database, "
    "and delete the row"
)
"""What to do about an entry, or a revision, that somebody has put in where the chain does not go."""


class AuditTrail(Protocol):
    """Where the audit is kept. One contract suite (`tests/stores`) runs against every implementation.

    Every method may raise `BackendUnavailable` and `DeadlineExceeded`.
    """

    @property
    def keep(self) -> int:
        """How many entries are kept at least, the newest; older ones may be gone."""
        ...

    async def append(self, entries: Sequence[AuditEntry]) -> None:
        """Keep entries, in their order, all or none; returns when they are durable."""
        ...

    async def entries(
        self, *, before: int | None = None, fleet: str | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """Up to `limit` entries, newest first, that came before the place `before`."""
        ...

    async def head(self) -> tuple[int, str]:
        """Place and hash of the newest entry, as they were noted when it was written; (0, "") if there is none."""
        ...

    async def stray(self) -> int | None:
        """Place of an entry that no append has put there: beyond the newest, or before the first; None if none is.

        `entries` leaves such ones out, and appends go on beside them: those that are in their way are moved, in their
        order, to places before the first, where they stay as evidence.
        """
        ...


class MemoryAudit:
    """An audit in memory, for tests and for managers that outlive nothing.

    Args:
        keep: How many entries are kept, the newest.
    """

    def __init__(self, *, keep: int = KEEP) -> None:
        self._entries: deque[AuditEntry] = deque(maxlen=checked_keep(keep))
        self._head = (0, "")
        self.keep = keep

    async def append(self, entries: Sequence[AuditEntry]) -> None:
        """See the port."""
        for entry in entries:
            seq, previous = self._head
            kept = replace(entry, seq=seq + 1, previous=previous)
            self._entries.append(kept)
            self._head = kept.seq, kept.hash

    async def entries(
        self, *, before: int | None = None, fleet: str | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """See the port."""
        found = (each for each in reversed(self._entries) if fleet is None or each.fleet == fleet)
        return list(islice((each for each in found if before is None or each.seq < before), limit))

    async def head(self) -> tuple[int, str]:
        """See the port."""
        return self._head

    async def stray(self) -> int | None:
        """See the port: nobody else writes here."""
        return None


async def verify(trail: AuditTrail, *, page: int = 500) -> tuple[int, str | None]:
    """Whether the audit is as it was written, as far back as it is kept.

    Returns:
        How many entries were looked at, and what does not fit, if anything.
    """
    newest, hash = await trail.head()
    checked, expected, place = 0, hash, newest
    async for entry in _backwards(trail, newest + 1, page):
        if entry.seq != place:
            return checked, f"entry {place} is not there"
        if entry.hash != expected:
            return checked, f"entry {entry.seq} was altered after it was written, or the one after it"
        checked, expected, place = checked + 1, entry.previous, place - 1
    if place > 0:  # what is older than is kept may be gone; the newest may have moved on meanwhile
        newest, _ = await trail.head()
    if place > max(0, newest - trail.keep):
        return checked, f"entry {place} is not there"
    stray = await trail.stray()
    return checked, None if stray is None else f"entry {stray} was put in by hand: {STRAY}"


def checked_keep(keep: int) -> int:
    """How many entries are to be kept; raises `SpecError` for less than one."""
    if keep < 1:
        raise SpecError(f"keep: must be at least 1 entry; got {keep}")
    return keep


async def _backwards(trail: AuditTrail, before: int, page: int) -> AsyncIterator[AuditEntry]:
    while found := await trail.entries(before=before, limit=page):
        for entry in found:
            yield entry
        before = found[-1].seq
