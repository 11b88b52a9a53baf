"""What the commands that change a database write into its audit: no request, and as good as one."""

from __future__ import annotations

import getpass
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from agentfleet.errors import AgentFleetError, BackendUnavailable
from agentfleet.server.problems import refusal_of
from agentfleet.stores.audit import AuditEntry
from agentfleet.stores.sql import Database, SqlAudit

ORIGIN = "cli"
"""Where commands come from, as the audit and the history of configuration have it."""
_ALL = 2**62
"""Entries that a command keeps: how many are too many is the servers' business."""


@asynccontextmanager
async def audited(database: Database, command: str, detail: str, *, fleet: str | None = None) -> AsyncIterator[None]:
    """Around one change: it is written down before it is made (202), and once more if it is refused.

    Args:
        database: Whose audit it is.
        command: The command, without its arguments.
        detail: What it changes.
        fleet: Name of the fleet concerned.

    Raises:
        BackendUnavailable: It cannot be written down, and is not made.
    """
    audit = SqlAudit(database, keep=_ALL)
    asked = AuditEntry(
        at=time.time(),
        actor=actor(),
        credential="",
        origin=ORIGIN,
        request=str(uuid.uuid4()),
        method="CLI",
        path=f"agentfleet {command}",
        fleet=fleet,
        operation=None,
        status=202,
        detail=detail,
    )
    try:
        await audit.append([asked])
    except AgentFleetError as error:
        raise BackendUnavailable(f"nothing was changed, because it cannot be audited: {error}") from error
    try:
        yield
    except AgentFleetError as error:
        said = str(error)[:500]
        await audit.append([replace(asked, at=time.time(), status=refusal_of(error).status, detail=said)])
        raise


def actor() -> str:
    """Who runs this command, as the audit names it."""
    return f"cli/{user()}"


def user() -> str:
    """Who runs this command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        return "unknown"
