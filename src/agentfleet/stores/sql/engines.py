"""Addresses of databases, and engines made for what we ask of them: deadlines everywhere, and no lost commit."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from agentfleet.errors import SpecError
from agentfleet.stores.sql.checkpoints import BACKSTOP
from agentfleet.stores.sql.direct import BEGIN_TO_WRITE, DRIVER

_PAUSE = 2000
"""Milliseconds that a transaction may be left alone, at most."""
_FAMILIES = {"sqlite": ("sqlite+pysqlite", DRIVER), "postgresql": ("postgresql+psycopg",) * 2}
WRITES = "agentfleet_writes"
"""Execution option of a connection whose transaction will write; SQLite locks at its beginning, then."""


def url_of(url: str | URL) -> URL:
    """The address of a database: `sqlite:///relative.db`, `sqlite:////absolute.db`, `postgresql://user@host/name`.

    Raises:
        SpecError: It is no such address.
    """
    try:
        made = make_url(url)
    except ArgumentError as error:
        raise SpecError("url: must be like 'sqlite:///fleet.db' or 'postgresql://user@host/name'") from error
    family = made.get_backend_name()
    if family not in _FAMILIES:
        raise SpecError(f"url: databases of the kind {family!r} are not supported; use sqlite or postgresql")
    if family == "sqlite" and made.database in (None, "", ":memory:"):
        raise SpecError(
            "url: SQLite needs a file, as in 'sqlite:///fleet.db'; for memory use MemoryJournal, MemoryConfig"
        )
    return made


def is_sqlite(url: URL) -> bool:
    """Whether it is a file of SQLite's."""
    return url.get_backend_name() == "sqlite"


def engine(url: str | URL, *, timeout: float, fsync: bool = True) -> Engine:
    """An engine for threads that may wait.

    Args:
        url: See `url_of`.
        timeout: Seconds that a connection, a lock or a statement may take.
        fsync: Whether a commit also survives the loss of power; without it, the death of the process only.
    """
    made = url_of(url)
    address = made.set(drivername=_FAMILIES[made.get_backend_name()][0])
    return _prepared(create_engine(address, **_options(made, timeout)), made, timeout, fsync=fsync)


def async_engine(url: str | URL, *, timeout: float, connections: int) -> AsyncEngine:
    """An engine for an asyncio event loop; otherwise as `engine`."""
    made = url_of(url)
    address = made.set(drivername=_FAMILIES[made.get_backend_name()][1])
    options = _options(made, timeout) | {"pool_size": connections, "max_overflow": 0, "pool_timeout": timeout}
    found = create_async_engine(address, **options)
    _prepared(found.sync_engine, made, timeout, fsync=True)
    return found


@asynccontextmanager
async def connected(engine: AsyncEngine, *, timeout: float) -> AsyncIterator[AsyncConnection]:
    """A connection of the pool, given back at the end.

    SQLAlchemy's own context manager has a task of its own give it back when it is cancelled, and nobody waits for that:
    the engine may be disposed of before, and then nobody ever closes the connection. Here it is waited for.
    """
    connection = await engine.connect()
    try:
        yield connection
    finally:
        with anyio.move_on_after(timeout, shield=True):
            await connection.close()


def _options(url: URL, timeout: float) -> dict[str, Any]:
    if is_sqlite(url):
        return {"connect_args": {"timeout": timeout}}
    milliseconds = max(1, math.ceil(timeout * 1000))
    # whoever is paused amid a transaction holds up others for so long: less than they wait for a statement
    idle = max(1, min(_PAUSE, milliseconds // 2))
    settings = f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={idle}"
    arguments = {
        "connect_timeout": max(1, math.ceil(timeout)),
        "options": settings,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": milliseconds,
        "application_name": "agentfleet",
    }
    return {"connect_args": arguments, "pool_pre_ping": True}


def _prepared(made: Engine, url: URL, timeout: float, *, fsync: bool) -> Engine:
    if is_sqlite(url):
        _prepare_sqlite(made, timeout, fsync=fsync)
    elif not fsync:

        @event.listens_for(made, "connect")
        def on_connect(connection: Any, _: object) -> None:
            connection.execute("SET synchronous_commit = off")
            connection.commit()

    return made


def _prepare_sqlite(made: Engine, timeout: float, *, fsync: bool) -> None:
    """Have the driver begin no transactions by itself, and take the write lock first where one is to write.

    A transaction that reads first and writes then fails when another has written in between, at once and whatever the
    time-out; one that begins by locking waits.
    """

    @event.listens_for(made, "connect")
    def on_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {math.ceil(timeout * 1000)}")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute(f"PRAGMA wal_autocheckpoint = {BACKSTOP}")
            cursor.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
            cursor.execute("PRAGMA foreign_keys = ON")
        finally:
            cursor.close()

    @event.listens_for(made, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql(BEGIN_TO_WRITE if writes else "BEGIN")
