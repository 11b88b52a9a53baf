"""The server itself: does it live, does it take requests, what does it count, who leads, who has changed what."""

from __future__ import annotations

from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from agentfleet.errors import AgentFleetError, NotFound
from agentfleet.rest.base import date_of
from agentfleet.rest.clusters import NAME
from agentfleet.rest.system import Alive, AuditAnswer, AuditPage, AuditVerified, ManagerAnswer, Managers, Ready
from agentfleet.server.answering import (
    API,
    Administers,
    Limit,
    PageCursor,
    Reads,
    StrictRoute,
    asked,
    done,
    page_size,
    reply,
)
from agentfleet.server.context import Api
from agentfleet.server.cursors import cursor, number_after
from agentfleet.server.describing import problems
from agentfleet.server.problems import Refusal, later
from agentfleet.stores.audit import AuditEntry, verify
from agentfleet.stores.tokens import Scope

root = APIRouter(tags=["server"], route_class=StrictRoute)
router = APIRouter(prefix=API, tags=["server"], route_class=StrictRoute)
TEXT = "text/plain; version=0.0.4; charset=utf-8"
_CHECK = 2.0
"""Seconds that a check of readiness may take."""
_ALL = "audit"


@root.get("/livez", response_model=Alive, summary="Whether the process lives", responses=problems(open=True))
async def livez() -> Response:
    """It answers, so it lives."""
    return done(Alive())


@root.get("/readyz", response_model=Ready, summary="Whether it takes requests", responses=problems(open=True))
async def readyz(request: Request) -> Response:
    """Whether its store and its engine can be reached, and it is not leaving."""
    api = asked(request).api
    reason = await why_not_ready(api)
    if reason is not None:
        raise later(503, "unavailable", reason)
    return done(Ready(identity=api.manager.identity))


async def why_not_ready(api: Api) -> str | None:
    """Why the server takes no requests; None if it does."""
    if api.leaving.begun:
        return "it is leaving"
    health = api.manager.health()
    if not health.ready:
        return health.reason
    for name, check in api.checks.items():
        try:
            with anyio.fail_after(_CHECK):
                await check()
        except TimeoutError:
            return f"{name}: no answer within {_CHECK:g} s"
        except AgentFleetError:
            return f"{name}: cannot be reached"
    return None


@root.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=problems() | {200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """What the server and its clusters count. Needs a token for every cluster, unless it was opened to all."""
    made = asked(request)
    if not made.api.open_metrics:
        made.principal.require(Scope.READ, everywhere=True)
    body = await anyio.to_thread.run_sync(made.api.manager.telemetry.render)
    return Response(body, media_type=TEXT)


@router.get("/managers", response_model=Managers, summary="The managers", responses=problems(etag=True))
async def list_managers(asked: Reads) -> Response:
    """The managers that share the clusters: this one as it is, the others as they were last seen."""
    manager, health = asked.api.manager, asked.api.manager.health()
    closed = {name: why for name, why in health.closed.items() if asked.principal.reaches(name)}
    here = ManagerAnswer(
        identity=health.identity,
        here=True,
        ready=health.ready and not asked.api.leaving.begun,
        reason=health.reason,
        leads=health.leads,
        stands_by=health.stands_by,
        closed=closed,
        store_age_seconds=round(max(0.0, health.store_age), 3),
    )
    others = [
        ManagerAnswer(identity=name, here=False, about=dict(seen.about))
        for name, seen in sorted(manager.peers.items())
        if name != health.identity
    ]
    aging = {"items": {"__all__": {"store_age_seconds"}}}
    return reply(asked, Managers(items=(here, *others)), aging=aging)


@router.get("/audit", response_model=AuditPage, summary="Who changed what", responses=problems(404, 422, etag=True))
async def list_audit(
    asked: Administers,
    cluster: Annotated[str | None, Query(pattern=NAME, max_length=63, description="Name of a cluster.")] = None,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """Every change that was asked for, newest first. A token for some clusters must name one of them."""
    if cluster is None:
        if not asked.principal.everywhere:
            raise Refusal(403, "forbidden", "name a cluster: this token reaches some alone")
    elif not asked.principal.reaches(cluster):
        raise NotFound(f"there is no fleet {cluster!r:.300}")
    size, before = page_size(asked, limit), number_after(_ALL, cursor_)
    found = await asked.api.audit.entries(before=before, fleet=cluster, limit=size + 1)
    items = tuple(map(_told, found[:size]))
    return reply(asked, AuditPage(items=items, next=cursor(_ALL, found[size - 1].seq) if len(found) > size else None))


@router.get(
    "/audit/verification",
    response_model=AuditVerified,
    summary="Whether the audit is unaltered",
    responses=problems(etag=True),
)
async def verify_audit(asked: Administers) -> Response:
    """Whether every entry of the audit is as it was written: each holds the hash of the one before."""
    asked.principal.require(Scope.ADMIN, everywhere=True)
    checked, wrong = await verify(asked.api.audit)
    return reply(asked, AuditVerified(ok=wrong is None, checked=checked, detail=wrong))


def _told(entry: AuditEntry) -> AuditAnswer:
    return AuditAnswer(
        seq=entry.seq,
        at=date_of(entry.at),
        actor=entry.actor,
        credential=entry.credential,
        origin=entry.origin,
        request_id=entry.request,
        method=entry.method,
        path=entry.path,
        cluster=entry.fleet,
        operation_id=entry.operation,
        status=entry.status,
        detail=entry.detail,
        hash=entry.hash,
        previous=entry.previous,
    )
