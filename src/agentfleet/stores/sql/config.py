"""Configuration revisions in a database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from agentfleet.errors import BackendUnavailable, ConfigConflict, ConfigError, NotLeader
from agentfleet.stores.config import ConfigMarks, ConfigRevision, RolloutRecord
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.engines import is_sqlite
from agentfleet.stores.sql.fences import latest_epoch, pass_fence
from agentfleet.stores.sql.schema import CONFIG_HEADS, CONFIG_REVISIONS, CONFIG_ROLLOUTS
from agentfleet.stores.sql.strays import set_aside

_CHANNEL = "config"
_FENCE = "config:"
"""Begins the names of rollouts' fences: those of fleets' names are the journal's."""
_number = CONFIG_REVISIONS.c.revision
_NEWEST = select(CONFIG_HEADS.c.newest).where(CONFIG_HEADS.c.key == CONFIG_REVISIONS.c.key).scalar_subquery()
_CHAINED = (_number > 0) & (_number <= func.coalesce(_NEWEST, 0))
"""What appends have written: whoever may insert a row may put it beyond the newest, but nobody runs it."""


class SqlConfig:
    """`ConfigRecords` in a database, shared by any number of processes.

    Args:
        database: Open while this is used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert = sqlite.insert if is_sqlite(database.url) else postgresql.insert

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """See `ConfigRecords`."""
        key = revision.key
        async with failing(), self._database.writing() as connection:
            if not await self._advance(connection, key, expect, revision.revision):
                found = await connection.execute(select(CONFIG_HEADS.c.newest).where(CONFIG_HEADS.c.key == key))
                newest = found.scalar_one_or_none() or 0
                raise ConfigConflict(f"configuration {key!r}: the newest revision is {newest}, not {expect}")
            mine = CONFIG_REVISIONS.c.key == key
            await set_aside(connection, _number, _number > expect, mine)
            values = {column.name: getattr(revision, column.name) for column in CONFIG_REVISIONS.c}
            await connection.execute(insert(CONFIG_REVISIONS).values(values))
            await self._database.note_change(connection, _CHANNEL, key)
        self._database.ring(_CHANNEL, key)

    async def _advance(self, connection: AsyncConnection, key: str, expect: int, number: int) -> bool:
        """Compare and set: the row is locked until the commit, so that of two writers one finds it changed."""
        if expect == 0:
            change: Any = self._insert(CONFIG_HEADS).values(key=key, newest=number).on_conflict_do_nothing()
        else:
            fits = (CONFIG_HEADS.c.key == key) & (CONFIG_HEADS.c.newest == expect)
            change = update(CONFIG_HEADS).where(fits).values(newest=number)
        return (await connection.execute(change.returning(CONFIG_HEADS.c.key))).first() is not None

    async def newest(self, key: str) -> ConfigRevision | None:
        """See `ConfigRecords`."""
        mine = select(CONFIG_REVISIONS).where(CONFIG_REVISIONS.c.key == key, _CHAINED)
        found = await self._select(mine.order_by(_number.desc()).limit(1))
        return found[0] if found else None

    async def find(self, key: str, revision: int) -> ConfigRevision | None:
        """See `ConfigRecords`."""
        if not 0 < revision < 2**63:
            return None
        which = (CONFIG_REVISIONS.c.key == key) & (_number == revision)
        found = await self._select(select(CONFIG_REVISIONS).where(which, _CHAINED))
        return found[0] if found else None

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        """See `ConfigRecords`."""
        if revision >= 2**63 or limit < 1:
            return []
        which = (CONFIG_REVISIONS.c.key == key) & (_number > max(revision, 0))
        query = select(CONFIG_REVISIONS).where(which, _CHAINED)
        return await self._select(query.order_by(_number).limit(min(limit, 2**31)))

    async def marks(self, key: str) -> ConfigMarks:
        """See `ConfigRecords`."""
        head = select(CONFIG_HEADS.c.newest).where(CONFIG_HEADS.c.key == key)
        beyond = (CONFIG_REVISIONS.c.key == key) & ~_CHAINED
        stray = select(func.max(_number)).where(beyond)
        async with failing(), self._database.reading() as connection:
            both = select(head.scalar_subquery(), stray.scalar_subquery())  # one statement sees one state
            newest, found = (await connection.execute(both)).one()
        return ConfigMarks(newest or 0, "", found)

    async def requested(self, key: str, request: str) -> ConfigRevision | None:
        """See `ConfigRecords`."""
        which = (CONFIG_REVISIONS.c.key == key) & (CONFIG_REVISIONS.c.request == request)
        found = await self._select(select(CONFIG_REVISIONS).where(which, _CHAINED).order_by(_number.desc()))
        return found[0] if found else None

    async def keys(self) -> Sequence[str]:
        """See `ConfigRecords`."""
        async with failing(), self._database.reading() as connection:
            return sorted((await connection.execute(select(CONFIG_HEADS.c.key))).scalars())

    async def changed(self, key: str, revision: int, version: int | None = None) -> None:
        """See `ConfigRecords`."""
        joined = CONFIG_HEADS.join(CONFIG_ROLLOUTS, CONFIG_ROLLOUTS.c.key == CONFIG_HEADS.c.key, isouter=True)
        query = select(CONFIG_HEADS.c.newest, CONFIG_ROLLOUTS.c.version).select_from(joined)
        query = query.where(CONFIG_HEADS.c.key == key)

        async def is_newer() -> bool:
            async with failing(), self._database.reading() as connection:
                row = (await connection.execute(query)).one_or_none()
            moved = version is not None and row is not None and (row.version or 0) > version
            return moved or (row is not None and row.newest > revision)

        await self._database.changed(_CHANNEL, key, is_newer)

    async def rollout(self, key: str) -> RolloutRecord | None:
        """See `ConfigRecords`."""
        async with failing(), self._database.reading() as connection:
            found = await connection.execute(select(CONFIG_ROLLOUTS).where(CONFIG_ROLLOUTS.c.key == key))
            row = found.one_or_none()
        if row is None:
            return None
        values = dict(row._mapping)
        return RolloutRecord.from_dict(values | json.loads(values.pop("body")))

    async def advance(self, record: RolloutRecord, *, expect: int) -> None:
        """See `ConfigRecords`."""
        body = {"trials": dict(record.trials), "memory": dict(record.memory), "reasons": list(record.reasons)}
        columns = ("key", "version", "revision", "base", "phase", "epoch")
        values = {name: getattr(record, name) for name in columns} | {"body": json.dumps(body, separators=(",", ":"))}
        table = CONFIG_ROLLOUTS.c
        if expect == 0:
            change: Any = self._insert(CONFIG_ROLLOUTS).values(values).on_conflict_do_nothing()
        else:
            fits = (table.key == record.key) & (table.version == expect)
            change = update(CONFIG_ROLLOUTS).where(fits).values(values)
        async with failing(), self._database.writing() as connection:
            await self._pass_fence(connection, record)
            if (await connection.execute(change.returning(table.key))).first() is None:
                raise ConfigConflict(f"the rollout of {record.key!r} is not at version {expect} any more")
            await self._database.note_change(connection, _CHANNEL, record.key)
        self._database.ring(_CHANNEL, record.key)

    async def _pass_fence(self, connection: AsyncConnection, record: RolloutRecord) -> None:
        """Refuse a leader that is behind what was written here, by a row of its own, or told in the journal.

        The journal's row is read, never locked: an append blocks its process while it waits for that row, and could
        wait for a transaction of that very process. Earlier versions wrote here through the journal's row, too.
        """
        if not record.epoch:
            return
        told = (await connection.execute(latest_epoch(record.key))).scalar() or 0
        own = f"{_FENCE}{record.key}"
        passed = told <= record.epoch
        if passed:
            passed = (await connection.execute(pass_fence(self._insert, own, record.epoch))).first() is not None
        if not passed:
            ahead = max(told, (await connection.execute(latest_epoch(own))).scalar() or 0)
            raise NotLeader(f"{record.key!r}: a leader of epoch {ahead} has written; this is {record.epoch}")

    async def _select(self, query: Any) -> list[ConfigRevision]:
        async with failing(), self._database.reading() as connection:
            return [ConfigRevision(**row._mapping) for row in await connection.execute(query)]


@asynccontextmanager
async def failing() -> AsyncIterator[None]:
    """Around calls of the database: what cannot be reached is an error of the configuration store."""
    try:
        yield
    except BackendUnavailable as error:
        raise ConfigError(str(error)) from error
