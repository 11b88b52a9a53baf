"""Clusters: made, listed, looked at, changed as a whole, deleted."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from agentfleet.operations import Apply, Create, Kind, Operation, reused
from agentfleet.rest.answers import (
    Accepted,
    Cluster,
    ClusterHealth,
    ClusterPage,
    ClusterSummary,
    Created,
    Revisions,
    revisions_of,
)
from agentfleet.rest.base import FieldError
from agentfleet.rest.clusters import ClusterConfig, ClusterFromSpec, ClusterRequest
from agentfleet.server.answering import (
    API,
    AdministersCluster,
    AskedToChange,
    Limit,
    Operates,
    OperatesCluster,
    PageCursor,
    Reads,
    ReadsCluster,
    StrictRoute,
    accepted,
    ask_for,
    based_on,
    cluster_tag,
    page_size,
    reply,
    require_match,
)
from agentfleet.server.cursors import cursor, text_after
from agentfleet.server.describing import problems
from agentfleet.server.problems import Refusal

router = APIRouter(prefix=API, tags=["clusters"], route_class=StrictRoute)
_ALL = "clusters"
_AHEAD = 500
"""Clusters that are looked at to fill a page of those that a token reaches."""


@router.post(
    "/clusters",
    status_code=202,
    response_model=Created,
    summary="Create a cluster",
    responses=problems(409, 422, key=True),
)
async def create_cluster(asked: Operates, request: ClusterRequest) -> Response:
    """Have a cluster made. Answers when that is sure to happen; the operation tells how far it has come."""
    api, principal, body = asked.api, asked.principal, request.root
    if not principal.reaches(body.cluster_name):
        raise Refusal(403, "forbidden", f"{principal.name} may have no cluster of this name")
    asked.exchange.note(fleet=body.cluster_name)
    if (operation := _created(body, await api.manager.earlier(asked.exchange.caller))) is None:
        namespace = api.admission.namespace(principal, body.namespace)
        spec = body.to_spec(api.admission.template)
        api.admission.check(principal, spec.template, None)
        operation = await api.manager.create(spec, namespace=namespace, by=asked.exchange.caller)
    return accepted(asked, operation, Created(cluster_id=operation.fleet, operation_id=operation.id))


@router.get("/clusters", response_model=ClusterPage, summary="List the clusters", responses=problems(422, etag=True))
async def list_clusters(
    asked: Reads,
    cursor_: Annotated[PageCursor, Query(alias="cursor")] = None,
    limit: Limit = None,
) -> Response:
    """The clusters that the token reaches, by name."""
    size, after = page_size(asked, limit), text_after(_ALL, cursor_)
    found: list[ClusterSummary] = []
    while True:
        ahead = size - len(found) + 1 if asked.principal.everywhere else _AHEAD
        records = await asked.api.manager.fleets(after=after, limit=ahead)
        for record in records:
            if len(found) == size:
                page = ClusterPage(items=tuple(found), next=cursor(_ALL, found[-1].cluster_name))
                return reply(asked, page)
            if asked.principal.reaches(record.name):
                found.append(ClusterSummary.listed(record))
        if len(records) < ahead:
            return reply(asked, ClusterPage.made(items=tuple(found)))
        after = records[-1].name


@router.get("/clusters/{id}", response_model=Cluster, summary="Look at a cluster", responses=problems(404, etag=True))
async def get_cluster(asked: ReadsCluster) -> Response:
    """A cluster in full. Its ETag begins with what was asked of it last: the spec, and the template or size since.

    As the If-Match of a change it holds, however the cluster stands, until another spec, template or size is asked for.
    """
    return reply(asked, Cluster.of(asked.record), etag=cluster_tag(asked.record))


@router.put(
    "/clusters/{id}",
    status_code=202,
    response_model=Accepted,
    summary="Change a cluster's spec",
    responses=problems(404, 409, 412, 422, 428, key=True, match=True),
)
async def put_cluster(asked: OperatesCluster, request: ClusterRequest) -> Response:
    """Have a cluster be as another spec says. If-Match must be the ETag of the state that this spec is based on."""
    body = request.root
    require_match(asked)
    if (operation := _applied(asked, body)) is None:
        operation = await _apply(asked, body)
    return accepted(
        asked, operation, Accepted(cluster_id=operation.fleet, status="updating", operation_id=operation.id)
    )


async def _apply(asked: AskedToChange, body: ClusterConfig | ClusterFromSpec) -> Operation:
    record, api = asked.record, asked.api
    expect, upon = based_on(asked)
    if body.namespace not in (None, record.namespace):
        message = f"a cluster stays where it is, in {record.namespace}"
        errors = [FieldError(field="namespace", message=message)]
        raise Refusal(422, "invalid", f"namespace: {message}", errors=errors)
    before = record.wanted.template
    spec = body.to_spec(before)
    api.admission.check(asked.principal, spec.template, before)
    return await api.manager.apply(record.id, spec, expect=expect, asked=upon, by=asked.exchange.caller)


def _applied(asked: AskedToChange, body: ClusterConfig | ClusterFromSpec) -> Operation | None:
    """What a spec that was sent before has become. Where it has no template, that of the first time is meant."""
    if asked.earlier is None:
        return None
    if asked.earlier.kind is not Kind.APPLY:
        raise reused(asked.earlier.by)
    kept = Apply.parse(dict(asked.earlier.arguments))
    return asked.repeats(Kind.APPLY, Apply(spec=body.to_spec(kept.spec.template)).to_dict())


def _created(body: ClusterConfig | ClusterFromSpec, earlier: Operation | None) -> Operation | None:
    """What a new cluster that was sent before has become; as `_applied`, and so for the namespace."""
    if earlier is None:
        return None
    if earlier.kind is not Kind.CREATE:
        raise reused(earlier.by)
    kept = Create.parse(dict(earlier.arguments))
    namespace = kept.namespace if body.namespace is None else body.namespace
    again = Create(spec=body.to_spec(kept.spec.template), namespace=namespace)
    return earlier.same(body.cluster_name, Kind.CREATE, again.to_dict())


@router.delete(
    "/clusters/{id}",
    status_code=202,
    response_model=Accepted,
    summary="Delete a cluster",
    responses=problems(404, 409, 412, 422, key=True, match=True),
)
async def delete_cluster(asked: AdministersCluster) -> Response:
    """Have all instances drained and ended, and the cluster forgotten. Its events and operations stay."""
    operation = await ask_for(asked, Kind.DELETE)
    answer = Accepted(cluster_id=operation.fleet, status="deleting", operation_id=operation.id)
    return accepted(asked, operation, answer)


@router.get(
    "/clusters/{id}/health",
    response_model=ClusterHealth,
    summary="How a cluster is",
    responses=problems(404, etag=True),
)
async def get_health(asked: ReadsCluster) -> Response:
    """How well a cluster is, and why it is not."""
    return reply(asked, ClusterHealth.of(asked.record, asked.api.clock.now()), aging={"age_seconds"})


@router.get(
    "/clusters/{id}/revisions",
    response_model=Revisions,
    summary="A cluster's revisions",
    responses=problems(404, etag=True),
)
async def get_revisions(asked: ReadsCluster) -> Response:
    """The kept revisions of a cluster's template, oldest first."""
    return reply(asked, revisions_of(asked.record))
