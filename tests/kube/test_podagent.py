"""The agent of a fake pod: nobody stays connected to one that has ended."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from agentfleet.testing.kube import podagent
from agentfleet.testing.kube.podagent import PodAgent, Vitals


class Exhausted:
    """A listener of a process that has no descriptor left for whoever comes."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.asked = 0
        self.exhausted = True

    def accept(self) -> Any:
        self.asked += 1
        if self.exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.inner.accept()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("turns", range(8))
def test_a_connection_that_is_being_accepted_while_the_pod_ends_is_reset_too(turns: int) -> None:
    """Whatever the turn of the loop in which the pod ends: an accepted connection is made over several of them."""

    async def test() -> None:
        agent = PodAgent(Vitals())
        port = free_port()
        agent.listen("127.0.0.1", {port})
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            agent.close()
            with anyio.fail_after(5):
                try:
                    ended = await asyncio.get_running_loop().sock_recv(client, 1) == b""
                except ConnectionResetError:
                    ended = True
            assert ended

    anyio.run(test)


def test_a_process_without_descriptors_does_not_spin_and_lets_in_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(podagent, "_PAUSE", 0.2)

    async def test() -> None:
        agent, port, loop = PodAgent(Vitals()), free_port(), asyncio.get_running_loop()
        agent.listen("127.0.0.1", {port})
        poor: Any = Exhausted(agent._listening[0])
        agent._listening[:] = [poor]
        loop.add_reader(poor, agent._accept, poor)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            await anyio.sleep(0.1)
            assert poor.asked == 1, "the socket is readable all the time"
            poor.exhausted = False
            await loop.sock_sendall(client, b"GET /health HTTP/1.1\r\n\r\n")
            with anyio.fail_after(5):
                assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 200")
        poor.exhausted, asked = True, poor.asked
        with socket.create_connection(("127.0.0.1", port)):
            await anyio.sleep(0.1)
            agent.close()  # while it pauses
            await anyio.sleep(0.3)
        assert poor.asked == asked + 1

    anyio.run(test)


def test_a_connection_that_nobody_can_serve_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    async def test() -> None:
        agent, port, loop = PodAgent(Vitals()), free_port(), asyncio.get_running_loop()
        told: list[object] = []
        loop.set_exception_handler(lambda _, context: told.append(context))
        agent.listen("127.0.0.1", {port})
        monkeypatch.setattr(loop, "connect_accepted_socket", fail)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            with anyio.fail_after(5):
                assert await loop.sock_recv(client, 1) == b""
        agent.close()
        assert not told

    anyio.run(test)
