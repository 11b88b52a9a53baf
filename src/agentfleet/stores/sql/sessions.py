"""The connections that a journal holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from agentfleet.stores.sql.engines import WRITES


class HeldConnections:
    """Two connections, one for transactions and one for statements by themselves; made anew after they broke.

    For one thread at a time, but for `abort`.

    Args:
        engine: Makes them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[bool, Connection] = {}
        self._driven: dict[bool, Any] = {}
        """The driver's own connections, to be broken off from another thread."""

    @contextmanager
    def begin(self, *, writes: bool = False, at_once: bool = False) -> Iterator[Connection]:
        """A transaction.

        Args:
            writes: Whether it will write; SQLite locks at its beginning, then.
            at_once: Each statement is a transaction of its own.
        """
        try:
            if at_once not in self._held:
                self._held[at_once] = made = self._engine.connect()
                self._driven[at_once] = made.connection.driver_connection
                if at_once:
                    made.execution_options(isolation_level="AUTOCOMMIT")
            connection = self._held[at_once].execution_options(**{WRITES: writes})
            with connection.begin():
                yield connection
        except BaseException:
            self.drop()
            raise

    def probe(self) -> None:
        """See `bounded.Session`."""
        with self.begin(at_once=True) as connection:
            connection.execute(text("SELECT 1"))

    def abort(self) -> None:
        """End the connections at their sockets, so that whoever waits for an answer is woken; for PostgreSQL."""
        for each in tuple(self._driven.values()):
            with suppress(OSError, SQLAlchemyError, _closed()), socket.socket(fileno=os.dup(each.fileno())) as mine:
                mine.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Close both."""
        held, self._held, self._driven = self._held, {}, {}
        for each in held.values():
            with suppress(SQLAlchemyError):  # it was broken off
                each.close()


def _closed() -> type[Exception]:
    """What psycopg raises for the number of a socket that is closed."""
    import psycopg  # noqa: PLC0415 - only where PostgreSQL is used

    return psycopg.OperationalError
