"""The contract of the port for configuration records, held against every implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import insert, text

from agentfleet import ConfigConflict, ConfigError, ConfigStore, Event, MemoryJournal, NotLeader
from agentfleet.errors import KeyReused
from agentfleet.stores.config import ConfigRecords, ConfigRevision, RolloutRecord
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.sql import Database, SqlConfig, SqlJournal, changes
from agentfleet.stores.sql.schema import CONFIG_REVISIONS
from agentfleet.testing.postgres import Postgres

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

Opened = AbstractAsyncContextManager[ConfigRecords]
KINDS = ["memory", "sqlite", "postgres"]


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Opened]:
    """Opens the same records, each time as another process would."""
    if request.param == "memory":
        memory = MemoryConfig()
        url = ""
    elif request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'config.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("prepared"))

    @asynccontextmanager
    async def open_() -> AsyncIterator[ConfigRecords]:
        if not url:
            yield memory
            return
        async with Database(url) as database:
            yield SqlConfig(database)

    return open_


def revision(number: int, key: str = "a", document: str = "{}") -> ConfigRevision:
    return ConfigRevision(key, number, document, 1.5 * number, "ann", f"reason {number}", None, "here", "f" * 64)


async def test_what_a_request_has_published_is_found(opened: Callable[[], Opened]) -> None:
    names = {1: "", 2: "first", 3: "", 4: "second"}
    asked = [replace(revision(number), request=name) for number, name in names.items()]
    async with opened() as records:
        for each in asked:
            await records.append(each, expect=each.revision - 1)
        await records.append(replace(revision(1, "b"), request="third"), expect=0)
    async with opened() as records:
        assert await records.requested("a", "first") == asked[1]
        assert await records.requested("a", "second") == asked[3]
        assert await records.requested("a", "third") is None
        assert asked[1].hash == revision(2).hash


async def test_a_request_that_is_sent_again_publishes_once(opened: Callable[[], Opened]) -> None:
    """Also where it comes many times at once, to several processes, or with what it was based on."""
    why: Any = {"author": "ann", "reason": "because"}
    async with opened() as one, opened() as two:
        stores = [ConfigStore(one), ConfigStore(two)]
        found: list[int] = []

        async def ask(store: ConfigStore, expect: int | None) -> None:
            found.append((await store.put("a", {"n": 1}, expect=expect, request="first", **why)).revision)

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(ask, stores[number % 2], None if number % 4 < 2 else 0)
        assert found == [1] * 8
        second = await stores[0].put("a", {"n": 2}, expect=1, request="second", **why)
        assert await stores[1].put("a", {"n": 2}, expect=1, request="second", **why) == second
        with pytest.raises(KeyReused, match="revision 2"):
            await stores[1].put("a", {"n": 3}, request="second", **why)
        back = await stores[0].rollback("a", 1, expect=2, request="back", **why)
        assert await stores[1].rollback("a", 1, expect=2, request="back", **why) == back
        with pytest.raises(KeyReused):
            await stores[1].rollback("a", 2, request="back", **why)
        assert [each.revision for each in await stores[0].history("a")] == [1, 2, 3]
        assert await stores[0].verify("a") == 3


async def test_what_was_appended_is_read_back_also_by_others(opened: Callable[[], Opened]) -> None:
    odd = ConfigRevision("ключ ☃", 3, '{"n":"\\u0000☃"}', 1e9 + 0.123456, "änn", "line\nbreak", 2, "", "")
    async with opened() as records:
        for number in (1, 2, 5):  # numbers rise, and may leave some out
            await records.append(revision(number), expect={1: 0, 2: 1, 5: 2}[number])
        await records.append(odd, expect=0)
    async with opened() as records:
        assert await records.newest("a") == revision(5)
        assert await records.newest(odd.key) == odd
        assert await records.newest("b") is None
        assert [await records.find("a", number) for number in (0, 1, 3, 5, 10**30)] == [
            None,
            revision(1),
            None,
            revision(5),
            None,
        ]
        assert list(await records.after("a", 1, 10)) == [revision(2), revision(5)]
        assert list(await records.after("a", 0, 2)) == [revision(1), revision(2)]
        assert list(await records.after("a", 5, 10)) == list(await records.after("b", 0, 10)) == []
        assert list(await records.keys()) == sorted(["a", odd.key])


async def test_of_two_writers_one_is_refused_and_nothing_of_it_is_kept(opened: Callable[[], Opened]) -> None:
    async with opened() as records:
        await records.append(revision(1), expect=0)
        for expect in (0, 2):
            with pytest.raises(ConfigConflict):
                await records.append(revision(2), expect=expect)
        assert await records.newest("a") == revision(1)
        assert len(await records.after("a", 0, 10)) == 1


async def test_writers_who_race_lose_none_and_repeat_none(opened: Callable[[], Opened]) -> None:
    """Eight writers, each through a connection of its own, add one to what they have read."""
    won: list[int] = []

    async def write(times: int) -> None:
        async with opened() as records:
            while times:
                newest = await records.newest("a")
                number = 0 if newest is None else newest.revision
                try:
                    await records.append(revision(number + 1), expect=number)
                except ConfigConflict:
                    continue
                won.append(number + 1)
                times -= 1

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(write, 5)
    assert sorted(won) == list(range(1, 41))
    async with opened() as records:
        assert [each.revision for each in await records.after("a", 0, 100)] == list(range(1, 41))


async def test_who_waits_is_woken_by_whoever_writes(
    opened: Callable[[], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the notice itself: whoever waits does not look again by himself here."""
    monkeypatch.setattr(changes, "_LOOK", 3600.0)
    async with opened() as records, opened() as others, anyio.create_task_group() as tasks:
        woken = anyio.Event()

        async def wait() -> None:
            await records.changed("a", 1)
            newest = await records.newest("a")
            while newest is None or newest.revision < 2:  # it may return early
                await records.changed("a", 1)
                newest = await records.newest("a")
            woken.set()

        await others.append(revision(1), expect=0)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await others.append(revision(1, "b"), expect=0)
        assert not woken.is_set()
        await others.append(revision(2), expect=1)
        with anyio.fail_after(20):
            await woken.wait()
            await records.changed("a", 0)  # what has changed already is not waited for


