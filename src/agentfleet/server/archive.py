"""What `agentfleet config` does: writes the newest configuration of a database out, and reads it in again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio

from agentfleet.configarchive import Loaded, dump, load
from agentfleet.configstore import ConfigStore
from agentfleet.errors import SpecError
from agentfleet.server.commands import ORIGIN, actor, audited
from agentfleet.server.schemas import register, schemas_in
from agentfleet.server.serving import events_url
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.sql import Database, SqlConfig, SqlJournal
from agentfleet.stores.sql.config import failing


def exported(database: str, fleets: Sequence[str]) -> str:
    """The newest documents of these fleets, or of all, as one text; raises `ConfigNotFound` or `BackendUnavailable`."""

    async def write(store: ConfigStore) -> str:
        return await dump(store, fleets or None)

    return _within(database, write)


def imported(database: str, file: Path, *, reason: str, schemas: Path | None, dry_run: bool) -> str:
    """Publish what differs, and say what that was; raises as `configarchive.load`, and `SpecError` for the files.

    Each revision is audited before it is published.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from error
    known = {} if schemas is None else schemas_in(schemas)

    async def read(store: ConfigStore) -> str:
        register(store, known)
        done = await load(store, text, author=actor(), reason=reason, dry_run=dry_run, origin=ORIGIN)
        return "\n".join(map(_line, done))

    return _within(database, read)


class _Audited(SqlConfig):
    """Revisions that are written into the audit before they are kept."""

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """See `ConfigRecords`."""
        what = f"configuration revision {revision.revision}"
        async with failing(), audited(self._database, "config import", what, fleet=revision.key):
            await super().append(revision, expect=expect)


def _within(database: str, work: Callable[[ConfigStore], Awaitable[str]]) -> str:
    async def run() -> str:
        async with Database(database) as opened:
            with SqlJournal(events_url(database)) as journal:
                return await work(ConfigStore(_Audited(opened), journal=journal))

    return anyio.run(run)


def _line(loaded: Loaded) -> str:
    changes = f"{len(loaded.changes)} change{'' if len(loaded.changes) == 1 else 's'}"
    what = changes if loaded.revision is None else f"revision {loaded.revision}, {changes}"
    return f"{loaded.key}: {what if loaded.changes or loaded.revision else 'as it is'}"
