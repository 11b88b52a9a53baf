"""A fleet in two tables: true, bounded in what it costs, and nothing but a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import event
from tests.fleet.world import spec

from agentfleet import (
    Fleet,
    FleetSpec,
    HealthState,
    Instance,
    MemoryBackend,
    MemoryJournal,
    Phase,
    ScalingPolicy,
    Usage,
)
from agentfleet.mirror import FleetMirror
from agentfleet.portrait import Portrait, date_of
from agentfleet.specs import CpuTarget, MemoryTarget
from agentfleet.stores.sql import Database, SqlFleets
from agentfleet.stores.sql.engines import WRITES
from agentfleet.view import FleetView

pytestmark = pytest.mark.integration


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@asynccontextmanager
async def mirrored(wanted: FleetSpec, database: Database, **more: Any) -> AsyncIterator[tuple[Fleet, FleetMirror]]:
    backend = MemoryBackend(seed=1, start_delay=(0.01, 0.02))
    async with Fleet(wanted, backend=backend, seed=1, **more) as fleet:
        await fleet.deploy(timeout=60)
        yield fleet, FleetMirror(fleet, SqlFleets(database), namespace="labs")


@pytest.mark.anyio
async def test_the_tables_show_what_there_is(tmp_path: Path) -> None:
    policy = ScalingPolicy(max_replicas=9, targets=(CpuTarget(utilization=60), MemoryTarget(utilization=75)))
    wanted = spec(4)
    wanted = wanted.replace(template=wanted.template.replace(cpu="100m", memory="64Mi"), scaling=policy)
    async with Database(f"sqlite:///{tmp_path / 'fleet.db'}") as database:
        tables = SqlFleets(database)
        async with mirrored(wanted, database) as (fleet, mirror):
            await mirror.write()
            (cluster,) = await tables.clusters()
            assert (cluster.cluster_name, cluster.namespace) == (fleet.name, "labs")
            assert (cluster.min_replicas, cluster.max_replicas) == (1, 9)
            assert (cluster.target_cpu_percent, cluster.target_memory_percent) == (60, 75)
            assert cluster.health_check_config == wanted.health.model_dump(mode="json")
            assert cluster.created_at is not None
            rows = {row.instance_id: row for row in await tables.instances(cluster.id)}
            assert set(rows) == {each.id for each in fleet.instances}
            for each in fleet.instances:
                row = rows[each.id]
                assert row.node_name == each.node
                assert row.status in ("idle", "fresh", "busy", "unknown")
                assert row.created_at is not None
                assert abs(row.created_at.timestamp() - each.created_at) < 0.001
                assert row.last_heartbeat is not None
            await fleet.scale(2)
            await fleet.ready(timeout=60)
            while len(fleet.view.members) > 2:
                await fleet._runtime.waiting.pulse()
            await mirror.write()
            assert {row.instance_id for row in await tables.instances(cluster.id)} == set(fleet.view.members)
            await fleet.delete(timeout=60)
            await mirror.write()
            assert await tables.clusters() == []


@pytest.mark.anyio
async def test_the_next_manager_writes_on_and_clears_away_what_is_gone(tmp_path: Path) -> None:
    async with Database(f"sqlite:///{tmp_path / 'fleet.db'}") as database:
        tables = SqlFleets(database)
        async with mirrored(spec(3), database) as (_, mirror):
            await mirror.write()
            (before,) = await tables.clusters()
        async with mirrored(spec(3), database) as (fleet, mirror):  # another world: none of these instances is there
            await mirror.write()
            (after,) = await tables.clusters()
            assert after.id == before.id
            assert after.created_at == before.created_at
            rows = await tables.instances(after.id)
            assert {row.instance_id for row in rows} == {each.id for each in fleet.instances}


@pytest.mark.anyio
async def test_what_it_costs_does_not_grow_with_the_fleet(tmp_path: Path) -> None:
    """One transaction with what has changed; where nothing has changed and nobody has his turn, none."""
    costs: dict[int, list[int]] = {}
    for size in (3, 120):
        async with Database(f"sqlite:///{tmp_path / f'{size}.db'}") as database, mirrored(spec(size), database) as both:
            fleet, mirror = both
            assert database._engine is not None
            begun: list[bool] = []
            event.listen(
                database._engine.sync_engine,
                "begin",
                lambda connection, begun=begun: begun.append(bool(connection.get_execution_options().get(WRITES))),
            )
            counts: list[int] = []
            await mirror.write()  # the first: the fleet's own row, too
            for number in range(3):
                victim = sorted(fleet.view.members)[number]
                fleet.view.judge(victim, HealthState.UNHEALTHY, fleet.clock.now())
                begun.clear()
                await mirror.write()
                counts.append(sum(begun))
            begun.clear()
            await mirror.write()
            costs[size] = [*counts, sum(begun)]
    assert costs[3] == costs[120] == [1, 1, 1, 0]


def seen(count: int, cpu: float = 0.5) -> FleetView:
    """A fleet as its leader sees it: all well, and busy with this much."""
    view = FleetView()
    for number in range(count):
        id = f"i{number:04}"
        view.put(Instance(id, "a", number, 1, "1", Phase.RUNNING, created_at=0.0, ready=True))
        view.judge(id, HealthState.HEALTHY, 0.0)
        view.measure(id, Usage(0.0, cpu, 1000))
    return view


@pytest.mark.parametrize(("size", "share"), [(3, 1.0), (120, 1.0), (2_000, 1.0), (2_000, 0.1)])
def test_each_instance_has_its_turn_and_none_twice_as_often(size: int, share: float) -> None:
    """What instances use is written anew for all of them in each heartbeat's time, or at the share that is granted."""
    view = seen(size)
    portrait = Portrait(view, (), heartbeat=5.0)
    changed, gone = portrait.changes(0.0, share=share)
    assert (len(changed), gone) == (size, [])
    portrait.told(changed, gone)
    for id in view.members:
        view.measure(id, Usage(0.0, 0.7, 1000))
    beaten: Counter[str] = Counter()
    most = 0
    for second in range(1, 1 + round(10 / share)):
        changed, gone = portrait.changes(float(second), share=share)
        assert gone == []
        portrait.told(changed, gone)
        most = max(most, len(changed))
        beaten.update(row.instance_id for row in changed)
        assert all(row.cpu_usage == 0.7 for row in changed)
        assert {row.last_heartbeat for row in changed} <= {date_of(float(second))}
    assert set(beaten) == set(view.members)
    assert max(beaten.values()) - min(beaten.values()) <= 1
    assert most <= size / 5.0 * share + 50, "in small portions"


