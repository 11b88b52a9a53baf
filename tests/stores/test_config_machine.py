"""The configuration store's laws: no change is lost, repeated or reordered, and none vanishes that was acknowledged.

Hypothesis makes up histories of several stores on the same records, as several processes have them: writers who race,
with compare and set or without; writers that are cut off amid a put, or killed with SIGKILL; stores that are closed and
opened again; connections that break; readers who follow from anywhere, and go on elsewhere from where they were.
More of them: `HYPOTHESIS_PROFILE=thorough`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

pytest.importorskip("sqlalchemy")

from sqlalchemy import text

from agentfleet import ConfigConflict, ConfigError, ConfigInvalid, ConfigStore, DeadlineExceeded, MemoryJournal
from agentfleet.stores.config import ConfigRecords, ConfigRevision
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.sql import Database, SqlConfig
from agentfleet.testing.postgres import Postgres

pytestmark = pytest.mark.integration

STORES = 3
PATIENCE = 60.0
_T = TypeVar("_T")
_NAMES = itertools.count(1)
NUMBERS = st.integers(0, STORES - 1)


# ------------------------------------------------------------------------------------------------ what is under test


@dataclass
class Process:
    """One process's view: a store of its own on the common records, open until it is told to end."""

    store: ConfigStore
    _asked: anyio.Event = field(default_factory=anyio.Event)
    _over: anyio.Event = field(default_factory=anyio.Event)

    async def live(self, stack: AsyncExitStack) -> None:
        await self._asked.wait()
        await stack.aclose()
        self._over.set()

    async def close(self) -> None:
        """End it in good order."""
        self._asked.set()
        await self._over.wait()


class Site:
    """The records, and the processes that share them, all on one event loop in a thread."""

    def __init__(self, portal: BlockingPortal, url: str) -> None:
        self.portal, self.url = portal, url
        self.memory = MemoryConfig(keep=100_000)
        self.journal = MemoryJournal()
        self.readers: list[Reader] = []
        """All that there ever were."""
        self.processes = [self._open() for _ in range(STORES)]

    @property
    def is_sql(self) -> bool:
        return bool(self.url)

    def call(self, do: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        """Run something on the loop, to its end."""

        async def bounded() -> _T:
            with anyio.fail_after(PATIENCE):
                return await do(*args)

        return self.portal.call(bounded)

    def _open(self) -> Process:
        made: Process = self.portal.start_task(self._live)[1]
        return made

    async def _live(self, *, task_status: TaskStatus[Process]) -> None:
        async with AsyncExitStack() as stack:
            records: ConfigRecords = self.memory
            if self.is_sql:
                records = SqlConfig(await stack.enter_async_context(Database(self.url)))
            process = Process(ConfigStore(records, journal=self.journal))
            task_status.started(process)
            await process.live(stack)

    def reopen(self, number: int) -> None:
        """One process ends, and another takes its place."""
        self.call(self.processes[number].close)
        self.processes[number] = self._open()

    async def cut(self) -> None:
        """The database's server breaks all connections; who asks next finds out."""
        async with Database(self.url) as database, database.writing() as connection:
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            await connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))

    def close(self) -> None:
        """End all; readers first, who are left where a history has broken off."""
        for reader in self.readers:
            if reader.stop is not None:
                self.call(reader.stop)
        for each in self.processes:
            self.call(each.close)


