"""Instances: listed, looked at, and acted on one by one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from starlette.responses import Response

from agentfleet.errors import BackendUnavailable
from agentfleet.operations import Kind
from agentfleet.rest.answers import Accepted, Instance, InstancePage, Logs
from agentfleet.rest.clusters import Doing, IsolateRequest, ReplaceRequest
from agentfleet.server.answering import (
    API,
    AskedToChange,
    InstanceId,
    Limit,
    OperatesCluster,
    PageCursor,
    ReadsCluster,
    StrictRoute,
    Word,
    accepted,
    ask_for,
    page_size,
    reply,
)
from agentfleet.server.cursors import cursor, text_after
from agentfleet.server.describing import problems

router = APIRouter(prefix=API, tags=["instances"], route_class=StrictRoute)
_ALL = "instances"
_ANYWHERE = ReplaceRequest()
_CHANGES = problems(404, 409, 412, 422, key=True, match=True)
_ONE = "/clusters/{id}/instances/{instance_id}"


@router.get(
    "/clusters/{id}/instances",
    response_model=InstancePage,
    summary="A cluster's instances",
    responses=problems(404, 422, etag=True),
)
async def list_instances(
    asked: ReadsCluster,
    *,
    status: Word | None = None,
    node: Word | None = None,
    version: Word | None = None,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """Instances by id; those alone that are in a state, on a node, or of a version, where one is given."""
    size, after = page_size(asked, limit), text_after(_ALL, cursor_)
    found = await asked.api.manager.instances(
        asked.record.id, after=after, limit=size + 1, status=status, node=node, version=version
    )
    items = tuple(map(Instance.of, found[:size]))
    more = cursor(_ALL, found[size - 1].instance_id) if len(found) > size else None
    return reply(asked, InstancePage.made(items=items, next=more))


@router.get(_ONE, response_model=Instance, summary="Look at an instance", responses=problems(404, etag=True))
async def get_instance(asked: ReadsCluster, instance_id: InstanceId) -> Response:
    """An instance, as it was last seen."""
    return reply(asked, Instance.of(await asked.api.manager.instance(asked.record.id, instance_id)))


@router.get(
    _ONE + "/logs",
    response_model=Logs,
    summary="What an instance wrote",
    responses=problems(404, 422, 502, etag=True),
)
async def get_logs(
    asked: ReadsCluster,
    instance_id: InstanceId,
    lines: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> Response:
    """The last lines that an instance wrote, as its engine has them now."""
    await asked.api.manager.instance(asked.record.id, instance_id)  # of this cluster, and of no other
    fleet = asked.api.manager.fleet(asked.record.id)
    if fleet is None:
        raise BackendUnavailable(f"{asked.record.name} is not open in this manager now; ask again")
    found = await fleet.logs(instance_id, lines=lines)
    return reply(asked, Logs.made(instance_id=instance_id, lines=tuple(map(_plain, found))))


@router.post(
    _ONE + "/restart", status_code=202, response_model=Accepted, summary="Restart an instance", responses=_CHANGES
)
async def restart_instance(asked: OperatesCluster, instance_id: InstanceId) -> Response:
    """End an instance's process, with its drain, and start it again in its place."""
    return await _act(asked, Kind.RESTART, "restarting", instance_id)


@router.post(
    _ONE + "/replace", status_code=202, response_model=Accepted, summary="Replace an instance", responses=_CHANGES
)
async def replace_instance(
    asked: OperatesCluster, instance_id: InstanceId, body: Annotated[ReplaceRequest, Body()] = _ANYWHERE
) -> Response:
    """End an instance, with its drain, and have a new one take its place."""
    return await _act(asked, Kind.REPLACE, "replacing", instance_id, elsewhere=body.elsewhere)


@router.post(
    _ONE + "/isolate", status_code=202, response_model=Accepted, summary="Isolate an instance", responses=_CHANGES
)
async def isolate_instance(asked: OperatesCluster, instance_id: InstanceId, body: IsolateRequest) -> Response:
    """Set an instance apart for examination: it runs on, gets no work, and is replaced."""
    return await _act(asked, Kind.ISOLATE, "isolating", instance_id, reason=body.reason, keep=body.keep)


@router.post(
    _ONE + "/release", status_code=202, response_model=Accepted, summary="Release an instance", responses=_CHANGES
)
async def release_instance(asked: OperatesCluster, instance_id: InstanceId) -> Response:
    """End an isolated instance, with its drain."""
    return await _act(asked, Kind.RELEASE, "releasing", instance_id)


async def _act(asked: AskedToChange, kind: Kind, doing: Doing, id: str, **arguments: Any) -> Response:
    if asked.earlier is None:
        await asked.api.manager.instance(asked.record.id, id)
    operation = await ask_for(asked, kind, {"instance": id, **arguments})
    return accepted(asked, operation, Accepted(cluster_id=operation.fleet, status=doing, operation_id=operation.id))


def _plain(line: str) -> str:
    """A line that JSON can carry, whatever the instance wrote."""
    return line.encode("utf-8", "replace").decode()
