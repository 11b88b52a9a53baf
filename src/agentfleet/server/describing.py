"""The OpenAPI document: complete and exact, every status and every header of every route."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from agentfleet.rest.base import PROBLEM_TYPE, Problem
from agentfleet.server.agentpaths import AGENT_PATHS, TAG
from agentfleet.server.problems import TITLES

_ID = "$response.body#/cluster_id"
_REF = "#/components/schemas/{model}"
_BY_STATUS: Mapping[int, str] = {
    400: TITLES["malformed"],
    401: TITLES["unauthenticated"],
    403: TITLES["forbidden"],
    404: TITLES["not-found"],
    406: TITLES["not-acceptable"],
    408: TITLES["timeout"],
    409: f"{TITLES['refused']}, or somebody else was first",
    412: TITLES["precondition-failed"],
    413: TITLES["too-large"],
    415: TITLES["unsupported-media-type"],
    422: TITLES["invalid"],
    428: TITLES["precondition-required"],
    429: TITLES["too-many-requests"],
    431: TITLES["headers-too-large"],
    500: TITLES["internal"],
    502: TITLES["engine-refused"],
    503: TITLES["unavailable"],
    504: TITLES["deadline-exceeded"],
}
_ALWAYS = (406, 431, 500, 503, 504)
_KNOWN = (401, 403, 429)
_WITH_BODY = (400, 408, 413, 415)
_RETRY = (429, 503, 504)
_TAGS = [
    {"name": "clusters", "description": "Clusters (fleets) of agents."},
    {"name": "operations", "description": "What is asked of clusters, and how far it has come."},
    {"name": "instances", "description": "A cluster's instances, one by one."},
    {"name": "events", "description": "What happened, what was decided, and why."},
    {"name": "configuration", "description": "The documents that agents are told."},
    TAG,
    {"name": "server", "description": "The server itself."},
]
ABOUT = """\
Runs fleets of AI-agent instances. A *cluster* is a fleet.

Changes are answered by 202 when they are sure to be done; `Location` is the operation that tells how far they are.
Errors are `application/problem+json` (RFC 9457) and name each wrong field. Lists are read page by page: `next` of one
is the `cursor` of the next. Send `Idempotency-Key` with each change, and repeat it as often as you need to."""

Responses = dict[int | str, dict[str, Any]]


def problems(
    *statuses: int, key: bool = False, match: bool = False, etag: bool = False, open: bool = False
) -> Responses:
    """What a route answers besides its success, for FastAPI.

    Args:
        statuses: Of problems that not every route has.
        key: Whether it takes an Idempotency-Key.
        match: Whether it takes If-Match.
        etag: Whether its answer has an ETag, so that there may be a 304.
        open: Whether nobody needs a token for it.
    """
    del key, match  # both show in the statuses: 202, and 412
    found = {*statuses, *_ALWAYS, *(() if open else _KNOWN)}
    said: Responses = {status: _problem(status) for status in sorted(found)}
    if etag:
        said[304] = {"description": "As in If-None-Match"}
    return said


def describe(app: FastAPI, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application."""
    document = get_openapi(
        title="agentfleet",
        version=version,
        openapi_version="3.1.0",
        summary="Fleets of AI-agent instances",
        description=ABOUT,
        routes=app.routes,
        tags=_TAGS,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = Problem.model_json_schema(ref_template=_REF, mode="serialization")
    schemas |= problem.pop("$defs", {}) | {"Problem": problem}
    document["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "A token of `agentfleet token create`."}
    }
    for path, asked in deepcopy(AGENT_PATHS).items():
        document["paths"][path] = asked
        for operation in asked.values():
            operation["tags"] = [TAG["name"]]
            said = problems(400, 404, 422, etag=operation["operationId"] == "fetch_config")
            operation["responses"] |= {str(status): each for status, each in said.items()}
    for methods in document["paths"].values():
        for method, operation in methods.items():
            _complete(method, operation)
    _link(document["paths"])
    return document


def _link(paths: Mapping[str, Any]) -> None:
    """Say what an answer's ids are for."""
    of_cluster = {
        operation["operationId"]: {"operationId": operation["operationId"], "parameters": {"id": _ID}}
        for path, methods in paths.items()
        for operation in methods.values()
        if path.count("{") == 1 and "{id}" in path
    }
    follow = {"operationId": "get_operation", "parameters": {"operation_id": "$response.body#/operation_id"}}
    for methods in paths.values():
        for operation in methods.values():
            if "202" in operation["responses"]:
                more = of_cluster if operation["operationId"] == "create_cluster" else {}
                operation["responses"]["202"]["links"] = {"get_operation": follow, **more}


def _complete(method: str, operation: dict[str, Any]) -> None:
    responses: dict[str, Any] = operation["responses"]
    automatic = "application/json" in responses.get("422", {}).get("content", {})
    if automatic:  # FastAPI's own form of it
        del responses["422"]
    if "401" in responses:
        operation["security"] = [{"token": []}]
    if method in ("post", "put"):
        responses |= {str(status): _problem(status) for status in _WITH_BODY}
        if "requestBody" in operation or "422" in responses:
            responses["422"] = _problem(422)
    parameters = operation.setdefault("parameters", [])
    if "202" in responses or "412" in responses:
        parameters.append(_header("Idempotency-Key", "The same request again is done once.", r"^[!-~]{1,200}$"))
    if "202" in responses:
        responses["202"]["headers"] = {
            "Location": {"description": "The operation.", "required": True, "schema": {"type": "string"}}
        }
    if "412" in responses:
        parameters.append(
            _header("If-Match", "The ETag that the change is based on.", r"^(\*|\"[0-9]{1,15}(\.[^\"]*)?\")$")
        )
    if "304" in responses:
        parameters.append(_header("If-None-Match", "ETags: the answer is 304 while one of them holds."))
        tag = {"ETag": {"description": "Names this state.", "required": True, "schema": {"type": "string"}}}
        responses["200"]["headers"] = tag
        responses["304"]["headers"] = tag
    if operation["operationId"].startswith("stream_"):
        parameters.append(_header("Last-Event-ID", "The id of the last event that was read.", r"^[0-9]{1,16}$"))
        del responses["200"]["content"]["text/event-stream"]
        responses["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    operation["responses"] = dict(sorted(responses.items()))
    for response in responses.values():
        response.setdefault("headers", {})["X-Request-Id"] = {
            "description": "The request's id.",
            "required": True,
            "schema": {"type": "string", "format": "uuid"},
        }
    if not parameters:
        del operation["parameters"]


def _header(name: str, description: str, pattern: str | None = None) -> dict[str, Any]:
    schema = {"type": "string"} | ({} if pattern is None else {"pattern": pattern})
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _problem(status: int) -> dict[str, Any]:
    said: dict[str, Any] = {
        "description": _BY_STATUS[status],
        "content": {PROBLEM_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
    if status in _RETRY:
        said["headers"] = {
            "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
        }
    return said