class Writers:
    """Real processes that publish until they are killed."""

    def __init__(self) -> None:
        self._stand_by = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.config_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
        )

    def run(self, url: str, key: str, name: str, *, puts: int, more: float) -> dict[str, int]:
        """Have one publish, and kill it when it has so often, and a little more has passed; what was acknowledged."""
        assert self._stand_by.stdin is not None
        self._stand_by.stdin.write(json.dumps({"url": url, "key": key, "name": name}) + "\n")
        self._stand_by.stdin.flush()
        acked: dict[str, int] = {}
        _, pid = self._hear("begun")
        try:
            while len(acked) < puts:
                _, document, revision = self._hear("acked")
                acked[document] = revision
            go_on_for(more)
        finally:
            os.kill(pid, signal.SIGKILL)
        while (said := self._hear())[0] != "ended":
            acked[said[1]] = said[2]
        return acked

    def _hear(self, kind: str | None = None) -> list[Any]:
        assert self._stand_by.stdout is not None
        said: list[Any] = json.loads(self._stand_by.stdout.readline())
        assert kind in (None, said[0]), said
        return said

    def close(self) -> None:
        """End it."""
        assert self._stand_by.stdin is not None
        assert self._stand_by.stdout is not None
        self._stand_by.stdin.close()
        self._stand_by.wait(PATIENCE)
        self._stand_by.stdout.close()


def go_on_for(seconds: float) -> None:
    """Let a real process go on for a moment, so that it is killed wherever it is."""
    deadline = os.times().elapsed + seconds
    while os.times().elapsed < deadline:
        os.sched_yield()


@dataclass(eq=False)
class Reader:
    """Follows one key in a task of its own; goes on with another store where it was."""

    after: int
    seen: list[ConfigRevision] = field(default_factory=list)
    store: int = 0
    stop: Callable[[], Awaitable[None]] | None = None
    """Ends its task, and returns when it has."""

    @property
    def position(self) -> int:
        return self.seen[-1].revision if self.seen else self.after

    async def run(self, store: ConfigStore, key: str, *, task_status: TaskStatus[None]) -> None:
        """Follow until it is told to stop."""
        watch = store.watch(key, after=self.position)
        ended = anyio.Event()
        with anyio.CancelScope() as scope:

            async def stop() -> None:
                scope.cancel()
                await ended.wait()

            self.stop = stop
            task_status.started()
            while True:
                try:
                    self.seen.append(await anext(watch))
                except (ConfigError, DeadlineExceeded):
                    await anyio.sleep(0.01)  # it cannot be reached just now: the same reader goes on
        ended.set()


# ------------------------------------------------------------------------------------------------ the histories


