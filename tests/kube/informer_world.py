"""What the tests of connection and informer share: a server that says what it is told, and a proxy that fails."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from agentfleet.backends.kubernetes import Connection, KubeConfig
from agentfleet.backends.kubernetes.connection import Query, Requests


@dataclass
class Asked:
    """One request as the server got it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass
class Scripted:
    """A plain HTTP server whose answers are functions. An answer is raw bytes; the connection is closed after it."""

    answer: Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            parts = urlsplit(target)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            asked = Asked(method, parts.path, query, headers, body, asyncio.get_running_loop().time())
            self.asked.append(asked)
            await self.answer(asked, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client has had enough
        finally:
            writer.close()


def whole(status: int, body: bytes | dict[str, Any], *headers: str, kind: str = "application/json") -> bytes:
    """A complete answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


def chunk(content: bytes) -> bytes:
    """One piece of a stream."""
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def scripted(
    answer: Callable[[Asked, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Scripted]:
    """Serve while the context lasts."""
    script = Scripted(answer)
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.ensure_future(script.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:  # also of a task that was cancelled before it began
            writer.transport.abort()
        await asyncio.sleep(0)
        await server.wait_closed()


def always(*answers: bytes) -> Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]:
    """These answers one after the other, then the last one for ever."""
    left = list(answers)

    async def answer(_asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return answer


def write_config(folder: Path, server: str, user: dict[str, Any] | None = None, **cluster: Any) -> Path:
    """A kubeconfig."""
    path = folder / "config"
    content = {
        "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": "work"}}],
        "clusters": [{"name": "it", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "it", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def connect(config: Path, **options: Any) -> Connection:
    """A connection with small deadlines and a known jitter."""
    chosen: dict[str, Any] = {
        "timeout": 10,
        "read_timeout": 2,
        "connect_timeout": 2,
        "rng": random.Random(1),
        **options,
    }
    return Connection(KubeConfig(config), **chosen)


def b64(content: bytes) -> str:
    """Base64 as kubeconfigs have it."""
    return base64.b64encode(content).decode()


@dataclass
class Proxy:
    """A TCP proxy in front of a server: it can swallow what the server says, and cut every connection."""

    port: int
    target: int
    swallow: bool = False
    connections: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Break every connection off."""
        for writer in self._writers:
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool) -> None:
        try:
            while data := await reader.read(65536):
                if back and self.swallow:
                    continue
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer, back=False), self._pump(far_reader, writer, back=True))
        finally:
            self._writers -= {writer, far_writer}
            for each in (writer, far_writer):
                each.transport.abort()


@asynccontextmanager
async def proxied(server: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy in front of a server's URL, and the URL to use instead."""
    parts = urlsplit(server)
    assert parts.port is not None
    proxy = Proxy(0, parts.port)
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.ensure_future(proxy.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = listener.sockets[0].getsockname()[1]
    try:
        yield proxy, f"{parts.scheme}://127.0.0.1:{proxy.port}"
    finally:
        listener.close()
        proxy.cut()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:  # also of a task that was cancelled before it began
            writer.transport.abort()
        await asyncio.sleep(0)
        await listener.wait_closed()


class Interrupted(Requests):
    """A connection during whose lists something happens: after so many pages of each list, for the first lists."""

    def __init__(self, inner: Requests, happens: Callable[[], Awaitable[None]], *, pages: int, lists: int) -> None:
        self._inner = inner
        self._happens = happens
        self._pages = pages
        self.lists = lists
        self._read = 0
        self.asked = 0
        """Pages asked for."""

    async def request(self, method: str, path: str, *, query: Query | None = None, **more: Any) -> bytes:
        self.asked += 1
        self._read = self._read + 1 if query is not None and "continue" in query else 1
        if self._read == self._pages + 1 and self.lists:
            self.lists -= 1
            await self._happens()
        return await self._inner.request(method, path, query=query, **more)

    def stream(
        self, path: str, *, query: Query | None = None, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._inner.stream(path, query=query, silence=silence)
