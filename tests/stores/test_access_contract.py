"""The contracts of the ports for API tokens and for the audit, held against every store."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import delete, select, update

from agentfleet.errors import NotFound, OperationRefused, SpecError
from agentfleet.stores.audit import STRAY, AuditEntry, AuditTrail, MemoryAudit, verify
from agentfleet.stores.sql import Database, SqlAudit, SqlTokens
from agentfleet.stores.sql.schema import API_AUDIT, API_AUDIT_HEAD
from agentfleet.stores.tokens import MemoryTokens, Scope, TokenStore, is_secret_of, new_token, split
from agentfleet.testing.postgres import Postgres

pytestmark = pytest.mark.anyio
NOW = 1_700_000_000.25
TOKENS: list[type[TokenStore]] = [MemoryTokens, SqlTokens]  # mypy checks that both are such stores
TRAILS: list[type[AuditTrail]] = [MemoryAudit, SqlAudit]


@pytest.fixture
def anyio_backend() -> str:
    """The databases' drivers run on asyncio."""
    return "asyncio"


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database | None]:
    if request.param == "memory":
        yield None
        return
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'access.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("prepared"))
    async with Database(url) as opened:
        yield opened


@pytest.fixture
def tokens(database: Database | None) -> TokenStore:
    return MemoryTokens() if database is None else SqlTokens(database)


@pytest.fixture
def trail(database: Database | None) -> AuditTrail:
    return MemoryAudit() if database is None else SqlAudit(database)


def token(name: str = "ci", **more: Any) -> tuple[str, Any]:
    said: dict[str, Any] = {"scopes": ["operate", "read"], "fleets": ["b", "a"], "now": NOW}
    return new_token(name, **(said | more))


def entry(number: int = 1, **more: Any) -> AuditEntry:
    said: dict[str, Any] = {
        "actor": "token/ci",
        "credential": "0123",
        "origin": "::1",
        "request": str(uuid.UUID(int=number)),
    }
    said |= {"method": "PUT", "path": "/x", "fleet": "a", "operation": None, "status": 202}
    return AuditEntry(NOW + number, **(said | more))


# ------------------------------------------------------------------------------------------------ tokens


async def test_a_token_is_found_by_its_id(tokens: TokenStore) -> None:
    plain, record = token()
    await tokens.add(record)
    parts = split(plain)
    assert parts is not None
    found = await tokens.find(parts[0])
    assert found == record
    assert is_secret_of(found, parts[1])
    assert not is_secret_of(found, parts[1][:-1] + ("A" if parts[1][-1] != "A" else "B"))
    assert not is_secret_of(None, parts[1])
    assert (record.scopes, record.fleets) == ((Scope.READ, Scope.OPERATE), ("a", "b"))
    assert await tokens.find("0" * 16) is None


async def test_nothing_that_is_kept_gives_the_secret_away(tokens: TokenStore) -> None:
    plain, record = token()
    await tokens.add(record)
    assert plain.partition(".")[2] not in repr(await tokens.tokens())


async def test_a_name_is_given_once(tokens: TokenStore) -> None:
    await tokens.add(token()[1])
    with pytest.raises(OperationRefused, match="'ci'"):
        await tokens.add(token()[1])
    await tokens.revoke("ci", NOW)
    with pytest.raises(OperationRefused, match="'ci'"):
        await tokens.add(token()[1])
    await tokens.add(token("also")[1])
    assert [each.name for each in await tokens.tokens()] == ["also", "ci"]


async def test_a_revoked_token_stays_revoked(tokens: TokenStore) -> None:
    record = token()[1]
    await tokens.add(record)
    assert record.holds(NOW)
    ended = await tokens.revoke(record.id, NOW + 5)
    assert (ended.revoked_at, ended.holds(NOW)) == (NOW + 5, False)
    assert (await tokens.revoke("ci", NOW + 9)).revoked_at == NOW + 5
    with pytest.raises(NotFound, match="nobody"):
        await tokens.revoke("nobody", NOW)


async def test_when_tokens_were_used_is_noted(tokens: TokenStore) -> None:
    records = [token(name)[1] for name in ("one", "two", "three")]
    for each in records:
        await tokens.add(each)
    await tokens.used({records[0].id: NOW + 1, records[2].id: NOW + 3, "0" * 16: NOW})
    await tokens.used({})
    assert [each.used_at for each in await tokens.tokens()] == [NOW + 1, NOW + 3, None]


