"""The agent's server: a daemon thread with a small event loop of its own.

Out of band on purpose: an agent that is deep in a model call, or whose code blocks its event loop, still answers its
probes, and so is not killed for being busy; what it is doing shows in /status instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from agentfleet.agent.settings import Settings
from agentfleet.agent.wire import CONTINUE, Answer, BadRequest, Head, Reader, read_body, read_head
from agentfleet.errors import AgentFleetError, OperationRefused

Describe = Callable[[int, str], Answer]
_WRITE_TIMEOUT = 30.0
_DISCARD_TIMEOUT = 1.0
_JOIN_TIMEOUT = 5.0


class Application(Protocol):
    """What requests mean. Called in the server's loop."""

    def admit(self, head: Head) -> Answer | None:
        """Judge a request by its head alone, before its body is read: an answer refuses it."""
        ...

    async def handle(self, head: Head, body: bytes, gone: asyncio.Future[None]) -> Answer | None:
        """Answer an admitted request; `gone` is done when the client has left. None closes the connection."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `OperationRefused` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise OperationRefused(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def address_of(sock: socket.socket) -> str:
    """host:port that the socket listens on."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server:
    """Serves one socket in one thread until `stop`.

    Args:
        settings: Limits and timeouts.
        sock: Listening socket; the server owns it from here.
        describe: Makes an answer of a status and a message.
        max_connections: More than these are told 503 and closed.
    """

    api: Application
    """Set before `start`."""

    def __init__(self, settings: Settings, sock: socket.socket, *, describe: Describe, max_connections: int) -> None:
        self.loop = asyncio.new_event_loop()
        self._settings = settings
        self._sock = sock
        self._describe = describe
        self._max = max_connections
        self._connections: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._exchanges = 0
        self._calm = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="agentfleet-agent", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def post(self, call: Callable[[], object]) -> bool:
        """Run `call` in the server's loop, from any thread or signal handler; False when the server has ended."""
        try:
            self.loop.call_soon_threadsafe(call)
        except RuntimeError:
            return False  # the loop is closed: the agent has ended and nobody is left to tell
        return True

    def stop(self) -> None:
        """Close every connection and end the thread; returns when it has ended.

        Raises:
            AgentFleetError: The thread did not end in time, which only a bug can cause.
        """
        self.post(self._stop.set)
        self._thread.join(_JOIN_TIMEOUT)
        if self._thread.is_alive():
            raise AgentFleetError(f"the agent's server thread did not end within {_JOIN_TIMEOUT:g} s")

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._serve())
        finally:
            self.loop.close()

    async def _serve(self) -> None:
        def connected() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(Reader(self.loop), self._accept, loop=self.loop)

        listener = await self.loop.create_server(connected, sock=self._sock)
        await self._stop.wait()
        listener.close()
        # everything in this loop is a connection, or the drain that waits on them
        rest = asyncio.all_tasks(self.loop) - {asyncio.current_task(self.loop)}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=1.0)
        await asyncio.sleep(0)  # transports close their sockets one turn after they were told to

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, Reader)
        task = self.loop.create_task(self._converse(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _converse(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # so that `drain` returns when the kernel has all of it
        try:
            if len(self._connections) > self._max:
                await self._write(writer, self._describe(503, "too many connections"), keep_alive=False)
                return
            timeout = self._settings.head_timeout
            while await self._exchange(reader, writer, timeout):
                timeout = self._settings.idle_timeout
        except (ConnectionError, TimeoutError):
            pass  # the client left or stopped reading; its task goes on, and its result is kept
        finally:
            writer.close()
            if self._stop.is_set():
                writer.transport.abort()

    async def _exchange(self, reader: Reader, writer: asyncio.StreamWriter, timeout: float) -> bool:
        """One request and its answer; whether the connection stays open."""
        refusal: Answer | None = None
        try:
            head = await read_head(reader, timeout)
            if head is None:
                return False
            self._exchanges += 1
            try:
                refusal = self.api.admit(head)
                if refusal is None:
                    return await self._respond(head, reader, writer)
                # a body that was not read, announced or not, makes the connection useless for another request
                keep = head.keep_alive and (head.length == 0 or (head.length is None and head.method == "GET"))
                await self._write(writer, refusal, keep_alive=keep)
            finally:
                self._exchanges -= 1
                self._calm.set()
        except BadRequest as error:
            keep = False
            await self._write(writer, self._describe(error.status, str(error)), keep_alive=False)
        return keep or await self._discard(reader, writer)

    async def _respond(self, head: Head, reader: Reader, writer: asyncio.StreamWriter) -> bool:
        if head.length and head.headers.get("expect", "").lower() == "100-continue":
            writer.write(CONTINUE)
        body = await read_body(reader, head.length or 0, self._settings.body_timeout)
        answer = await self.api.handle(head, body, reader.gone)
        if answer is None:
            return False
        keep = head.keep_alive and not reader.gone.done()
        await self._write(writer, answer, keep_alive=keep)
        if answer.sent is not None and not writer.is_closing():
            answer.sent()
        return keep

    async def quiet(self) -> None:
        """Wait until no request is being answered."""
        while self._exchanges:
            self._calm.clear()
            await self._calm.wait()

    async def _write(self, writer: asyncio.StreamWriter, answer: Answer, *, keep_alive: bool) -> None:
        writer.write(answer.encode(keep_alive=keep_alive))
        async with asyncio.timeout(_WRITE_TIMEOUT):
            await writer.drain()

    async def _discard(self, reader: Reader, writer: asyncio.StreamWriter) -> bool:
        """Read away what a refused client still sends: closing at once would reset the answer off the wire."""
        writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT):
                left = 4 * self._settings.max_body
                while left > 0 and (data := await reader.read(65_536)):
                    left -= len(data)
        return False
