"""The REST API as an application: served by itself (`agentfleet serve`), or mounted into another one.

::

    async with FleetManager(records, backend=backend, journal=journal) as manager:
        app = create_app(manager, tokens=SqlTokens(database), audit=SqlAudit(database))

    host.mount("/fleets", app)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

import agentfleet
from agentfleet.errors import SpecError
from agentfleet.manager import FleetManager
from agentfleet.server.admission import Admission
from agentfleet.server.agents import AgentsApp
from agentfleet.server.answering import API
from agentfleet.server.context import Api, Beside, Check
from agentfleet.server.credentials import StoredTokens
from agentfleet.server.describing import describe
from agentfleet.server.gate import Gate, route_path
from agentfleet.server.leaving import Leaving
from agentfleet.server.limits import Limits, Rates
from agentfleet.server.metrics import ApiMetrics
from agentfleet.server.principals import Source
from agentfleet.server.problems import Refusal, invalid
from agentfleet.server.routes import clusters, configuration, events, instances, operations, system
from agentfleet.server.streams import Hub, Places
from agentfleet.stores.audit import AuditTrail, MemoryAudit
from agentfleet.stores.tokens import TokenStore

ROUTERS = (system.root, *(each.router for each in (clusters, operations, instances, events, configuration, system)))


def create_app(
    manager: FleetManager,
    *,
    tokens: TokenStore | None = None,
    sources: Sequence[Source] = (),
    audit: AuditTrail | None = None,
    admission: Admission | None = None,
    limits: Limits | None = None,
    checks: Mapping[str, Check] | None = None,
    leaving: Leaving | None = None,
    beside: Sequence[Beside] = (),
    insecure_loopback: bool = False,
    open_metrics: bool = False,
) -> FastAPI:
    """The REST API of a manager, for any ASGI server on asyncio, or to be mounted.

    Args:
        manager: Open while this is served.
        tokens: Where the API's own tokens are kept.
        sources: Other sources of credentials, asked in their order before `tokens`.
        audit: Where every change is written down; in memory when omitted.
        admission: What of a spec may be said by whom, and what runs where a request does not say it.
        limits: Bounds of everything.
        checks: What must be reachable, besides the store, for this to be ready; by name.
        leaving: Set by whoever ends the server, first of all.
        beside: Applications that answer some requests by themselves, and judge by themselves who may ask them.
        insecure_loopback: Answer this machine alone, and ask nobody for a token. Never behind a proxy.
        open_metrics: Whether /metrics needs no token.

    Raises:
        SpecError: Nobody could ever be recognised, because there is no source of credentials.
    """
    known = (*sources, *(() if tokens is None else (StoredTokens(tokens, manager.clock),)))
    if not known and not insecure_loopback:
        raise SpecError(
            "tokens: without a source of credentials nobody could ask; give a token store or another source"
        )
    bounds = Limits() if limits is None else limits
    metrics = ApiMetrics(manager.telemetry.registry)
    api = Api(
        manager=manager,
        admission=Admission() if admission is None else admission,
        limits=bounds,
        metrics=metrics,
        audit=MemoryAudit() if audit is None else audit,
        sources=known,
        rates=Rates(bounds.rate, bounds.burst, time.monotonic),
        failures=Rates(bounds.failures / 60, bounds.failures, time.monotonic),
        hub=Hub(manager.journal),
        places=Places("streams", bounds.streams, bounds.streams_each, metrics),
        agents=Places("agents", bounds.agents, bounds.agents, metrics),
        waits=Places("waits", bounds.waits, bounds.waits_each, metrics),
        leaving=Leaving() if leaving is None else leaving,
        checks=dict(checks or {}),
        insecure_loopback=insecure_loopback,
        open_metrics=open_metrics,
        beside=tuple(beside),
    )
    return routed(replace(api, beside=(*api.beside, AgentsApp(api))))


def routed(api: Api) -> FastAPI:
    """The routes around what they share."""
    app = _application()
    app.state.api = api
    app.add_middleware(Gate, api=api)
    return app


def document() -> dict[str, Any]:
    """The OpenAPI document, without a manager."""
    return _application().openapi()


def _application() -> FastAPI:
    app = FastAPI(
        title="agentfleet",
        version=agentfleet.__version__,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={RequestValidationError: _on_invalid, HTTPException: _on_http},
    )
    for router in ROUTERS:
        app.include_router(router)
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(describe(app, agentfleet.__version__))
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for that"
    raise invalid(error.errors()) from error


async def _on_http(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself."""
    assert isinstance(error, HTTPException), "registered for that"
    if isinstance(error.__cause__, Refusal):
        raise error.__cause__
    if error.status_code == 405:
        allowed = ", ".join(sorted(methods_of(request.scope)))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allowed})
        raise Refusal(
            405,
            "method-not-allowed",
            f"{request.method} cannot be done to this; {allowed} can",
            headers={"Allow": allowed},
        )
    if error.status_code == 404:
        raise Refusal(404, "not-found", "there is nothing at this path")
    raise Refusal(error.status_code, "malformed", str(error.detail))


def methods_of(scope: Scope) -> set[str]:
    """What can be done to a path: every route's methods, not the first one's alone."""
    found: set[str] = set()
    path = route_path(scope)
    for route in (each for router in ROUTERS for each in router.routes):
        if isinstance(route, APIRoute) and route.path_regex.match(path):
            found |= route.methods or set()
    if "GET" in found:
        found.add("HEAD")
    return {*found, "OPTIONS"}
