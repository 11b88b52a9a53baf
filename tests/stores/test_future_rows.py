"""Rows that a newer version has written, as in a rolling upgrade: this version leaves them alone and goes on."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import insert, select, update

from agentfleet import AgentTemplate, FleetManager, FleetSpec, MemoryBackend, MemoryJournal
from agentfleet.errors import RecordUnreadable
from agentfleet.operations import Caller, Kind, Status
from agentfleet.stores.fleets import FleetRecord, UnreadFleet
from agentfleet.stores.sql import Database, SqlFleetRecords
from agentfleet.stores.sql.schema import FLEETS, FLEETS_HEAD, OPERATIONS

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite:///{tmp_path / 'fleets.db'}"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").database(like=request.getfixturevalue("prepared"))
    async with Database(url) as made:
        yield made


def spec(name: str, replicas: int = 1) -> FleetSpec:
    return FleetSpec(name=name, template=AgentTemplate(command=("agent",)), replicas=replicas)


@asynccontextmanager
async def managing(database: Database, journal: MemoryJournal) -> AsyncIterator[FleetManager]:
    backend = MemoryBackend(start_delay=0.01, stop_delay=0.01)
    with anyio.fail_after(30):
        async with FleetManager(SqlFleetRecords(database), backend=backend, journal=journal, period=0.05) as made:
            yield made


async def until(holds: Any) -> None:
    with anyio.fail_after(20):
        while not holds():  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.01)


async def tell(database: Database, *changes: Any) -> None:
    """What another process has written."""
    async with database.writing() as connection:
        for change in changes:
            head = update(FLEETS_HEAD).values(last=FLEETS_HEAD.c.last + 1).returning(FLEETS_HEAD.c.last)
            number = (await connection.execute(head)).scalar_one()
            more = {"seq": number} if change.table is OPERATIONS and change.is_insert else {}
            await connection.execute(change.values(change=number, **more))
        await database.note_change(connection, "fleets", "")
    database.ring("fleets", "")


async def spec_of_the_future(database: Database, fleet: str) -> Any:
    async with database.reading() as connection:
        which = FLEETS.c.id == uuid.UUID(fleet)
        kept = json.loads((await connection.execute(select(FLEETS.c.spec).where(which))).scalar_one())
    kept["moods"] = ["calm"]
    return update(FLEETS).where(which).values(spec=json.dumps(kept), generation=FLEETS.c.generation + 1)


def asked_in_the_future(fleet: str, kind: str, arguments: dict[str, Any], id: uuid.UUID) -> Any:
    return insert(OPERATIONS).values(
        id=id,
        fleet=uuid.UUID(fleet),
        name="a",
        kind=kind,
        arguments=json.dumps(arguments),
        actor="ann",
        origin="",
        key=str(id),
        created_at=1.0,
        status="accepted",
        outcome="{}",
        epoch=0,
    )


async def test_a_spec_of_a_newer_version_closes_that_fleet_alone(database: Database) -> None:
    journal = MemoryJournal()
    async with managing(database, journal) as manager:
        first = await manager.create(spec("a"))
        await manager.finished((await manager.create(spec("b"))).id)
        await manager.finished(first.id)
        await tell(database, await spec_of_the_future(database, first.fleet))
        await until(lambda: "moods" in manager.health().closed.get("a", ""))
        assert manager.fleet(first.fleet) is None
        assert (await manager.finished((await manager.request("b", Kind.SCALE, {"replicas": 2})).id)).status == (
            Status.SUCCEEDED
        )
        listed = await manager.fleets()
        assert [(each.name, type(each)) for each in listed] == [("a", UnreadFleet), ("b", FleetRecord)]
        assert listed[0].status["good"] == 1, "how it stands can be read"
        for call in (manager.get("a"), manager.request("a", Kind.PAUSE), manager.apply("a", spec("a", 3))):
            with pytest.raises(RecordUnreadable, match="newer"):
                await call
    async with managing(database, journal) as manager:
        await until(lambda: "moods" in manager.health().closed.get("a", "") and manager.health().leads == 1)
        await tell(database, update(FLEETS).where(FLEETS.c.name == "a").values(spec=spec("a", 2).to_json()))
        await until(lambda: manager.health().leads == 2)
        assert manager.health().closed == {}


async def test_operations_of_a_newer_version_stay_as_they_are(database: Database) -> None:
    journal = MemoryJournal()
    async with managing(database, journal) as manager:
        first = await manager.create(spec("a"))
        await manager.finished(first.id)
        ids = [uuid.uuid4() for _ in range(4)]
        await tell(
            database,
            asked_in_the_future(first.fleet, "hibernate", {}, ids[0]),
            asked_in_the_future(first.fleet, "scale", {"replicas": 3, "gently": True}, ids[1]),
            asked_in_the_future(first.fleet, "deploy", {"version": None, "changes": {"mood": "calm"}}, ids[2]),
            asked_in_the_future(first.fleet, "pause", {}, ids[3]).values(status="scheduled"),
        )
        scaled = await manager.request("a", Kind.SCALE, {"replicas": 2})
        assert (await manager.finished(scaled.id)).status is Status.SUCCEEDED, "what this version knows is done"
        for id in (ids[0], ids[3]):
            with pytest.raises(RecordUnreadable, match="newer"):
                await manager.operation(str(id))
        page = await manager.operations("a", limit=3)
        assert [each.id for each in page] == [scaled.id, str(ids[2]), str(ids[1])], "a page is full"
        assert [each.id for each in await manager.operations("a", before=page[-1].seq)] == [first.id]
        with pytest.raises(RecordUnreadable):
            await manager.request("a", Kind.PAUSE, by=Caller("ann", key=str(ids[0])))
    async with managing(database, journal) as manager:
        await until(lambda: manager.health().leads == 1)
        assert (await manager.finished((await manager.request("a", Kind.PAUSE)).id)).status is Status.SUCCEEDED
    async with database.reading() as connection:
        which = OPERATIONS.c.id.in_(ids)
        rows = await connection.execute(select(OPERATIONS.c.status, OPERATIONS.c.outcome).where(which))
        assert sorted(tuple(row) for row in rows) == [("accepted", "{}")] * 3 + [("scheduled", "{}")]