async def test_how_far_a_rollout_has_come_is_compared_and_set(opened: Callable[[], Opened]) -> None:
    first = RolloutRecord("a", 1, 2, 1, "progressing", {"i-1": [1.5, 0, None]}, {"ring": 0}, ({"code": "x"},), epoch=3)
    second = replace(first, version=2, phase="complete", trials={}, epoch=4)
    async with opened() as records:
        await records.append(revision(1), expect=0)
        assert await records.rollout("a") is None
        await records.advance(first, expect=0)
        for expect in (0, 2):
            with pytest.raises(ConfigConflict):
                await records.advance(replace(first, version=expect + 1, phase="failed"), expect=expect)
        await records.advance(replace(first, key="b"), expect=0)
    async with opened() as records:
        assert await records.rollout("a") == first
        await records.advance(second, expect=1)
        with pytest.raises(NotLeader):
            await records.advance(replace(first, version=3, phase="failed"), expect=2)
        assert await records.rollout("a") == second
        assert await records.rollout("b") == replace(first, key="b")


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
async def test_a_leader_that_the_journal_knows_to_be_deposed_rolls_out_nothing(database_url: str) -> None:
    """Also in a database where an earlier version has written both through one fence."""
    record = RolloutRecord("a", 1, 2, 1, "progressing", epoch=3)
    async with Database(database_url) as database:
        records = SqlConfig(database)
        await records.advance(record, expect=0)
        with SqlJournal(database_url) as journal:
            journal.append(Event(1.0, "a", "k", epoch=4))
            with pytest.raises(NotLeader, match="epoch 4"):
                await records.advance(replace(record, version=2), expect=1)
            await records.advance(replace(record, version=2, epoch=5), expect=1)
            journal.append(Event(2.0, "a", "k", epoch=4))  # a later leader says in the journal itself that it leads
        with pytest.raises(NotLeader, match="epoch 5"):
            await records.advance(replace(record, version=3, epoch=4), expect=2)


