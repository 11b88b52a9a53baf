"""A manager with a simulated cluster and the REST API in front of it, in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from tests.server.asking import ADMIN, Asking, Reply

from agentfleet.backends.memory import MemoryBackend
from agentfleet.configstore import ConfigStore
from agentfleet.manager import FleetManager
from agentfleet.operations import Operation
from agentfleet.server import Admission, FileTokens, Leaving, Limits, create_app
from agentfleet.server.principals import Source
from agentfleet.specs import AgentTemplate
from agentfleet.stores.audit import KEEP, AuditEntry, AuditTrail, MemoryAudit, verify
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.stores.sql import Database, SqlAudit, SqlConfig, SqlFleetRecords, SqlJournal, SqlTokens
from agentfleet.stores.tokens import MemoryTokens, TokenStore

READER = "reader-token-of-the-tests-0123456789abcdef"
OPERATOR = "operator-token-of-the-tests-0123456789ab"
A_READER, A_OPERATOR, A_ADMIN, B_ADMIN = (
    f"{name}-token-of-the-tests-0123456789abcdef" for name in ("ar", "ao", "aa", "ba")
)
LINES = (
    f"admin admin * {ADMIN}",
    f"reader read * {READER}",
    f"operator operate * {OPERATOR}",
    f"a-reader read a {A_READER}",
    f"a-operator operate a {A_OPERATOR}",
    f"a-admin admin a {A_ADMIN}",
    f"b-admin admin b {B_ADMIN}",
)
TEMPLATE = AgentTemplate(command=["agent", "--port", "{port}"], cpu="250m", memory="512Mi", port=8080)


@dataclass
class World:
    """Everything of one test."""

    manager: FleetManager
    backend: MemoryBackend
    ask: Asking
    tokens: TokenStore
    audit: AuditTrail
    leaving: Leaving
    app: Any
    token_file: Path

    async def finished(self, reply: Reply) -> Operation:
        """What came of an accepted change."""
        assert reply.status == 202, (reply.status, reply.body)
        return await self.manager.finished(reply.json["operation_id"], timeout=60)

    async def cluster(self, name: str = "a", **more: Any) -> str:
        """A new cluster that is up and was looked at, and its id."""
        asked = {"cluster_name": name, "replicas": 2, "min_replicas": 1, "max_replicas": 10, **more}
        reply = await self.ask("POST", "/api/v1/clusters", asked)
        ended = await self.finished(reply)
        assert ended.status == "succeeded", ended
        await self.until(name, lambda seen: seen["status"] == "running")
        return str(reply.json["cluster_id"])

    async def until(self, name: str, reached: Any) -> dict[str, Any]:
        """Wait until a cluster is seen to be so."""
        with anyio.fail_after(60):
            while True:
                seen: dict[str, Any] = (await self.ask("GET", f"/api/v1/clusters/{name}")).json
                if reached(seen):
                    return seen
                await anyio.sleep(0.02)

    async def instances(self, name: str = "a") -> Sequence[str]:
        """Ids of a cluster's instances."""
        found = (await self.ask("GET", f"/api/v1/clusters/{name}/instances")).json["items"]
        return [each["instance_id"] for each in found]


@asynccontextmanager
async def world(
    folder: Path,
    *,
    database: str | None = None,
    limits: Limits | None = None,
    admission: Admission | None = None,
    sources: Sequence[Source] = (),
    keep_audit: int = KEEP,
    **more: Any,
) -> AsyncIterator[World]:
    """A manager and its API; on a database if there is one, in memory otherwise."""
    token_file = folder / "world-tokens"
    token_file.write_text("\n".join(LINES) + "\n")
    journal: MemoryJournal | SqlJournal = MemoryJournal()
    records: MemoryFleets | SqlFleetRecords = MemoryFleets()
    tokens: TokenStore = MemoryTokens()
    audit: AuditTrail = MemoryAudit(keep=keep_audit)
    async with AsyncExitStack() as stack:
        config: ConfigStore | None = None
        if database is not None:
            opened = await stack.enter_async_context(Database(database))
            events = f"sqlite:///{folder / 'events.db'}" if database.startswith("sqlite") else database
            journal = stack.enter_context(SqlJournal(events))
            records, tokens, audit = SqlFleetRecords(opened), SqlTokens(opened), SqlAudit(opened, keep=keep_audit)
            config = ConfigStore(SqlConfig(opened), journal=journal)
        backend = await stack.enter_async_context(MemoryBackend(start_delay=0.02, stop_delay=0.02))
        manager = FleetManager(records, backend=backend, journal=journal, config=config, period=0.05)
        leaving = Leaving()
        app = create_app(
            manager,
            tokens=tokens,
            sources=[FileTokens(token_file), *sources],
            audit=audit,
            admission=Admission(engine="memory", template=TEMPLATE) if admission is None else admission,
            limits=Limits(rate=100_000, burst=100_000) if limits is None else limits,
            leaving=leaving,
            **more,
        )
        await stack.enter_async_context(manager)
        yield World(manager, backend, Asking(app), tokens, audit, leaving, app, token_file)


async def audited_in(url: str) -> list[AuditEntry]:
    """The audit of a database, oldest first."""
    async with Database(url) as database:
        audit = SqlAudit(database)
        assert (await verify(audit))[1] is None
        return list(reversed(await audit.entries()))
