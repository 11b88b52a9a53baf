"""What `agentfleet serve` runs: a manager of all fleets of a store, and the REST API in front of it, in one process.

On SIGTERM it is not ready any more, hands its leases over, ends streams and waits, answers what is under way, and ends.
"""

from __future__ import annotations

import logging
import signal
import ssl
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus
from fastapi import FastAPI

import agentfleet
from agentfleet.configstore import ConfigStore
from agentfleet.engines import AnyEngine
from agentfleet.errors import SpecError
from agentfleet.manager import FleetManager
from agentfleet.openfiles import ENOUGH, raise_file_limit
from agentfleet.server.admission import Admission, EngineKind
from agentfleet.server.alone import alone
from agentfleet.server.app import create_app
from agentfleet.server.context import Check
from agentfleet.server.credentials import FileTokens
from agentfleet.server.leaving import Leaving
from agentfleet.server.limits import Limits
from agentfleet.server.listening import bind, keep_fresh, server_of, tls_of
from agentfleet.server.principals import Source
from agentfleet.server.schemas import Schemas, register, schemas_in
from agentfleet.server.tidying import keep_tidy
from agentfleet.server.tokenreview import AccessRules, TokenReviews
from agentfleet.specs import AgentTemplate
from agentfleet.stores.leases import LeaseStore
from agentfleet.stores.sql import (
    Database,
    SqlAcks,
    SqlAudit,
    SqlConfig,
    SqlFleetRecords,
    SqlJournal,
    SqlLeases,
    SqlTokens,
    ToldLeases,
)
from agentfleet.stores.sql.engines import is_sqlite, url_of

log = logging.getLogger(__name__)

LeaseKind = Literal["database", "kubernetes", "none"]
KEEP_EVENTS = 500_000
"""Events that are kept where nobody says otherwise: a few hundred megabytes."""
PATIENCE = 20.0
"""Seconds that requests under way get when it ends."""
_OTHER_FILES = 1024
"""Files and sockets beside those of clients: of stores, engines and probes."""
_FOR_LEASES = 2
"""Connections to PostgreSQL for the leases alone; renewals are short."""
_AT_LAST = 28.0
"""Seconds after which it ends whatever is still under way."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is served, and how.

    Attributes:
        database: Address of the store.
        backend: What runs the instances.
        host: Where to listen.
        port: Of TCP; 0 takes a free one.
        tls_cert: Certificate chain for TLS, PEM.
        tls_key: Its key, PEM.
        token_file: Tokens that an operator mounts; see `credentials.FileTokens`.
        access_rules: What users of Kubernetes may do; see `tokenreview.AccessRules`.
        insecure_loopback: Ask nobody for a token, and serve this machine alone.
        open_metrics: Whether /metrics needs no token.
        identity: Name of this manager.
        leases: Where leases are kept; by default as fits the backend and the store.
        namespaces: Where new fleets live; the first is the default.
        template: What runs where a request does not say it.
        config_schemas: JSON schemas that configuration is held to; see `schemas.schemas_in`.
        operators_may: Parts of a template for which the scope *operate* suffices.
        state_dir: Where the process backend keeps its records.
        keep_events: How many events are kept, besides the last of each state, which recovery needs; None keeps all.
        linger: Seconds to go on answering once it is told to end, so that load balancers notice.
        limits: Bounds of everything.
    """

    database: str
    backend: EngineKind
    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    access_rules: Path | None = None
    insecure_loopback: bool = False
    open_metrics: bool = False
    identity: str | None = None
    leases: LeaseKind | None = None
    namespaces: tuple[str, ...] = ()
    template: Path | None = None
    config_schemas: Path | None = None
    operators_may: frozenset[str] = frozenset()
    state_dir: Path | None = None
    keep_events: int | None = KEEP_EVENTS
    linger: float = 0.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SpecError("TLS: give both the certificate and its key")
        if self.access_rules is not None and self.backend != "kubernetes":
            raise SpecError("access rules: users of Kubernetes are known on the backend kubernetes alone")
        if self.lease_kind == "kubernetes" and self.backend != "kubernetes":
            raise SpecError("leases: Kubernetes keeps them on the backend kubernetes alone")

    @property
    def lease_kind(self) -> LeaseKind:
        """Where leases are kept. A manager that nobody can share a store or an engine with needs none."""
        if self.leases is not None:
            return self.leases
        if self.backend == "kubernetes":
            return "kubernetes"
        return "none" if is_sqlite(url_of(self.database)) else "database"


