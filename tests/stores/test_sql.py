"""What is particular to databases: their tables and migrations, deaths in the middle, several processes at once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psutil
import pytest

pytest.importorskip("sqlalchemy")

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from agentfleet import BackendUnavailable, Event, JournalError, OperationRefused, SpecError
from agentfleet.stores.sql import Database, SqlJournal, migrate
from agentfleet.stores.sql.engines import engine
from agentfleet.stores.sql.migrating import config_for
from agentfleet.stores.sql.schema import METADATA
from agentfleet.testing.postgres import Postgres

pytestmark = pytest.mark.integration

both = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
KILLS = int(os.environ.get("AGENTFLEET_KILLS", "12"))
"""Deaths per database in `test_what_was_acknowledged_survives_death`."""


def steps(url: str) -> list[str]:
    """Numbers of the migrations, oldest first."""
    made = engine(url, timeout=5)
    with made.connect() as connection:
        scripts = ScriptDirectory.from_config(config_for(connection))
    made.dispose()
    return [each.revision for each in scripts.walk_revisions()][::-1]


def tables(url: str) -> set[str]:
    made = engine(url, timeout=5)
    found = set(inspect(made).get_table_names()) - {"alembic_version"}
    made.dispose()
    return found


def ask(url: str, statement: str) -> list[Any]:
    made = engine(url, timeout=5)
    with made.connect() as connection:
        rows = [tuple(row) for row in connection.execute(text(statement))]
    made.dispose()
    return rows


def tell(url: str, statement: str) -> None:
    made = engine(url, timeout=5)
    with made.begin() as connection:
        connection.execute(text(statement))
    made.dispose()


CLUSTER = (
    "INSERT INTO cluster_config (id, cluster_name, namespace) "
    "VALUES ('0123456789abcdef0123456789abcdef', 'researchers', 'default')"
)


@both
def test_every_earlier_state_comes_up_with_its_data_and_goes_back(database_url: str) -> None:
    found = steps(database_url)
    assert found, "there are migrations"
    for step in found:
        migrate(database_url, "base")
        assert tables(database_url) == set()
        migrate(database_url, step)
        tell(database_url, CLUSTER)
        migrate(database_url)
        assert tables(database_url) == set(METADATA.tables)
        kept = ask(database_url, "SELECT cluster_name, min_replicas, max_replicas FROM cluster_config")
        assert kept == [("researchers", 1, 10)]
        migrate(database_url, step)
        assert len(ask(database_url, "SELECT id FROM cluster_config")) == 1
        migrate(database_url, step)  # nothing to do


@both
def test_tables_of_a_newer_version_are_left_alone(database_url: str) -> None:
    """An older version that is started again, as after a rollback, says what to do, and changes nothing."""
    migrate(database_url)
    tell(database_url, "UPDATE alembic_version SET version_num = '9999'")
    newest = steps(database_url)[-1]
    for begin in (
        lambda: migrate(database_url),
        lambda: migrate(database_url, "base"),
        lambda: SqlJournal(database_url),
    ):
        with pytest.raises(OperationRefused, match=f"migration 9999, .* agentfleet migrate --to {newest}"):
            begin()
    with pytest.raises(OperationRefused, match="newer version"):
        anyio.run(opened, database_url)
    assert ask(database_url, "SELECT version_num FROM alembic_version") == [("9999",)]
    tell(database_url, f"UPDATE alembic_version SET version_num = '{newest}'")
    with pytest.raises(SpecError, match=r"no migration '12'; there are 0001, .*, head and base"):
        migrate(database_url, "12")


async def opened(url: str) -> None:
    """Open a database, and close it."""
    async with Database(url):
        pass


@both
def test_the_migrations_make_what_the_tables_say(database_url: str) -> None:
    migrate(database_url)
    made = engine(database_url, timeout=5)
    with made.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []
    made.dispose()


def test_the_two_tables_are_as_they_were_asked_for(postgres: Postgres) -> None:
    """F18, by PostgreSQL's own words for types and defaults."""
    url = postgres.database()
    migrate(url)
    columns = (
        "SELECT column_name, data_type, character_maximum_length, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_name = '{}' ORDER BY ordinal_position"
    )
    date, words = "timestamp with time zone", "character varying"
    assert ask(url, columns.format("cluster_config")) == [
        ("id", "uuid", None, "NO", None),
        ("cluster_name", words, 255, "NO", None),
        ("namespace", words, 255, "NO", None),
        ("min_replicas", "integer", None, "YES", "1"),
        ("max_replicas", "integer", None, "YES", "10"),
        ("target_cpu_percent", "integer", None, "YES", "70"),
        ("target_memory_percent", "integer", None, "YES", "80"),
        ("health_check_config", "jsonb", None, "YES", None),
        ("created_at", date, None, "YES", None),
    ]
    assert ask(url, columns.format("agent_instances"))[:9] == [  # what else there is stands behind
        ("id", "uuid", None, "NO", None),
        ("cluster_id", "uuid", None, "YES", None),
        ("instance_id", words, 255, "NO", None),
        ("status", words, 50, "NO", None),
        ("node_name", words, 255, "YES", None),
        ("cpu_usage", "double precision", None, "YES", None),
        ("memory_usage", "double precision", None, "YES", None),
        ("last_heartbeat", date, None, "YES", None),
        ("created_at", date, None, "YES", None),
    ]
    refers = (
        "SELECT confrelid::regclass::text FROM pg_constraint "
        "WHERE conrelid = 'agent_instances'::regclass AND contype = 'f'"
    )
    assert ask(url, refers) == [("cluster_config",)]


