"""How routes answer: models as JSON with an ETag, operations as 202, and all of it written down for OpenAPI."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from agentfleet.operations import Kind, Operation, reused
from agentfleet.rest.answers import Accepted
from agentfleet.rest.base import MEDIA_TYPE, Answer, Cursor, FieldError
from agentfleet.rest.clusters import NAME
from agentfleet.server.bodies import JsonRequest
from agentfleet.server.context import Api
from agentfleet.server.exchange import Exchange, exchange_of
from agentfleet.server.principals import Principal
from agentfleet.server.problems import Refusal
from agentfleet.stores.fleets import FleetRecord
from agentfleet.stores.tokens import Scope

API = "/api/v1"
_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

ClusterId = Annotated[str, Path(pattern=NAME, max_length=63, description="A cluster's id, or its name.")]
OperationId = Annotated[str, Path(pattern=_UUID, description="An operation's id.")]
InstanceId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$", description="An instance's id.")
]
PageCursor = Annotated[Cursor | None, Query(description="Where to go on: `next` of the page before.")]
Word = Annotated[str, Query(min_length=1, max_length=253, pattern=r"^[!-~]+$")]


class StrictRoute(APIRoute):
    """A route whose JSON is read strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return strictly


# ------------------------------------------------------------------------------------------------ who asks for what


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of somebody who may ask it."""

    api: Api
    exchange: Exchange
    request: Request

    @property
    def principal(self) -> Principal:
        """Who asks."""
        assert self.exchange.principal is not None, "who asks was asked before"
        return self.exchange.principal


@dataclass(frozen=True, slots=True)
class AskedOfCluster(Asked):
    """A request about a cluster, of somebody whose token reaches it."""

    record: FleetRecord


@dataclass(frozen=True, slots=True)
class AskedToChange(Asked):
    """A request to change a cluster, of somebody whose token reaches it.

    Attributes:
        id: The cluster's id or name, as it was sent.
        earlier: What the same key was used for before. It is looked up first: the cluster may be gone since.
        found: The cluster; None where something was done under this key before.
    """

    id: str
    earlier: Operation | None
    found: FleetRecord | None

    @property
    def record(self) -> FleetRecord:
        """The cluster of a request that is not a repetition."""
        assert self.found is not None, "what is repeated is answered before"
        return self.found

    def repeats(self, kind: Kind, arguments: Mapping[str, Any] | None = None) -> Operation | None:
        """What this request became when it was sent before; raises `KeyReused` where its key stands for another."""
        return None if self.earlier is None else self.earlier.same(self.id, kind, arguments or {})


def asked(request: Request) -> Asked:
    """A request that came through the gate, whoever asks."""
    return Asked(request.app.state.api, exchange_of(request.scope), request)


def _of_anybody(scope: Scope) -> Any:
    async def found(request: Request) -> Asked:
        made = asked(request)
        made.principal.require(scope)
        return made

    return Depends(found)


def _of_cluster(scope: Scope) -> Any:
    async def found(id: ClusterId, request: Request) -> AskedOfCluster:
        made = asked(request)
        made.principal.require(scope)
        record = await made.api.manager.get(id)
        made.principal.require_reach(record.name, id)
        made.exchange.note(fleet=record.name)
        return AskedOfCluster(made.api, made.exchange, request, record)

    return Depends(found)


def _to_change(scope: Scope) -> Any:
    async def found(id: ClusterId, request: Request) -> AskedToChange:
        made = asked(request)
        made.principal.require(scope)
        earlier = await made.api.manager.earlier(made.exchange.caller)
        if earlier is not None and id not in (earlier.fleet, earlier.name):
            raise reused(earlier.by)
        record = await made.api.manager.get(id) if earlier is None else None
        name = record.name if record is not None else earlier.name if earlier is not None else id
        made.principal.require_reach(name, id)
        made.exchange.note(fleet=name)
        return AskedToChange(made.api, made.exchange, request, id, earlier, record)

    return Depends(found)


Reads = Annotated[Asked, _of_anybody(Scope.READ)]
Operates = Annotated[Asked, _of_anybody(Scope.OPERATE)]
Administers = Annotated[Asked, _of_anybody(Scope.ADMIN)]
ReadsCluster = Annotated[AskedOfCluster, _of_cluster(Scope.READ)]
OperatesCluster = Annotated[AskedToChange, _to_change(Scope.OPERATE)]
AdministersCluster = Annotated[AskedToChange, _to_change(Scope.ADMIN)]

# ------------------------------------------------------------------------------------------------ answers


def reply(
    asked: Asked,
    answer: Answer,
    *,
    etag: str | None = None,
    headers: Mapping[str, str] | None = None,
    aging: Any = None,
) -> Response:
    """An answer to a GET, or a 304 if the client has it already.

    Args:
        asked: By whom.
        answer: What is answered.
        etag: Names this state, if the answer's own bytes do not.
        headers: Added to it.
        aging: Fields that change by the clock alone, as pydantic's `exclude` has them: no part of what is named.
    """
    body = answer.model_dump_json().encode()
    state = body if aging is None else answer.model_dump_json(exclude=aging).encode()
    tag = f'W/"{hashlib.sha256(state).hexdigest()[:32]}"' if etag is None else f'"{etag}"'
    told = {"ETag": tag, **(headers or {})}
    known = asked.exchange.headers.get("if-none-match")
    if known is not None and asked.exchange.method in ("GET", "HEAD") and _is_among(tag, known):
        return Response(status_code=304, headers=told)
    return Response(body, media_type=MEDIA_TYPE, headers=told)


def done(answer: Answer, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer to what was done at once."""
    return Response(answer.model_dump_json(), status, headers, MEDIA_TYPE)


