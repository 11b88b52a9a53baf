"""Receiving: whatever arrives, whenever it does, nothing is lost and the event loop is not kept busy."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import anyio
import pytest

from agentfleet.signals.inbox import inbox

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end, which does not block, and the peer's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_what_comes_before_and_while_somebody_receives(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    box = inbox(ours)
    theirs.send(b"early")
    assert await box.receive() == b"early"
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.lowlevel.checkpoint)
        theirs.send(b"now")
        assert await box.receive() == b"now"
    theirs.close()
    assert await box.receive() == b""
    box.close()


async def test_what_comes_while_nobody_receives_waits_in_the_socket(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    box = inbox(ours)
    theirs.send(b"first")
    assert await box.receive() == b"first"
    theirs.send(b"unasked")
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert ours.recv(100, socket.MSG_PEEK) == b"unasked"
    assert not getattr(box, "_watched", False)  # else the loop would be told of it again and again
    assert await box.receive() == b"unasked"
    box.close()


async def test_a_cancelled_receiver_takes_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    box = inbox(ours)
    with anyio.move_on_after(0):
        await box.receive()
    theirs.send(b"later")
    assert await box.receive() == b"later"
    box.close()


async def test_breaking_off_wakes_the_receiver(pair: tuple[socket.socket, socket.socket]) -> None:
    box = inbox(pair[0])

    async def receive() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await box.receive()

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        box.break_off()
        box.close()


async def test_a_reset_is_an_error() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as group:

            async def reset(stream: anyio.abc.SocketStream) -> None:
                raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                await stream.aclose()

            group.start_soon(listener.serve, reset)
            with socket.create_connection(("127.0.0.1", port)) as ours:
                ours.setblocking(False)
                box = inbox(ours)
                with pytest.raises(ConnectionResetError):
                    await box.receive()
                box.close()
            group.cancel_scope.cancel()
