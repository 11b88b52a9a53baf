"""What `agentfleet token` does: makes, lists and ends tokens in a database."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

import anyio

from agentfleet.server.commands import actor, audited
from agentfleet.stores.sql import Database, SqlTokens
from agentfleet.stores.tokens import TokenRecord, new_token
from agentfleet.waiting import period_of


def create(database: str, name: str, *, scopes: Sequence[str], fleets: Sequence[str], expires: str | None) -> str:
    """Make a token, audited first, and return it; raises `SpecError`, `OperationRefused` or `BackendUnavailable`."""
    lasts = None if expires is None else period_of(expires, "expires")
    plain, record = new_token(name, scopes=scopes, fleets=fleets, now=time.time(), by=actor(), expires_in=lasts)

    async def add(opened: Database) -> str:
        what = f"token {name!r} ({record.id}): {', '.join(record.scopes)} on {', '.join(record.fleets)}"
        async with audited(opened, "token create", what):
            await SqlTokens(opened).add(record)
        return plain

    return _within(database, add)


def listed(database: str) -> str:
    """All tokens as a table; never what they are."""

    async def read(opened: Database) -> str:
        rows: list[tuple[str, ...]] = [("NAME", "ID", "SCOPES", "FLEETS", "CREATED", "EXPIRES", "LAST USED", "STATE")]
        rows += [_row(each, time.time()) for each in await SqlTokens(opened).tokens()]
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        return "\n".join(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    return _within(database, read)


def revoke(database: str, name: str) -> str:
    """End a token, audited first; raises `NotFound` or `BackendUnavailable`."""

    async def end(opened: Database) -> str:
        async with audited(opened, "token revoke", f"token {name!r:.200}"):
            record = await SqlTokens(opened).revoke(name, time.time())
        return f"token {record.name} ({record.id}) is revoked; managers know it within 5 seconds"

    return _within(database, end)


def _within(database: str, work: Callable[[Database], Awaitable[str]]) -> str:
    async def run() -> str:
        async with Database(database) as opened:
            return await work(opened)

    return anyio.run(run)


def _row(record: TokenRecord, now: float) -> tuple[str, ...]:
    state = "valid" if record.holds(now) else "expired" if record.revoked_at is None else "revoked"
    dates = (_date(at) for at in (record.created_at, record.expires_at, record.used_at))
    return (record.name, record.id, ",".join(record.scopes), ",".join(record.fleets), *dates, state)


def _date(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
