"""RECORD: journal, configuration, leases and fleet tables in SQLite or PostgreSQL (`agentfleet[sql]`).

::

    async with Database("postgresql://fleet@db/fleet") as database:
        store = ConfigStore(SqlConfig(database))
        leases = SqlLeases(database)
    with SqlJournal("sqlite:///fleet.db") as journal:
        ...

The tables are made, or brought up to date, when a database is opened. SQLite serves the processes of one machine, as
many as there are; PostgreSQL those of many. What was acknowledged survives the death of the process at any instant.
"""

from __future__ import annotations

from importlib.util import find_spec

from agentfleet.errors import MissingExtra

if find_spec("sqlalchemy") is None or find_spec("alembic") is None:
    raise MissingExtra("databases need 'agentfleet[sql]': pip install 'agentfleet[sql]'")

from agentfleet.stores.sql.access import SqlAudit, SqlTokens
from agentfleet.stores.sql.acks import SqlAcks
from agentfleet.stores.sql.config import SqlConfig
from agentfleet.stores.sql.database import Database
from agentfleet.stores.sql.fleets import SqlFleets
from agentfleet.stores.sql.journal import SqlJournal
from agentfleet.stores.sql.leases import SqlLeases, ToldLeases
from agentfleet.stores.sql.migrating import migrate
from agentfleet.stores.sql.registry import SqlFleetRecords

del find_spec

__all__ = [
    "Database",
    "SqlAcks",
    "SqlAudit",
    "SqlConfig",
    "SqlFleetRecords",
    "SqlFleets",
    "SqlJournal",
    "SqlLeases",
    "SqlTokens",
    "ToldLeases",
    "migrate",
]
