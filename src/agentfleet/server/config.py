"""Configuration over HTTP, for agents: a thin ASGI application in front of `delivery.ConfigDelivery`.

    GET  /api/v1/clusters/{id}/config/stream?instance=…&running=…&refused=…   server-sent events; Last-Event-ID resumes
    GET  /api/v1/clusters/{id}/config?instance=…&running=…&refused=…          the revision assigned; ETag, 304
    POST /api/v1/clusters/{id}/config/acks                                    what the instance runs, or has refused

It stands on ASGI alone, without a framework between a change and a thousand sockets; mount it beside the routes for
people. Server-sent events: WHATWG HTML, section 9.2. Errors are problem+json (RFC 9457).
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote

import anyio

from agentfleet.delivery import ConfigDelivery, ConfigStream
from agentfleet.errors import DeadlineExceeded, OperationRefused
from agentfleet.stores.acks import ConfigAck

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_PATH = re.compile(r"/api/v1/clusters/([^/]{1,253})/config(/stream|/acks)?")
_METHODS = {None: "GET", "/stream": "GET", "/acks": "POST"}
_MOST = 16_384
"""Bytes of an acknowledgement."""
_TIMEOUT = 10.0
_STREAM = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"connection", b"close"),
    (b"x-accel-buffering", b"no"),  # a proxy that gathers a stream would hold every change back
]
_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    422: "Unprocessable Content",
    503: "Service Unavailable",
}


class Refusal(Exception):
    """The request is refused: `authorize` may raise it.

    Args:
        status: The HTTP status: 401 without valid credentials, 403 with those of somebody else.
        detail: Why, for the client.
        headers: Added to the answer.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


Authorize = Callable[[Scope, str, str], Awaitable[None]]
"""`authorize(scope, cluster, instance)`: raises `Refusal` unless the request may speak for this instance."""
Find = Callable[[str], ConfigDelivery | None]
"""The delivery of a cluster; None if there is no such cluster here."""


class ConfigApp:
    """The application.

    Args:
        find: Finds a cluster's delivery, which runs for as long as it is found.
        authorize: Judges each request. There is no default: whoever may fetch a configuration may read it.
        again: Judges each open stream anew; `authorize` when omitted.
        beat: Seconds between two such judgements.
        longest: Seconds after which a stream ends, or somewhat earlier, so that clients spread anew.
    """

    def __init__(
        self,
        find: Find,
        authorize: Authorize,
        *,
        again: Authorize | None = None,
        beat: float = 15.0,
        longest: float = 3600.0,
    ) -> None:
        self._find = find
        self._authorize = authorize
        self._again = authorize if again is None else again
        self._beat, self._longest = beat, longest

    def claims(self, scope: Scope) -> bool:
        """Whether a request is for this application."""
        return scope["type"] == "http" and _PATH.fullmatch(_path(scope)) is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise NotImplementedError(f"this application serves http, not {scope['type']}")
        try:
            await self._serve(scope, receive, send)
        except Refusal as refusal:
            await _say(send, refusal)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = _PATH.fullmatch(_path(scope))
        if match is None:
            raise Refusal(404, "there is no such path")
        what: str | None = match[2]
        allowed = _METHODS[what]
        if scope["method"] != allowed:
            raise Refusal(405, f"use {allowed}", {"allow": allowed})
        cluster, query = unquote(match[1]), _query(scope)
        said = _read_ack(await _body(receive)) if what == "/acks" else None
        instance = _instance(query.get("instance") if said is None else said.instance)
        await self._authorize(scope, cluster, instance)
        delivery = self._find(cluster)
        if delivery is None:
            raise Refusal(404, f"there is no cluster {cluster!r} here")
        if said is not None:
            await self._hear(delivery, said, scope)
            await _answer(send, 204, b"", {})
        elif what == "/stream":
            await self._stream(delivery, instance, scope, receive, send)
        else:
            await self._fetch(delivery, instance, scope, send)

    async def _hear(self, delivery: ConfigDelivery, said: ConfigAck, scope: Scope) -> None:
        """Take an acknowledgement."""
        del scope
        await _check_revision(delivery, said)
        delivery.hear(said)

    async def _fetch(self, delivery: ConfigDelivery, instance: str, scope: Scope, send: Send) -> None:
        query = _query(scope)
        held = [each.strip().removeprefix("W/") for each in (_header(scope, b"if-none-match") or "").split(",")]
        if "running" in query:
            seen = max((int(tag) for tag in (each.strip('"') for each in held) if _is_number(tag)), default=0)
            delivery.note(instance, _number(query["running"], "running"), _refused(query), seen=seen, via="poll")
        elif "refused" in query:
            raise Refusal(400, "refused: say in 'running' what runs instead")
        try:
            parcel = await delivery.fetch(instance, timeout=_TIMEOUT)
        except DeadlineExceeded as error:
            log.warning("answers 503: %s", error)
            raise Refusal(503, "what is assigned is not known yet; ask again", {"retry-after": "2"}) from error
        if parcel is None:
            raise Refusal(404, f"no configuration is assigned to {instance!r}")
        headers = {"etag": parcel.etag, "cache-control": "no-cache"}
        if parcel.etag in held:
            await _answer(send, 304, b"", headers)
        else:
            await _answer(send, 200, parcel.body, headers | {"content-type": "application/json"})

    async def _stream(
        self, delivery: ConfigDelivery, instance: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        last = _header(scope, b"last-event-id")
        seen = _number(last, "Last-Event-ID") if last else 0
        query = _query(scope)
        running, refused = _number(query.get("running", "0"), "running"), _refused(query)
        try:
            async with delivery.subscribed(instance, running=running, refused=refused, seen=seen) as stream:
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_until_gone, receive, tasks.cancel_scope)
                    tasks.start_soon(self._judge, stream, scope, instance)
                    stream.push = partial(_push, send)
                    await _pump(stream, send)
                    tasks.cancel_scope.cancel()
        except OperationRefused as error:
            raise Refusal(503, str(error), {"retry-after": str(round(delivery.spread))}) from error
        with anyio.move_on_after(1.0):  # unless the client takes nothing any more
            await send({"type": "http.response.body", "body": b""})

    async def _judge(self, stream: ConfigStream, scope: Scope, instance: str) -> None:
        """End a stream when its time is over, or who reads it may not any more."""
        match = _PATH.fullmatch(_path(scope))
        assert match is not None, "it was served"
        end = anyio.current_time() + self._longest * random.uniform(0.8, 1.0)  # noqa: S311 - they are not to end together
        while (left := end - anyio.current_time()) > 0:
            await anyio.sleep(min(self._beat, left))
            try:
                await self._again(scope, unquote(match[1]), instance)
            except Refusal:
                break
        stream.end()


