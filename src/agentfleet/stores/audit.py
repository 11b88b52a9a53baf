"""RECORD: the port to the audit, one in memory, and what an entry is: who asked for which change, and what came of it.

Entries are only added, and the oldest dropped when there are too many. What was refused is a chain of its own, with a
bound of its own: anybody can have something refused as often as they like, and is not to push out what was done. Each
entry holds the hash of the one before in its chain, so that who alters, removes or puts in one breaks it; `verify`
finds where. Who may write all of it can make another chain: whether it is the one that was written says only what is
kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import astuple, dataclass, replace
from heapq import merge
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
        method: "POST", "PUT" or "DELETE"; "CLI" for a command.
        path: What was asked.
        fleet: Name of the fleet concerned, if there is one.
        operation: Id of the operation that it became.
        status: What was answered.
        detail: In words, for what was refused.
        seq: Its place among all, from 1; 0 while it is not kept.
        previous: Hash of the entry before in its chain: of what was refused, or of all else.
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

    @property
    def refused(self) -> bool:
        """Whether nothing was done for certain: what failed in the server (5xx) may have been done."""
        return 400 <= self.status < 500


KEEP = 100_000
"""Entries of each chain that are kept where nobody says otherwise: so many are verified within seconds."""


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
        """How many entries of each chain are kept at least, the newest; older ones may be gone."""
        ...

    async def append(self, entries: Sequence[AuditEntry]) -> None:
        """Keep entries, in their order, all or none; returns when they are durable."""
        ...

    async def entries(
        self, *, before: int | None = None, fleet: str | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """Up to `limit` entries, newest first, that came before the place `before`."""
        ...

    async def head(self) -> tuple[int, tuple[str, str]]:
        """Place of the newest entry; hashes of the newest that was done, and of the newest that was refused.

        As they were noted when those were written; 0 and "" where there is none.
        """
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
        keep: How many entries are kept, the newest, of what was done and of what was refused each.
    """

    def __init__(self, *, keep: int = KEEP) -> None:
        self._chains = tuple(deque[AuditEntry](maxlen=checked_keep(keep)) for _ in range(2))
        self._last = 0
        self.keep = keep

    async def append(self, entries: Sequence[AuditEntry]) -> None:
        """See the port."""
        for entry in entries:
            chain = self._chains[entry.refused]
            self._last += 1
            chain.append(replace(entry, seq=self._last, previous=_newest(chain)))

    async def entries(
        self, *, before: int | None = None, fleet: str | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """See the port."""
        both = merge(*map(reversed, self._chains), key=lambda each: each.seq, reverse=True)
        found = (each for each in both if fleet is None or each.fleet == fleet)
        return list(islice((each for each in found if before is None or each.seq < before), limit))

    async def head(self) -> tuple[int, tuple[str, str]]:
        """See the port."""
        done, refused = map(_newest, self._chains)
        return self._last, (done, refused)

    async def stray(self) -> int | None:
        """See the port: nobody else writes here."""
        return None


@dataclass(slots=True)
class _Link:
    """How far back a chain was followed."""

    hash: str
    """Of the entry that comes next, which is older; empty where none does."""
    next: str = "the newest entry"
    """What that is, in words."""
    checked: int = 0


async def verify(trail: AuditTrail, *, page: int = 500) -> tuple[int, str | None]:
    """Whether the audit is as it was written, as far back as it is kept.

    Every entry must be the next one of a chain, whichever: those of before there were two are all in one.

    Returns:
        How many entries were looked at, and what does not fit, if anything.
    """
    newest, hashes = await trail.head()
    links, checked = [_Link(each) for each in hashes], 0
    async for entry in _backwards(trail, newest + 1, page):
        hash = entry.hash
        link = next((each for each in links if each.hash == hash), None)
        if link is None:
            return checked, (
                f"entry {entry.seq} does not fit those after it: it was altered or put in, or one of them was altered "
                "or removed"
            )
        link.hash, link.next, link.checked = entry.previous, f"what came before entry {entry.seq}", link.checked + 1
        checked += 1
    moved = (await trail.head())[0] - newest  # so many old ones may have been dropped meanwhile
    for link in links:
        if link.hash and link.checked + moved < trail.keep:
            return checked, f"{link.next} is not there"
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


def _newest(chain: Sequence[AuditEntry]) -> str:
    return chain[-1].hash if chain else ""