def test_tokens_end_by_themselves() -> None:
    record = token(expires_in=60)[1]
    assert (record.holds(NOW + 59), record.holds(NOW + 60)) == (True, False)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"fleets": []}, "fleets"),
        ({"fleets": ["Not A Name"]}, "fleets"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=field):
        token(**wrong)
    with pytest.raises(SpecError, match="name"):
        token("two words")


def test_every_token_is_another() -> None:
    made = {token()[0] for _ in range(100)}
    assert len(made) == 100
    assert all(len(each.partition(".")[2]) == 43 for each in made)


# ------------------------------------------------------------------------------------------------ the audit


async def test_entries_are_read_newest_first(trail: AuditTrail) -> None:
    assert await trail.head() == (0, ("", ""))
    await trail.append([])
    await trail.append([entry(1), entry(2, fleet="b")])
    await trail.append([entry(3)])
    found = await trail.entries()
    assert [(each.seq, each.at) for each in found] == [(3, NOW + 3), (2, NOW + 2), (1, NOW + 1)]
    assert [each.seq for each in await trail.entries(fleet="a")] == [3, 1]
    assert [each.seq for each in await trail.entries(before=3, limit=1)] == [2]
    assert await trail.head() == (3, (found[0].hash, ""))
    assert (found[0].previous, found[1].previous, found[2].previous) == (found[1].hash, found[2].hash, "")


async def test_the_chain_holds_under_many_writers(trail: AuditTrail) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(trail.append, [entry(number), entry(number + 100)])
    assert await verify(trail, page=7) == (40, None)


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("change", ["altered", "removed", "last removed", "first removed"])
@pytest.mark.parametrize("statuses", [[202], [403], [202, 403], [403, 403, 202]], ids=str)
async def test_whoever_changes_the_audit_is_found(database: Database, change: str, statuses: list[int]) -> None:
    trail = SqlAudit(database)
    await trail.append([entry(number, status=statuses[number % len(statuses)]) for number in range(1, 11)])
    assert await verify(trail, page=3) == (10, None)
    async with database.writing() as connection:
        if change == "altered":
            await connection.execute(update(API_AUDIT).where(API_AUDIT.c.seq == 5).values(actor="somebody else"))
        else:
            gone = {"removed": 5, "last removed": 10, "first removed": 1}[change]
            await connection.execute(delete(API_AUDIT).where(API_AUDIT.c.seq == gone))
    checked, wrong = await verify(trail, page=3)
    assert wrong is not None
    assert checked < 10


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("status", [202, 403])
async def test_an_audit_that_is_emptied_is_found(database: Database, status: int) -> None:
    trail = SqlAudit(database)
    await trail.append([entry(1, status=202), entry(2, status=403)])
    async with database.writing() as connection:
        await connection.execute(delete(API_AUDIT).where(API_AUDIT.c.status == status))
    assert await verify(trail) == (1, "the newest entry is not there")


async def put_in(database: Database, *entries: AuditEntry) -> None:
    """As somebody does who may write to the table."""
    async with database.writing() as connection:
        for each in entries:
            values = {name: getattr(each, name) for name in AuditEntry.__slots__}
            await connection.execute(API_AUDIT.insert().values(values))


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("places", [[11], [12, 13, 14], [11, 12, 5000]])
async def test_an_entry_that_is_put_in_beyond_the_newest_is_not_shown_and_found(
    database: Database, places: list[int]
) -> None:
    """Also one whose hashes fit: and it keeps nobody from writing, neither then nor later."""
    trail = SqlAudit(database)
    await trail.append([entry(number) for number in range(1, 11)])
    newest = (await trail.entries(limit=1))[0]
    await put_in(database, *(replace(newest, seq=each, actor="forged", previous=newest.hash) for each in places))
    assert [each.seq for each in await trail.entries(limit=2)] == [10, 9]
    assert await verify(trail, page=3) == (10, f"entry {places[-1]} was put in by hand: {STRAY}")
    for number in range(11, 15):
        await trail.append([entry(number)])
    found = await trail.entries(limit=100)
    assert [each.seq for each in found] == list(range(14, 0, -1))
    assert "forged" not in {each.actor for each in found}
    async with database.reading() as connection:
        rows = await connection.execute(select(API_AUDIT.c.seq).where(API_AUDIT.c.actor == "forged"))
        assert len(list(rows)) == len(places), "evidence is kept"
    checked, wrong = await verify(trail, page=3)
    assert (checked, "put in by hand" in (wrong or "")) == (14, True)
    trail = SqlAudit(database, keep=5)
    await trail.append([entry(15)])
    assert [each.seq for each in await trail.entries()] == [15, 14, 13, 12, 11]
    checked, wrong = await verify(trail)  # dropping the old drops no evidence
    assert (checked, "put in by hand" in (wrong or "")) == (5, True)
    async with database.writing() as connection:
        await connection.execute(delete(API_AUDIT).where(API_AUDIT.c.actor == "forged"))
    assert await verify(trail) == (5, None)


