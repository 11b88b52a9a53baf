"""The contract of the port for leases, held against every store that needs no cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from agentfleet import Conflict
from agentfleet.core.leadership import LeasePolicy, LeaseRecord
from agentfleet.leadership import Leadership
from agentfleet.stores.leases import Forgetting, LeaseStore, MemoryLeases, Telling
from agentfleet.stores.sql import Database, SqlLeases, ToldLeases
from agentfleet.testing.postgres import Postgres

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@pytest.fixture(params=["memory", "sqlite", "postgres", "told by sqlite", "told by postgres"])
async def leases(request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str) -> AsyncIterator[LeaseStore]:
    if request.param == "memory":
        yield MemoryLeases()
        return
    if request.param.endswith("sqlite"):
        url = f"sqlite:///{tmp_path / 'leases.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("prepared"))
    async with Database(url) as database:
        yield ToldLeases(MemoryLeases(), database) if request.param.startswith("told") else SqlLeases(database)


async def test_a_lease_is_made_once_and_read_back(leases: LeaseStore) -> None:
    assert await leases.get("a", timeout=5) is None
    made = await leases.create("a", LeaseRecord("ann", 1, 15.5), timeout=5)
    assert (made.holder, made.epoch, made.duration) == ("ann", 1, 15.5)
    assert made.version
    assert made.uid
    assert await leases.get("a", timeout=5) == made
    with pytest.raises(Conflict):
        await leases.create("a", LeaseRecord("bob", 1, 15.5), timeout=5)
    assert await leases.get("a", timeout=5) == made
    assert await leases.get("b", timeout=5) is None


async def test_only_who_knows_the_present_version_changes_it(leases: LeaseStore) -> None:
    first = await leases.create("a", LeaseRecord("ann", 1, 15.0), timeout=5)
    second = await leases.update("a", first, timeout=5)
    assert second.version != first.version, "also when nothing else changes"
    assert second.uid == first.uid
    for stale in (first, replace(second, uid="another"), replace(second, version="99")):
        with pytest.raises(Conflict):
            await leases.update("a", replace(stale, holder="bob"), timeout=5)
    with pytest.raises(Conflict):
        await leases.update("b", second, timeout=5)
    third = await leases.update("a", replace(second, holder=None, epoch=2), timeout=5)
    assert await leases.get("a", timeout=5) == third
    assert (third.holder, third.epoch) == (None, 2)


async def test_a_lease_is_removed_only_by_who_knows_its_present_version(leases: LeaseStore) -> None:
    assert isinstance(leases, Forgetting)
    first = await leases.create("a", LeaseRecord("ann", 1, 15.0), timeout=5)
    second = await leases.update("a", replace(first, holder=None), timeout=5)
    for stale in (first, replace(second, uid="another")):
        with pytest.raises(Conflict):
            await leases.remove("a", stale, timeout=5)
    assert await leases.get("a", timeout=5) == second
    for _ in range(2):  # that it is gone already is as good
        await leases.remove("a", second, timeout=5)
    assert await leases.get("a", timeout=5) is None
    made = await leases.create("a", LeaseRecord("ben", 2, 15.0), timeout=5)
    assert made.uid != second.uid


async def test_of_many_who_want_it_at_once_one_gets_it(leases: LeaseStore) -> None:
    first = await leases.create("a", LeaseRecord(None, 1, 1.0), timeout=5)
    won: list[str] = []

    async def take(name: str) -> None:
        try:
            await leases.update("a", replace(first, holder=name, epoch=2), timeout=20)
        except Conflict:
            return
        won.append(name)

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(take, str(number))
    assert len(won) == 1
    found = await leases.get("a", timeout=5)
    assert found is not None
    assert found.holder == won[0]


async def test_a_leader_who_leaves_is_followed_at_once(leases: LeaseStore) -> None:
    async def first_term(who: Leadership) -> int:
        return (await anext(aiter(who.terms()))).epoch

    with anyio.fail_after(30):
        async with Leadership("a", leases, identity="two", policy=LeasePolicy()) as two:
            epoch = await first_term(two)
            async with Leadership("a", leases, identity="three", policy=LeasePolicy()) as three:
                assert two.leads
                assert not three.leads
        async with Leadership("a", leases, identity="four", policy=LeasePolicy()) as four:
            assert await first_term(four) == epoch + 1, "given up, so that nobody waits for it to lapse"


@pytest.mark.parametrize("leases", ["sqlite", "postgres", "told by sqlite", "told by postgres"], indirect=True)
async def test_a_lease_that_is_given_up_is_told_at_once(leases: LeaseStore) -> None:
    """Nobody looks again for 20 s, and yet the next one leads right after the first has left."""
    patient = LeasePolicy(duration=60, renew_deadline=30, renew=20, poll=20)
    assert isinstance(leases, Telling)
    leads, leaves = anyio.Event(), anyio.Event()

    async def lead_first() -> None:
        async with Leadership("a", leases, policy=patient) as first:
            await anext(first.terms())
            leads.set()
            await leaves.wait()

    with anyio.fail_after(15):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lead_first)
            await leads.wait()
            async with Leadership("a", leases, policy=patient) as second:
                while second.holder is None:  # noqa: ASYNC110 - until it has looked
                    await anyio.sleep(0.01)
                leaves.set()
                await anext(second.terms())
                assert second.leads