@dataclass(frozen=True, slots=True)
class _Engine:
    """What depends on the backend."""

    make: AnyEngine | Callable[[str], AnyEngine]
    namespaces: tuple[str, ...]
    leases: LeaseStore | Callable[[str], LeaseStore] | None = None
    sources: tuple[Source, ...] = ()
    checks: Mapping[str, Check] = field(default_factory=dict)


async def serve(options: Options, *, started: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: What, and how.
        started: Told the address once requests are taken.

    Raises:
        SpecError: The options do not fit together, or nobody could ever be recognised.
        BackendUnavailable: The store or the address cannot be had.
    """
    _allow_files(options.limits)
    schemas: Schemas = {} if options.config_schemas is None else schemas_in(options.config_schemas)
    async with AsyncExitStack() as stack:
        await _serve(options, schemas, stack, started)


async def _serve(
    options: Options, schemas: Schemas, stack: AsyncExitStack, started: Callable[[str], None] | None
) -> None:
    listener = stack.enter_context(bind(options.host, options.port, loopback=options.insecure_loopback))
    tls = None
    if options.tls_cert is not None and options.tls_key is not None:
        tls = tls_of(options.tls_cert, options.tls_key)
    if options.lease_kind == "none":
        stack.enter_context(alone(options.database))
    database = await stack.enter_async_context(Database(options.database))
    journal = stack.enter_context(SqlJournal(events_url(options.database), limit=options.keep_events))
    engine = await _engine(options, database, stack)
    tokens, leaving = SqlTokens(database), Leaving()
    sources = (*_file_tokens(options), *engine.sources)
    if not (sources or options.insecure_loopback or await tokens.tokens()):
        raise SpecError(
            "tokens: nobody could be recognised; make one with 'agentfleet token create', name a --token-file, or "
            "serve this machine alone with --insecure-loopback"
        )
    config = ConfigStore(SqlConfig(database), journal=journal)
    register(config, schemas)
    manager = FleetManager(
        SqlFleetRecords(database),
        backend=engine.make,
        journal=journal,
        config=config,
        acks=SqlAcks(database),
        leases=engine.leases,
        identity=options.identity,
        about={"version": agentfleet.__version__},
    )
    app = create_app(
        manager,
        tokens=tokens,
        sources=sources,
        audit=SqlAudit(database),
        admission=Admission(
            engine=options.backend,
            template=None if options.template is None else _template(options.template),
            lowered=options.operators_may,
            namespaces=engine.namespaces,
        ),
        limits=options.limits,
        checks=engine.checks,
        leaving=leaving,
        insecure_loopback=options.insecure_loopback,
        open_metrics=options.open_metrics,
    )
    port = listener.getsockname()[1]
    address = f"{'http' if tls is None else 'https'}://{options.host}:{port}"
    running = _Running(manager, app, leaving, options, tls)
    await running.run(listener, lambda: _tell(address, options, started))


def _tell(address: str, options: Options, started: Callable[[str], None] | None) -> None:
    log.info(
        "serving at %s", address, extra={"address": address, "backend": options.backend, "leases": options.lease_kind}
    )
    if started is not None:
        started(address)


class _Running:
    """Runs manager and server side by side, and ends them in the right order."""

    def __init__(
        self, manager: FleetManager, app: FastAPI, leaving: Leaving, options: Options, tls: ssl.SSLContext | None
    ) -> None:
        self._manager, self._leaving, self._options, self._tls = manager, leaving, options, tls
        self._server = server_of(app, tls=tls, connections=options.limits.connections, patience=PATIENCE)

    async def run(self, listener: object, told: Callable[[], None]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._heed_signals, tasks.cancel_scope)
            tasks.start_soon(keep_tidy)
            if self._tls is not None and self._options.tls_cert is not None and self._options.tls_key is not None:
                tasks.start_soon(keep_fresh, self._tls, self._options.tls_cert, self._options.tls_key)
            async with anyio.create_task_group() as working:
                await working.start(self._manage)
                working.start_soon(self._tell_when_started, told)
                await self._server.serve(sockets=[listener])  # type: ignore[list-item]
                self._leaving.begin()
            tasks.cancel_scope.cancel()
        log.info("ended")

    async def _manage(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        async with self._manager:
            task_status.started()
            await self._leaving.wait()
        log.info("handed the fleets over")

    async def _tell_when_started(self, told: Callable[[], None]) -> None:
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await anyio.sleep(0.01)
        told()

    async def _heed_signals(self, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("asked to leave by %s", number.name)
                break
        self._leaving.begin()
        await anyio.sleep(self._options.linger)
        self._server.should_exit = True
        await anyio.sleep(_AT_LAST - min(self._options.linger, _AT_LAST))
        log.warning("not everything has ended in time; ending all the same")
        scope.cancel()


# ------------------------------------------------------------------------------------------------ parts


def _allow_files(limits: Limits) -> None:
    """Have as many files open as there may be clients; where the system does not let us, say what to do."""
    needed = limits.connections + _OTHER_FILES
    if (allowed := raise_file_limit(max(ENOUGH, needed))) < needed:
        log.warning(
            "only %s files and sockets may be open, and %s are needed for %s streams of agents, %s of events and all "
            "else: who comes beyond that is not answered, and the store may be out of reach. Raise the hard limit "
            "(LimitNOFILE=%d of systemd, --ulimit nofile=%d of a container engine, ulimit -Hn in a shell), or share "
            "the agents among more managers",
            f"{allowed:,}",
            f"{needed:,}",
            f"{limits.agents:,}",
            f"{limits.streams:,}",
            needed,
            needed,
        )


def events_url(database: str) -> str:
    """Where the journal is: in the same PostgreSQL, but beside a SQLite file.

    A file of SQLite has one writer at a time. The journal writes without giving other tasks a turn, so that it must not
    wait for a transaction of theirs.
    """
    url = url_of(database)
    if not is_sqlite(url):
        return url.render_as_string(hide_password=False)
    path = Path(str(url.database))
    return url.set(database=str(path.with_name(f"{path.stem}-events{path.suffix}"))).render_as_string(
        hide_password=False
    )


async def leases_in(database: Database, stack: AsyncExitStack) -> LeaseStore:
    """Leases in a database, over connections of their own: a renewal must not queue behind requests and reports.

    In SQLite over the same ones, where whoever writes waits for the others in the process in any case.
    """
    if is_sqlite(database.url):
        return SqlLeases(database)
    own = Database(database.url, timeout=database.timeout, connections=_FOR_LEASES)
    return SqlLeases(await stack.enter_async_context(own))


async def _engine(options: Options, database: Database, stack: AsyncExitStack) -> _Engine:
    leases = await leases_in(database, stack) if options.lease_kind == "database" else None
    if options.backend == "memory":
        from agentfleet.backends.memory import MemoryBackend  # noqa: PLC0415 - one of three

        return _Engine(MemoryBackend(), options.namespaces or ("default",), leases)
    if options.backend == "process":
        from agentfleet.backends.process import ProcessBackend  # noqa: PLC0415

        backend = ProcessBackend(state_dir=options.state_dir, on_close="keep")
        return _Engine(backend, options.namespaces or ("default",), leases)
    return await _kubernetes(options, database, leases, stack)


async def _kubernetes(
    options: Options, database: Database, leases: LeaseStore | None, stack: AsyncExitStack
) -> _Engine:
    from agentfleet.backends.kubernetes import Connection, KubernetesBackend  # noqa: PLC0415
    from agentfleet.backends.kubernetes.lease import KubernetesLeases  # noqa: PLC0415

    connection = await stack.enter_async_context(Connection.find())
    kept: LeaseStore | Callable[[str], LeaseStore] | None = leases
    if options.lease_kind == "kubernetes":  # over a connection of their own: a renewal must not queue behind a rollout
        to_leases = await stack.enter_async_context(Connection.find())
        kept = cache(lambda namespace: ToldLeases(KubernetesLeases(to_leases, namespace), database))
    sources: tuple[Source, ...] = ()
    if options.access_rules is not None:
        sources = (TokenReviews(connection, AccessRules.from_file(options.access_rules)),)

    async def reachable() -> None:
        await connection.request("GET", "/version", timeout=2.0)

    return _Engine(
        lambda namespace: KubernetesBackend(connection, namespace=namespace),
        options.namespaces or (await connection.namespace(),),
        kept,
        sources,
        {"kubernetes": reachable},
    )


def _file_tokens(options: Options) -> tuple[Source, ...]:
    return () if options.token_file is None else (FileTokens(options.token_file),)


def _template(path: Path) -> AgentTemplate:
    try:
        return AgentTemplate.from_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"template {path}: cannot be read: {error}") from error
