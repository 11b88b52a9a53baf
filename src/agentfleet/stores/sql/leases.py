"""Leases in a database: one row each, changed only by who knows its present version."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import ColumnElement

from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded
from agentfleet.stores.leases import Forgetting, LeaseStore
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.schema import LEASES

_CHANNEL = "leases"
_HINT = 0.5
"""Seconds for telling that a lease was given up."""


class SqlLeases:
    """A `LeaseStore` in a database: managers that share it need no cluster to elect their leader.

    Args:
        database: Open while this is used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        """The lease, None if there is none."""
        async with _within(timeout), self._database.reading() as connection:
            row = (await connection.execute(select(LEASES).where(LEASES.c.name == name))).one_or_none()
        return None if row is None else _record(row)

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Make the lease; raises `Conflict` if there is one."""
        values = _values(record) | {"name": name, "uid": str(uuid.uuid4()), "version": 1}
        async with _within(timeout), self._database.writing() as connection:
            try:
                row = (await connection.execute(insert(LEASES).values(values).returning(*LEASES.c))).one()
            except IntegrityError as error:
                raise Conflict(f"{name}: there is a lease already") from error
        return _record(row)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Change the lease; raises `Conflict` unless the version fits."""
        version = int(record.version or 0)
        values = _values(record) | {"version": version + 1}
        change = update(LEASES).where(_is(name, record)).values(values).returning(*LEASES.c)
        async with _within(timeout), self._database.writing() as connection:
            row = (await connection.execute(change)).one_or_none()
            if row is None:
                raise Conflict(f"{name}: version {version} is not the present one")
            if record.holder is None:
                await self._database.note_change(connection, _CHANNEL, name)
        if record.holder is None:
            self._database.ring(_CHANNEL, name)
        return _record(row)

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        """Remove the lease; raises `Conflict` unless the version fits."""
        async with _within(timeout), self._database.writing() as connection:
            gone = await connection.execute(delete(LEASES).where(_is(name, record)).returning(LEASES.c.name))
            if gone.one_or_none() is None:
                left = (await connection.execute(select(LEASES.c.version).where(LEASES.c.name == name))).one_or_none()
                if left is not None:
                    raise Conflict(f"{name}: version {record.version} is not the present one, {left.version}")

    async def given_up(self, name: str) -> None:
        """Return when a lease was given up, by whomever."""
        await _given_up(self._database, name)


class ToldLeases:
    """Leases that are kept elsewhere, as on a cluster; that one is given up is told through a shared database.

    So the next leader need not find it by looking. It is a hint: while the database is away, it finds it by looking.

    Args:
        leases: Where they are kept.
        database: Open while this is used, and shared by all who want these leases.
    """

    def __init__(self, leases: LeaseStore, database: Database) -> None:
        self._leases = leases
        self._database = database

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        """The lease, as it is kept."""
        return await self._leases.get(name, timeout=timeout)

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Make the lease; raises `Conflict` if there is one."""
        return await self._leases.create(name, record, timeout=timeout)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Change the lease; raises `Conflict` unless the version fits."""
        kept = await self._leases.update(name, record, timeout=timeout)
        if record.holder is None:
            with suppress(BackendUnavailable, DeadlineExceeded), anyio.move_on_after(_HINT):
                async with self._database.writing() as connection:
                    await self._database.note_change(connection, _CHANNEL, name)
                self._database.ring(_CHANNEL, name)
        return kept

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        """Remove the lease where it is kept, if it can be removed there; raises `Conflict` unless the version fits."""
        if isinstance(self._leases, Forgetting):
            await self._leases.remove(name, record, timeout=timeout)

    async def given_up(self, name: str) -> None:
        """Return when a lease was given up, by whomever."""
        await _given_up(self._database, name)


async def _given_up(database: Database, name: str) -> None:
    async def look() -> bool:
        return False  # who is told looks for himself, as he does now and then anyway

    await database.changed(_CHANNEL, name, look)


def _is(name: str, record: LeaseRecord) -> ColumnElement[bool]:
    """Whether a row is that version of that very lease."""
    version = int(record.version or 0)
    return (LEASES.c.name == name) & (LEASES.c.version == version) & (LEASES.c.uid == record.uid)


def _values(record: LeaseRecord) -> dict[str, Any]:
    return {"holder": record.holder, "epoch": record.epoch, "duration": record.duration}


def _record(row: Any) -> LeaseRecord:
    return LeaseRecord(row.holder, row.epoch, row.duration, str(row.version), str(row.version), row.uid)


@asynccontextmanager
async def _within(timeout: float) -> AsyncIterator[None]:
    try:
        with anyio.fail_after(timeout):
            yield
    except DeadlineExceeded:
        raise
    except TimeoutError as error:
        raise DeadlineExceeded(f"the database gave no answer within {timeout:g} s") from error
