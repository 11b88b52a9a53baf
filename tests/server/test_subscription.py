"""The agent's own client against a real server: it ends where the server is, and comes back without a herd."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

pytest.importorskip("uvicorn")

import anyio.lowlevel
from tests.server.serving import KEY, WHY, site, until

from agentfleet import ConfigStore, SpecError
from agentfleet.agent import subscribe
from agentfleet.agent.fetch import Target
from agentfleet.agent.subscribe import Subscription
from agentfleet.server.config import Refusal
from agentfleet.stores.acks import MemoryAcks
from agentfleet.stores.config_memory import MemoryConfig

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def anyio_backend() -> str:
    """The agent's side runs on asyncio."""
    return "asyncio"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients come back soon."""
    monkeypatch.setattr(subscribe, "RETRY", (0.05, 0.1))
    monkeypatch.setattr("agentfleet.delivery._SHORTEST", 0.05)


@dataclass
class Client:
    """One agent: what it was offered, and what it makes of it."""

    subscription: Subscription
    running: int = 0
    document: Mapping[str, Any] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)
    answers: dict[int, tuple[int, str]] = field(default_factory=dict)
    """What it says to a revision; else it accepts it, if it is newer."""
    warnings: list[str] = field(default_factory=list)

    async def offer(self, revision: int, document: Mapping[str, Any]) -> tuple[int, str]:
        self.offered.append(revision)
        if revision in self.answers:
            return self.answers[revision]
        if revision < self.running:
            return 409, "not newer"
        self.running, self.document = revision, document
        return 200, ""

    async def has(self, revision: int) -> None:
        await until(lambda: self.running >= revision)


@asynccontextmanager
async def subscribed(url: str, instance: str = "a", **options: Any) -> AsyncIterator[Client]:
    """An agent that subscribes."""
    client: Client

    async def offer(revision: int, document: Mapping[str, Any]) -> tuple[int, str]:
        return await client.offer(revision, document)

    client = Client(
        Subscription(
            url,
            instance,
            offer=offer,
            running=lambda: client.running,
            warn=lambda text: client.warnings.append(text),  # noqa: PLW0108 - the client is not there yet
            rng=random.Random(instance),
            **options,
        )
    )
    task = asyncio.create_task(client.subscription.run())
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_it_runs_what_is_published_and_says_so(quick: None) -> None:
    async with site() as made:
        await made.put(n=1)
        async with subscribed(made.url) as client:
            await client.has(1)
            await made.said("a", 1)
            for number in range(2, 5):
                await made.put(n=number)
                await client.has(number)
            assert (client.document, client.offered) == ({"n": 4}, [1, 2, 3, 4])
            await made.said("a", 4)


async def test_it_asks_now_and_then_where_it_is_told_to(quick: None) -> None:
    async with site() as made, subscribed(made.url, poll=0.05) as client:
        await until(lambda: client.subscription.connected)
        await made.put(n=1)
        await client.has(1)
        await made.put(n=2)
        await client.has(2)
        assert (await made.said("a", 2)).via == "poll"
        assert client.offered == [1, 2]
        assert not client.warnings


async def test_what_it_refuses_is_known_and_not_sent_again(quick: None) -> None:
    async with site() as made:
        await made.put(n=1)
        async with subscribed(made.url) as client:
            await client.has(1)
            client.answers[2] = (422, "no such model")
            await made.put(n=2)
            assert (await made.said("a", 1, 2)).why == "no such model"
            made.delivery._streams["a"].cut()
            await until(lambda: not client.subscription.connected)
            await until(lambda: client.subscription.connected)
            await made.put(n=3)
            await client.has(3)
            assert client.offered == [1, 2, 3]
            await made.said("a", 3)


@pytest.mark.parametrize(("poll", "head"), [(None, b"Last-Event-ID: 7"), (0.05, b'If-None-Match: "7"')])
async def test_what_it_refuses_is_said_where_it_asks(poll: float | None, head: bytes, quick: None) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # at the end it goes while it asks
            heads.append(await reader.readuntil(b"\r\n\r\n"))
        body = b'{"revision": 7, "document": {}}'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(body) + 30))
        writer.write(b"event: config\ndata: %b\n\n" % body if poll is None else body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with subscribed(f"http://{host}:{port}/api/v1/clusters/{KEY}", poll=poll) as client:
        client.running, client.answers[7] = 6, (422, "not with me")
        if poll is not None:
            client.subscription._take("", b'{"revision": 7, "document": {}}')
        await until(lambda: any(head in each for each in heads))
    server.close()
    assert b"running=6&refused=0 " in heads[0]
    assert all(b"running=6&refused=7 " in each for each in heads if head in each)


async def test_what_it_could_not_judge_is_offered_again(quick: None) -> None:
    async with site() as made, subscribed(made.url) as client:
        client.answers[1] = (504, "on_config did not return")
        await made.put(n=1)
        await until(lambda: len(client.offered) > 1)
        assert made.delivery.book.known["a"].answered == 0, "that is no refusal"
        client.answers.clear()
        await client.has(1)
        await made.said("a", 1)


async def test_it_comes_back_when_the_server_does_and_never_goes_back(quick: None) -> None:
    """The server is gone and another one is there, which knows less: what runs goes on until there is news."""
    records, acks = MemoryConfig(), MemoryAcks()
    async with site(ConfigStore(records), acks) as made:
        for number in range(1, 6):
            await made.put(n=number)
        port = int(made.address.rsplit(":", 1)[1])
        other = asyncio.create_task(anyio.lowlevel.checkpoint())
        await other
        async with subscribed(made.url) as client:
            await client.has(5)
            made.delivery._streams["a"].end()
            await until(lambda: client.subscription.connected)
    async with subscribed(f"http://127.0.0.1:{port}/api/v1/clusters/{KEY}") as client:
        client.running = 5
        await until(lambda: bool(client.warnings))
        assert "ConnectionRefused" in client.warnings[0]
        older = ConfigStore()
        await older.put(KEY, {"n": "old"}, **WHY)
        async with site(older, acks, port=port) as made:
            await made.said("a", 5)
            for number in range(2, 6):
                await older.put(KEY, {"n": number}, **WHY)
            assert (client.running, client.offered) == (5, [])
            await older.put(KEY, {"n": "new"}, **WHY)
            await client.has(6)
            assert client.document == {"n": "new"}


async def test_a_stream_that_falls_silent_is_given_up(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribe, "SILENCE", 0.2)
    monkeypatch.setattr("agentfleet.delivery.BEAT", 3600.0)
    async with site() as made, subscribed(made.url) as client:
        await until(lambda: client.subscription.connected)
        await until(lambda: any("TimeoutError" in each for each in client.warnings))
        await made.put(n=1)
        await client.has(1)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nid: 1XX",
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n27\r\nevent: config\ndata: {"revision":"x"}\n\n\n\n\r\n',
        b"x" * 20_000,
    ],
    ids=[
        "nothing",
        "half a head",
        "another protocol",
        "a proxy",
        "no chunk",
        "a broken chunk",
        "no revision",
        "endless",
    ],
)
async def test_whatever_answers_it_goes_on(answer: bytes, quick: None) -> None:
    """A server that talks nonsense is tried again; what is in force stays."""
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with subscribed(f"http://{host}:{port}/api/v1/clusters/{KEY}") as client:
        client.running = 3
        await until(lambda: calls >= 3)
        assert (client.running, client.offered) == (3, [])
        assert 1 <= len(client.warnings) <= 3, "the same trouble is told once"
    server.close()
    await server.wait_closed()


async def test_its_token_is_read_anew_for_each_connection(quick: None) -> None:
    tokens = iter(["old", "old", *["new"] * 1000])

    async def authorize(scope: Any, _cluster: str, _instance: str) -> None:
        if dict(scope["headers"]).get(b"authorization") != b"Bearer new":
            raise Refusal(401, "expired")

    async with site(authorize=authorize) as made:
        await made.put(n=1)
        async with subscribed(made.url, token=lambda: next(tokens)) as client:
            await client.has(1)
            assert "401" in client.warnings[0]


async def test_a_token_that_cannot_be_sent_does_no_harm(quick: None) -> None:
    async with site() as made, subscribed(made.url, token=lambda: "a\r\nX-Evil: 1") as client:
        await until(lambda: bool(client.warnings))
        assert "cannot carry" in client.warnings[0]


@pytest.mark.parametrize(
    "url", ["", "manager:8080", "ftp://m/x", "http:///x", "http://m:x/", "http://u:p@m/", "http://m/?a=1"]
)
def test_addresses_that_are_none_are_refused(url: str) -> None:
    async def offer(_revision: int, _document: Mapping[str, Any]) -> tuple[int, str]:
        return 200, ""

    with pytest.raises(SpecError, match="AGENTFLEET_CONFIG_URL"):
        Subscription(url, "a", offer=offer, running=lambda: 0)


# ------------------------------------------------------------------------------------------------ many of them


async def test_a_hundred_all_have_it_after_the_server_was_gone(quick: None) -> None:
    """Streams, refusals, a trial and an outage: each ends where it is to be, and the store knows who runs what."""
    records, acks, count = MemoryConfig(), MemoryAcks(), 100
    async with anyio.create_task_group() as tasks, _many(count) as clients:
        async with site(ConfigStore(records), acks) as made:
            port = int(made.address.rsplit(":", 1)[1])
            await made.put(n=1)
            for client in clients.values():
                tasks.start_soon(client.run, made.url)
            await until(lambda: all(client.running == 1 for client in clients.values()))
        await until(lambda: not any(client.subscription.connected for client in clients.values()))
        store = ConfigStore(records)
        await store.put(KEY, {"n": 2}, **WHY)
        async with site(store, acks, port=port) as made:
            await until(lambda: all(client.running == 2 for client in clients.values()))
            for name in clients:
                await made.said(name, 2)
            assert all(client.offered == [1, 2] for client in clients.values())
        tasks.cancel_scope.cancel()


class Runner(Client):
    """A client that is started by hand."""

    async def run(self, url: str) -> None:
        self.subscription._target = Target.of(url)
        await self.subscription.run()


@asynccontextmanager
async def _many(count: int) -> AsyncIterator[dict[str, Runner]]:
    clients: dict[str, Runner] = {}
    for number in range(count):
        name = f"a-{number}"

        async def offer(revision: int, document: Mapping[str, Any], name: str = name) -> tuple[int, str]:
            return await clients[name].offer(revision, document)

        clients[name] = Runner(
            Subscription(
                "http://127.0.0.1:1",
                name,
                offer=offer,
                running=lambda name=name: clients[name].running,  # type: ignore[misc]
                rng=random.Random(number),
            )
        )
    yield clients


def test_returns_are_spread_evenly() -> None:
    """Of a thousand who are cut off together no tenth of the span sees twice its share; and none waits longer."""

    async def offer(_revision: int, _document: Mapping[str, Any]) -> tuple[int, str]:
        return 200, ""

    clients = [
        Subscription("http://m/", f"a-{n}", offer=offer, running=lambda: 0, rng=random.Random(n)) for n in range(1000)
    ]
    for client in clients:
        client._spread = 4.0  # as a server with a thousand streams asks for
    for attempt in (0, 1, 5):
        pauses = [client.pause(attempt) for client in clients]
        assert 0 <= min(pauses) < 0.1
        assert 3.9 < max(pauses) <= 4.0
        tenths = [sum(1 for pause in pauses if tenth <= pause / 0.4 < tenth + 1) for tenth in range(10)]
        assert max(tenths) < 2 * 100
    alone = clients[0]
    alone._spread = 1.0
    assert max(alone.pause(0) for _ in range(100)) <= 1.0
    assert max(alone.pause(9) for _ in range(100)) <= subscribe.RETRY[1]
