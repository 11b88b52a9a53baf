"""Fleets and operations in a database, for managers that share them; see `stores.fleets.FleetRecords`."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agentfleet.errors import NotFound, NotLeader, OperationRefused
from agentfleet.operations import OPEN, RESHAPING, Caller, Kind, Operation, Status
from agentfleet.specs import FleetSpec
from agentfleet.stores.fleets import Attendance, FleetRecord, InstanceRow, News, Picture, UnreadFleet
from agentfleet.stores.fleets_memory import check_submission, exists, same_request
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.fences import latest_epoch, pass_fence
from agentfleet.stores.sql.fleets import (
    cluster_row,
    insert_of,
    put_cluster,
    read_instances,
    remove_cluster,
    write_instances,
)
from agentfleet.stores.sql.rows import operation_of, readable, record_of, record_or_why, row_of
from agentfleet.stores.sql.schema import CLUSTER_CONFIG, FLEETS, FLEETS_HEAD, MANAGERS, OPERATIONS

_CHANNEL = "fleets"
_AT_ONCE = 200
"""Rows of instances that one transaction writes, or little more."""
_DRAWN = 10
"""What a fleet's status costs, in rows."""
_ADVANCE = update(FLEETS_HEAD).values(last=FLEETS_HEAD.c.last + 1).returning(FLEETS_HEAD.c.last)
_JOINED: Select[Any] = select(FLEETS, CLUSTER_CONFIG.c.namespace, CLUSTER_CONFIG.c.created_at).join(
    CLUSTER_CONFIG, CLUSTER_CONFIG.c.id == FLEETS.c.id
)
_LAST: Select[Any] = (
    select(OPERATIONS.c.seq.label("asked"), OPERATIONS.c.status.label("progress"))
    .where(OPERATIONS.c.kind.in_(RESHAPING))
    .order_by(OPERATIONS.c.seq.desc())
    .limit(1)
)