def test_who_is_not_in_turn_is_written_for_what_it_is_alone() -> None:
    view = seen(2_000)
    portrait = Portrait(view, (), heartbeat=5.0)
    portrait.told(*portrait.changes(0.0))
    view.measure("i1999", Usage(0.0, 0.9, 1))
    view.judge("i1999", HealthState.UNHEALTHY, 1.0)
    changed, _ = portrait.changes(0.001)
    (row,) = changed
    assert (row.status, row.cpu_usage, row.last_heartbeat) == ("sick", 0.5, date_of(0.0))


@pytest.mark.anyio
async def test_a_database_that_fails_is_told_once_and_caught_up_with(tmp_path: Path) -> None:
    journal = MemoryJournal()
    database = Database(f"sqlite:///{tmp_path / 'fleet.db'}")
    async with mirrored(spec(2), database, journal=journal) as (fleet, mirror):
        mirror._period = 0.01
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mirror.run)
            with anyio.fail_after(20):
                async for each in journal.follow():
                    if each.kind == "mirror.failed":
                        break
                async with database:
                    while len(await SqlFleets(database).instances(mirror.cluster.id)) < 2:
                        await fleet.clock.sleep(0.02)
                    tasks.cancel_scope.cancel()
        (failed,) = (each for each in journal.read() if each.kind == "mirror.failed")
        assert failed.data["error"] == "BackendUnavailable"
        assert "not open" not in failed.to_json(), "what the database said is for the log"
