"""The HTTP client against servers on loopback sockets, well-behaved and not."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketStream
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.errors import AgentFleetError, DeadlineExceeded, SpecError
from agentfleet.signals import wire
from agentfleet.signals.http import HttpClient, HttpError, Response, connect_check

pytestmark = pytest.mark.anyio

Serving = Callable[[Callable[[SocketStream], object]], AbstractAsyncContextManager[str]]
LONG = 30.0  # a deadline that no test is meant to reach


async def read_request(stream: SocketStream) -> bytes:
    """One request with its body, b"" once the client has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            data += await stream.receive()
        except anyio.EndOfStream:
            return b""
    head, _, body = data.partition(b"\r\n\r\n")
    size = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            size = int(line.split(b":")[1])
    while len(body) < size:
        body += await stream.receive()
    return head + b"\r\n\r\n" + body


def answer(body: bytes = b"ok", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def once(data: bytes) -> Callable[[SocketStream], object]:
    """A server that reads one request, sends `data` and closes."""

    async def handler(stream: SocketStream) -> None:
        await read_request(stream)
        await stream.send(data)

    return handler


@asynccontextmanager
async def closed_port() -> AsyncIterator[str]:
    """An address that refuses: bound, so that nobody else gets it, and not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


async def get(address: str, path: str = "/", timeout: float = LONG, **options: int) -> Response:
    async with HttpClient(**options) as client:
        return await client.request("GET", address, path, timeout=timeout)


# ------------------------------------------------------------------------------------------------ well-behaved


async def test_requests_reuse_one_connection(serving: Serving) -> None:
    connections: list[list[bytes]] = []

    async def handler(stream: SocketStream) -> None:
        seen: list[bytes] = []
        connections.append(seen)
        while request := await read_request(stream):
            seen.append(request)
            await stream.send(answer(b"%d" % len(seen), **{"X-Twice": "a", "x-twice": "b"}))

    async with serving(handler) as address, HttpClient() as client:
        first = await client.request("GET", address, "/health?x=1", headers={"Accept": "a/b"}, timeout=LONG)
        second = await client.request("POST", address, "/task", body=b"work", timeout=LONG)
        assert client.idle == 1
    assert first == Response(200, {"content-length": "1", "x-twice": "a, b"}, b"1")
    assert second.body == b"2"
    host = address.encode()
    assert connections == [
        [
            b"GET /health?x=1 HTTP/1.1\r\nHost: " + host + b"\r\nAccept: a/b\r\n\r\n",
            b"POST /task HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 4\r\n\r\nwork",
        ]
    ]


@pytest.mark.parametrize(
    ("wired", "status", "body"),
    [
        (answer(b"x" * 300_000), 200, b"x" * 300_000),
        (answer(b"", "204 No Content"), 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 2, 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil close", 200, b"until close"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\n" + answer(b"late"), 200, b"late"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, b""),
        (
            b"HTTP/1.1 500 No\r\nTransfer-Encoding: Chunked\r\n\r\n4;e\r\nWiki\r\nA\r\npedia in\r\n\r\n0\r\nT:\r\n\r\n",
            500,
            b"Wikipedia in\r\n",
        ),
    ],
)
async def test_framings(serving: Serving, wired: bytes, status: int, body: bytes) -> None:
    async with serving(once(wired)) as address:
        response = await get(address)
    assert (response.status, response.body) == (status, body)


async def test_an_answer_may_arrive_byte_by_byte(serving: Serving) -> None:
    wired = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    async def handler(stream: SocketStream) -> None:
        while await read_request(stream):
            for byte in wired:
                await stream.send(bytes([byte]))
                await anyio.lowlevel.checkpoint()

    async with serving(handler) as address, HttpClient() as client:
        for _ in range(2):
            assert (await client.request("GET", address, "/", timeout=LONG)).body == b"abcde"
        assert client.idle == 1


async def test_head_has_no_body(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        while await read_request(stream):
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")

    async with serving(handler) as address, HttpClient() as client:
        for _ in range(2):
            assert (await client.request("HEAD", address, "/", timeout=LONG)).body == b""


async def test_a_large_request_is_sent_whole(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        while request := await read_request(stream):
            await stream.send(answer(b"%d" % len(request.partition(b"\r\n\r\n")[2])))

    async with serving(handler) as address, HttpClient() as client:
        response = await client.request("PUT", address, "/", body=b"x" * 3_000_000, timeout=LONG)
    assert response.body == b"3000000"


async def test_the_answer_to_a_request_that_was_not_read_is_kept(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        await stream.receive(100)
        await stream.send(answer(b"busy", "503 Busy", Connection="close"))
        await stream.send_eof()
        while await stream.receive():
            pass

    async with serving(handler) as address, HttpClient() as client:
        response = await client.request("POST", address, "/", body=b"x" * 1_000_000, timeout=LONG)
    assert (response.status, response.body) == (503, b"busy")


# ------------------------------------------------------------------------------------------------ keep-alive


async def test_connections_that_may_not_be_kept_are_closed(serving: Serving) -> None:
    for wired in (
        answer(b"a", Connection="close"),
        answer(b"a") + b"surplus",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    ):
        async with serving(once(wired)) as address, HttpClient() as client:
            assert (await client.request("GET", address, "/", timeout=LONG)).body == b"a"
            assert client.idle == 0


async def test_a_connection_closed_while_idle_is_replaced(serving: Serving) -> None:
    closed = anyio.Event()
    count = 0

    async def handler(stream: SocketStream) -> None:
        nonlocal count
        count += 1
        await read_request(stream)
        await stream.send(answer())
        if count == 1:
            await stream.aclose()
            closed.set()
        else:
            await read_request(stream)

    async with serving(handler) as address, HttpClient() as client:
        await client.request("GET", address, "/", timeout=LONG)
        await closed.wait()
        assert (await client.request("POST", address, "/", timeout=LONG)).status == 200
    assert count == 2


@pytest.mark.parametrize(("method", "retried"), [("GET", True), ("PUT", True), ("DELETE", True), ("POST", False)])
async def test_only_idempotent_requests_are_repeated(serving: Serving, method: str, retried: bool) -> None:
    requests = 0

    async def handler(stream: SocketStream) -> None:
        nonlocal requests
        while await read_request(stream):
            requests += 1
            if requests == 2:
                return  # read on the kept connection, then closed without an answer
            await stream.send(answer())

    async with serving(handler) as address, HttpClient() as client:
        await client.request("GET", address, "/", timeout=LONG)
        if retried:
            assert (await client.request(method, address, "/", timeout=LONG)).status == 200
        else:
            with pytest.raises(HttpError, match="closed the kept connection") as caught:
                await client.request(method, address, "/", timeout=LONG)
            assert caught.value.sent
    assert requests == (3 if retried else 2)


async def test_no_repetition_once_an_answer_has_begun(serving: Serving) -> None:
    requests = 0

    async def handler(stream: SocketStream) -> None:
        nonlocal requests
        while await read_request(stream):
            requests += 1
            if requests == 2:
                await stream.send(b"H")
                return
            await stream.send(answer())

    async with serving(handler) as address, HttpClient() as client:
        await client.request("GET", address, "/", timeout=LONG)
        with pytest.raises(HttpError, match="middle of a header"):
            await client.request("GET", address, "/", timeout=LONG)
    assert requests == 2


@pytest.mark.parametrize(
    ("limits", "kept"),
    [({"max_idle_per_address": 2}, 4), ({"max_idle": 3, "max_idle_per_address": 9}, 3), ({"max_idle": 0}, 0)],
)
async def test_idle_connections_are_bounded(serving: Serving, limits: dict[str, int], kept: int) -> None:
    together = anyio.Event()
    waiting = 0

    async def handler(stream: SocketStream) -> None:
        nonlocal waiting
        while await read_request(stream):
            waiting += 1
            if waiting == 6:
                together.set()
            await together.wait()
            await stream.send(answer())

    async def ask(client: HttpClient, address: str) -> None:
        await client.request("GET", address, "/", timeout=LONG)

    async with serving(handler) as one, serving(handler) as two, HttpClient(**limits) as client:
        async with anyio.create_task_group() as group:
            for address in (one, two) * 3:
                group.start_soon(ask, client, address)
        assert client.idle == kept


async def test_a_long_idle_connection_makes_room(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        while await read_request(stream):
            await stream.send(answer())

    async with (
        serving(handler) as one,
        serving(handler) as two,
        HttpClient(max_idle=1, idle_timeout=0) as client,
    ):
        for address in (one, two, one):
            await client.request("GET", address, "/", timeout=LONG)
            assert list(client._idle) == [address]


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("wired", "message"),
    [
        (b"", "closed without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "middle of a header"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "7 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "3 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde", "2 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n", "longer than its size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", "malformed chunk size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000, "a chunk size of more than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 20_000, "trailer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "other than chunked"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nab", "content length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nab", "content length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "body of more than"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2_000_000, "body of more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10001\r\n\r\n" + b"x" * 10_001, "body of more than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", "body of more than"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "malformed header"),
        (b"HTTP/1.1 200 OK\r\nspace : x\r\n\r\n", "malformed header"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", "a header of more than 65536"),
        (b"HTTP/1.1 999 OK\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/2 200 OK\r\n\r\n", "does not speak HTTP"),
        (b"SSH-2.0-OpenSSH_9.0\r\n\r\n", "does not speak HTTP"),
        (bytes(range(256)) * 10 + b"\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "switched protocols"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 40, "no final one"),
    ],
)
async def test_broken_answers_are_errors(serving: Serving, wired: bytes, message: str) -> None:
    async with serving(once(wired)) as address:
        with pytest.raises(HttpError, match=message) as caught:
            await get(address, max_body=10_000)
    assert caught.value.sent
    assert isinstance(caught.value, AgentFleetError)


async def test_refused() -> None:
    async with closed_port() as address:
        with pytest.raises(HttpError, match=f"cannot connect to {address}: Connection refused") as caught:
            await get(address)
        assert not caught.value.sent
        with pytest.raises(HttpError, match="refused"):
            await connect_check(address, LONG)


async def test_unresolvable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nowhere(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(anyio, "getaddrinfo", nowhere)
    with pytest.raises(HttpError, match="does not resolve: Name or service not known") as caught:
        await get("agent.invalid:80")
    assert not caught.value.sent


async def test_names_resolve(serving: Serving) -> None:
    async with serving(once(answer())) as address:
        assert (await get(address.replace("127.0.0.1", "localhost"))).status == 200


async def test_a_silent_peer_ends_at_the_deadline(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        await stream.receive()
        await anyio.sleep_forever()

    async with serving(handler) as address:
        with pytest.raises(DeadlineExceeded, match=r"GET /health of .* not answered within 0\.05 s"):
            await get(address, "/health", timeout=0.05)


async def test_a_trickling_peer_ends_at_the_deadline(serving: Serving) -> None:
    async def handler(stream: SocketStream) -> None:
        await stream.receive()
        await stream.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send(b"x")

    async with serving(handler) as address:
        with pytest.raises(DeadlineExceeded):
            await get(address, timeout=0.1)


async def test_tcp_check(serving: Serving) -> None:
    accepted = anyio.Event()

    async def handler(stream: SocketStream) -> None:
        accepted.set()

    async with serving(handler) as address:
        await connect_check(address, LONG)
        await accepted.wait()


@pytest.mark.skipif(not Path("/proc/sys/net/ipv4/ip_local_port_range").exists(), reason="Linux only")
async def test_a_socket_connected_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    original = socket.socket.connect_ex

    def from_same_port(sock: socket.socket, target: tuple[str, int]) -> int:
        sock.bind(target)
        return original(sock, target)

    monkeypatch.setattr(socket.socket, "connect_ex", from_same_port)
    with pytest.raises(HttpError, match="refused"):
        await connect_check(f"127.0.0.1:{port}", LONG)


async def test_closing_ends_requests_under_way(serving: Serving) -> None:
    received = anyio.Event()

    async def handler(stream: SocketStream) -> None:
        await stream.receive()
        received.set()
        await anyio.sleep_forever()

    client = HttpClient()

    async def ask(address: str) -> None:
        with pytest.raises(HttpError, match="broke"):
            await client.request("GET", address, "/", timeout=LONG)

    async with serving(handler) as address:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, address)
            await received.wait()
            await client.aclose()
        with pytest.raises(HttpError, match="client is closed"):
            await client.request("GET", address, "/", timeout=LONG)


async def test_cancellation_closes_the_socket(serving: Serving) -> None:
    hung_up = anyio.Event()
    received = anyio.Event()

    async def handler(stream: SocketStream) -> None:
        await stream.receive()
        received.set()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        hung_up.set()

    async with serving(handler) as address, HttpClient() as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.request("GET", address, "/", timeout=LONG))
            await received.wait()
            group.cancel_scope.cancel()
        await hung_up.wait()
        assert not client._active


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:0", "host:70000", "a b:80", "h/x:80", "h:8x"])
async def test_bad_addresses_are_named(address: str) -> None:
    async with HttpClient() as client:
        with pytest.raises(SpecError, match="host:port"):
            await client.request("GET", address, "/", timeout=LONG)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GE T", "/", {}),
        ("GET", "no-slash", {}),
        ("GET", "/a b", {}),
        ("GET", "/\r\nX: y", {}),
        ("GET", "/", {"X": "a\r\nY: b"}),
        ("GET", "/", {"X\n": "a"}),
        ("GET", "/", {"X": "\u0100"}),
    ],
)
async def test_injection_is_refused(method: str, path: str, headers: Mapping[str, str]) -> None:
    async with HttpClient() as client:
        with pytest.raises(SpecError):
            await client.request(method, "127.0.0.1:1", path, headers=headers, timeout=LONG)


def test_ipv6_addresses() -> None:
    assert wire._split("[::1]:80") == (socket.AF_INET6, "::1", 80)
    assert wire._split("10.0.0.1:65535") == (socket.AF_INET, "10.0.0.1", 65535)
    assert wire._split("agent-7.fleet.svc:8000") == (None, "agent-7.fleet.svc", 8000)


@given(st.binary(max_size=400))
def test_any_header_parses_or_is_an_http_error(head: bytes) -> None:
    for data in (head, b"HTTP/1.1 200 OK\r\n" + head):
        try:
            _, status, headers = wire._parse_head(data, "a:1")
        except HttpError:
            continue
        assert 100 <= status <= 599
        assert all(name == name.lower() for name in headers)


def test_errors_are_told_in_words() -> None:
    assert wire.say(OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))) == os.strerror(errno.ECONNRESET)
    assert wire.say(anyio.ClosedResourceError()) == "ClosedResourceError"
