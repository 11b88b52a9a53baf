"""The agent in a fake pod: real HTTP on the pod's own address, with answers that a test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 503: "Service Unavailable"}
_MAX_HEAD, _MAX_BODY = 65_536, 4 << 20


@dataclass(slots=True)
class Vitals:
    """What the agent of one pod answers.

    Attributes:
        healthy: Whether /health is 200.
        ready: Whether /ready is 200.
        silent: Nothing is answered; connections are still accepted.
        busy: Tasks in flight that a test has decreed.
        running: Tasks in flight that were given over HTTP.
        draining: It has been told to end.
    """

    version: str = ""
    healthy: bool = True
    ready: bool = True
    silent: bool = False
    busy: int = 0
    running: int = 0
    completed: int = 0
    draining: bool = False
    task_seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    config_revision: int = 0
    changed: Callable[[], None] = lambda: None
    """Called when work has ended."""

    @property
    def in_flight(self) -> int:
        """Tasks that run."""
        return self.busy + self.running

    def status(self) -> dict[str, Any]:
        """What /status answers."""
        state = "draining" if self.draining else "busy" if self.in_flight else "idle"
        return {
            "state": state,
            "in_flight": self.in_flight,
            "queue_length": 0,
            "last_progress": 0.0,
            "completed": self.completed,
            "failed": 0,
            "config_revision": self.config_revision,
            "version": self.version,
        }


class PodAgent:
    """Serves one pod's agent on its address and ports, until it is closed; then connections are refused."""

    def __init__(self, vitals: Vitals) -> None:
        self.vitals = vitals
        self._servers: list[asyncio.Server] = []
        self._open: set[_Conversation] = set()

    async def listen(self, address: str, ports: set[int]) -> None:
        """Listen.

        Raises:
            OSError: Another program listens there.
        """
        loop = asyncio.get_running_loop()
        for port in ports:
            self._servers.append(await loop.create_server(self._converse, address, port, backlog=64))

    def close(self) -> None:
        """Stop listening and reset every connection."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for conversation in list(self._open):
            conversation.abort()

    def _converse(self) -> _Conversation:
        return _Conversation(self.vitals, self._open)


class _Conversation(asyncio.Protocol):
    """One connection: requests one after the other."""

    __slots__ = ("_buffer", "_busy", "_open", "_transport", "_vitals")

    def __init__(self, vitals: Vitals, open_ones: set[_Conversation]) -> None:
        self._vitals = vitals
        self._open = open_ones
        self._buffer = b""
        self._busy = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        """End."""
        self._open.discard(self)

    def abort(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self._buffer += data
        while not self._busy and not self._vitals.silent:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEAD:
                    self.abort()
                return
            head = self._buffer[:end].decode("latin-1")
            length = _content_length(head)
            if length is None or length > _MAX_BODY:
                self.abort()
                return
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            method, _, rest = head.partition(" ")
            self._answer(method, rest.partition(" ")[0].partition("?")[0], body)

    def _answer(self, method: str, path: str, body: bytes) -> None:
        vitals = self._vitals
        match method, path:
            case "GET", "/health":
                self._send(200 if vitals.healthy else 503, {"healthy": vitals.healthy})
            case "GET", "/ready":
                ready = vitals.healthy and vitals.ready and not vitals.draining
                self._send(200 if ready else 503, {"ready": ready})
            case "GET", "/status":
                self._send(200, vitals.status())
            case "GET", "/config":
                self._send(200, {"revision": vitals.config_revision, "document": vitals.config})
            case "PUT", "/config":
                self._configure(json.loads(body))
            case "POST", "/tasks":
                self._work(json.loads(body))
            case _, "/health" | "/ready" | "/status" | "/config" | "/tasks":
                self._send(405, {"error": f"{path} does not take {method}"})
            case _:
                self._send(404, {"error": f"no such path: {path}"})

    def _configure(self, asked: dict[str, Any]) -> None:
        vitals = self._vitals
        if asked["revision"] < vitals.config_revision:
            self._send(409, {"error": "a newer revision is in force", "revision": vitals.config_revision})
            return
        vitals.config_revision, vitals.config = asked["revision"], asked["document"]
        self._send(200, {"revision": vitals.config_revision})

    def _work(self, task: dict[str, Any]) -> None:
        if self._vitals.draining:
            self._send(503, {"error": "draining"})
            return
        if task.get("resume"):
            self._send(404, {"error": "not known"})
            return
        self._busy = True
        self._vitals.running += 1
        asyncio.get_running_loop().call_later(self._vitals.task_seconds, self._worked, task["id"])

    def _worked(self, task: str) -> None:
        self._vitals.running -= 1
        self._vitals.completed += 1
        self._busy = False
        self._send(200, {"id": task, "ok": True, "result": None})
        self._vitals.changed()
        self.data_received(b"")

    def _send(self, status: int, body: dict[str, Any]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = json.dumps(body).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}"
        self._transport.write(f"HTTP/1.1 {status} {_REASONS[status]}\r\n{kind}\r\n\r\n".encode() + data)


def _content_length(head: str) -> int | None:
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return int(value) if value.strip().isdecimal() else None
    return 0
