"""What is asked of clusters, and how far it has come."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, Query
from starlette.responses import Response

from agentfleet.carrying import changed
from agentfleet.errors import AgentFleetError, DeadlineExceeded, NotFound
from agentfleet.operations import Kind, Operation
from agentfleet.rest.answers import Accepted, OperationAnswer, OperationPage, Scaling
from agentfleet.rest.base import FieldError
from agentfleet.rest.clusters import DeployRequest, Doing, RollbackRequest, ScaleRequest
from agentfleet.server.answering import (
    API,
    Asked,
    AskedToChange,
    Limit,
    OperatesCluster,
    OperationId,
    PageCursor,
    Reads,
    ReadsCluster,
    StrictRoute,
    accepted,
    ask_for,
    page_size,
    reply,
)
from agentfleet.server.bodies import Gone
from agentfleet.server.context import Api
from agentfleet.server.cursors import cursor, number_after
from agentfleet.server.describing import problems
from agentfleet.server.problems import Refusal
from agentfleet.units import parse_duration

router = APIRouter(prefix=API, tags=["operations"], route_class=StrictRoute)
_ALL = "operations"
_LAST_GOOD = RollbackRequest()
_CHANGES = problems(404, 409, 412, 422, key=True, match=True)


async def _ask(asked: AskedToChange, kind: Kind, doing: Doing, arguments: dict[str, Any] | None = None) -> Response:
    operation = await ask_for(asked, kind, arguments)
    return accepted(asked, operation, Accepted(cluster_id=operation.fleet, status=doing, operation_id=operation.id))


@router.put(
    "/clusters/{id}/scale", status_code=202, response_model=Scaling, summary="Scale a cluster", responses=_CHANGES
)
async def scale_cluster(asked: OperatesCluster, body: ScaleRequest) -> Response:
    """Ask for another size. With a scaling policy the autoscaler goes on from there."""
    operation = await ask_for(asked, Kind.SCALE, body.to_dict())
    answer = Scaling(
        cluster_id=operation.fleet, status="scaling", operation_id=operation.id, target_replicas=body.replicas
    )
    return accepted(asked, operation, answer)


@router.post(
    "/clusters/{id}/deploy", status_code=202, response_model=Accepted, summary="Deploy a version", responses=_CHANGES
)
async def deploy_cluster(asked: OperatesCluster, body: DeployRequest) -> Response:
    """Roll out another version, or any other change of the template."""
    if asked.earlier is None:
        before = asked.record.wanted.template
        asked.api.admission.check(asked.principal, changed(before, body), before)
    return await _ask(asked, Kind.DEPLOY, "deploying", body.to_dict())


@router.post(
    "/clusters/{id}/rollback", status_code=202, response_model=Accepted, summary="Roll back", responses=_CHANGES
)
async def rollback_cluster(asked: OperatesCluster, body: Annotated[RollbackRequest, Body()] = _LAST_GOOD) -> Response:
    """Return to an earlier revision: the one that is named, or the last good one."""
    return await _ask(asked, Kind.ROLLBACK, "rolling_back", body.to_dict())


@router.post(
    "/clusters/{id}/pause", status_code=202, response_model=Accepted, summary="Pause rollouts", responses=_CHANGES
)
async def pause_cluster(asked: OperatesCluster) -> Response:
    """Hold the rollout where it is, and those to come."""
    return await _ask(asked, Kind.PAUSE, "pausing")


@router.post(
    "/clusters/{id}/resume", status_code=202, response_model=Accepted, summary="Resume rollouts", responses=_CHANGES
)
async def resume_cluster(asked: OperatesCluster) -> Response:
    """Go on with a paused rollout."""
    return await _ask(asked, Kind.RESUME, "resuming")


@router.post(
    "/clusters/{id}/stop", status_code=202, response_model=Accepted, summary="Stop a cluster", responses=_CHANGES
)
async def stop_cluster(asked: OperatesCluster) -> Response:
    """Drain and end all instances; the size is remembered."""
    return await _ask(asked, Kind.STOP, "stopping")


@router.post(
    "/clusters/{id}/start", status_code=202, response_model=Accepted, summary="Start a cluster", responses=_CHANGES
)
async def start_cluster(asked: OperatesCluster) -> Response:
    """Bring a stopped cluster back to its size."""
    return await _ask(asked, Kind.START, "starting")


# ------------------------------------------------------------------------------------------------ how far it has come


@router.get(
    "/clusters/{id}/operations",
    response_model=OperationPage,
    summary="A cluster's operations",
    responses=problems(404, 422, etag=True),
)
async def list_operations(
    asked: ReadsCluster,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """What was asked of a cluster, newest first."""
    size, before = page_size(asked, limit), number_after(_ALL, cursor_)
    found = await asked.api.manager.operations(asked.record.id, before=before, limit=size + 1)
    items = tuple(map(OperationAnswer.of, found[:size]))
    more = cursor(_ALL, found[size - 1].seq) if len(found) > size else None
    return reply(asked, OperationPage.made(items=items, next=more))


@router.get(
    "/operations/{operation_id}",
    response_model=OperationAnswer,
    summary="How far an operation has come",
    responses=problems(404, 422, etag=True),
)
async def get_operation(
    asked: Reads,
    operation_id: OperationId,
    wait: Annotated[
        str | None,
        Query(
            max_length=20,
            pattern=r"^\d{1,4}(\.\d{1,3})?(ms|s|m)?$",
            description='Answer when it has ended, or after this long: "10s". The server has a bound of its own.',
        ),
    ] = None,
) -> Response:
    """How far an operation has come; with `wait` when it has ended."""
    operation = await asked.api.manager.operation(operation_id)
    if not asked.principal.reaches(operation.name):
        raise NotFound(f"there is no operation {operation_id!r:.300}")
    if wait is not None and operation.open:
        operation = await _wait(asked, operation, wait)
    return reply(asked, OperationAnswer.of(operation))


async def _wait(asked: Asked, operation: Operation, wait: str) -> Operation:
    """The operation when it has ended, when the time is over, or when the server leaves.

    Raises:
        Refusal: Too many wait already.
        Gone: Whoever asked does not wait any more.
        AgentFleetError: The store cannot tell, or there is no such operation any more.
    """
    api, who = asked.api, asked.principal.credential
    seconds = min(_seconds(wait), api.limits.wait)
    api.waits.check(who)
    asked.exchange.lasting(seconds)
    found, gone = operation, False
    failed: AgentFleetError | None = None
    with api.waits.taken(who):
        async with anyio.create_task_group() as tasks:

            async def leave() -> None:
                await api.leaving.wait()
                tasks.cancel_scope.cancel()

            async def notice() -> None:
                nonlocal gone
                while (await asked.request.receive())["type"] != "http.disconnect":
                    pass
                gone = True
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave)
            tasks.start_soon(notice)
            try:
                found = await _ended(api, operation.id, seconds)
            except AgentFleetError as error:  # raised outside, so that it is no group
                failed = error
            tasks.cancel_scope.cancel()
    if gone:
        raise Gone
    if failed is not None:
        raise failed
    return found


async def _ended(api: Api, id: str, seconds: float) -> Operation:
    try:
        return await api.manager.finished(id, timeout=seconds)
    except DeadlineExceeded:
        return await api.manager.operation(id)


def _seconds(wait: str) -> float:
    try:
        return parse_duration(wait if wait[-1].isalpha() else float(wait))
    except ValueError as error:
        raise Refusal(
            422, "invalid", f"wait: {error}", errors=[FieldError(field="wait", message=str(error))]
        ) from error
