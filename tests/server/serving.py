"""A real server for the tests of this directory, and a client that speaks plain HTTP to it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn

from agentfleet import ConfigStore
from agentfleet.delivery import ConfigDelivery
from agentfleet.server.config import ConfigApp
from agentfleet.stores.acks import ConfigAck, ConfigAcks, MemoryAcks

KEY = "researchers"
WHY: dict[str, Any] = {"author": "ann", "reason": "because"}


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something of another task holds."""
    with anyio.fail_after(20):
        while not holds():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.005)


def listening(port: int = 0) -> socket.socket:
    """A listening socket."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(1024)
    return sock


@asynccontextmanager
async def serving(app: Any, port: int = 0) -> AsyncIterator[str]:
    """An ASGI application in uvicorn; its address."""
    sock = listening(port)
    config = uvicorn.Config(
        app, log_level="error", lifespan="off", http="httptools", loop="asyncio", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve([sock]))
    try:
        await until(lambda: server.started)
        host, port = sock.getsockname()
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        await running
        sock.close()


async def everybody(_scope: Any, _cluster: str, _instance: str) -> None:
    """Whoever asks may."""


@dataclass
class Site:
    """A store, its delivery, and where it is served."""

    store: ConfigStore
    acks: ConfigAcks
    delivery: ConfigDelivery
    address: str

    @property
    def url(self) -> str:
        return f"http://{self.address}/api/v1/clusters/{KEY}"

    async def put(self, **document: Any) -> int:
        """Publish."""
        return (await self.store.put(KEY, document, **WHY)).revision

    async def said(self, instance: str, revision: int, refused: int = 0) -> ConfigAck:
        """Wait until an instance has said this, and it is written."""
        batch = 0
        with anyio.fail_after(20):
            while True:
                batch, found = await self.acks.after(KEY, 0)
                for ack in found:
                    if (ack.instance, ack.revision, ack.refused) == (instance, revision, refused):
                        return ack
                await self.acks.changed(KEY, batch)


@asynccontextmanager
async def site(
    store: ConfigStore | None = None,
    acks: ConfigAcks | None = None,
    *,
    port: int = 0,
    authorize: Any = everybody,
    **more: Any,
) -> AsyncIterator[Site]:
    """A store that is delivered and served."""
    store, acks = store or ConfigStore(), acks or MemoryAcks()
    delivery = ConfigDelivery(store, KEY, acks, **more)
    async with serving(ConfigApp({KEY: delivery}.get, authorize), port) as address, anyio.create_task_group() as tasks:
        await tasks.start(delivery.run)
        yield Site(store, acks, delivery, address)
        tasks.cancel_scope.cancel()  # its streams end, so that the server can


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    address: str, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    try:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {address}", "Connection: close", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + data)
        raw = await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *more = head.decode().split("\r\n")
    found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in more)}
    return Reply(int(first.split()[1]), found, rest)


@dataclass
class RawStream:
    """A subscriber that only reads."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: str = ""
    events: list[tuple[int, Any]] = field(default_factory=list)
    comments: int = 0

    async def event(self) -> tuple[int, Any]:
        """The next event: its id and its data."""
        with anyio.fail_after(20):
            while True:
                for line in (await self.frame()).split("\n"):
                    if line == ":":
                        self.comments += 1
                    elif line.startswith("data: "):
                        said = json.loads(line[6:])
                        self.events.append((said["revision"], said["document"]))
                        return self.events[-1]

    async def frame(self) -> str:
        """The next chunk."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2].decode()

    async def ended(self) -> bool:
        """Whether it ends within the deadline."""
        with anyio.fail_after(20):
            return (await self.reader.read()).endswith(b"") or True


@asynccontextmanager
async def streaming(address: str, query: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[RawStream]:
    """Subscribe, without the agent's client."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    try:
        lines = [f"GET /api/v1/clusters/{KEY}/config/stream?{query} HTTP/1.1", f"Host: {address}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode()
        yield RawStream(reader, writer, head)
    finally:
        writer.close()
        await writer.wait_closed()
