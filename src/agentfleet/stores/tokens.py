"""RECORD: the port to where API tokens are kept, one in memory, and what a token is.

A token is `af_ID.SECRET`. Only the SHA-256 of its secret is kept: it has 256 random bits, so that nothing slower is
needed to keep it from being guessed. It is found by its id, and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from agentfleet.errors import NotFound, OperationRefused, SpecError

_TOKEN = re.compile(r"af_([0-9a-f]{16})\.([A-Za-z0-9_-]{43})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}", re.ASCII)
_FLEET = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
ALL = "*"
"""Stands for every fleet, those to come included."""


class Scope(StrEnum):
    """What a token is good for. Each includes the ones before it."""

    AGENT = "agent"
    """Fetch a cluster's configuration, and say what of it is run: what agents need."""
    READ = "read"
    """Look at everything."""
    OPERATE = "operate"
    """Scale, deploy versions, roll back, pause, restart, configure."""
    ADMIN = "admin"
    """Say what runs: programs, images, variables; delete."""

    @property
    def rank(self) -> int:
        """Higher includes lower."""
        return tuple(Scope).index(self)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is kept of a token.

    Attributes:
        id: Public; its first part.
        name: Who has it, for the audit; never given twice.
        digest: SHA-256 of its secret, in hex.
        scopes: What it is good for.
        fleets: Names of the fleets that it reaches, or `ALL`.
        created_at: Seconds since the epoch, as the other dates.
        created_by: Who made it.
        expires_at: When it ends by itself.
        used_at: When it was used last, to the minute.
        revoked_at: When it was ended.
    """

    id: str
    name: str
    digest: str
    scopes: tuple[Scope, ...]
    fleets: tuple[str, ...]
    created_at: float
    created_by: str = ""
    expires_at: float | None = None
    used_at: float | None = None
    revoked_at: float | None = None

    def holds(self, now: float) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class TokenStore(Protocol):
    """Where tokens are kept. One contract suite (`tests/stores`) runs against every implementation.

    Every method may raise `BackendUnavailable` and `DeadlineExceeded`.
    """

    async def add(self, record: TokenRecord) -> None:
        """Keep a new token; raises `OperationRefused` if there is or was one of its name."""
        ...

    async def find(self, id: str) -> TokenRecord | None:
        """The token with this id."""
        ...

    async def tokens(self) -> Sequence[TokenRecord]:
        """All of them, by name; revoked ones stay for the audit."""
        ...

    async def revoke(self, name: str, at: float) -> TokenRecord:
        """End a token, by its name or id; one that was ended before stays so. Raises `NotFound`."""
        ...

    async def used(self, seen: Mapping[str, float]) -> None:
        """Note when tokens were used last, by id."""
        ...


class MemoryTokens:
    """Tokens in memory, for tests and for managers that outlive nothing."""

    def __init__(self, records: Iterable[TokenRecord] = ()) -> None:
        self._records = {each.id: each for each in records}

    async def add(self, record: TokenRecord) -> None:
        """See the port."""
        if any(each.name == record.name for each in self._records.values()):
            raise OperationRefused(taken(record.name))
        self._records[record.id] = record

    async def find(self, id: str) -> TokenRecord | None:
        """See the port."""
        return self._records.get(id)

    async def tokens(self) -> Sequence[TokenRecord]:
        """See the port."""
        return sorted(self._records.values(), key=lambda each: each.name)

    async def revoke(self, name: str, at: float) -> TokenRecord:
        """See the port."""
        found = next((each for each in self._records.values() if name in (each.id, each.name)), None)
        if found is None:
            raise NotFound(f"there is no token {name!r:.200}")
        if found.revoked_at is None:
            found = self._records[found.id] = replace(found, revoked_at=at)
        return found

    async def used(self, seen: Mapping[str, float]) -> None:
        """See the port."""
        for id, at in seen.items():
            if id in self._records:
                self._records[id] = replace(self._records[id], used_at=at)


# ------------------------------------------------------------------------------------------------ making and checking


def new_token(
    name: str,
    *,
    scopes: Iterable[str],
    fleets: Iterable[str],
    now: float,
    by: str = "",
    expires_in: float | None = None,
) -> tuple[str, TokenRecord]:
    """A new token: what its holder is given, once, and what is kept.

    Args:
        name: Who gets it.
        scopes: Words of `Scope`.
        fleets: Names of fleets, or `ALL`.
        now: Seconds since the epoch.
        by: Who makes it.
        expires_in: Seconds until it ends by itself; None is never.

    Raises:
        SpecError: An argument is not usable; the message names it.
    """
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    expires_at = None if expires_in is None else now + expires_in
    record = TokenRecord(
        id, check_name(name), digest_of(secret), scopes_of(scopes), fleets_of(fleets), now, by, expires_at
    )
    return f"af_{id}.{secret}", record


def digest_of(secret: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split(token: str) -> tuple[str, str] | None:
    """Id and secret of a token, None if it has not the form of one."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else (found[1], found[2])


def is_secret_of(record: TokenRecord | None, secret: str) -> bool:
    """Whether it is this token's secret; takes as long where there is no token."""
    kept = record.digest if record is not None else digest_of("")
    return hmac.compare_digest(kept, digest_of(secret)) and record is not None


def check_name(name: str) -> str:
    """A token's name; raises `SpecError` if it is none."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"name: use up to 100 letters, digits, '.', '_', '@' and '-', not {name!r:.120}")
    return name


def scopes_of(words: Iterable[str]) -> tuple[Scope, ...]:
    """Scopes by their words; raises `SpecError` for others, and for none."""
    found = []
    for word in words:
        try:
            found.append(Scope(word))
        except ValueError as error:
            raise SpecError(f"scopes: {word!r:.40} is none of {', '.join(Scope)}") from error
    if not found:
        raise SpecError(f"scopes: name at least one of {', '.join(Scope)}")
    return tuple(sorted(set(found), key=lambda each: each.rank))


def fleets_of(names: Iterable[str]) -> tuple[str, ...]:
    """Fleets by their names; raises `SpecError` for what can be none, and for none."""
    found = tuple(sorted(set(names)))
    wrong = next((name for name in found if name != ALL and not _FLEET.fullmatch(name)), None)
    if wrong is not None:
        raise SpecError(f"fleets: {wrong!r:.80} can be no fleet's name; write names, or '{ALL}' for all of them")
    if not found:
        raise SpecError(f"fleets: name at least one, or '{ALL}' for all of them")
    return (ALL,) if ALL in found else found


def taken(name: str) -> str:
    """Why a token is not made."""
    return f"there is or was a token {name!r}: its name stands in the audit; choose another"
