"""The contract of the port for fleets and operations, held against every store."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from agentfleet.errors import Conflict, NotFound, NotLeader, OperationRefused
from agentfleet.operations import Caller, Kind, Operation, Status
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.stores.fleets import FleetRecord, FleetRecords, InstanceRow, Picture
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.sql import Database, SqlFleetRecords
from agentfleet.testing.postgres import Postgres

pytestmark = pytest.mark.anyio
PORTS: list[type[FleetRecords]] = [MemoryFleets, SqlFleetRecords]  # mypy checks that both are such stores
NOW = 1_700_000_000.0


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@asynccontextmanager
async def opened(url: str | None) -> AsyncIterator[FleetRecords]:
    if url is None:
        yield MemoryFleets()
        return
    async with Database(url) as database:
        yield SqlFleetRecords(database)


def address(request: pytest.FixtureRequest, folder: Path) -> str | None:
    if request.param == "memory":
        return None
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'fleets.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(like=request.getfixturevalue("prepared"))


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def records(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FleetRecords]:
    async with opened(address(request, tmp_path)) as made:
        yield made


def spec(name: str = "a", **more: Any) -> FleetSpec:
    return FleetSpec(name=name, template=AgentTemplate(command=("agent",)), **more)


def record(name: str = "a", **more: Any) -> FleetRecord:
    wanted = spec(name, **more)
    return FleetRecord(str(uuid.uuid4()), name, "labs", wanted, NOW, "ann")


def ask(of: FleetRecord, kind: Kind, by: Caller | None = None, **arguments: Any) -> Operation:
    return Operation(str(uuid.uuid4()), of.id, of.name, kind, arguments, by or Caller("ann"), NOW)


async def made(records: FleetRecords, name: str = "a") -> tuple[FleetRecord, Operation]:
    new = record(name)
    return new, await records.create(new, ask(new, Kind.CREATE))


async def test_what_is_created_is_found_by_id_and_name(records: FleetRecords) -> None:
    new, operation = await made(records)
    assert await records.find(new.id) == new
    assert await records.find("a") == new
    assert operation.seq > 0
    assert await records.operation(operation.id) == operation
    for unknown in (str(uuid.uuid4()), "b", "", "☃" * 1000):
        with pytest.raises(NotFound):
            await records.find(unknown)
        with pytest.raises(NotFound):
            await records.operation(unknown)


async def test_a_name_is_one_fleets(records: FleetRecords) -> None:
    await made(records)
    other = record()
    operation = ask(other, Kind.CREATE)
    with pytest.raises(OperationRefused, match="already"):
        await records.create(other, operation)
    assert len(await records.fleets()) == 1
    with pytest.raises(NotFound):
        await records.operation(operation.id)


async def test_of_many_who_take_a_name_at_once_one_has_it(records: FleetRecords) -> None:
    results: list[str] = []

    async def take() -> None:
        new = record()
        try:
            await records.create(new, ask(new, Kind.CREATE))
        except OperationRefused:
            results.append("refused")
        else:
            results.append("made")

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(take)
    assert sorted(results) == ["made"] + ["refused"] * 7


async def test_the_same_request_again_is_the_same_operation(records: FleetRecords) -> None:
    new = record()
    by = Caller("ann", "10.0.0.1", "k1")
    first = await records.create(new, ask(new, Kind.CREATE, by, spec={"x": 1}))
    again = record()  # the client has made up another id, because it does not know the first
    assert await records.create(again, ask(again, Kind.CREATE, by, spec={"x": 1})) == first
    scale = await records.submit(ask(new, Kind.SCALE, Caller("ann", key="k2"), replicas=3))
    assert (await records.submit(ask(new, Kind.SCALE, Caller("ann", key="k2"), replicas=3))).id == scale.id
    with pytest.raises(OperationRefused, match="idempotency key"):
        await records.submit(ask(new, Kind.SCALE, Caller("ann", key="k2"), replicas=4))
    other = await records.submit(ask(new, Kind.SCALE, Caller("ben", key="k2"), replicas=4))
    assert other.id != scale.id, "keys are each actor's own"
    assert [each.id for each in await records.operations(new.id)] == [other.id, scale.id, first.id]
    assert await records.earlier(by) == first
    assert await records.earlier(Caller("ben", key="k2")) == other
    assert await records.earlier(Caller("ben", key="k1")) is None
    assert await records.earlier(Caller("ann")) is None


async def test_of_one_request_sent_many_times_at_once_one_is_kept(records: FleetRecords) -> None:
    new, _ = await made(records)
    found: set[str] = set()

    async def send() -> None:
        found.add((await records.submit(ask(new, Kind.SCALE, Caller("ann", key="k"), replicas=3))).id)

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(send)
    assert len(found) == 1
    assert len(await records.operations(new.id)) == 2


async def test_a_spec_is_changed_by_who_knows_the_present_one(records: FleetRecords) -> None:
    new, _ = await made(records)
    wider = spec(replicas=7)
    await records.submit(ask(new, Kind.APPLY), spec=wider, expect=1)
    found = await records.find(new.id)
    assert (found.spec, found.generation, found.created_at) == (wider, 2, NOW)
    refused = ask(new, Kind.APPLY)
    with pytest.raises(Conflict, match="generation 2"):
        await records.submit(refused, spec=spec(replicas=9), expect=1)
    assert await records.find(new.id) == found
    with pytest.raises(NotFound):
        await records.operation(refused.id)
    await records.submit(ask(new, Kind.APPLY), spec=spec(replicas=9))
    assert (await records.find(new.id)).generation == 3


async def test_an_operation_may_be_based_on_the_last_that_asked_for_a_template_or_size(records: FleetRecords) -> None:
    new, _ = await made(records)
    assert ((await records.find(new.id)).asked, (await records.find(new.id)).pending) == (0, False)
    await records.submit(ask(new, Kind.PAUSE), asked=0)
    assert (await records.find("a")).asked == 0, "that asks for neither"
    scale = await records.submit(ask(new, Kind.SCALE, replicas=3), asked=0)
    assert ((await records.find("a")).asked, (await records.find("a")).pending) == (scale.seq, True)
    for asked in (0, scale.seq + 1):
        with pytest.raises(Conflict, match="since"):
            await records.submit(ask(new, Kind.APPLY), spec=spec(replicas=9), expect=1, asked=asked)
    await records.advance(scale.moved(Status.RUNNING, NOW))
    assert ((await records.find("a")).asked, (await records.find("a")).pending) == (scale.seq, False)
    await records.submit(ask(new, Kind.DELETE), asked=scale.seq)


async def test_a_fleet_that_is_being_deleted_takes_nothing_more(records: FleetRecords) -> None:
    new, _ = await made(records)
    await records.submit(ask(new, Kind.DELETE))
    assert (await records.find(new.id)).deleting
    for kind in (Kind.SCALE, Kind.DELETE):
        with pytest.raises(OperationRefused, match="being deleted"):
            await records.submit(ask(new, kind))
    gone = record("never")
    with pytest.raises(NotFound):
        await records.submit(ask(gone, Kind.SCALE))


async def test_a_deletion_that_has_failed_may_be_asked_for_again(records: FleetRecords) -> None:
    new, _ = await made(records)
    failed = await records.submit(ask(new, Kind.DELETE))
    await records.advance(replace(failed.moved(Status.RUNNING, NOW).moved(Status.FAILED, NOW, error="X"), epoch=1))
    assert (await records.find(new.id)).deleting
    with pytest.raises(OperationRefused, match="delete it again"):
        await records.submit(ask(new, Kind.SCALE))
    again = await records.submit(ask(new, Kind.DELETE), expect=1)
    assert [each.id for each in (await records.operations(new.id))[:2]] == [again.id, failed.id]
    await records.advance(replace(again.moved(Status.RUNNING, NOW), epoch=1))
    for kind in (Kind.SCALE, Kind.DELETE):
        with pytest.raises(OperationRefused, match="being deleted"):
            await records.submit(ask(new, kind))


async def test_pages_of_fleets_and_operations(records: FleetRecords) -> None:
    for name in ("c", "a", "b"):
        await made(records, name)
    assert [each.name for each in await records.fleets(limit=2)] == ["a", "b"]
    assert [each.name for each in await records.fleets(after="b")] == ["c"]
    fleet = await records.find("a")
    kept = [await records.submit(ask(fleet, Kind.SCALE, replicas=size)) for size in range(5)]
    newest = await records.operations(fleet.id, limit=2)
    assert [each.id for each in newest] == [kept[4].id, kept[3].id]
    assert [each.id for each in await records.operations(fleet.id, before=newest[-1].seq, limit=2)] == [
        kept[2].id,
        kept[1].id,
    ]


async def test_an_operation_advances_and_ends_once(records: FleetRecords) -> None:
    new, operation = await made(records)
    running = replace(operation.moved(Status.RUNNING, NOW + 1, revision=1), epoch=1)
    await records.advance(running)
    assert await records.operation(operation.id) == running
    ended = running.moved(Status.SUCCEEDED, NOW + 2, size=3)
    await records.advance(ended)
    await records.advance(replace(running, outcome={"late": True}))
    kept = await records.operation(operation.id)
    assert (kept.status, kept.outcome, kept.finished_at) == (Status.SUCCEEDED, {"revision": 1, "size": 3}, NOW + 2)
    assert not kept.open
    assert (await records.find(new.id)) == new


async def test_a_deposed_leader_writes_nothing(records: FleetRecords) -> None:
    new, operation = await made(records)
    other, _ = await made(records, "b")
    row = InstanceRow("i1", "idle")
    told = [Picture(new.id, 2, {"good": 1}, [row]), Picture(other.id, 1, {"good": 1}, [row])]
    assert await records.epoch(new.id) == 0
    assert await records.report(told, at=NOW) == []
    stale = Picture(new.id, 1, {"good": 9}, [InstanceRow("i2", "idle")], ["i1"])
    fresh = Picture(other.id, 1, {"good": 2})
    assert (await records.epoch(new.id), await records.epoch(other.id)) == (2, 1)
    assert await records.report([stale, fresh], at=NOW + 1) == [new.id], "the others' words are kept"
    assert (await records.find(new.id)).status == {"good": 1}
    assert (await records.find(other.id)).status == {"good": 2}
    assert await records.instances(new.id) == [row]
    with pytest.raises(NotLeader):
        await records.advance(replace(operation.moved(Status.RUNNING, NOW), epoch=1))
    with pytest.raises(NotLeader):
        await records.remove(new.id, replace(operation.moved(Status.RUNNING, NOW), epoch=1))
    assert (await records.operation(operation.id)).status is Status.ACCEPTED
    await records.advance(replace(operation.moved(Status.RUNNING, NOW), epoch=2))


async def test_instances_come_change_and_go(records: FleetRecords) -> None:
    new, _ = await made(records)
    rows = [InstanceRow(f"i{n}", "idle" if n else "sick", cpu_usage=0.5, restarts=n, detail="why") for n in range(3)]
    await records.report([Picture(new.id, 1, None, rows)], at=NOW)
    assert await records.instances(new.id) == rows
    beat = datetime.fromtimestamp(NOW + 5, UTC)
    changed = replace(rows[1], status="busy", version="2", revision=2, config_revision=4, last_heartbeat=beat)
    await records.report([Picture(new.id, 1, None, [changed], ["i2", "i9"])], at=NOW + 5)
    assert await records.instances(new.id) == [rows[0], changed]
    assert [row.instance_id for row in await records.instances(new.id, after="i0", limit=1)] == ["i1"]
    assert (await records.find(new.id)).status == {}


async def test_many_instances_are_told_in_one_call(records: FleetRecords) -> None:
    new, _ = await made(records)
    rows = [InstanceRow(f"i{n:04}", "idle") for n in range(1_000)]
    assert await records.report([Picture(new.id, 1, {"good": 1_000}, rows)], at=NOW) == []
    assert await records.instances(new.id) == rows
    assert (await records.find(new.id)).status == {"good": 1_000}
    gone = [row.instance_id for row in rows[1:]]
    await records.report([Picture(new.id, 1, None, (), gone)], at=NOW)
    assert await records.instances(new.id) == rows[:1]


async def test_a_fleet_whose_deletion_is_complete_is_gone_and_its_operations_tell(records: FleetRecords) -> None:
    new, _ = await made(records)
    await records.report([Picture(new.id, 1, {"good": 1}, [InstanceRow("i1", "idle")])], at=NOW)
    deletion = await records.submit(ask(new, Kind.DELETE))
    before = (await records.news(0)).position
    await records.remove(new.id, replace(deletion.moved(Status.RUNNING, NOW).moved(Status.SUCCEEDED, NOW), epoch=1))
    with pytest.raises(NotFound):
        await records.find(new.id)
    assert await records.fleets() == []
    assert await records.instances(new.id) == []
    assert (await records.operation(deletion.id)).status is Status.SUCCEEDED
    assert new.id in (await records.news(before)).gone
    again, _ = await made(records)
    assert again.id != new.id
    assert await records.report([Picture(new.id, 1, {"good": 1})], at=NOW) == [new.id], "it is no more"
    assert (await records.find("a")).status == {}


async def test_news_tell_what_has_changed_and_nothing_twice(records: FleetRecords) -> None:
    assert (await records.news(0)).position == 0
    first, operation = await made(records)
    news = await records.news(0)
    assert [each.id for each in news.fleets] == [first.id]
    assert [each.id for each in news.operations] == [operation.id]
    assert await records.news(news.position) == replace(news, fleets=(), operations=())
    scale = await records.submit(ask(first, Kind.SCALE, replicas=3))
    later = await records.news(news.position)
    assert (later.fleets, [each.id for each in later.operations]) == ((), [scale.id])
    await records.advance(replace(scale.moved(Status.RUNNING, NOW).moved(Status.FAILED, NOW, error="X"), epoch=1))
    ended = await records.news(later.position)
    assert [each.status for each in ended.operations] == [Status.FAILED], "who waits for it must know"
    await records.report([Picture(first.id, 1, {"good": 3})], at=NOW)
    assert (await records.news(ended.position)).fleets == (), "how it stands is no news of what is wanted"
    begun_anew = await records.news(0)
    assert [each.id for each in begun_anew.operations] == [operation.id], "what has ended is history"


async def test_whoever_waits_is_woken_by_a_change(records: FleetRecords) -> None:
    new, _ = await made(records)
    position = (await records.news(0)).position
    woken = anyio.Event()

    async def wait() -> None:
        while not (await records.news(position)).operations:
            await records.changed(position)
        woken.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.lowlevel.checkpoint()
            await records.submit(ask(new, Kind.PAUSE))
            await woken.wait()
        await records.changed(position)
        await records.ping()


async def test_managers_say_that_they_are_there(records: FleetRecords) -> None:
    assert (await records.attend("m1", {"leads": 1}))["m1"].beats == 1
    await records.attend("m2", {"leads": 0})
    found = await records.attend("m1", {"leads": 2})
    assert {id: (each.beats, each.about) for id, each in found.items()} == {
        "m1": (2, {"leads": 2}),
        "m2": (1, {"leads": 0}),
    }
    for _ in range(2):
        await records.leave("m1")
    assert list(await records.attend("m2", {})) == ["m2"]


@pytest.mark.parametrize("records", ["sqlite", "postgres"], indirect=True)
async def test_what_is_kept_is_there_after_a_restart(records: Any) -> None:
    new, operation = await made(records)
    await records.report([Picture(new.id, 3, {"good": 1}, [InstanceRow("i1", "idle")])], at=NOW)
    async with Database(records._database.url) as database:
        again = SqlFleetRecords(database)
        assert replace(await again.find("a"), status={}, status_at=None) == new
        assert await again.operation(operation.id) == operation
        assert await again.instances(new.id) == [InstanceRow("i1", "idle")]
        with pytest.raises(NotLeader):
            await again.advance(replace(operation.moved(Status.RUNNING, NOW), epoch=2))


@pytest.mark.parametrize("records", ["sqlite", "postgres"], indirect=True)
async def test_the_newest_operations_are_kept_however_often_each_has_changed(records: Any) -> None:
    few = SqlFleetRecords(records._database, keep=3)
    new, creation = await made(few)
    left_open, *asked = [await few.submit(ask(new, Kind.SCALE, replicas=size)) for size in range(5)]
    for each in (creation, *asked):
        running = replace(each.moved(Status.RUNNING, NOW), epoch=1)
        for step in range(4):
            running = replace(running, outcome={"step": step})
            await few.advance(running)
        await few.advance(running.moved(Status.SUCCEEDED, NOW))
    last = await few.submit(ask(new, Kind.PAUSE))
    kept = [each.id for each in await few.operations(new.id)]
    assert kept == [each.id for each in (last, *reversed(asked[-2:]), left_open)]


@pytest.mark.parametrize("records", ["sqlite", "postgres"], indirect=True)
async def test_another_process_is_woken_too(records: Any) -> None:
    new, _ = await made(records)
    position = (await records.news(0)).position
    async with Database(records._database.url) as database:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(SqlFleetRecords(database).changed, position)
                await records.submit(ask(new, Kind.PAUSE))
