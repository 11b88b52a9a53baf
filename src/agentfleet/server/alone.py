"""One manager alone on a store: a second one by mistake is refused, rather than both acting."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentfleet.errors import OperationRefused, SpecError
from agentfleet.stores.sql.engines import is_sqlite, url_of


@contextmanager
def alone(database: str) -> Iterator[None]:
    """A block in which no other process of this machine manages a SQLite file.

    Raises:
        OperationRefused: Another one does.
        SpecError: It is no file, so that managers must share it by leases.
    """
    url = url_of(database)
    if not is_sqlite(url):
        raise SpecError("leases: managers of a PostgreSQL share it; use --leases database or kubernetes")
    path = Path(f"{url.database}.lock")
    try:
        file = path.open("a")
    except OSError as error:
        raise SpecError(f"database: {path} cannot be made: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OperationRefused(
                f"another manager runs on {url.database}; end it first, or share the store with --leases database"
            ) from error
        yield
