"""Who runs which configuration, in a database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agentfleet.stores.acks import ConfigAck
from agentfleet.stores.sql.config import failing
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.fleets import insert_of, values_of
from agentfleet.stores.sql.schema import CONFIG_ACK_HEADS, CONFIG_ACKS

_CHANNEL = "acks"
_WIDE = 500
"""Values in one statement: SQLite takes so many."""


class SqlAcks:
    """`ConfigAcks` in a database, shared by any number of processes.

    Args:
        database: Open while this is used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert = insert_of(database)

    async def write(self, key: str, acks: Sequence[ConfigAck], gone: Sequence[str] = ()) -> None:
        """See `ConfigAcks`."""
        async with failing(), self._database.writing(background=True) as connection:
            batch = await self._next(connection, key)
            if acks:
                last = {ack.instance: values_of(ack) | {"key": key, "batch": batch} for ack in acks}
                await connection.execute(self._upsert(), list(last.values()))
            for start in range(0, len(gone), _WIDE):
                names = gone[start : start + _WIDE]
                which = (CONFIG_ACKS.c.key == key) & CONFIG_ACKS.c.instance.in_(names)
                await connection.execute(delete(CONFIG_ACKS).where(which))
            await self._database.note_change(connection, _CHANNEL, key)
        self._database.ring(_CHANNEL, key)

    async def _next(self, connection: AsyncConnection, key: str) -> int:
        """The batch's number; its row is locked until the commit, so that no reader sees a later batch first."""
        heads = CONFIG_ACK_HEADS.c
        said = self._insert(CONFIG_ACK_HEADS).values(key=key, newest=1)
        said = said.on_conflict_do_update(index_elements=["key"], set_={"newest": heads.newest + 1})
        return int((await connection.execute(said.returning(heads.newest))).scalar_one())

    def _upsert(self) -> Any:
        said = self._insert(CONFIG_ACKS)
        new = {name: said.excluded[name] for name in ("revision", "refused", "why", "via", "at", "batch")}
        return said.on_conflict_do_update(index_elements=["key", "instance"], set_=new)

    async def after(self, key: str, batch: int) -> tuple[int, Sequence[ConfigAck]]:
        """See `ConfigAcks`."""
        table = CONFIG_ACKS.c
        columns = (table.instance, table.revision, table.refused, table.why, table.via, table.at)
        async with failing(), self._database.reading() as connection:
            newest = await self._newest(connection, key)
            if newest <= batch:
                return newest, []
            query = select(*columns).where((table.key == key) & (table.batch > batch) & (table.batch <= newest))
            return newest, [ConfigAck(*row) for row in await connection.execute(query)]

    async def changed(self, key: str, batch: int) -> None:
        """See `ConfigAcks`."""

        async def is_newer() -> bool:
            async with failing(), self._database.reading() as connection:
                return await self._newest(connection, key) > batch

        await self._database.changed(_CHANNEL, key, is_newer)

    async def _newest(self, connection: AsyncConnection, key: str) -> int:
        found = await connection.execute(select(CONFIG_ACK_HEADS.c.newest).where(CONFIG_ACK_HEADS.c.key == key))
        return int(found.scalar_one_or_none() or 0)
