"""The tables `cluster_config` and `agent_instances` (F18), as rows and the few statements that keep them."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from agentfleet.specs import CpuTarget, FleetSpec, MemoryTarget
from agentfleet.stores.fleets import InstanceRow
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.engines import is_sqlite
from agentfleet.stores.sql.schema import AGENT_INSTANCES, CLUSTER_CONFIG

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_IDS = uuid.UUID("6f0d5f6e-5a0b-4c8e-9b39-0a3c0f5d1f10")
"""Ids are made of names in this namespace (RFC 9562, version 5), so that writing a row again finds it."""
_AT_ONCE = 500
"""Values that a statement may name: SQLite takes not many more."""
_STAYS = ("id", "cluster_id", "instance_id", "created_at")
"""Of a row that is written again."""
Insert = Callable[[Table], Any]
"""The dialect's `insert`, which can update what exists."""


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """A fleet, as its user asks for it."""

    id: uuid.UUID
    cluster_name: str
    namespace: str
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_cpu_percent: int | None = None
    target_memory_percent: int | None = None
    health_check_config: Mapping[str, Any] | None = None
    created_at: datetime | None = None


def cluster_id(namespace: str, name: str) -> uuid.UUID:
    """The id of a fleet that nobody gave one: the same for the same names, for ever."""
    return uuid.uuid5(_IDS, f"{namespace}/{name}")


def cluster_row(
    spec: FleetSpec, *, namespace: str, id: uuid.UUID | None = None, created_at: datetime | None = None
) -> ClusterRow:
    """What `cluster_config` says of a spec: without a scaling policy the bounds are its size."""
    scaling = spec.scaling
    targets = () if scaling is None else scaling.targets
    return ClusterRow(
        id=cluster_id(namespace, spec.name) if id is None else id,
        cluster_name=spec.name,
        namespace=namespace,
        min_replicas=spec.replicas if scaling is None else scaling.min_replicas,
        max_replicas=spec.replicas if scaling is None else scaling.max_replicas,
        target_cpu_percent=next((each.utilization for each in targets if isinstance(each, CpuTarget)), None),
        target_memory_percent=next((each.utilization for each in targets if isinstance(each, MemoryTarget)), None),
        health_check_config=spec.health.model_dump(mode="json"),
        created_at=created_at,
    )


class SqlFleets:
    """Writes and reads the two tables.

    Args:
        database: Open while this is used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert = insert_of(database)

    async def put(self, cluster: ClusterRow) -> None:
        """Write a fleet's row, or write it again; when it was made stays."""
        async with self._database.writing() as connection:
            await put_cluster(connection, self._insert, cluster)

    async def write(self, cluster: uuid.UUID, rows: Sequence[InstanceRow], gone: Sequence[str] = ()) -> None:
        """Write what has changed of a fleet's instances, all in one transaction; when each was made stays."""
        async with self._database.writing(background=True) as connection:
            await write_instances(connection, self._insert, cluster, rows, gone)

    async def remove(self, cluster: uuid.UUID) -> None:
        """Remove a fleet and its instances; one that is not there is no error."""
        async with self._database.writing() as connection:
            await remove_cluster(connection, cluster)

    async def clusters(self) -> list[ClusterRow]:
        """All fleets, by name."""
        query = select(CLUSTER_CONFIG).order_by(CLUSTER_CONFIG.c.cluster_name, CLUSTER_CONFIG.c.namespace)
        async with self._database.reading() as connection:
            return [ClusterRow(**plain(row)) for row in await connection.execute(query)]

    async def instances(self, cluster: uuid.UUID) -> list[InstanceRow]:
        """A fleet's instances, by name."""
        async with self._database.reading() as connection:
            return await read_instances(connection, cluster)


def insert_of(database: Database) -> Insert:
    """The `insert` of a database's dialect."""
    return sqlite.insert if is_sqlite(database.url) else postgresql.insert


async def put_cluster(connection: AsyncConnection, insert: Insert, cluster: ClusterRow) -> None:
    """Write a fleet's row, or write it again; when it was made stays."""
    values = values_of(cluster)
    await connection.execute(_upsert(insert, CLUSTER_CONFIG, tuple(values)), values)


async def write_instances(
    connection: AsyncConnection, insert: Insert, cluster: uuid.UUID, rows: Sequence[InstanceRow], gone: Sequence[str]
) -> None:
    """Write rows that are new or changed, and take away those that are gone; when each was made stays."""
    values = [_row(cluster, row) for row in rows]
    table = AGENT_INSTANCES.c
    if values:
        await connection.execute(_upsert(insert, AGENT_INSTANCES, tuple(values[0])), values)
    for start in range(0, len(gone), _AT_ONCE):
        which = (table.cluster_id == cluster) & table.instance_id.in_(gone[start : start + _AT_ONCE])
        await connection.execute(delete(AGENT_INSTANCES).where(which))


def _row(cluster: uuid.UUID, row: InstanceRow) -> dict[str, Any]:
    return values_of(row) | {"id": uuid.uuid5(cluster, row.instance_id), "cluster_id": cluster}


def values_of(item: DataclassInstance) -> dict[str, Any]:
    """A dataclass's fields. `asdict` copies each value, which takes several times as long as the database does."""
    return {each.name: getattr(item, each.name) for each in fields(item)}


async def remove_cluster(connection: AsyncConnection, cluster: uuid.UUID) -> None:
    """Remove a fleet's row and those of its instances."""
    await connection.execute(delete(AGENT_INSTANCES).where(AGENT_INSTANCES.c.cluster_id == cluster))
    await connection.execute(delete(CLUSTER_CONFIG).where(CLUSTER_CONFIG.c.id == cluster))


async def read_instances(
    connection: AsyncConnection,
    cluster: uuid.UUID,
    *,
    after: str = "",
    limit: int | None = None,
    where: Mapping[str, str] | None = None,
) -> list[InstanceRow]:
    """Up to `limit` of a fleet's instances whose ids follow `after`, and whose fields have these values, by id."""
    table = AGENT_INSTANCES.c
    columns = [table[each.name] for each in fields(InstanceRow)]
    which = (table.cluster_id == cluster) & (table.instance_id > after)
    for name, value in (where or {}).items():
        which &= table[name] == value
    query = select(*columns).where(which).order_by(table.instance_id).limit(limit)
    return [InstanceRow(**plain(row)) for row in await connection.execute(query)]


def plain(row: Any) -> dict[str, Any]:
    """A row's values; SQLite keeps no time zone, and what we write is in UTC."""
    return {
        name: value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
        for name, value in row._mapping.items()
    }


@functools.cache  # SQLAlchemy makes `excluded` anew for each statement, which costs more than writing some rows
def _upsert(insert: Insert, table: Table, names: tuple[str, ...]) -> Any:
    """A statement that writes a row, or writes it again under its id; when it was made stays."""
    said: Any = insert(table)
    new = {name: said.excluded[name] for name in names if name not in _STAYS}
    return said.on_conflict_do_update(index_elements=["id"], set_=new)