class SqlFleetRecords:
    """A store of fleets in SQLite or PostgreSQL.

    Args:
        database: Open while this is used.
        keep: How many operations are kept, the newest; those that are open stay in any case.
    """

    def __init__(self, database: Database, *, keep: int = 100_000) -> None:
        self._database = database
        self._insert = insert_of(database)
        self._keeps = keep
        self._trimmed: int | None = None
        """At which change old operations were removed last."""

    async def create(self, record: FleetRecord, operation: Operation) -> Operation:
        """See the port."""
        async with self._database.writing() as connection:
            change = await _next(connection)
            if (earlier := await _earlier(connection, operation.by)) is not None:
                return same_request(earlier, operation)
            if await _named(connection, record.name) is not None:
                raise OperationRefused(exists(record.name))
            id = uuid.UUID(record.id)
            made = datetime.fromtimestamp(record.created_at, UTC)
            row = cluster_row(record.spec, namespace=record.namespace, id=id, created_at=made)
            await put_cluster(connection, self._insert, row)
            values = {
                "id": id,
                "name": record.name,
                "spec": record.spec.to_json(),
                "generation": record.generation,
                "created_by": record.created_by,
                "deleting": False,
                "change": change,
            }
            await connection.execute(insert(FLEETS).values(values))
            kept = await self._keep(connection, operation, change)
        self._ring()
        return kept

    async def submit(
        self,
        operation: Operation,
        *,
        spec: FleetSpec | None = None,
        expect: int | None = None,
        asked: int | None = None,
    ) -> Operation:
        """See the port."""
        async with self._database.writing() as connection:
            change = await _next(connection)
            if (earlier := await _earlier(connection, operation.by)) is not None:
                return same_request(earlier, operation)
            record = await _found(connection, operation.fleet)
            deletes = record.deleting and await _deletes(connection, record.id)
            check_submission(record, operation.kind, expect, asked, deletes=deletes)
            if spec is not None or operation.kind is Kind.DELETE:
                await self._change(connection, record, spec, change, deleting=operation.kind is Kind.DELETE)
            kept = await self._keep(connection, operation, change)
        self._ring()
        return kept

    async def _change(
        self, connection: AsyncConnection, record: FleetRecord, spec: FleetSpec | None, change: int, *, deleting: bool
    ) -> None:
        id = uuid.UUID(record.id)
        new: dict[str, Any] = {"change": change, "deleting": deleting}
        if spec is not None:
            new |= {"spec": spec.to_json(), "generation": record.generation + 1}
            await put_cluster(connection, self._insert, cluster_row(spec, namespace=record.namespace, id=id))
        await connection.execute(update(FLEETS).where(FLEETS.c.id == id).values(new))

    async def _keep(self, connection: AsyncConnection, operation: Operation, change: int) -> Operation:
        kept = replace(operation, seq=change)
        await connection.execute(insert(OPERATIONS).values(row_of(kept) | {"change": change}))
        await self._database.note_change(connection, _CHANNEL, "")
        if self._trimmed is None or change - self._trimmed >= self._keeps // 100:
            await self._trim(connection)
            self._trimmed = change
        return kept

    async def _trim(self, connection: AsyncConnection) -> None:
        """Remove what is older than the newest ones. Numbers are those of changes: they do not count operations."""
        newest = select(OPERATIONS.c.seq).order_by(OPERATIONS.c.seq.desc()).offset(self._keeps).limit(1)
        if (last := (await connection.execute(newest)).scalar()) is not None:
            old = (OPERATIONS.c.seq <= last) & OPERATIONS.c.status.not_in(OPEN)
            await connection.execute(delete(OPERATIONS).where(old))

    async def find(self, id: str) -> FleetRecord:
        """See the port."""
        async with self._database.reading() as connection:
            return await _found(connection, id)

    async def fleets(self, *, after: str = "", limit: int = 1000) -> Sequence[FleetRecord | UnreadFleet]:
        """See the port."""
        query = _JOINED.where(FLEETS.c.name > after).order_by(FLEETS.c.name).limit(limit)
        async with self._database.reading() as connection:
            return list(map(record_or_why, await connection.execute(query)))

    async def earlier(self, by: Caller) -> Operation | None:
        """See the port."""
        async with self._database.reading() as connection:
            return await _earlier(connection, by)

    async def operation(self, id: str) -> Operation:
        """See the port."""
        made = _uuid(id)
        if made is not None:
            async with self._database.reading() as connection:
                found = await connection.execute(select(OPERATIONS).where(OPERATIONS.c.id == made))
                if (row := found.one_or_none()) is not None:
                    return operation_of(row)
        raise NotFound(f"there is no operation {id!r:.300}")

    async def operations(self, fleet: str, *, before: int | None = None, limit: int = 100) -> Sequence[Operation]:
        """See the port."""
        query = select(OPERATIONS).where(OPERATIONS.c.fleet == _uuid(fleet)).order_by(OPERATIONS.c.seq.desc())
        found: list[Operation] = []
        async with self._database.reading() as connection:
            while True:  # what cannot be read must not make a page look like the last one
                page = query if before is None else query.where(OPERATIONS.c.seq < before)
                rows = (await connection.execute(page.limit(limit - len(found)))).all()
                found += readable(rows)
                if len(found) == limit or not rows:
                    return found
                before = rows[-1].seq

    async def advance(self, operation: Operation) -> None:
        """See the port."""
        async with self._database.writing(background=True) as connection:
            await self._pass(connection, operation)
            await self._advance(connection, operation)
        self._ring()

    async def _advance(self, connection: AsyncConnection, operation: Operation) -> None:
        new = {"change": await _next(connection)} | {
            name: value
            for name, value in row_of(operation).items()
            if name in ("status", "started_at", "finished_at", "outcome", "epoch")
        }
        which = (OPERATIONS.c.id == uuid.UUID(operation.id)) & OPERATIONS.c.status.in_(OPEN)
        await connection.execute(update(OPERATIONS).where(which).values(new))
        await self._database.note_change(connection, _CHANNEL, "")

    async def _pass(self, connection: AsyncConnection, operation: Operation) -> None:
        passed = await connection.execute(pass_fence(self._insert, operation.fleet, operation.epoch))
        if passed.scalar() is None:
            raise NotLeader(
                f"{operation.name}: a later epoch than {operation.epoch} has begun; what came of operation "
                f"{operation.id} is left to the manager that leads now"
            )

    async def report(self, pictures: Sequence[Picture], *, at: float) -> Sequence[str]:
        """See the port."""
        left_out: list[str] = []
        for batch in _batches(sorted(pictures, key=lambda each: each.fleet)):  # all lock in one order
            async with self._database.writing(background=True) as connection:
                for picture in batch:
                    if picture.fleet not in left_out and not await self._draw(connection, picture, at):
                        left_out.append(picture.fleet)
        return left_out

    async def _draw(self, connection: AsyncConnection, picture: Picture, at: float) -> bool:
        """Write one fleet's picture; False if it is nobody's to write."""
        if (await connection.execute(pass_fence(self._insert, picture.fleet, picture.epoch))).scalar() is None:
            return False
        id = uuid.UUID(picture.fleet)
        which = FLEETS.c.id == id
        if picture.status is not None:
            new = {"status": json.dumps(picture.status), "status_at": at}
            found = bool((await connection.execute(update(FLEETS).where(which).values(new))).rowcount)
        else:
            found = (await connection.execute(select(FLEETS.c.id).where(which))).scalar() is not None
        if found:
            await write_instances(connection, self._insert, id, picture.changed, picture.gone)
        return found

    async def epoch(self, fleet: str) -> int:
        """See the port."""
        async with self._database.reading() as connection:
            return (await connection.execute(latest_epoch(fleet))).scalar() or 0

    async def instances(
        self, fleet: str, *, after: str = "", limit: int = 1000, where: Mapping[str, str] | None = None
    ) -> Sequence[InstanceRow]:
        """See the port."""
        id = _uuid(fleet)
        if id is None:
            return []
        async with self._database.reading() as connection:
            return await read_instances(connection, id, after=after, limit=limit, where=where)

    async def remove(self, id: str, operation: Operation) -> None:
        """See the port."""
        made = uuid.UUID(id)
        async with self._database.writing() as connection:
            await self._pass(connection, operation)
            await connection.execute(delete(FLEETS).where(FLEETS.c.id == made))
            await remove_cluster(connection, made)
            await self._advance(connection, operation)
        self._ring()

    async def news(self, after: int) -> News:
        """See the port."""
        changed = OPERATIONS.c.change > after
        asked = select(OPERATIONS).where(changed).order_by(OPERATIONS.c.seq)
        if not after:
            asked = asked.where(OPERATIONS.c.status.in_(OPEN))
        deleted = (OPERATIONS.c.kind == Kind.DELETE) & (OPERATIONS.c.status == Status.SUCCEEDED)
        async with self._database.reading() as connection:
            position = (await connection.execute(select(FLEETS_HEAD.c.last))).scalar_one()
            fleets = tuple(map(record_or_why, await connection.execute(_JOINED.where(FLEETS.c.change > after))))
            operations = tuple(readable(await connection.execute(asked), level=logging.WARNING))
            gone = (await connection.execute(select(OPERATIONS.c.fleet).where(changed, deleted))).scalars()
            return News(position, fleets, tuple(str(id) for id in gone), operations)

    async def changed(self, after: int) -> None:
        """See the port."""

        async def look() -> bool:
            async with self._database.reading() as connection:
                position: int = (await connection.execute(select(FLEETS_HEAD.c.last))).scalar_one()
            return position > after

        await self._database.changed(_CHANNEL, "", look)

    async def attend(self, identity: str, about: Mapping[str, Any]) -> Mapping[str, Attendance]:
        """See the port."""
        said: Any = self._insert(MANAGERS).values(identity=identity, beats=1, about=json.dumps(about))
        again = {"beats": MANAGERS.c.beats + 1, "about": said.excluded.about}
        async with self._database.writing() as connection:
            await connection.execute(said.on_conflict_do_update(index_elements=["identity"], set_=again))
            rows = await connection.execute(select(MANAGERS))
            return {row.identity: Attendance(row.beats, json.loads(row.about)) for row in rows}

    async def leave(self, identity: str) -> None:
        """See the port."""
        async with self._database.writing() as connection:
            await connection.execute(delete(MANAGERS).where(MANAGERS.c.identity == identity))

    async def ping(self) -> None:
        """See the port."""
        async with self._database.reading() as connection:
            await connection.execute(select(FLEETS_HEAD.c.last))

    def _ring(self) -> None:
        self._database.ring(_CHANNEL, "")


