"""One database and its connections, shared by the stores that are kept in it. For asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agentfleet.errors import BackendUnavailable, DeadlineExceeded, OperationRefused, SpecError
from agentfleet.stores.sql.changes import Changes, changes_of
from agentfleet.stores.sql.checkpoints import Checkpoints
from agentfleet.stores.sql.engines import WRITES, async_engine, connected, is_sqlite, url_of
from agentfleet.stores.sql.migrating import migrate
from agentfleet.units import parse_duration

_PATIENCE = 6
"""How many times as long those wait to write for whom nobody waits."""


class Database:
    """Connections to one database. Use it as an async context manager, on asyncio.

    Args:
        url: `sqlite:///fleet.db`, or `postgresql://user:password@host/name`.
        timeout: Time that a connection or a statement may take, in seconds or like "10s".
        connections: Open at one time, at most.

    Raises:
        SpecError: `url` is no such address.
    """

    def __init__(self, url: str | URL, *, timeout: float | str = 10.0, connections: int = 5) -> None:
        self.url = url_of(url)
        try:
            self.timeout = parse_duration(timeout)
        except ValueError as error:
            raise SpecError(f"timeout: {error}") from error
        self._connections = connections
        self._engine: AsyncEngine | None = None
        self._changes: Changes | None = None
        self._stack = AsyncExitStack()
        self._turns = anyio.Lock()
        """SQLite takes one writer at a time, and who finds it taken looks again after up to a tenth of a second: the
        tasks of one process rather wait in line."""
        self._behind = anyio.Lock()
        """The line of those for whom nobody waits: one of them at a time stands in the other."""

    async def __aenter__(self) -> Self:
        """Open it; makes the tables, or brings them up to date.

        Raises:
            BackendUnavailable: It cannot be reached, or refuses.
            OperationRefused: It is open already, or a newer version of this library has changed the tables.
        """
        if self._engine is not None:
            raise OperationRefused("this database is open already")
        async with AsyncExitStack() as stack:
            with unreachable():
                work = partial(migrate, self.url, timeout=max(self.timeout, 60.0))
                await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
                self._engine = async_engine(self.url, timeout=self.timeout, connections=self._connections)
                stack.push_async_callback(self._close)
                if is_sqlite(self.url):
                    stack.callback(Checkpoints(str(self.url.database), timeout=self.timeout).close)
                self._changes = await stack.enter_async_context(changes_of(self.url, self._engine))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _close(self) -> None:
        made, self._engine, self._changes = self._engine, None, None
        if made is not None:
            with anyio.CancelScope(shield=True):
                await made.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that reads. Raises like `writing`."""
        async with self._begin(writes=False) as connection:
            yield connection

    @asynccontextmanager
    async def writing(self, *, background: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes: committed at the end, taken back on an error.

        Args:
            background: Whether nobody waits for it: on SQLite those that somebody waits for go before the others.

        Raises:
            BackendUnavailable: The database cannot be reached, is locked for too long, or is not open.
            DeadlineExceeded: No connection became free in time.
        """
        async with AsyncExitStack() as stack:
            if is_sqlite(self.url):
                patience = self.timeout * (_PATIENCE if background else 1)
                with anyio.move_on_after(patience) as waiting:
                    if background:
                        await stack.enter_async_context(self._behind)
                    await stack.enter_async_context(self._turns)
                if waiting.cancelled_caught:
                    raise DeadlineExceeded(f"the database was written by others for {patience:g} s")
            yield await stack.enter_async_context(self._begin(writes=True))

    @asynccontextmanager
    async def _begin(self, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        if self._engine is None:
            raise BackendUnavailable("the database is not open; use it inside 'async with database:'")
        with unreachable():
            async with connected(self._engine, timeout=self.timeout) as plain:
                connection = await plain.execution_options(**{WRITES: writes})
                async with connection.begin():
                    yield connection

    async def changed(self, channel: str, key: str, look: Callable[[], Awaitable[bool]]) -> None:
        """Wait until `look` finds what it looks for, asked at first and now and then, or the key has changed."""
        if self._changes is None:
            raise BackendUnavailable("the database is not open; use it inside 'async with database:'")
        await self._changes.wait(f"{channel}:{key}", look)

    async def note_change(self, connection: AsyncConnection, channel: str, key: str) -> None:
        """Within a transaction: tell other processes, when it is committed, that a key has changed."""
        if self._changes is not None:
            await self._changes.note(connection, f"{channel}:{key}")

    def ring(self, channel: str, key: str) -> None:
        """Tell those who wait in this process."""
        if self._changes is not None:
            self._changes.ring(f"{channel}:{key}")


class unreachable:  # noqa: N801 - reads as a statement
    """Around calls of the database's driver: turns its errors into ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NoConnection):
            raise DeadlineExceeded(f"the database gave no connection in time: {error}") from error
        if isinstance(error, SQLAlchemyError | OSError) and not isinstance(error, TimeoutError):
            cause = getattr(error, "orig", None) or error
            raise BackendUnavailable(f"the database failed: {str(cause).strip()[:500]}") from error