class Machine(RuleBasedStateMachine):
    """Made-up histories, and what must hold in each."""

    site: Site
    writers: Writers | None

    def __init__(self) -> None:
        super().__init__()
        self.key = f"key-{next(_NAMES)}"
        self.known: list[ConfigRevision] = []
        """All that was ever read, in its order."""
        self.acked: dict[str, int] = {}
        """The number of each document that was acknowledged; none is published twice."""
        self.open: set[str] = set()
        """Documents of which nobody knows whether they were stored."""
        self.back: dict[int, int] = {}
        """Rollbacks that were acknowledged: what each revision restores."""
        self.readers: list[Reader] = []
        self.kills = 0

    # ---------------------------------------------------------------------------------------- writing

    @initialize()
    def begin(self) -> None:
        """One reader is there from the start."""
        self.follow(0, 0)

    @rule(number=NUMBERS, how=st.sampled_from(["any", "right", "stale", "ahead"]))
    def put(self, number: int, how: str) -> None:
        newest = len(self.known)
        expect = {"any": None, "right": newest, "stale": newest - 1, "ahead": newest + 1}[how]
        if expect == -1:
            return
        outcome = self.site.call(self._put, number, self._document(), expect)
        if outcome is not (how in ("any", "right")):
            self._expect_a_late_one(how)

    @rule(number=NUMBERS)
    def put_nonsense(self, number: int) -> None:
        async def put() -> None:
            with pytest.raises(ConfigInvalid, match=r"a\.0: is not a finite number"):
                await self.store(number).put(self.key, {"a": [float("nan")]}, author="ann", reason="test")

        self.site.call(put)

    @rule(numbers=st.lists(NUMBERS, min_size=2, max_size=6), compares=st.booleans())
    def race(self, numbers: list[int], compares: bool) -> None:
        """Of those who compare one wins; of those who do not each does."""
        expect, outcomes = len(self.known) if compares else None, []

        async def write(number: int, document: str) -> None:
            outcomes.append(await self._put(number, document, expect))

        async def all_at_once() -> None:
            async with anyio.create_task_group() as tasks:
                for number in numbers:
                    tasks.start_soon(write, number, self._document())

        self.site.call(all_at_once)
        if outcomes.count(True) != (1 if compares else len(numbers)):
            self._expect_a_late_one("right" if compares else "any")

    @rule(number=NUMBERS, steps=st.integers(0, 12), pause=st.sampled_from([0.0, 0.0005, 0.002, 0.005]))
    def break_off(self, number: int, steps: int, pause: float) -> None:
        """The task that publishes is cancelled wherever it is then."""
        document = self._document()

        async def put() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._put, number, document, None)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                await anyio.sleep(pause)
                tasks.cancel_scope.cancel()

        self.open.add(document)
        self.site.call(put)

    @rule(number=NUMBERS, which=st.floats(0, 1, exclude_max=True))
    def roll_back(self, number: int, which: float) -> None:
        if not self.known:  # no precondition: whether what was broken off is stored differs from run to run
            return
        to = 1 + int(which * len(self.known))

        async def roll_back() -> ConfigRevision:
            return await self.store(number).rollback(self.key, to, author="ann", reason="back")

        self.back[self.site.call(roll_back).revision] = to

    @precondition(lambda self: self.writers is not None and self.kills < 2)
    @rule(puts=st.integers(0, 5), more=st.sampled_from([0.0, 0.0003, 0.001, 0.003]))
    def kill(self, puts: int, more: float) -> None:
        """A process that publishes is killed wherever it is then."""
        assert self.writers is not None
        self.kills += 1
        name = self._document()
        acked = self.writers.run(self.site.url, self.key, name, puts=puts, more=more)
        self.acked |= acked
        self.open.add(f"{name}-{len(acked) + 1}")  # it may have been stored, and not been told

    @precondition(lambda self: self.site.url.startswith("postgresql"))
    @rule(number=NUMBERS)
    def cut(self, number: int) -> None:
        """All connections break while somebody writes."""
        document = self._document()

        async def write() -> None:
            try:
                await self._put(number, document, None)
            except (ConfigError, DeadlineExceeded):
                self.open.add(document)

        async def both() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                tasks.start_soon(self.site.cut)

        self.site.call(both)

    # ---------------------------------------------------------------------------------------- reading

    @precondition(lambda self: len(self.readers) < 4)
    @rule(number=NUMBERS, which=st.floats(0, 1))
    def follow(self, number: int, which: float) -> None:
        """A reader begins after any revision that there is."""
        self._attach(Reader(round(which * len(self.known))), number)

    @rule(which=st.floats(0, 1, exclude_max=True), number=NUMBERS)
    def resume(self, which: float, number: int) -> None:
        """A reader is cut off wherever it is, and goes on elsewhere from the last revision that it has."""
        self._detach(reader := self.readers[int(which * len(self.readers))])
        self._attach(reader, number)

    @rule(number=NUMBERS)
    def restart(self, number: int) -> None:
        """A process ends, with its readers cut off, and another takes its place."""
        moved = [reader for reader in self.readers if reader.store == number]
        for reader in moved:
            self._detach(reader)
        self.site.reopen(number)
        for reader in moved:
            self._attach(reader, number)

    @rule()
    def settle(self) -> None:
        """Everybody who follows gets all that there is, without anything else being published."""
        self._look()

        async def all_have_it() -> None:
            while any(reader.position < len(self.known) for reader in self.readers):  # noqa: ASYNC110
                await anyio.sleep(0.001)

        self.site.call(all_have_it)

    @rule(number=NUMBERS)
    def verify(self, number: int) -> None:
        """The chain of hashes is whole."""

        async def verify() -> int:
            return await self.store(number).verify(self.key)

        self._look()
        assert self.site.call(verify) == len(self.known)

    # ---------------------------------------------------------------------------------------- what must hold

    @invariant()
    def all_that_is_known_stays(self) -> None:
        self._look()
        for reader in self.readers:
            seen = list(reader.seen)
            assert seen == self.known[reader.after : reader.after + len(seen)]

    def _look(self) -> None:
        """Read the whole history in another process's way; it only grows, and each entry has an author."""

        async def read() -> list[ConfigRevision]:
            return list(await self.store(random.randrange(STORES)).history(self.key, limit=100_000))

        found = self.site.call(self._patiently, read)
        assert found[: len(self.known)] == self.known, "what was published has changed"
        for before, each in itertools.pairwise([None, *found]):
            assert each is not None
            assert (each.revision, each.previous) == ((1, "") if before is None else (before.revision + 1, before.hash))
        for each in found[len(self.known) :]:
            self._account_for(each)
        self.known = found
        for document, revision in self.acked.items():
            assert found[revision - 1].document == {"by": document}, "what was acknowledged is lost"

    def _account_for(self, revision: ConfigRevision) -> None:
        document = revision.document["by"]
        if revision.restores is not None:
            assert self.back[revision.revision] == revision.restores
            assert revision.text == self.known[revision.restores - 1].text
        elif document in self.open:
            self.open.discard(document)
            self.acked[document] = revision.revision
        else:
            assert self.acked[document] == revision.revision, "this was never published, or twice"

    async def _patiently(self, do: Callable[[], Awaitable[_T]]) -> _T:
        """Ask again where a connection was broken."""
        with anyio.fail_after(PATIENCE):
            while True:
                try:
                    return await do()
                except (ConfigError, DeadlineExceeded):
                    await anyio.sleep(0.01)

    def teardown(self) -> None:
        """Whatever has happened, all get all of it."""
        try:
            self.settle()
            self.verify(0)
            self.all_that_is_known_stays()
        finally:
            for reader in self.readers:
                self._detach(reader)

    # ---------------------------------------------------------------------------------------- parts

    def store(self, number: int) -> ConfigStore:
        return self.site.processes[number].store

    def _document(self) -> str:
        return f"d{next(_NAMES)}"

    def _expect_a_late_one(self, how: str) -> None:
        """What was broken off may be stored a little later: then, and then alone, the right number was wrong."""
        known, unsure = len(self.known), set(self.open)
        self._look()
        assert how in ("right", "ahead")
        assert unsure & {each.document["by"] for each in self.known[known:]}

    async def _put(self, number: int, document: str, expect: int | None) -> bool:
        try:
            stored = await self.store(number).put(
                self.key, {"by": document}, author="ann", reason="test", expect=expect
            )
        except ConfigConflict:
            return False
        self.acked[document] = stored.revision
        self.open.discard(document)
        return True

    def _attach(self, reader: Reader, number: int) -> None:
        reader.store = number
        self.site.portal.start_task(reader.run, self.store(number), self.key)
        if reader not in self.readers:
            self.readers.append(reader)
            self.site.readers.append(reader)

    def _detach(self, reader: Reader) -> None:
        assert reader.stop is not None
        self.site.call(reader.stop)


# ------------------------------------------------------------------------------------------------ the backends


@contextmanager
def site(url: str) -> Iterator[Site]:
    with start_blocking_portal("asyncio") as portal:
        made = Site(portal, url)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def standing_by() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])
def test_nothing_is_lost_repeated_or_reordered(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, standing_by: Writers
) -> None:
    url = ""
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path / 'config.db'}"
    elif kind == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("prepared"))
    share = 1 if kind == "memory" else 6
    examples = max(5, settings().max_examples // share)
    with site(url) as made:

        class Here(Machine):
            site = made
            writers = standing_by if made.is_sql else None

        run_state_machine_as_test(
            Here,
            settings=settings(
                settings(),
                max_examples=examples,
                stateful_step_count=30,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
