"""The gate: every request comes through here first, and every answer leaves through here.

It says who asks before anything else is looked at, holds every bound, gives each answer its id and its headers, counts
it, and has each change audited before it is answered. Routes know nothing of all that.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Sequence

import anyio
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentfleet.errors import AgentFleetError
from agentfleet.server import bodies
from agentfleet.server.context import Api
from agentfleet.server.exchange import KEY, Exchange
from agentfleet.server.limits import Rates
from agentfleet.server.principals import LOOPBACK, Principal, Remembering, Source
from agentfleet.server.problems import Refusal, later, problem_of, refusal_of
from agentfleet.stores.audit import AuditEntry

log = logging.getLogger("agentfleet.server.access")

OPEN = frozenset({"/livez", "/readyz"})
"""Paths that nobody needs a token for."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: The routes.
        api: What they share.
    """

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app = app
        self._api = api
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        exchange = Exchange.of(scope)
        scope[KEY] = exchange
        answering = _Answering(self._api, exchange, scope, send)
        exchange.give_back = self._begin()
        try:
            await self._pass(exchange, answering, scope, receive)
        except bodies.Gone:
            log.info("%s %s: the client has gone", exchange.method, exchange.path)
        finally:
            exchange.give_back()

    def _begin(self) -> Callable[[], None]:
        """Count a request among those that are answered at once, until what this returns is called."""
        self._in_flight += 1
        self._api.metrics.began()
        counted = True

        def give_back() -> None:
            nonlocal counted
            if counted:
                counted = False
                self._in_flight -= 1
                self._api.metrics.ended()

        return give_back

    async def _pass(self, exchange: Exchange, answering: _Answering, scope: Scope, receive: Receive) -> None:
        api = self._api
        try:
            with anyio.move_on_after(api.limits.deadline) as exchange.deadline:
                app = next((each for each in api.beside if each.claims(scope)), None)
                if app is None:
                    receive = await self._admit(exchange, scope, receive)
                else:
                    bodies.check_headers(exchange.headers, exchange.path, api.limits)
                    exchange.counts = False
                    exchange.lasting(float("inf"))
                with anyio.CancelScope() as answering.rest:
                    await (app or self._app)(answering.scope(), receive, answering.send)
                return
            if not answering.begun:
                refusal = later(
                    504, "deadline-exceeded", f"no answer within {api.limits.deadline:g} s; it may have been done"
                )
                await answering.refuse(refusal)
        except Refusal as refusal:
            await answering.refuse(refusal)
        except AgentFleetError as error:
            conditional = "if-match" in exchange.headers or "if-none-match" in exchange.headers
            await answering.refuse(refusal_of(error, conditional=conditional))
        except bodies.Gone:
            raise
        except Exception:
            log.exception("%s %s: a bug", exchange.method, exchange.path)
            if answering.begun:
                raise
            await answering.refuse(
                Refusal(500, "internal", "a bug in the server; its log has more, under this request's id")
            )

    async def _admit(self, exchange: Exchange, scope: Scope, receive: Receive) -> Receive:
        """Let a request in, or raise why not."""
        api, path = self._api, route_path(scope)
        if self._in_flight > api.limits.at_once and path not in OPEN:
            api.metrics.limited("at-once")
            raise later(503, "unavailable", f"{api.limits.at_once} requests are being answered; try again")
        bodies.check_headers(exchange.headers, exchange.path, api.limits)
        if not (path in OPEN or (path == "/metrics" and api.open_metrics)):
            exchange.principal = await recognise(api, exchange)
            limit(api, exchange, exchange.principal.credential)
        if not bodies.check_body(exchange.method, exchange.headers, api.limits):
            return receive
        return bodies.replay(await bodies.read_body(receive, api.limits), receive)


class _Answering:
    """Sends the one answer of an exchange."""

    def __init__(self, api: Api, exchange: Exchange, scope: Scope, send: Send) -> None:
        self._api = api
        self._exchange = exchange
        self._scope = scope
        self._send = send
        self._started_at = time.perf_counter()
        self.rest = anyio.CancelScope()
        """Cancelled when nothing that follows is wanted."""
        self.begun = False

    def scope(self) -> Scope:
        """What the routes see: a HEAD is a GET whose body nobody gets."""
        if self._exchange.method == "HEAD":
            self._scope = {**self._scope, "method": "GET"}
        return self._scope

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a problem, unless an answer has begun."""
        if self.begun:
            return
        exchange = self._exchange
        exchange.note(detail=f"{refusal.kind}: {refusal.detail}"[:500])
        try:
            await problem_of(refusal, exchange.id)(self._scope, _nothing, self.send)
        except Refusal as unaudited:  # by now this one is not to be audited, either
            await problem_of(unaudited, exchange.id)(self._scope, _nothing, self.send)

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._exchange.method == "HEAD":
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            self.rest.cancel()
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        exchange = self._exchange
        exchange.status = message["status"]
        if exchange.writes and exchange.counts and exchange.principal is not None:
            await self._audit(exchange)
        self.begun = True
        self._told(exchange)
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        headers["X-Request-Id"] = exchange.id
        if self._scope["scheme"] == "https":
            headers["Strict-Transport-Security"] = "max-age=31536000"
        await self._send(message)

    async def _audit(self, exchange: Exchange) -> None:
        """Write down who asked for what, before anybody is told what came of it."""
        who = exchange.principal
        assert who is not None, "nobody is not audited"
        entry = AuditEntry(
            at=self._api.clock.now(),
            actor=who.name,
            credential=who.credential,
            origin=exchange.origin,
            request=exchange.id,
            method=exchange.method,
            path=exchange.path,
            fleet=exchange.fleet,
            operation=exchange.operation,
            status=exchange.status,
            detail=exchange.detail.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode(),
        )
        try:
            await self._api.audit.append([entry])
        except AgentFleetError as error:
            log.warning("request %s cannot be audited: %s", exchange.id, error)
            exchange.counts = False  # so that the refusal itself is not, either
            raise later(
                503,
                "unavailable",
                "what was done, if anything, cannot be audited now; ask again, with the same Idempotency-Key",
            ) from error

    def _told(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - self._started_at
        route = exchange.route or getattr(self._scope.get("route"), "path", "(none)")
        self._api.metrics.answered(route, exchange.method, exchange.status, seconds)
        who = "nobody" if exchange.principal is None else exchange.principal.name
        log.log(
            logging.DEBUG if exchange.routine and exchange.status < 400 else logging.INFO,
            "%s %s %d",
            exchange.method,
            exchange.path,
            exchange.status,
            extra={
                "request_id": exchange.id,
                "route": route,
                "status": exchange.status,
                "milliseconds": round(seconds * 1000, 2),
                "actor": who,
                "origin": exchange.origin,
            },
        )


async def recognise(api: Api, exchange: Exchange) -> Principal:
    """Who asks; raises a 401 where that is nobody who is known, a 403 or 429 where it does not matter."""
    sources, token = api.sources, _token(exchange)
    if api.failures.empty(exchange.origin) > 0:  # nobody else is asked for who guesses; those who are known get in
        sources = [each for each in sources if isinstance(each, Remembering) and each.remembers(token)]
    if (found := await principal_now(api, exchange, sources)) is not None:
        return found
    api.metrics.unauthenticated()
    if (wait := api.failures.take(exchange.origin)) > 0:
        api.metrics.limited("failures")
        raise later(429, "too-many-requests", "too many attempts to say who asks failed from this address", wait)
    said = 'error="invalid_token"' if token else ""
    raise Refusal(
        401,
        "unauthenticated",
        "send a valid token as 'Authorization: Bearer …'",
        headers={"WWW-Authenticate": f'Bearer realm="agentfleet" {said}'.rstrip()},
    )


async def principal_now(api: Api, exchange: Exchange, sources: Sequence[Source] | None = None) -> Principal | None:
    """Who has sent a request, as far as its credentials hold at this moment; None is nobody who is known.

    Args:
        api: What is shared.
        exchange: The request.
        sources: That are asked; all by default.

    Raises:
        Refusal: A 403: it is not from where it must be.
        BackendUnavailable, DeadlineExceeded: A source cannot be asked.
    """
    if api.insecure_loopback:
        check_loopback(exchange)
        return LOOPBACK
    if token := _token(exchange):
        for source in api.sources if sources is None else sources:
            if (found := await source.principal(token)) is not None:
                return found
    return None


def _token(exchange: Exchange) -> str:
    """The one bearer token of a request; empty if there is none that could be one."""
    scheme, _, token = exchange.headers.get("authorization", "").partition(" ")
    token = token.strip()
    one = len(exchange.headers.getlist("authorization")) == 1
    return token if scheme.lower() == "bearer" and token.isascii() and one else ""


def limit(api: Api, exchange: Exchange, who: str, *, rates: Rates | None = None, times: float = 1.0) -> None:
    """Raise a 429 where somebody asks too often: more than `times` as often as a token may."""
    wait = (api.rates if rates is None else rates).take(who, times)
    if wait > 0:
        exchange.counts = False
        api.metrics.limited("rate")
        name = "nobody" if exchange.principal is None else exchange.principal.name
        often = f"{api.limits.rate * times:g} times a second"
        raise later(429, "too-many-requests", f"{name} asks more than {often}", wait)


def route_path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def check_loopback(exchange: Exchange) -> None:
    """Raise a 403 unless the request is from this machine, and not by a web page that a browser here shows.

    A name that resolves to 127.0.0.1 (DNS rebinding), or a form that posts across sites, would else be let in.
    """
    if not is_loopback(exchange.origin):
        raise Refusal(403, "forbidden", "this server answers this machine alone: it was told to ask nobody for a token")
    host = exchange.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.strip("[]").lower() not in _LOCAL_NAMES:
        raise Refusal(403, "forbidden", f"this server is called localhost, not {host[:100]!r}")
    page = exchange.headers.get("origin")
    if page is not None and page.partition("://")[2] != host:
        raise Refusal(403, "forbidden", "this server takes no requests of other sites' pages")


def is_loopback(address: str) -> bool:
    """Whether it is an address of this machine alone."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
