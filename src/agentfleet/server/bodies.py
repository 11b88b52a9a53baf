"""Bodies of requests: read whole, in time and in bounds, and as JSON without surprises."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import anyio
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from agentfleet.rest.base import MEDIA_TYPE, PROBLEM_TYPE, STREAM_TYPE
from agentfleet.server.limits import Limits
from agentfleet.server.problems import Refusal

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_OURS = (MEDIA_TYPE, PROBLEM_TYPE, STREAM_TYPE, "text/plain")


class Gone(Exception):
    """The client has gone before its request was whole. There is nobody to answer."""


def check_headers(headers: Headers, path: str, limits: Limits) -> None:
    """Raise a 431 or 406 for headers that are too large, or accept nothing that is answered here."""
    size = len(path) + sum(len(name) + len(value) + 4 for name, value in headers.raw)
    if size > limits.headers:
        raise Refusal(431, "headers-too-large", f"path and headers have {size} bytes; {limits.headers} are taken")
    accepted = headers.get("accept")
    if accepted and not any(map(_is_ours, accepted.split(","))):
        raise Refusal(406, "not-acceptable", f"answers are {MEDIA_TYPE}; accept that, or anything")


def check_body(method: str, headers: Headers, limits: Limits) -> bool:
    """Whether a body follows that matters; raises a 415 or 413 for one of another kind, or that is too large."""
    if method not in ("POST", "PUT", "PATCH"):
        return False
    length, chunked = headers.get("content-length"), "transfer-encoding" in headers
    if not chunked and (length is None or length == "0"):
        return False
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MEDIA_TYPE:
        raise Refusal(
            415, "unsupported-media-type", f"bodies are {MEDIA_TYPE}, not {kind[:60] or 'of a kind that is not said'!r}"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "unsupported-media-type", "bodies are taken as they are, without Content-Encoding")
    if length is not None and length.isdecimal() and int(length[:20]) > limits.body:
        raise _too_large(limits)
    return True


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body; raises a 413 or 408, and `Gone`."""
    parts: list[bytes] = []
    size, more = 0, True
    with anyio.move_on_after(limits.upload) as patience:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part: bytes = message.get("body", b"")
            size, more = size + len(part), bool(message.get("more_body", False))
            if size > limits.body:
                raise _too_large(limits)
            parts.append(part)
    if patience.cancelled_caught:
        raise Refusal(
            408, "timeout", f"the body was not there after {limits.upload:g} s", headers={"Connection": "close"}
        )
    body = b"".join(parts)
    _check_depth(body, limits)
    return body


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what really comes."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class JsonRequest(Request):
    """A request whose JSON is read strictly: no key twice, no NaN, nothing that Python alone takes for JSON."""

    async def json(self) -> Any:
        """The body; raises a 400 for what is no JSON."""
        body = await self.body()
        try:
            return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "malformed", f"the body is no JSON: {str(error)[:300]}") from error


def _check_depth(body: bytes, limits: Limits) -> None:
    if body.count(b"[") + body.count(b"{") <= limits.depth:
        return
    depth = 0
    for sign in _STRINGS.sub(b"", body):
        if sign in b"[{":
            depth += 1
            if depth > limits.depth:
                raise Refusal(400, "malformed", f"the body is nested more than {limits.depth} levels deep")
        elif sign in b"]}":
            depth -= 1


def _is_ours(accepted: str) -> bool:
    kind, _, parameters = accepted.strip().lower().partition(";")
    kind = kind.strip()
    if re.search(r"(^|;)\s*q=0(\.0*)?\s*($|;)", parameters):
        return False
    main, _, sub = kind.partition("/")
    return kind == "*/*" or any(kind == each or (sub == "*" and each.startswith(f"{main}/")) for each in _OURS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object; remove one")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, "too-large", f"the body is larger than the {limits.body} bytes that are taken")
