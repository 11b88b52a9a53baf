"""The agent in a fake pod: real HTTP on the pod's own address, with answers that a test decides."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 503: "Service Unavailable"}
_MAX_HEAD, _MAX_BODY = 65_536, 4 << 20
_BACKLOG = 64
_PAUSE = 1.0
"""Seconds until somebody is let in again, after there was no descriptor left for them."""


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
    """Serves one pod's agent on its address and ports, until it is closed; then connections are refused.

    It accepts by itself, because an `asyncio.Server` of Python before 3.13 that is closed while it accepts a connection
    leaves it open for good (CPython's gh-109564): a pod that ends would keep its client waiting.
    """

    def __init__(self, vitals: Vitals) -> None:
        self.vitals = vitals
        self._listening: list[socket.socket] = []
        self._arriving: set[asyncio.Task[object]] = set()
        self._open: set[_Conversation] = set()
        self._closed = False

    def listen(self, address: str, ports: set[int]) -> None:
        """Listen.

        Raises:
            OSError: Another program listens there.
        """
        loop = asyncio.get_running_loop()
        for port in ports:
            listener = socket.create_server((address, port), backlog=_BACKLOG)
            listener.setblocking(False)
            self._listening.append(listener)
            loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Stop listening and reset every connection, also one whose accepting is still under way."""
        self._closed = True
        for listener in self._listening:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listening.clear()
        for conversation in list(self._open):
            conversation.abort()

    def begun(self, conversation: _Conversation) -> None:
        """A connection was accepted, perhaps by an agent that has been closed since."""
        if self._closed:
            conversation.abort()
        else:
            self._open.add(conversation)

    def over(self, conversation: _Conversation) -> None:
        """A connection has ended."""
        self._open.discard(conversation)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_BACKLOG):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left; the socket stays readable, so that the loop would turn and turn
                loop.remove_reader(listener)
                loop.call_later(_PAUSE, self._accept_again, listener)
                return
            client.setblocking(False)
            task = loop.create_task(loop.connect_accepted_socket(lambda: _Conversation(self), client))
            self._arriving.add(task)
            task.add_done_callback(lambda ended, client=client: self._arrived(ended, client))  # type: ignore[misc]

    def _accept_again(self, listener: socket.socket) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _arrived(self, task: asyncio.Task[object], client: socket.socket) -> None:
        self._arriving.discard(task)
        if task.cancelled() or task.exception() is not None:  # the loop ends, or fails: nobody else would close it
            client.close()


class _Conversation(asyncio.Protocol):
    """One connection: requests one after the other."""

    __slots__ = ("_agent", "_buffer", "_busy", "_transport", "_vitals")

    def __init__(self, agent: PodAgent) -> None:
        self._agent = agent
        self._vitals = agent.vitals
        self._buffer = b""
        self._busy = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._agent.begun(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        """End."""
        self._agent.over(self)

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
