"""API tokens and the audit in a database; see `stores.tokens.TokenStore` and `stores.audit.AuditTrail`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from agentfleet.errors import NotFound, OperationRefused
from agentfleet.stores.audit import KEEP, AuditEntry, checked_keep
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.schema import API_AUDIT, API_AUDIT_HEAD, API_TOKENS
from agentfleet.stores.sql.strays import set_aside
from agentfleet.stores.tokens import Scope, TokenRecord, taken

_USED = update(API_TOKENS).where(API_TOKENS.c.id == bindparam("token")).values(used_at=bindparam("seen"))
_NEXT = (
    update(API_AUDIT_HEAD)
    .values(last=API_AUDIT_HEAD.c.last + bindparam("count"))
    .returning(API_AUDIT_HEAD.c.last, API_AUDIT_HEAD.c.hash, API_AUDIT_HEAD.c.refused)
)
_TOGETHER = 1000
"""Entries of the audit that are dropped together."""
_COLUMNS = [API_AUDIT.c[each.name] for each in fields(AuditEntry)]
_LAST = select(API_AUDIT_HEAD.c.last).scalar_subquery()
_CHAINED = (API_AUDIT.c.seq > 0) & (API_AUDIT.c.seq <= _LAST)
"""What appends have written: whoever may insert a row may put it beyond the newest, but is not believed."""


class SqlTokens:
    """Tokens in SQLite or PostgreSQL.

    Args:
        database: Open while this is used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, record: TokenRecord) -> None:
        """See the port."""
        values = {each.name: getattr(record, each.name) for each in fields(record)}
        values |= {"scopes": ",".join(record.scopes), "fleets": ",".join(record.fleets)}
        async with self._database.writing() as connection:
            if (await connection.execute(_named(record.name))).scalar() is not None:
                raise OperationRefused(taken(record.name))
            try:
                await connection.execute(insert(API_TOKENS).values(values))
            except IntegrityError as error:  # somebody else was first
                raise OperationRefused(taken(record.name)) from error

    async def find(self, id: str) -> TokenRecord | None:
        """See the port."""
        async with self._database.reading() as connection:
            row = (await connection.execute(select(API_TOKENS).where(API_TOKENS.c.id == id))).one_or_none()
        return None if row is None else _token(row)

    async def tokens(self) -> Sequence[TokenRecord]:
        """See the port."""
        async with self._database.reading() as connection:
            return [_token(row) for row in await connection.execute(select(API_TOKENS).order_by(API_TOKENS.c.name))]

    async def revoke(self, name: str, at: float) -> TokenRecord:
        """See the port."""
        which = (API_TOKENS.c.name == name) | (API_TOKENS.c.id == name)
        end = update(API_TOKENS).where(which).values(revoked_at=func.coalesce(API_TOKENS.c.revoked_at, at))
        async with self._database.writing() as connection:
            await connection.execute(end)
            row = (await connection.execute(select(API_TOKENS).where(which))).one_or_none()
        if row is None:
            raise NotFound(f"there is no token {name!r:.200}")
        return _token(row)

    async def used(self, seen: Mapping[str, float]) -> None:
        """See the port."""
        if seen:
            async with self._database.writing() as connection:
                await connection.execute(_USED, [{"token": id, "seen": at} for id, at in sorted(seen.items())])


class SqlAudit:
    """The audit in SQLite or PostgreSQL.

    Args:
        database: Open while this is used.
        keep: How many entries are kept, the newest, of what was done and of what was refused each; up to a thousand
            more before the oldest are dropped together.
    """

    def __init__(self, database: Database, *, keep: int = KEEP) -> None:
        self._database = database
        self.keep = checked_keep(keep)
        self._together = min(_TOGETHER, keep)

    async def append(self, entries: Sequence[AuditEntry]) -> None:
        """See the port. The row of the newest is held until the commit, so that each chain has one end."""
        if not entries:
            return
        async with self._database.writing() as connection:
            head = (await connection.execute(_NEXT, {"count": len(entries)})).one()
            seq, ends = head.last - len(entries), [head.hash, head.refused]
            await set_aside(connection, API_AUDIT.c.seq, API_AUDIT.c.seq > seq)
            rows: list[dict[str, Any]] = []
            for entry in entries:
                seq += 1
                kept = replace(entry, seq=seq, previous=ends[entry.refused])
                rows.append({each.name: getattr(kept, each.name) for each in fields(kept)} | {"refused": kept.refused})
                ends[entry.refused] = kept.hash
            await connection.execute(insert(API_AUDIT), rows)
            await connection.execute(update(API_AUDIT_HEAD).values(hash=ends[False], refused=ends[True]))
            if seq // self._together > (seq - len(entries)) // self._together:
                for refused in (False, True):
                    await self._drop_old(connection, refused=refused)

    async def _drop_old(self, connection: AsyncConnection, *, refused: bool) -> None:
        chain = (API_AUDIT.c.refused == refused) & (API_AUDIT.c.seq > 0)  # those set aside stay
        newest = select(API_AUDIT.c.seq).where(chain).order_by(API_AUDIT.c.seq.desc())
        old = (await connection.execute(newest.offset(self.keep).limit(1))).scalar()
        if old is not None:
            await connection.execute(delete(API_AUDIT).where(chain, API_AUDIT.c.seq <= old))

    async def entries(
        self, *, before: int | None = None, fleet: str | None = None, limit: int = 100
    ) -> Sequence[AuditEntry]:
        """See the port."""
        query = select(*_COLUMNS).where(_CHAINED)
        if before is not None:
            query = query.where(API_AUDIT.c.seq < before)
        if fleet is not None:
            query = query.where(API_AUDIT.c.fleet == fleet)
        async with self._database.reading() as connection:
            found = await connection.execute(query.order_by(API_AUDIT.c.seq.desc()).limit(limit))
            return [AuditEntry(**row._mapping) for row in found]

    async def head(self) -> tuple[int, tuple[str, str]]:
        """See the port."""
        query = select(API_AUDIT_HEAD.c.last, API_AUDIT_HEAD.c.hash, API_AUDIT_HEAD.c.refused)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one()
        return row.last, (row.hash, row.refused)

    async def stray(self) -> int | None:
        """See the port."""
        beyond = select(func.max(API_AUDIT.c.seq)).where((API_AUDIT.c.seq < 1) | (API_AUDIT.c.seq > _LAST))
        async with self._database.reading() as connection:
            found: int | None = (await connection.execute(beyond)).scalar()
        return found


def _named(name: str) -> Any:
    return select(API_TOKENS.c.id).where(API_TOKENS.c.name == name)


def _token(row: Any) -> TokenRecord:
    values = dict(row._mapping)
    values["scopes"] = tuple(map(Scope, row.scopes.split(",")))
    values["fleets"] = tuple(row.fleets.split(","))
    return TokenRecord(**values)