async def _pump(stream: ConfigStream, send: Send) -> None:
    async for frame in stream:
        try:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        except OSError:  # the client is gone (ASGI 2.4)
            return


def _push(send: Send, frame: bytes) -> bool:
    """Write a frame if the server takes it without waiting; whether it has.

    What waits is given up before anything is written, or has been taken by then; the stream's own task sends it anew,
    and an agent that is sent a revision twice takes it once.
    """
    sending: Generator[Any, None, None] = send(
        {"type": "http.response.body", "body": frame, "more_body": True}
    ).__await__()
    try:
        next(sending)
    except StopIteration:
        return True
    except OSError:  # the client is gone: its own task finds out
        return False
    sending.close()
    return False


async def _check_revision(delivery: ConfigDelivery, said: ConfigAck) -> None:
    """Refuse what nobody can run; but who has come with that already does, where the store knew more once."""
    known = delivery.book.known.get(said.instance)
    for name, number in (("revision", said.revision), ("refused", said.refused)):
        if (known is None or number > known.answered) and not await delivery.exists(number):
            raise Refusal(422, f"{name}: there is no revision {number} yet")


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


# ------------------------------------------------------------------------------------------------ HTTP


def _path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def route_of(scope: Scope) -> str:
    """The path as a template, for a request that is for this application."""
    match = _PATH.fullmatch(_path(scope))
    return "(none)" if match is None else f"/api/v1/clusters/{{id}}/config{match[2] or ''}"


def speaks(scope: Scope) -> bool:
    """Whether a request for this application says something of an instance, or takes its place; else it only reads."""
    match = _PATH.fullmatch(_path(scope))
    return match is None or match[2] is not None or not {"running", "refused"}.isdisjoint(_query(scope))


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))


def _header(scope: Scope, name: bytes) -> str | None:
    found: bytes | None = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else found.decode("latin-1")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < 2**63


def _number(text: str, name: str) -> int:
    if not _is_number(text):
        raise Refusal(400, f"{name}: must be the number of a revision, not {text[:40]!r}")
    return int(text)


def _refused(query: Mapping[str, str]) -> int | None:
    return _number(query["refused"], "refused") if "refused" in query else None


def _instance(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 253 or not name.isprintable():
        raise Refusal(400, "instance: must be the id of an instance, up to 253 printable characters")
    return name


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    with anyio.move_on_after(_TIMEOUT) as scope:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the request was broken off")
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > _MOST:
                raise Refusal(413, f"an acknowledgement has at most {_MOST} bytes")
    if scope.cancelled_caught:
        raise Refusal(400, f"the body did not arrive within {_TIMEOUT:g} s")
    return body


def _read_ack(body: bytes) -> ConfigAck:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(422, "the body must be JSON") from error
    if not isinstance(said, dict):
        raise Refusal(422, "the body must be a JSON object")
    unknown = set(said) - {"instance", "revision", "refused", "why", "via"}
    if unknown:
        raise Refusal(422, f"{min(unknown)[:80]}: is not known here; there are instance, revision, refused, why, via")
    for name in ("revision", "refused"):
        number = said.get(name, 0)
        if type(number) is not int or not 0 <= number < 2**63:
            raise Refusal(422, f"{name}: must be the number of a revision, or 0 for none")
    why = said.get("why", "")
    if not isinstance(why, str):
        raise Refusal(422, "why: must be text")
    via = said.get("via", "stream")
    if via not in ("stream", "poll"):
        raise Refusal(422, "via: must be 'stream' or 'poll'")
    return ConfigAck(_instance(said.get("instance")), said.get("revision", 0), said.get("refused", 0), why, via)


async def _say(send: Send, refusal: Refusal) -> None:
    title = _TITLES.get(refusal.status, "Refused")
    problem = {"type": "about:blank", "title": title, "status": refusal.status, "detail": refusal.detail}
    headers = refusal.headers | {"content-type": "application/problem+json"}
    await _answer(send, refusal.status, json.dumps(problem).encode(), headers)


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    if status not in (204, 304):
        lines.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
