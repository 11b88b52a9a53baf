"""Events: what happened to a cluster, what was decided about it and why; in pages, and as they happen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from agentfleet.errors import AgentFleetError
from agentfleet.rest.answers import EventAnswer, EventPage
from agentfleet.rest.base import STREAM_TYPE, FieldError
from agentfleet.server.answering import (
    API,
    AskedOfCluster,
    Limit,
    PageCursor,
    ReadsCluster,
    StrictRoute,
    page_size,
    reply,
)
from agentfleet.server.cursors import cursor, number_after
from agentfleet.server.describing import problems
from agentfleet.server.gate import principal_now
from agentfleet.server.problems import Refusal, later
from agentfleet.server.streams import INTERNAL, Wanted, frames
from agentfleet.stores.pages import Page, read_page
from agentfleet.stores.tokens import Scope

router = APIRouter(prefix=API, tags=["events"], route_class=StrictRoute)
DECISIONS = (
    "scaling.",
    "governor.",
    "recovery.",
    "rollout.",
    "fleet.scaled",
    "fleet.foreign_change",
    "config.halted",
    "config.rolled_back",
)
"""Kinds of events that are decisions, with their reasons."""
_FORWARD, _BACK = "events", "events-back"
Kinds = Annotated[
    list[Annotated[str, Query(pattern=r"^[a-z][a-z0-9_.]{0,99}$")]] | None,
    Query(max_length=10, alias="kind", description='Beginnings of kinds, such as "rollout."; none is all.'),
]
Seq = Annotated[int, Query(ge=0, le=2**53, description="Events after this place.")]


@router.get(
    "/clusters/{id}/events", response_model=EventPage, summary="What happened", responses=problems(404, 422, etag=True)
)
async def list_events(
    asked: ReadsCluster,
    *,
    kinds: Kinds = None,
    newest: Annotated[bool, Query(description="Newest first.")] = False,
    after: Seq | None = None,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """A cluster's events, oldest first unless asked otherwise."""
    return await _page(asked, tuple(kinds or ()), cursor_, limit, newest=newest, after=after)


@router.get(
    "/clusters/{id}/decisions",
    response_model=EventPage,
    summary="What was decided, and why",
    responses=problems(404, 422, etag=True),
)
async def list_decisions(
    asked: ReadsCluster,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """What was decided about a cluster, newest first, each with its reasons."""
    return await _page(asked, DECISIONS, cursor_, limit, newest=True, after=None)


async def _page(
    asked: AskedOfCluster,
    kinds: tuple[str, ...],
    given: str | None,
    limit: int | None,
    *,
    newest: bool,
    after: int | None,
) -> Response:
    size, what = page_size(asked, limit), _BACK if newest else _FORWARD
    place = number_after(what, given)
    if place is not None and after is not None:
        message = "a cursor says where to go on; leave one of them out"
        raise Refusal(422, "invalid", f"after: {message}", errors=[FieldError(field="after", message=message)])
    wanted = Page(
        fleet=asked.record.name,
        after=(after or 0) if newest or place is None else place,
        before=place if newest else None,
        limit=size,
        newest=newest,
        kinds=kinds,
        without=INTERNAL,
    )
    found = await anyio.to_thread.run_sync(read_page, asked.api.manager.journal, wanted, abandon_on_cancel=True)
    items = tuple(map(EventAnswer.of, found))
    more = cursor(what, found[-1].seq) if len(found) == size else None
    return reply(asked, EventPage.made(items=items, next=more))


@router.get(
    "/clusters/{id}/events/stream",
    summary="What happens, as it happens",
    response_class=StreamingResponse,
    responses=problems(404, 422) | {200: {"description": "Server-sent events", "content": {STREAM_TYPE: {}}}},
)
async def stream_events(
    asked: ReadsCluster,
    kinds: Kinds = None,
    after: Seq | None = None,
) -> Response:
    """Events as they happen (server-sent events); each frame's id is its place.

    A client that comes back with Last-Event-ID, to this manager or to another one, gets what it missed. Without that,
    and without `after`, the stream begins with what happens next. A frame `journal.trimmed` says that some of what was
    missed is kept no longer.
    """
    api, principal = asked.api, asked.principal
    position = _position(asked, after)
    if position is None:
        position = await api.hub.newest()
    if api.leaving.begun:
        raise later(503, "unavailable", "this manager is leaving; ask another one")
    wanted = Wanted(position, asked.record.name, tuple(kinds or ()), api.limits.stream, api.limits.beat)
    api.places.check(principal.credential)
    asked.exchange.lasting(float("inf"))
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return StreamingResponse(_counted(asked, wanted), media_type=STREAM_TYPE, headers=headers)


async def _counted(asked: AskedOfCluster, wanted: Wanted) -> AsyncIterator[bytes]:
    api = asked.api
    with api.places.taken(asked.principal.credential):
        async for frame in frames(api.hub, wanted, api.leaving, lambda: _still(asked)):
            yield frame


def _position(asked: AskedOfCluster, after: int | None) -> int | None:
    last = asked.exchange.headers.get("last-event-id")
    if last is None or not last.strip():
        return after
    if not (last.isascii() and last.isdigit() and len(last) <= 16):
        message = "is the id of no event; leave it out"
        raise Refusal(
            422, "invalid", f"Last-Event-ID: {message}", errors=[FieldError(field="Last-Event-ID", message=message)]
        )
    return int(last)


async def _still(asked: AskedOfCluster) -> bool:
    """Whether who asked may still see this: the token holds, reaches the cluster, and the cluster is there."""
    api = asked.api
    try:
        found = await principal_now(api, asked.exchange)
        if found is None or not found.may(Scope.READ) or not found.reaches(asked.record.name):
            return False
        await api.manager.get(asked.record.id)
    except AgentFleetError:
        return False
    return True
