"""Brings a database's tables up to date, or back; any number of processes may do so at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, inspect, text

from agentfleet.errors import OperationRefused, SpecError
from agentfleet.stores.sql.engines import WRITES, engine, is_sqlite, url_of
from agentfleet.stores.sql.schema import NEWEST

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "head"
_LOCK = 0x41464C54
"""Number of PostgreSQL's advisory lock for migrations."""


def migrate(url: str | URL, to: str = HEAD, *, timeout: float = 60.0) -> None:
    """Make the tables, or change them to how another version of this library has them. All or nothing. Blocks.

    Args:
        url: Address of the database; a SQLite file is made if there is none.
        to: Number of a migration, "head" for the newest, "base" for none: drops all tables, with what they hold.
        timeout: Seconds that each statement, and the wait for another process that migrates, may take.

    Raises:
        OperationRefused: A newer version of this library has changed the tables already; nothing was changed.
        SpecError: There is no migration of this number.
        sqlalchemy.exc.SQLAlchemyError: The database cannot be reached, or refuses; nothing was changed.
    """
    made = engine(url_of(url), timeout=timeout)
    try:
        with made.connect() as plain:
            connection = plain.execution_options(**{WRITES: True})
            with connection.begin():
                if to in (HEAD, NEWEST) and _present(connection) == NEWEST:
                    return  # as nearly always; Alembic takes a quarter of a second to import
                if not is_sqlite(url_of(url)):
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
                _move(connection, to)
    finally:
        made.dispose()


def _present(connection: Connection) -> str | None:
    """The number of the last migration that the tables have seen."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def config_for(connection: Connection) -> Config:
    """Alembic's configuration, without a file."""
    from alembic.config import Config  # noqa: PLC0415 - slow to import

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _move(connection: Connection, to: str) -> None:
    from alembic import command  # noqa: PLC0415 - slow to import
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = config_for(connection)
    scripts = ScriptDirectory.from_config(config)
    now = MigrationContext.configure(connection).get_current_revision()
    known = {each.revision for each in scripts.walk_revisions()}
    if now is not None and now not in known:
        newest = scripts.get_current_head()
        raise OperationRefused(
            f"the database's tables are of a newer version of agentfleet (migration {now}, this one knows {newest});"
            f" run that version, or have it take them back: agentfleet migrate --to {newest}"
        )
    if to not in {HEAD, "base", *known}:
        raise SpecError(f"there is no migration {to!r}; there are {', '.join(sorted(known))}, {HEAD} and base")
    target = scripts.get_current_head() if to == HEAD else None if to == "base" else to
    if now == target:
        return
    back = target is None or (
        now is not None and target in {each.revision for each in scripts.walk_revisions("base", now)}
    )
    if back:
        command.downgrade(config, to)
    else:
        command.upgrade(config, to)
