"""SQLite from an event loop: statements run where they are made, and only what may wait runs in a thread.

A statement takes some ten microseconds. Handed over to a thread and back it takes two turns of the event loop, and a
transaction of six of them a dozen, during which it holds the only lock there is for writing: in a manager of a hundred
fleets, where a turn takes milliseconds, all others waited for that. What does wait is the beginning of a transaction
that writes, if another process writes just then, and its commit, for the disk; these two are handed over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.to_thread
from sqlalchemy import URL, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only

BEGIN_TO_WRITE = "BEGIN IMMEDIATE"
DRIVER = "sqlite+agentfleet"
_MANY = 500
"""Rows that are written where they are made, at most: some five milliseconds."""


class _Cursor(sqlite3.Cursor):
    async def _async_soft_close(self) -> None:
        """SQLAlchemy asks cursors of asyncio's to free what they hold on a server before their rows are read."""


class _Connection(sqlite3.Connection):
    writes = False
    """Whether there is something to commit."""

    def begun_at_once(self) -> bool:
        """Begin to write, if no other process does so now."""
        (patience,) = self.execute("PRAGMA busy_timeout").fetchone()
        self.execute("PRAGMA busy_timeout = 0")
        try:
            self.execute(BEGIN_TO_WRITE)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        finally:
            self.execute(f"PRAGMA busy_timeout = {patience}")
        return True

    def cursor(self, factory: Any = _Cursor) -> Any:
        """One that asyncio's dialects may have."""
        return super().cursor(factory)


class DirectSqlite(SQLiteDialect_pysqlite):
    """The dialect of the standard library's driver, for asyncio."""

    driver = "agentfleet"
    supports_statement_cache = True
    is_async = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:  # noqa: ARG003 - as SQLAlchemy asks
        """One that asyncio's tasks may wait for."""
        return AsyncAdaptedQueuePool

    def create_connect_args(self, url: URL) -> Any:
        """Connections that threads may use in turn."""
        words, options = super().create_connect_args(url)
        return words, {**options, "check_same_thread": False, "factory": _Connection}

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """At once, but for what waits until other processes have written."""
        run = partial(super().do_execute, cursor, statement, parameters, context)
        if statement != BEGIN_TO_WRITE:
            await_only(_at_once(run))
            return
        if not cursor.connection.begun_at_once():
            await_only(anyio.to_thread.run_sync(run))
        cursor.connection.writes = True

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """At once, but for what takes long by its mere number."""
        run = partial(super().do_executemany, cursor, statement, parameters, context)
        await_only(anyio.to_thread.run_sync(run) if len(parameters) > _MANY else _at_once(run))

    def do_commit(self, dbapi_connection: Any) -> None:
        """In a thread, if it is to wait for the disk."""
        plain = _plain(dbapi_connection)
        writes, plain.writes = plain.writes, False
        if writes:
            await_only(anyio.to_thread.run_sync(plain.commit))  # cancelled or not it waits: nobody meets it amid that
        else:
            plain.commit()

    def do_rollback(self, dbapi_connection: Any) -> None:
        """At once."""
        plain = _plain(dbapi_connection)
        plain.writes = False
        plain.rollback()


def _plain(connection: Any) -> _Connection:
    """The driver's connection, which the pool wraps."""
    found: _Connection = getattr(connection, "dbapi_connection", connection)
    return found


async def _at_once(work: Callable[[], None]) -> None:
    """Work, as something to await without a turn of the event loop: SQLAlchemy demands an await of each statement."""
    work()


registry.register(DRIVER.replace("+", "."), __name__, DirectSqlite.__name__)
