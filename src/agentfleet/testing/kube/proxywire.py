"""The proxy's connections: a client's TCP stream with faults below everything, and HTTP/1.1 framing on streams."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

_MAX_HEAD = 1 << 17


class Broken(Exception):
    """A peer left, or did not speak HTTP/1.1."""


class FaultyStream(ByteStream):
    """A client's TCP stream, whose bytes may come late or never."""

    def __init__(self, inner: SocketStream, lag: Callable[[], float]) -> None:
        self._inner = inner
        self._lag = lag
        self.dead = False
        """Swallows everything both ways, and says nothing."""

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """Receive, unless dead: then what comes is dropped, until the client leaves."""
        while True:
            data = await self._inner.receive(max_bytes)
            if (lag := self._lag()) > 0:
                await anyio.sleep(lag)
            if not self.dead:
                return data

    async def send(self, item: bytes) -> None:
        """Send, unless dead."""
        if (lag := self._lag()) > 0:
            await anyio.sleep(lag)
        if not self.dead:
            await self._inner.send(item)

    async def send_eof(self) -> None:
        """Say that nothing more comes, unless dead."""
        if not self.dead:
            await self._inner.send_eof()

    async def aclose(self) -> None:
        """Close."""
        await self._inner.aclose()

    def reset(self) -> None:
        """Make the close that follows a reset."""
        raw = self._inner.extra(SocketAttribute.raw_socket)  # noqa: S610 - anyio's, not Django's
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    @property
    def extra_attributes(self) -> Any:
        """Those of the socket."""
        return self._inner.extra_attributes


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the header lines of a message."""

    first: str
    lines: tuple[str, ...]

    def get(self, name: str) -> str:
        """A header's value; empty if there is none."""
        for line in self.lines:
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return ""

    def encode(self) -> bytes:
        """As it goes over the wire."""
        return "\r\n".join([self.first, *self.lines, "", ""]).encode("latin-1")


class Peer:
    """A stream with the bytes that came and were not read yet."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def fill(self) -> bool:
        """Receive some more; False when there is no more."""
        try:
            self._buffer += await self.stream.receive()
        except anyio.EndOfStream:
            return False
        return True

    async def head(self) -> Head | None:
        """The head of the next message; None when the peer has left between two."""
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > _MAX_HEAD:
                raise Broken
            if not await self.fill():
                if self._buffer:
                    raise Broken
                return None
        text, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        return Head(first, tuple(lines))

    async def body(self, head: Head, *, of_response: bool) -> AsyncIterator[bytes]:
        """The body's bytes without their framing, as they come."""
        if "chunked" in head.get("transfer-encoding").lower():
            while size := int((await self._line()).partition(b";")[0], 16):
                async for piece in self._exactly(size):
                    yield piece
                await self._line()
            while await self._line():
                pass  # trailers
        elif head.get("content-length"):
            async for piece in self._exactly(int(head.get("content-length"))):
                yield piece
        elif of_response:
            while self._buffer or await self.fill():
                piece, self._buffer = self._buffer, b""
                yield piece

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            if not self._buffer and not await self.fill():
                raise Broken
            piece, self._buffer = self._buffer[:size], self._buffer[size:]
            size -= len(piece)
            yield piece

    async def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            if not await self.fill():
                raise Broken
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line
