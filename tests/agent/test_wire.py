"""The agent's server against bytes that are no HTTP: it answers or closes, and goes on serving."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.helpers import DEADLINE, AgentProcess, running

from agentfleet.agent.wire import HEAD_LIMIT

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with running() as process:
        yield process


def exchange(address: str, data: bytes) -> bytes:
    """Send, say that nothing follows, and read to the end."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as client:
        received = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while more := client.recv(65_536):
                received += more
        except ConnectionError:
            pass  # closed while we were still sending: an answer of its own
        return received


_PIECES = st.sampled_from(
    [
        b"GET /health HTTP/1.1", b"POST /tasks HTTP/1.1", b"PUT /config HTTP/1.1", b"GET", b" ", b"\r\n", b"\n", b"\r",
        b"\r\n\r\n", b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 5, 5", b"content-length: 1",
        b"Transfer-Encoding: chunked", b"Host:", b": x", b"X" * 300, b"{}", b'{"id":"a"}', b"\0", b"\xff", b"HTTP/1.0",
        b"Connection: close", b"Expect: 100-continue", b"0\r\n\r\n", b"A: b\r\n c: d",
    ]
)  # fmt: skip


@given(data=st.one_of(st.binary(max_size=300), st.lists(_PIECES, max_size=12).map(b"".join)))
def test_any_bytes_are_answered_or_closed(agent: AgentProcess, data: bytes) -> None:
    answer = exchange(agent.address, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert exchange(agent.address, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /health HTTP/2\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nA: b\nB: c\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nA: b", 400),
        (b"POST /tasks HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /tasks HTTP/1.1\r\nContent-Length: +1\r\n\r\na", 400),
        (b"POST /tasks HTTP/1.1\r\nContent-Length: 9\r\n\r\na", 400),
        (b"POST /tasks HTTP/1.1\r\n\r\n", 411),
        (b"POST /tasks HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 65 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nA: " + b"x" * HEAD_LIMIT + b"\r\n\r\n", 431),
        (b"POST /tasks HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    ],
)
def test_malformed_requests_get_the_right_status(agent: AgentProcess, data: bytes, status: int) -> None:
    answer = exchange(agent.address, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in answer


def test_a_connection_serves_several_requests(agent: AgentProcess) -> None:
    head = b"GET /health HTTP/1.1\r\n"
    assert (
        exchange(agent.address, (head + b"\r\n") * 3 + head + b"Connection: close\r\n\r\n").count(b" 200 OK\r\n") >= 1
    )
    host, port = agent.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as client, client.makefile("rb") as lines:
        for _ in range(3):
            client.sendall(head + b"\r\n")
            assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
            while (line := lines.readline()) != b"\r\n":
                assert line != b"Connection: close\r\n"
            assert lines.read(11) == b'{"ok":true}'
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"Connection: close" in lines.read()


def test_a_large_body_may_ask_first(agent: AgentProcess) -> None:
    host, port = agent.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as client, client.makefile("rb") as lines:
        client.sendall(b"POST /tasks HTTP/1.1\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n")
        assert lines.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert lines.readline() == b"\r\n"
        client.sendall(b'{"id":"expect"}')
        assert lines.readline() == b"HTTP/1.1 200 OK\r\n"


def test_more_connections_than_agreed_are_told_so(agent: AgentProcess) -> None:
    host, port = agent.address.rsplit(":", 1)
    held: list[socket.socket] = []
    try:
        refused = b""
        while not refused and len(held) < 600:
            client = socket.create_connection((host, int(port)), timeout=DEADLINE)
            held.append(client)
            if len(held) > 256 + 128:
                client.settimeout(DEADLINE)
                refused = client.recv(100)
        assert refused.startswith(b"HTTP/1.1 503 ")
    finally:
        for client in held:
            client.close()
