"""Receiving on a socket, once for each answer: what is asked most often is to cost least.

To have an event loop look at a socket and look away again costs more than all else about a probe. On asyncio the loop
therefore looks at a kept socket all the time, as it does for its own streams; on trio, which has no such means, it is
asked each time.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

import anyio

_LARGEST = 65_536


class Inbox(Protocol):
    """What arrives at one socket. One task at a time receives."""

    async def receive(self) -> bytes:
        """What has arrived, at least a byte; nothing at the end of the stream. Raises `OSError`."""
        ...

    def break_off(self) -> None:
        """Let the task that receives now, if any, end with `anyio.ClosedResourceError`."""
        ...

    def close(self) -> None:
        """Look at the socket no more, and close it."""
        ...


def inbox(sock: socket.socket) -> Inbox:
    """The one for the event loop that runs here."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return _Asking(sock) if task is None else _Watching(sock, task.get_loop())


class _Asking:
    """On any event loop that anyio knows."""

    __slots__ = ("_sock",)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def receive(self) -> bytes:
        while True:
            await anyio.wait_readable(self._sock)
            try:
                return self._sock.recv(_LARGEST)
            except BlockingIOError:
                continue  # readiness is a hint

    def break_off(self) -> None:
        anyio.notify_closing(self._sock)

    def close(self) -> None:
        self._sock.close()


class _Watching:
    """On asyncio. What comes while nobody receives stays in the socket, and the loop looks away until somebody does."""

    __slots__ = ("_loop", "_receiver", "_sock", "_watched")

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._receiver: asyncio.Future[bytes] | None = None
        self._watched = False

    async def receive(self) -> bytes:
        self._receiver = self._loop.create_future()
        if not self._watched:
            self._loop.add_reader(self._sock, self._arrived)
            self._watched = True
        try:
            return await self._receiver
        finally:
            self._receiver = None

    def _arrived(self) -> None:
        receiver = self._receiver
        if receiver is None or receiver.done():
            self._look_away()
            return
        try:
            receiver.set_result(self._sock.recv(_LARGEST))
        except BlockingIOError:
            return  # readiness is a hint
        except OSError as error:
            receiver.set_exception(error)

    def _look_away(self) -> None:
        if self._watched and not self._loop.is_closed():
            self._loop.remove_reader(self._sock)
        self._watched = False

    def break_off(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_exception(anyio.ClosedResourceError())

    def close(self) -> None:
        self._look_away()
        self._sock.close()