@both
def test_processes_that_migrate_at_once_do_not_meet(database_url: str) -> None:
    migrate(database_url, "base")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            migrate(database_url)
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    assert tables(database_url) == set(METADATA.tables)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", "mysql"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("no address", "must be like"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, message: str) -> None:
    for make in (Database, SqlJournal):
        with pytest.raises(SpecError, match=f"url: .*{message}"):
            make(url)


def test_a_database_out_of_reach_is_said(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be opened"):
        SqlJournal("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(JournalError, match="cannot be opened"):
        SqlJournal(f"sqlite:///{tmp_path}/no/such/folder/j.db")

    async def enter() -> None:
        async with Database("postgresql://nobody@127.0.0.1:1/none", timeout=2):
            raise AssertionError("it cannot be open")

    with pytest.raises(BackendUnavailable):
        anyio.run(enter)


@both
def test_journals_of_two_processes_make_one_history(database_url: str) -> None:
    with SqlJournal(database_url) as one, SqlJournal(database_url) as two:
        for number in range(20):
            (one, two)[number % 2].append(Event(float(number), "a", "state.fleet", data={"n": number}))
        assert [each.seq for each in one.read()] == [each.seq for each in two.read()] == list(range(1, 21))
        last = one.last_state("a", "state.fleet")
        assert last is not None
        assert last.data == {"n": 19}

        async def follow() -> list[int]:
            got: list[int] = []
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:

                    async def read() -> None:
                        async for each in one.follow(after=20):
                            got.append(each.seq)
                            if len(got) == 3:
                                return

                    tasks.start_soon(read)
                    await anyio.wait_all_tasks_blocked()
                    for number in range(3):
                        two.append(Event(float(number), "b", "k"))
            return got

        assert anyio.run(follow) == [21, 22, 23]


WRITER = """
import sys
import anyio
import anyio.lowlevel
from agentfleet import ConfigStore, Event
from agentfleet.stores.sql import Database, SqlConfig, SqlJournal

async def main(url, first):
    async with Database(url) as database:
        with SqlJournal(url) as journal:
            store, number = ConfigStore(SqlConfig(database)), first
            while True:
                seq = journal.append(Event(1.0, "a", "state.fleet", data={"n": number})).seq
                print("event", seq, number, flush=True)
                done = await store.put("a", {"n": number, "pad": "x" * 2000}, author="ann", reason="count")
                print("revision", done.revision, number, flush=True)
                number += 1

anyio.run(main, sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.slow
@both
def test_what_was_acknowledged_survives_death(database_url: str) -> None:
    """Kill -9 at random instants under load: nothing acknowledged is lost, nothing is half there."""
    rng = random.Random(7)
    events: dict[int, int] = {}
    revisions: dict[int, int] = {}
    for _ in range(KILLS):
        wanted, lines = rng.randint(1, 60), 0
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, database_url, str(1000 * len(revisions))], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                if not line.endswith("\n"):
                    break  # its death cut the sentence off: nobody was told
                kind, number, value = line.split()
                (events if kind == "event" else revisions)[int(number)] = int(value)
                lines += 1
                if lines == wanted:
                    threading.Timer(rng.random() * 0.01, writer.send_signal, (signal.SIGKILL,)).start()
        assert writer.returncode == -signal.SIGKILL
    with SqlJournal(database_url) as journal:
        kept = journal.read()
        assert [each.seq for each in kept] == list(range(1, len(kept) + 1))
        assert {each.seq: each.data["n"] for each in kept}.items() >= events.items()
        last = journal.last_state("a", "state.fleet")
        assert last is not None
        assert last.seq == kept[-1].seq
    found = ask(database_url, "SELECT revision, text FROM config_revisions ORDER BY revision")
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert {number: json.loads(document)["n"] for number, document in found}.items() >= revisions.items()
    assert ask(database_url, "SELECT newest FROM config_heads") == [(len(found),)]
    assert len(events) > KILLS


SERVED = """
import sys, time
from agentfleet.testing.postgres import Postgres

with Postgres() as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is no parent-death signal elsewhere")
def test_a_server_does_not_outlive_who_started_it(postgres: Postgres) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVED], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        folder = Path(server.cmdline()[2]).parent
        assert server.name() == "postgres"
        starter.kill()
    server.wait(20)
    shutil.rmtree(folder)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_is_cancelled_amid_statements_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a lock, nor a change of which half is done, nor a task that holds up the end of the event loop."""
    before = asyncio.all_tasks()
    change, read = "UPDATE journal_head SET last = last + 1", "SELECT last, trimmed FROM journal_head"

    async def use(database: Database) -> None:
        while True:
            async with database.writing() as connection:
                await connection.execute(text(change))
                await connection.execute(text("UPDATE journal_head SET trimmed = trimmed + 1"))
            async with database.reading() as connection:
                await connection.execute(text(read))

    async def look() -> bool:
        return False

    async with Database(f"sqlite:///{tmp_path / 'fleet.db'}", connections=2, timeout=1.0) as database:
        for steps_taken in range(150):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(use, database)
                tasks.start_soon(database.changed, "config", "a", look)
                for _ in range(steps_taken):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            async with database.writing() as connection:  # the lock is free
                last, trimmed = (await connection.execute(text(read))).one()
                assert last == trimmed, "a transaction was carried out by halves"
    assert last > 0, "some were carried out"
    assert not asyncio.all_tasks() - before