async def test_the_audit_is_bounded_and_what_is_kept_is_verified(database: Database | None) -> None:
    trail = MemoryAudit(keep=10) if database is None else SqlAudit(database, keep=10)
    for number in range(1, 36):
        await trail.append([entry(number)])
        assert await verify(trail) == (len(await trail.entries(limit=100)), None)
    await trail.append([entry(number) for number in range(36, 76)])
    kept = [each.seq for each in await trail.entries(limit=100)]
    assert kept[:10] == list(range(75, 65, -1))
    assert len(kept) < 20
    if database is not None:  # the oldest that must be there is not
        async with database.writing() as connection:
            await connection.execute(delete(API_AUDIT).where(API_AUDIT.c.seq <= 66))
        assert await verify(trail) == (9, "what came before entry 67 is not there")
    with pytest.raises(SpecError, match="keep"):
        MemoryAudit(keep=0)


async def test_refusals_push_out_older_refusals_and_nothing_that_was_done(database: Database | None) -> None:
    trail = MemoryAudit(keep=10) if database is None else SqlAudit(database, keep=10)
    await trail.append([entry(1, method="DELETE"), entry(2, status=504)])  # this may have been done, too
    for number in range(3, 103, 4):
        await trail.append([entry(number + more, status=403 + more) for more in range(4)])
        assert (await verify(trail, page=7))[1] is None
    kept = await trail.entries(limit=100)
    assert [each.at - NOW for each in kept[:10]] == list(range(102, 92, -1))
    assert [(each.seq, each.method, each.status) for each in kept[-2:]] == [(2, "PUT", 504), (1, "DELETE", 202)]
    assert len(kept) <= 22
    for number in range(103, 203):
        await trail.append([entry(number)])
        assert (await verify(trail, page=7))[1] is None
    kept = await trail.entries(limit=100)
    assert sum(each.refused for each in kept) >= 10, "and what was done pushes out no refusals"
    assert sum(not each.refused for each in kept) < 20
    if database is not None:  # what is put where a refusal was dropped is found
        await put_in(database, replace(kept[-1], seq=50))
        checked, wrong = await verify(trail)
        assert (checked, (wrong or "")[:8]) == (len(kept), "entry 50")


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
async def test_an_audit_of_before_refusals_were_kept_apart_goes_on(database: Database) -> None:
    """Earlier versions kept all in one chain: it is verified as it is, its refusals are dropped as what was done."""
    old: list[AuditEntry] = []
    for number in range(1, 13):
        previous = old[-1].hash if old else ""
        old.append(entry(number, status=(202, 403)[number % 2], seq=number, previous=previous))
    await put_in(database, *old)
    async with database.writing() as connection:
        await connection.execute(update(API_AUDIT_HEAD).values(last=12, hash=old[-1].hash))
    trail = SqlAudit(database, keep=10)
    assert await verify(trail) == (12, None)
    for number in range(13, 63):
        await trail.append([entry(number, status=403)])
        assert (await verify(trail, page=7))[1] is None
    kept = [each.seq for each in await trail.entries(limit=100)]
    assert kept[-10:] == list(range(12, 2, -1))
    for number in range(63, 93):
        await trail.append([entry(number)])
        assert (await verify(trail, page=7))[1] is None
