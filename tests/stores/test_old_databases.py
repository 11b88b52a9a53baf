"""Databases that earlier versions of this library have left behind come up, with what is in them, and are managed."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import text
from tests.fleet.world import spec

from agentfleet import FleetManager, MemoryBackend
from agentfleet.operations import Status
from agentfleet.stores.sql import Database, SqlFleetRecords, SqlFleets, SqlJournal, SqlLeases, migrate, migrations
from agentfleet.stores.sql.engines import WRITES, engine
from agentfleet.stores.sql.schema import NEWEST

pytestmark = [pytest.mark.integration]
CLUSTER = uuid.UUID("11111111-2222-3333-4444-555555555555")


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


MIGRATIONS = Path(migrations.__path__[0]) / "versions"
STEPS = sorted(each.name[1:5] for each in MIGRATIONS.glob("m0*.py"))
"""Numbers of the migrations, oldest first."""


def run(url: str, *statements: str, **values: Any) -> None:
    made = engine(url, timeout=5)
    with made.connect() as plain:
        connection = plain.execution_options(**{WRITES: True})
        with connection.begin():
            for statement in statements:
                connection.execute(text(statement), values)
    made.dispose()


def test_the_newest_migration_is_the_one_that_the_tables_name() -> None:
    assert STEPS[-1] == NEWEST


@pytest.mark.parametrize("step", ["0000", *STEPS])
@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.anyio
async def test_a_database_of_any_age_is_brought_up_and_managed(database_url: str, step: str) -> None:
    migrate(database_url, "base")
    if step >= "0001":
        migrate(database_url, step)
        id = CLUSTER.hex if database_url.startswith("sqlite") else str(CLUSTER)
        run(
            database_url,
            "INSERT INTO cluster_config (id, cluster_name, namespace) VALUES (:id, 'old', 'labs')",
            "INSERT INTO agent_instances (id, cluster_id, instance_id, status) VALUES (:other, :id, 'old-1', 'idle')",
            id=id,
            other=id.replace("1", "9"),
        )
    if step >= "0002":
        line = '{"seq":1,"at":1.0,"fleet":"old","kind":"state.fleet","data":{"x":1}}'
        run(
            database_url,
            "UPDATE journal_head SET last = 1",
            "INSERT INTO journal (seq, fleet, kind, at, line) VALUES (1, 'old', 'state.fleet', 1.0, :line)",
            "INSERT INTO journal_states (fleet, kind, seq, line) VALUES ('old', 'state.fleet', 1, :line)",
            line=line,
        )
    events = database_url if database_url.startswith("postgres") else f"{database_url}-events"
    async with Database(database_url) as database, MemoryBackend(seed=1, start_delay=(0.01, 0.02)) as backend:
        with SqlJournal(events) as journal:
            records, leases = SqlFleetRecords(database), SqlLeases(database)
            async with FleetManager(records, backend=backend, journal=journal, leases=leases) as manager:
                created = await manager.create(spec(2))
                done = await manager.finished(created.id, timeout=60)
                assert done.status is Status.SUCCEEDED
            tables = SqlFleets(database)
            names = {each.cluster_name for each in await tables.clusters()}
            assert names == ({"a", "old"} if step >= "0001" else {"a"})
            kept = [(row.instance_id, row.restarts, row.version) for row in await tables.instances(CLUSTER)]
            assert kept == ([("old-1", 0, None)] if step >= "0001" else [])
    with SqlJournal(database_url) as journal:
        old = journal.last_state("old", "state.fleet")
        assert (None if old is None else (old.data, old.epoch)) == (({"x": 1}, 0) if step >= "0002" else None)
