"""The contract of the port to where it is kept who runs which configuration, held against every implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from agentfleet import configacks
from agentfleet.clock import SystemClock
from agentfleet.configacks import AckBook
from agentfleet.errors import ConfigError
from agentfleet.stores.acks import ConfigAck, ConfigAcks, MemoryAcks
from agentfleet.stores.sql import Database, SqlAcks, changes
from agentfleet.testing.postgres import Postgres

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

Opened = AbstractAsyncContextManager[ConfigAcks]


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Opened]:
    """Opens the same place, each time as another process would."""
    memory, url = MemoryAcks(), ""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'acks.db'}"
    elif request.param == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("prepared"))

    @asynccontextmanager
    async def open_() -> AsyncIterator[ConfigAcks]:
        if not url:
            yield memory
            return
        async with Database(url) as database:
            yield SqlAcks(database)

    return open_


def ack(number: int, revision: int = 1) -> ConfigAck:
    return ConfigAck(f"i-{number}", revision, revision + 1, "no\nsuch ☃", "stream", 1e9 + number / 7)


async def test_the_last_word_of_each_is_kept_and_read_in_batches(opened: Callable[[], Opened]) -> None:
    async with opened() as acks, opened() as others:
        assert await acks.after("a", 0) == (0, [])
        await acks.write("a", [ack(1), ack(2), ack(2, 5)])
        first, found = await others.after("a", 0)
        assert sorted(found, key=lambda each: each.instance) == [ack(1), ack(2, 5)]
        await others.write("a", [ack(3)])
        await others.write("b", [ack(9)])
        second, found = await acks.after("a", first)
        assert (second > first, list(found)) == (True, [ack(3)])
        assert await acks.after("a", second) == (second, [])
        await acks.write("a", [replace(ack(1), revision=7)], gone=["i-2", "never there"])
        third, found = await others.after("a", second)
        assert [(each.instance, each.revision) for each in found] == [("i-1", 7)]
        _, everything = await others.after("a", 0)
        assert {each.instance for each in everything} == {"i-1", "i-3"}
        assert third > second


async def test_a_thousand_at_once_of_whom_many_go(opened: Callable[[], Opened]) -> None:
    async with opened() as acks:
        await acks.write("a", [ack(number) for number in range(1000)])
        await acks.write("a", [], gone=[f"i-{number}" for number in range(900)])
        _, found = await acks.after("a", 0)
        assert {each.instance for each in found} == {f"i-{number}" for number in range(900, 1000)}


async def test_no_reader_misses_a_batch_while_many_write(opened: Callable[[], Opened]) -> None:
    """Who reads on from the newest batch it has seen gets every word, however the writers' transactions overlap."""
    seen: set[str] = set()

    async def write(writer: int) -> None:
        async with opened() as acks:
            for number in range(10):
                await acks.write("a", [ack(100 * writer + number)])

    async def read() -> None:
        async with opened() as acks:
            batch = 0
            while len(seen) < 50:
                batch, found = await acks.after("a", batch)
                seen.update(each.instance for each in found)
                if not found:
                    await acks.changed("a", batch)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for writer in range(5):
                tasks.start_soon(write, writer)
    assert seen == {f"i-{100 * writer + number}" for writer in range(5) for number in range(10)}


async def test_who_waits_is_woken_by_whoever_writes(
    opened: Callable[[], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_LOOK", 3600.0)
    async with opened() as acks, opened() as others, anyio.create_task_group() as tasks:
        woken = anyio.Event()

        async def wait() -> None:
            while not (await acks.after("a", 0))[0]:  # it may return early
                await acks.changed("a", 0)
            woken.set()

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await others.write("b", [ack(1)])
        assert not woken.is_set()
        await others.write("a", [ack(1)])
        with anyio.fail_after(20):
            await woken.wait()
            await acks.changed("a", 0)  # what has changed already is not waited for


class AwayOnce:
    """Fails the next write, while which something happens."""

    def __init__(self, acks: ConfigAcks) -> None:
        self._acks = acks
        self.meanwhile: Callable[[], None] | None = None
        self.after, self.changed = acks.after, acks.changed
        self.failed = anyio.Event()

    async def write(self, key: str, acks: Sequence[ConfigAck], gone: Sequence[str] = ()) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
            self.failed.set()
            raise ConfigError("the place is away")
        await self._acks.write(key, acks, gone)


async def test_the_last_word_holds_whatever_failed_to_be_written_before(
    opened: Callable[[], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes back, and another one goes, while it cannot be written that the one has gone and the other has come."""
    monkeypatch.setattr(configacks, "_RETRY", 0.01)
    async with opened() as place, anyio.create_task_group() as tasks:
        away = AwayOnce(place)
        book = AckBook(away, "a", clock=SystemClock())

        async def until(kept: dict[str, int]) -> None:
            with anyio.fail_after(20):
                while {each.instance: each.revision for each in (await place.after("a", 0))[1]} != kept:  # noqa: ASYNC110
                    await anyio.sleep(0.01)

        def turned_round() -> None:
            book.hear(ConfigAck("back", 6))
            book.forget("short")

        book.hear(ConfigAck("back", 5))
        tasks.start_soon(book.run)
        await until({"back": 5})
        away.meanwhile = turned_round
        book.forget("back")
        book.hear(ConfigAck("short", 5))
        with anyio.fail_after(20):
            await away.failed.wait()
        book.hear(ConfigAck("last", 1))
        await until({"back": 6, "last": 1})
        assert set(book.known) == {"back", "last"}
        tasks.cancel_scope.cancel()


async def test_what_one_manager_has_heard_another_one_knows(opened: Callable[[], Opened]) -> None:
    """Two books on the same place: each tells of what the other has heard, a few writes for a hundred words."""
    async with opened() as mine, opened() as theirs, anyio.create_task_group() as tasks:
        books = [AckBook(each, "a", clock=SystemClock()) for each in (mine, theirs)]
        for book in books:
            tasks.start_soon(book.run)
        for number in range(100):
            books[number % 2].hear(ConfigAck(f"i-{number}", 3, via="stream"))
        with anyio.fail_after(20):
            while any(len(book.known) < 100 for book in books):  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
            books[0].forget("i-1")
            while (await theirs.after("a", 0))[0] == 0 or len((await theirs.after("a", 0))[1]) > 99:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        batch, found = await mine.after("a", 0)
        assert batch <= 10, "they were written in batches"
        assert {each.revision for each in found} == {3}
        tasks.cancel_scope.cancel()