async def test_events_are_told_while_a_rollout_is_written_down(
    postgres: Postgres, prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append blocks the event loop: whatever row it waited for, its own process could not give it free."""
    url = postgres.database(like=prepared)
    async with Database(url) as database:
        note = database.note_change

        async def tell_meanwhile(connection: Any, channel: str, key: str) -> None:
            for epoch in (3, 4):
                assert journal.append(Event(1.0, "a", "config.refused", epoch=epoch)).seq
            await note(connection, channel, key)

        monkeypatch.setattr(database, "note_change", tell_meanwhile)
        with SqlJournal(url, timeout=1.0) as journal:
            records = SqlConfig(database)
            await records.advance(RolloutRecord("a", 1, 2, 1, "progressing", epoch=3), expect=0)
            assert len(journal.read()) == 2
            with pytest.raises(NotLeader):  # the one that was written is behind now
                await records.advance(RolloutRecord("a", 2, 2, 1, "progressing", epoch=3), expect=1)


async def test_leaders_who_race_write_each_version_once(opened: Callable[[], Opened]) -> None:
    won: list[int] = []

    async def write(times: int) -> None:
        async with opened() as records:
            while times:
                known = await records.rollout("a")
                version = 0 if known is None else known.version
                try:
                    await records.advance(RolloutRecord("a", version + 1, 2, 1, "progressing", epoch=1), expect=version)
                except ConfigConflict:
                    continue
                won.append(version + 1)
                times -= 1

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(write, 5)
    assert sorted(won) == list(range(1, 26))


async def test_who_waits_for_a_rollout_is_woken_by_whoever_leads(
    opened: Callable[[], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_LOOK", 3600.0)
    async with opened() as records, opened() as others, anyio.create_task_group() as tasks:
        await others.append(revision(1), expect=0)
        await others.advance(RolloutRecord("a", 1, 1, 0, "progressing"), expect=0)
        woken = anyio.Event()

        async def wait() -> None:
            known = await records.rollout("a")
            while known is None or known.version < 2:  # it may return early
                await records.changed("a", 1, 1)
                known = await records.rollout("a")
            woken.set()

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert not woken.is_set()
        await others.advance(RolloutRecord("a", 2, 1, 0, "complete"), expect=1)
        with anyio.fail_after(20):
            await woken.wait()
            await records.changed("a", 1, 1)  # what has changed already is not waited for
            await records.changed("a", 0)


async def test_a_store_on_them_watches_what_another_one_publishes(opened: Callable[[], Opened]) -> None:
    async with opened() as mine, opened() as theirs:
        reader, writer = ConfigStore(mine), ConfigStore(theirs)
        seen: list[int] = []

        async def read() -> None:
            async for each in reader.watch("a"):
                seen.append(each.document["n"])
                if len(seen) == 60:
                    return

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                for number in range(60):
                    await writer.put("a", {"n": number}, author="ann", reason="count", origin="a test")
        assert seen == list(range(60))
        assert await reader.verify("a") == 60
        assert (await reader.get("a")).origin == "a test"


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("what", ["text", "author", "newest", "left out", "cut off", "first", "first two"])
async def test_who_alters_what_was_published_is_found(database_url: str, what: str) -> None:
    async with Database(database_url) as database:
        store = ConfigStore(SqlConfig(database), journal=MemoryJournal())
        for number in range(1, 71):  # more than one page
            await store.put("a", {"n": number}, author="ann", reason="count")
        assert await store.verify("a") == 70
        change = {
            "text": "UPDATE config_revisions SET text = '{}' WHERE revision = 66",
            "author": "UPDATE config_revisions SET author = 'bob' WHERE revision = 66",
            "newest": "UPDATE config_revisions SET text = '{}' WHERE revision = 70",
            "left out": "DELETE FROM config_revisions WHERE revision = 66",
            "cut off": "DELETE FROM config_revisions WHERE revision > 66",
            "first": "DELETE FROM config_revisions WHERE revision = 1",
            "first two": "DELETE FROM config_revisions WHERE revision < 3",
        }[what]
        async with database.writing() as connection:
            await connection.execute(text(change))
        named = {"newest": "70", "left out": "65", "cut off": "70 to 66", "first": "2 is not", "first two": "3 is not"}
        found = named.get(what, "66")
        with pytest.raises(ConfigError, match=f"revision {found}"):
            await store.verify("a")


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
async def test_what_is_cut_off_is_found_without_a_journal(database_url: str) -> None:
    """By a process that has not seen it, too: the newest's number is kept beside."""
    async with Database(database_url) as database:
        store = ConfigStore(SqlConfig(database))
        for number in range(1, 4):
            await store.put("a", {"n": number}, author="ann", reason="count")
        async with database.writing() as connection:
            await connection.execute(text("DELETE FROM config_revisions WHERE revision = 3"))
        with pytest.raises(ConfigError, match="revision 3, the newest, is not there"):
            await ConfigStore(SqlConfig(database)).verify("a")


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("numbers", [[4], [5, 6], [4, 5, 900]])
async def test_a_revision_that_is_put_in_is_nobodys_configuration(database_url: str, numbers: list[int]) -> None:
    """Also one whose hashes fit: it is not shown, it is found, and it keeps nobody from publishing."""
    async with Database(database_url) as database:
        records, journal = SqlConfig(database), MemoryJournal()
        store = ConfigStore(records, journal=journal)
        for key in ("a", "b"):
            for number in range(1, 4):
                await store.put(key, {"n": number}, author="ann", reason="count")
        before = await store.get("a")
        async with database.writing() as connection:
            for number in numbers:
                forged = replace(before, revision=number, text="{}", author="eve", request="r", previous=before.hash)
                await connection.execute(insert(CONFIG_REVISIONS).values(asdict(forged)))
                before = forged
        for each in (store, ConfigStore(SqlConfig(database), journal=journal)):
            assert (await each.get("a")).revision == 3
            assert [found.revision for found in await each.history("a")] == [1, 2, 3]
            assert await records.find("a", numbers[0]) is None
            assert await records.requested("a", "r") is None
            with pytest.raises(ConfigError, match=f"revision {numbers[-1]} was put in by hand.* delete the row"):
                await each.verify("a")
            assert await each.verify("b") == 3
        for number in range(4, 8):
            assert (await store.put("a", {"n": number}, author="ann", reason="go on")).revision == number
        assert {found.author for found in await store.history("a")} == {"ann"}
        with pytest.raises(ConfigError, match="put in by hand"):
            await store.verify("a")
        async with database.writing() as connection:
            gone = await connection.execute(text("DELETE FROM config_revisions WHERE author = 'eve'"))
            assert gone.rowcount == len(numbers), "evidence is kept"
        assert await store.verify("a") == 7


async def test_a_database_that_goes_away_is_said_and_found_again(postgres: Postgres, prepared: str) -> None:
    with Postgres() as server:
        url = server.database()
        async with Database(url, timeout=5) as database:
            store = ConfigStore(SqlConfig(database))
            first = await store.put("a", {}, author="ann", reason="first")
            watch = store.watch("a", after=first.revision)
            server.kill()
            with pytest.raises(ConfigError):
                await store.get("a")
            server.start()
            async with anyio.create_task_group() as tasks:
                got: list[ConfigRevision] = []

                async def read() -> None:
                    got.append(await watch.__anext__())

                tasks.start_soon(read)
                await store.put("a", {"n": 2}, author="ann", reason="second")
            assert [each.revision for each in got] == [2]
