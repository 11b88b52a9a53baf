"""Asks an ASGI application in its own process: no sockets, and every byte that it sends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

ADMIN = "admin-token-of-the-tests-0123456789abcdef"


@dataclass
class Reply:
    """What was answered."""

    status: int = 0
    headers: Headers = field(default_factory=Headers)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """The kind of problem."""
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.body)
        problem = self.json
        assert problem["status"] == self.status
        assert problem["instance"] == f"urn:uuid:{self.headers['x-request-id']}"
        kind: str = problem["type"].removeprefix("urn:agentfleet:problem:")
        return kind

    def fields(self) -> list[str]:
        return [each["field"] for each in self.json["errors"]]


class Asking:
    """Asks one application.

    Args:
        app: The application.
        token: Sent with every request; None sends none.
        client: Address that requests come from.
    """

    def __init__(self, app: ASGIApp, token: str | None = ADMIN, client: str = "127.0.0.1") -> None:
        self.app, self.token, self.client = app, token, client

    def by(self, token: str | None) -> Asking:
        return Asking(self.app, token, self.client)

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
        chunks: list[bytes] | None = None,
        gone: anyio.Event | None = None,
    ) -> Reply:
        sent = {"host": "localhost", **{name.lower(): value for name, value in (headers or {}).items()}}
        if self.token is not None:
            sent.setdefault("authorization", f"Bearer {self.token}")
        data = json.dumps(body).encode() if body is not None else raw or b""
        if (body is not None or raw is not None) and chunks is None:
            sent.setdefault("content-type", "application/json")
            sent.setdefault("content-length", str(len(data)))
        parts = [data] if chunks is None else list(chunks)
        plain, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": _unquoted(plain),
            "raw_path": plain.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent.items()],
            "client": (self.client, 40_000),
            "server": ("localhost", 8080),
            "state": {},
        }
        reply = Reply()

        async def receive() -> Message:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await (anyio.Event() if gone is None else gone).wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = Headers(raw=message["headers"])
            else:
                reply.body += message.get("body", b"")

        with anyio.fail_after(30):
            await self.app(scope, receive, send)
        return reply


def _unquoted(path: str) -> str:
    return unquote(path)
