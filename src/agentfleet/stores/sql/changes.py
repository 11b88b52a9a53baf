"""Who waits for a change of a row is woken by it, whichever process made it: LISTEN/NOTIFY, or a table in SQLite.

Waking is a hint. Whoever is woken looks, and everybody looks again now and then by himself, so that a notice that was
lost with a connection delays a change, and never hides it.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import anyio
from sqlalchemy import URL, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agentfleet.stores.following import Bell
from agentfleet.stores.sql.engines import connected, is_sqlite

CHANNEL = "agentfleet"
_LOOK = 10.0
"""Seconds after which those who wait look again by themselves."""
_GLANCE = 0.005
"""Seconds between two looks at whether SQLite's log was written to, while anybody waits."""
_COUNTER = 0.25
"""Seconds between two looks at its counter of changes, if the log seems untouched."""
_SETTLING = 5
"""Glances after the log was written to at which the counter is looked at: a commit counts after it is written."""


_NOTE = text(
    "INSERT INTO changes (key, number) VALUES (:key, (SELECT coalesce(max(number), 0) + 1 FROM changes))"
    " ON CONFLICT (key) DO UPDATE SET number = excluded.number"
)
_CHANGED = text("SELECT key, number FROM changes WHERE number > :after")


class Changes(Protocol):
    """Wakes those who wait for a key."""

    async def wait(self, key: str, look: Callable[[], Awaitable[bool]]) -> None:
        """Until `look` finds what it looks for, or the key has changed; perhaps in another way."""
        ...

    async def note(self, connection: AsyncConnection, key: str) -> None:
        """Within a transaction: tell other processes when it is committed."""
        ...

    def ring(self, key: str) -> None:
        """Wake those of this process."""
        ...


@asynccontextmanager
async def changes_of(url: URL, engine: AsyncEngine) -> AsyncIterator[Changes]:
    """What wakes those who wait for changes of one database."""
    made = _Counted(engine, str(url.database)) if is_sqlite(url) else _Notified(url)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        try:
            yield made
        finally:
            tasks.cancel_scope.cancel()


class _Ear:
    """Those who wait for one key."""

    __slots__ = ("bell", "rung", "told", "waiting")

    def __init__(self) -> None:
        self.bell = Bell()
        self.rung = 0
        """How often it was rung, for whatever reason."""
        self.told = 0
        """How often because this very key has changed."""
        self.waiting = 0


class _Bells:
    """One bell for each key, as long as somebody waits for it."""

    def __init__(self) -> None:
        self._ears: dict[str, _Ear] = {}
        self._wanted = anyio.Event()

    @property
    def _waiting(self) -> bool:
        """Whether anybody waits."""
        return bool(self._ears)

    async def wait(self, key: str, look: Callable[[], Awaitable[bool]]) -> None:
        """See `Changes`. Who is told that this very key has changed looks for himself."""
        ear = self._ears.setdefault(key, _Ear())
        ear.waiting += 1
        self._wanted.set()
        told = ear.told
        try:
            while ear.told == told:
                rung = ear.rung
                if await look():
                    return
                if ear.rung == rung:  # else it was rung while we looked
                    with anyio.move_on_after(_LOOK * (0.75 + random.random() / 2)):  # noqa: S311 - jitter
                        await ear.bell.wait()
        finally:
            ear.waiting -= 1
            if not ear.waiting:
                del self._ears[key]

    def ring(self, key: str) -> None:
        """See `Changes`."""
        ear = self._ears.get(key)
        if ear is not None:
            ear.told += 1
            ear.rung += 1
            ear.bell.ring()

    def _ring_all(self) -> None:
        """Something may have changed."""
        for ear in tuple(self._ears.values()):
            ear.rung += 1
            ear.bell.ring()


class _Counted(_Bells):
    """SQLite counts the changes that other connections commit, and a table says which keys they were about.

    Asking for the count takes a thread and a tenth of a millisecond, looking at the date of the write-ahead log nearly
    nothing; so the log is looked at often, the counter when the log was written to, and the table when the counter has
    moved.
    """

    def __init__(self, engine: AsyncEngine, path: str) -> None:
        super().__init__()
        self._engine = engine
        self._log = f"{path}-wal"
        self._read: int | None = None
        """Up to which number the table was read; None before."""

    async def note(self, connection: AsyncConnection, key: str) -> None:
        """See `Changes`: the key's row gets the next number. There is one writer at a time."""
        await connection.execute(_NOTE, {"key": key})

    async def run(self) -> None:
        while True:
            self._wanted = anyio.Event()
            if not self._waiting:
                await self._wanted.wait()
            try:
                await self._watch()
            except (SQLAlchemyError, OSError):
                self._ring_all()  # those who wait look for themselves, and are told what is wrong
                await anyio.sleep(1.0)

    async def _watch(self) -> None:
        """Compare the counter on one connection, as long as anybody waits."""
        before: int | None = None
        written: object = None
        settling, rest = 0, 0.0
        async with connected(self._engine, timeout=_LOOK) as connection:
            while self._waiting:
                if written != (written := self._written()):
                    settling = _SETTLING
                if settling or rest <= 0:
                    now = await self._count(connection)
                    if now != before:
                        await self._tell(connection)
                    before, rest = now, _COUNTER
                settling, rest = max(0, settling - 1), rest - _GLANCE
                await anyio.sleep(_GLANCE)

    async def _tell(self, connection: AsyncConnection) -> None:
        """Wake those whose keys have changed since the table was read; the first time everybody."""
        rows = (await connection.execute(_CHANGED, {"after": self._read or 0})).all()
        await connection.rollback()
        if self._read is None:
            self._ring_all()
        for row in rows if self._read is not None else ():
            self.ring(row.key)
        self._read = max((row.number for row in rows), default=self._read or 0)

    async def _count(self, connection: AsyncConnection) -> int:
        """The counter, outside of any transaction: within one it stands still."""
        count = (await connection.exec_driver_sql("PRAGMA data_version")).scalar_one()
        await connection.rollback()
        return int(count)

    def _written(self) -> object:
        """What changes when the log is written to; it is not opened, which would undo SQLite's own locks."""
        try:
            found = os.stat(self._log)  # noqa: PTH116 - no path is made of it 200 times a second
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size


class _Notified(_Bells):
    """PostgreSQL notifies those who listen (LISTEN, NOTIFY)."""

    def __init__(self, url: URL) -> None:
        super().__init__()
        self._url = url

    async def note(self, connection: AsyncConnection, key: str) -> None:
        """See `Changes`; delivered when the transaction is committed."""
        await connection.execute(text("SELECT pg_notify(:channel, :key)"), {"channel": CHANNEL, "key": key})

    async def run(self) -> None:
        import psycopg  # noqa: PLC0415 - only where it is used

        failures = 0
        address = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        while True:
            try:
                made = await psycopg.AsyncConnection.connect(
                    address, autocommit=True, connect_timeout=5, keepalives_idle=5, application_name="agentfleet-watch"
                )
                async with made:
                    await made.execute(f"LISTEN {CHANNEL}")
                    failures = 0
                    self._ring_all()  # what was notified before is lost
                    async for notice in made.notifies():
                        self.ring(notice.payload)
            except (psycopg.Error, OSError):
                failures += 1
            self._ring_all()
            span = min(5.0, 0.1 * 2.0 ** min(failures, 6))
            await anyio.sleep(span * (0.5 + random.random() / 2))  # noqa: S311 - jitter