def accepted(asked: Asked, operation: Operation, answer: Accepted) -> Response:
    """An answer to what will be done: 202, and where to look how far it has come."""
    asked.exchange.note(fleet=operation.name, operation=operation.id)
    root = asked.request.scope.get("root_path", "")
    return done(answer, 202, {"Location": f"{root}{API}/operations/{operation.id}"})


def page_size(asked: Asked, limit: int | None) -> int:
    """Items on this page."""
    most = asked.api.limits.page
    return min(100, most) if limit is None else min(limit, most)


Limit = Annotated[
    int | None,
    Query(ge=1, le=100_000, description="Items on the page, 100 by default; the server's own bound holds, too."),
]


async def ask_for(asked: AskedToChange, kind: Kind, arguments: Mapping[str, Any] | None = None) -> Operation:
    """Have an operation on a cluster kept, if the cluster is what If-Match says; or find what it became before."""
    if (operation := asked.repeats(kind, arguments)) is not None:
        return operation
    expect, upon = based_on(asked)
    manager, by = asked.api.manager, asked.exchange.caller
    return await manager.request(asked.record.id, kind, arguments, expect=expect, asked=upon, by=by)


# ------------------------------------------------------------------------------------------------ conditions

_CLUSTER_TAG = re.compile(r'"([0-9]{1,15}|([0-9]{1,15}\.[0-9]{1,18}\.[0-9a-f]{8})(\..*)?)"', re.ASCII)


def cluster_tag(record: FleetRecord) -> str:
    """Names the state of a cluster: first what is wanted of it, which changes are based on, and then how it stands."""
    seen = "" if record.status_at is None else f".{record.status_at * 1000:.0f}"
    return f"{_wanted_tag(record)}{seen}{'.deleting' if record.deleting else ''}"


def _wanted_tag(record: FleetRecord) -> str:
    """What was asked of a cluster, and what has come of it so far: an operation shows in both, one after the other."""
    wanted = hashlib.sha256(json.dumps(record.wanted.to_dict(), sort_keys=True).encode()).hexdigest()
    return f"{record.generation}.{record.asked}.{wanted[:8]}"


def based_on(asked: AskedToChange) -> tuple[int | None, int | None]:
    """The generation, and the `FleetRecord.asked`, that a change of a cluster is based on; None takes any.

    Raises:
        Refusal: A 412 where If-Match has no ETag of what is asked of the cluster now, or there should be none.
    """
    headers, record = asked.exchange.headers, asked.record
    if headers.get("if-none-match", "").strip() == "*":
        raise Refusal(412, "precondition-failed", f"If-None-Match: there is a cluster {record.name} already")
    match = headers.get("if-match", "*").strip()
    if match == "*":
        return None, None
    tags = [each[2] or each[1] for each in map(_CLUSTER_TAG.fullmatch, map(str.strip, match.split(","))) if each]
    if str(record.generation) in tags:
        return record.generation, None
    if _wanted_tag(record) in tags and not record.pending:  # what is pending does not show in what was read
        return record.generation, record.asked
    raise Refusal(
        412,
        "precondition-failed",
        f"If-Match: {match[:100]!r} is no ETag of what is wanted of cluster {record.name} now: somebody else was "
        "first; read it again, and make your change upon that",
    )


def expected(asked: Asked, given: int | None = None) -> int | None:
    """The number that a change is based on: of If-Match, of If-None-Match: * (0), or as the body gives it.

    Numbers stand in entity tags as they are, and perhaps followed by a dot and more. None where nothing is expected.

    Raises:
        Refusal: A 412 for a tag that is none of ours; a 422 where header and body differ.
    """
    headers = asked.exchange.headers
    match, none = headers.get("if-match"), headers.get("if-none-match")
    said: int | None = None
    if match is not None and match.strip() != "*":
        number = match.strip().strip('"').partition(".")[0]
        if not number.isascii() or not number.isdigit() or len(number) > 15 or match.strip().startswith("W/"):
            raise Refusal(412, "precondition-failed", f"If-Match: {match[:100]!r} is no ETag of this; read it again")
        said = int(number)
    elif none is not None and none.strip() == "*":
        said = 0
    if said is not None and given is not None and said != given:
        message = f"is {given}, and the header says {said}; leave one out"
        raise Refusal(422, "invalid", f"expect: {message}", errors=[FieldError(field="expect", message=message)])
    return given if said is None else said


def require_match(asked: Asked) -> None:
    """Raise a 428 unless it is said which state a change is based on."""
    if "if-match" not in asked.exchange.headers:
        raise Refusal(
            428,
            "precondition-required",
            "send If-Match with the ETag that you read, so that nobody's change is lost; '*' takes any",
        )


def _is_among(tag: str, known: str) -> bool:
    plain = tag.removeprefix("W/")
    return known.strip() == "*" or any(each.strip().removeprefix("W/") == plain for each in known.split(","))