def _batches(pictures: Iterable[Picture]) -> Iterator[Sequence[Picture]]:
    """As much as may be written in one transaction, so that whoever changes something waits shortly."""
    batch: list[Picture] = []
    cost = 0
    for picture in pictures:
        for part in _parts(picture):
            batch.append(part)
            cost += _DRAWN + len(part.changed) + len(part.gone)
            if cost >= _AT_ONCE:
                yield batch
                batch, cost = [], 0
    if batch:
        yield batch


def _parts(picture: Picture) -> Iterator[Picture]:
    """A picture of many instances in several; the first has all that is not about single instances."""
    yield replace(picture, changed=picture.changed[:_AT_ONCE])
    for start in range(_AT_ONCE, len(picture.changed), _AT_ONCE):
        yield Picture(picture.fleet, picture.epoch, changed=picture.changed[start : start + _AT_ONCE])


async def _next(connection: AsyncConnection) -> int:
    """The number of this change. Holds the row until the commit, so that numbers become visible in their order."""
    return int((await connection.execute(_ADVANCE)).scalar_one())


async def _found(connection: AsyncConnection, id: str) -> FleetRecord:
    made = _uuid(id)
    which = FLEETS.c.name == id if made is None else FLEETS.c.id == made
    row = (await connection.execute(_JOINED.where(which))).one_or_none()
    if row is None:
        raise NotFound(f"there is no fleet {id!r:.300}")
    record = record_of(row)
    last = (await connection.execute(_LAST.where(OPERATIONS.c.fleet == row.id))).one_or_none()
    return record if last is None else replace(record, asked=last.asked, pending=last.progress == Status.ACCEPTED)


async def _deletes(connection: AsyncConnection, id: str) -> bool:
    """Whether an operation that deletes a fleet is open."""
    which = (OPERATIONS.c.fleet == uuid.UUID(id)) & (OPERATIONS.c.kind == Kind.DELETE) & OPERATIONS.c.status.in_(OPEN)
    return (await connection.execute(select(OPERATIONS.c.id).where(which).limit(1))).scalar() is not None


async def _named(connection: AsyncConnection, name: str) -> Any:
    return (await connection.execute(select(FLEETS.c.id).where(FLEETS.c.name == name))).scalar()


async def _earlier(connection: AsyncConnection, by: Caller) -> Operation | None:
    """The operation that was kept under the same key."""
    if by.key is None:
        return None
    query = select(OPERATIONS).where(OPERATIONS.c.actor == by.actor, OPERATIONS.c.key == by.key)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else operation_of(row)


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None
