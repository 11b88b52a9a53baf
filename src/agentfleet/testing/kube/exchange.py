"""One client's conversation with an API server through the proxy: requests one after the other, with their faults."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from anyio.abc import ByteStream

from agentfleet.testing.kube.proxyfaults import (
    Answer,
    EventFault,
    Fault,
    Injection,
    NoAnswer,
    Reset,
    SlowBody,
    TruncatedBody,
)
from agentfleet.testing.kube.proxywire import Broken, Head, Peer

_KEPT = 100_000  # requests that the log keeps
_WATCH = re.compile(r"[?&]watch=(1|true)(&|$)")


class CutHere(Exception):
    """The client's connection is to be reset."""


class Rules:
    """The faults that wait for their requests, and the requests that came."""

    def __init__(self) -> None:
        self._injections: list[Injection] = []
        self.requests: list[tuple[str, str]] = []

    def add(self, injection: Injection) -> Injection:
        """A further fault; the oldest that matches strikes."""
        self._injections = [*(each for each in self._injections if not each.spent), injection]
        return injection

    def clear(self) -> None:
        """Take all back."""
        for each in self._injections:
            each.cancel()
        self._injections.clear()

    def seen(self, method: str, target: str) -> None:
        """Note a request."""
        if len(self.requests) >= _KEPT:
            del self.requests[: _KEPT // 2]
        self.requests.append((method, target))

    def request(self, method: str, target: str) -> Fault | None:
        """What is to befall a request."""
        for each in self._injections:
            if not isinstance(each.fault, EventFault) and each.wants(method, target) and each.strike():
                return each.fault
        return None

    def event(self, target: str, line: bytes) -> EventFault | None:
        """What is to befall an event of a watch."""
        for each in self._injections:
            fault = each.fault
            if isinstance(fault, EventFault) and each.wants("GET", target) and _concerns(fault, line) and each.strike():
                return fault
        return None


def _concerns(fault: EventFault, line: bytes) -> bool:
    return b'"type":"BOOKMARK"' not in line[:40] and re.search(fault.matching.encode(), line) is not None


class Exchange:
    """Reads requests of one client, asks the server, and answers."""

    def __init__(self, client: ByteStream, connect: Callable[[], Awaitable[ByteStream]], rules: Rules) -> None:
        self._client = Peer(client)
        self._connect = connect
        self._rules = rules
        self._server: Peer | None = None

    async def run(self) -> None:
        """Until the client leaves.

        Raises:
            CutHere: The client's connection is to be reset.
        """
        try:
            while (head := await self._client.head()) is not None:
                parts = head.first.split(" ")
                if len(parts) != 3:
                    raise Broken
                method, target, _ = parts
                body = b"".join([piece async for piece in self._client.body(head, of_response=False)])
                self._rules.seen(method, target)
                await self._one(method, target, head, body)
        finally:
            if self._server is not None:
                with anyio.CancelScope(shield=True):
                    await anyio.aclose_forcefully(self._server.stream)

    async def _one(self, method: str, target: str, head: Head, body: bytes) -> None:
        match self._rules.request(method, target):
            case Answer() as fault:
                if fault.done:
                    await self._carry_out(method, head, body)
                await self._answer(fault)
            case NoAnswer() as fault:
                if fault.done:
                    await self._carry_out(method, head, body)
                await self._until_client_leaves()
            case Reset() as fault:
                if fault.done:
                    await self._carry_out(method, head, body)
                raise CutHere
            case fault:
                answer, pieces = await self._ask(method, head, body)
                await self._relay(
                    answer, self._faulty(pieces, fault, target), whole=not isinstance(fault, TruncatedBody)
                )

    # ------------------------------------------------------------------------------------------------ the server

    async def _ask(self, method: str, head: Head, body: bytes) -> tuple[Head, AsyncIterator[bytes]]:
        if self._server is None:
            self._server = Peer(await self._connect())
        framed = tuple(
            each for each in head.lines if not each.lower().startswith(("transfer-encoding", "content-length"))
        )
        if body or method in {"POST", "PUT", "PATCH"}:
            framed += (f"Content-Length: {len(body)}",)
        await self._server.stream.send(Head(head.first, framed).encode() + body)
        answer = await self._server.head()
        if answer is None:
            raise CutHere  # the server has left: so does the proxy
        bodiless = method == "HEAD" or answer.first.split(" ")[1] in {"204", "304"}
        return answer, _nothing() if bodiless else self._server.body(answer, of_response=True)

    async def _carry_out(self, method: str, head: Head, body: bytes) -> None:
        _, pieces = await self._ask(method, head, body)
        async for _ in pieces:
            pass

    # ------------------------------------------------------------------------------------------------ the client

    async def _answer(self, fault: Answer) -> None:
        lines = [f"{name}: {value}" for name, value in fault.headers.items()]
        head = Head(f"HTTP/1.1 {fault.status} Injected", (*lines, f"Content-Length: {len(fault.body)}"))
        await self._client.stream.send(head.encode() + fault.body)

    async def _until_client_leaves(self) -> None:
        while await self._client.fill():
            pass
        raise Broken

    async def _relay(self, head: Head, pieces: AsyncIterator[bytes], *, whole: bool) -> None:
        """Send an answer on; stop asking when the client leaves meanwhile."""
        chunked = "chunked" in head.get("transfer-encoding").lower()
        left = False

        async def watch_client() -> None:
            nonlocal left
            while await self._client.fill():
                pass
            left = True
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_client)
            await self._client.stream.send(head.encode())
            async for piece in pieces:
                await self._client.stream.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if chunked else piece)
            if chunked and whole:
                await self._client.stream.send(b"0\r\n\r\n")
            tasks.cancel_scope.cancel()
        if left or not whole or not (chunked or head.get("content-length") or _bodiless(head)):
            raise Broken

    # ------------------------------------------------------------------------------------------------ bodies

    async def _faulty(self, pieces: AsyncIterator[bytes], fault: Any, target: str) -> AsyncIterator[bytes]:
        if _WATCH.search(target):
            pieces = self._events(pieces, target)
        left = fault.size if isinstance(fault, TruncatedBody) else None
        async for piece in pieces:
            if isinstance(fault, SlowBody):
                for start in range(0, len(piece), fault.size):
                    await anyio.sleep(fault.pause)
                    yield piece[start : start + fault.size]
            elif left is not None:
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return
            else:
                yield piece

    async def _events(self, pieces: AsyncIterator[bytes], target: str) -> AsyncIterator[bytes]:
        """The lines of a watch, with what is to befall them."""
        rest, held = b"", b""
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                fault = self._rules.event(target, line)
                kind = None if fault is None else fault.kind
                if fault is not None and kind == "replace":
                    yield fault.replacement + b"\n"
                elif kind == "swap" and not held:
                    held = line + b"\n"
                    continue
                elif kind == "duplicate":
                    yield line + b"\n" + line + b"\n"
                elif kind != "drop":
                    yield line + b"\n"
                if held:
                    yield held
                    held = b""
        if held or rest:
            yield held + rest


def _bodiless(head: Head) -> bool:
    return head.first.split(" ")[1] in {"204", "304"}


async def _nothing() -> AsyncIterator[bytes]:
    pieces: tuple[bytes, ...] = ()
    for piece in pieces:
        yield piece
