"""The client by itself, against servers that answer what a test wants: other tries, other addresses, odd answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from agentfleet.client import FleetClient
from agentfleet.client.problems import error_of
from agentfleet.client.streaming import Frames
from agentfleet.errors import (
    AccessDenied,
    BackendRefused,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    KeyReused,
    NotFound,
    OperationRefused,
    SpecError,
)

pytestmark = pytest.mark.anyio
EMPTY: dict[str, Any] = {"items": [], "next": None}
SCALING = {"cluster_id": "1", "status": "scaling", "operation_id": "2", "target_replicas": 3}


class Fake:
    """A server that gives its answers in their order, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.url = ""
        self.tasks: set[asyncio.Task[Any]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while line := await reader.readline():
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(": ")
                    headers[name.lower()] = value
                await reader.readexactly(int(headers.get("content-length", 0)))
                self.asked.append((line.decode().rsplit(" ", 1)[0], headers))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    return  # closes without a word
                if answer == "silence":
                    await asyncio.sleep(3600)
                status, body, more = answer if len(answer) == 3 else (*answer, {})
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                told = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(data)}\r\n{told}\r\n".encode() + data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def fakes(*answers: Sequence[Any]) -> AsyncIterator[list[Fake]]:
    made, servers = [], []
    for each in answers:
        fake = Fake(*each)
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        made.append(fake)
        servers.append(server)
    try:
        yield made
    finally:
        for server in servers:
            server.close()
        tasks = [task for fake in made for task in fake.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):  # their sockets close
            await asyncio.sleep(0)


def problem(status: int, kind: str, detail: str = "no", **more: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    body = {"type": f"urn:agentfleet:problem:{kind}", "title": "t", "status": status, "detail": detail, **more}
    return status, body, {"content-type": "application/problem+json", "retry-after": "1"}


@pytest.mark.parametrize(
    "first", [[None], [problem(503, "unavailable")], [(502, b"<html>")], [problem(429, "too-many-requests")]]
)
async def test_another_manager_is_asked_once_with_the_same_key(first: list[Any]) -> None:
    async with fakes(first, [(202, SCALING)]) as (one, two), FleetClient(one.url, two.url, token="t") as client:
        assert (await client.scale("a", 3)).target_replicas == 3
        await client.scale("a", 4)
        assert len(two.asked) == 2  # it stays with the one that answers
        keys = [headers["idempotency-key"] for _, headers in (*one.asked, *two.asked)]
        assert len(set(keys[:-1])) == 1
        assert keys[-1] != keys[0]
        assert two.asked[0] == ("PUT /api/v1/clusters/a/scale", two.asked[0][1])
        assert two.asked[0][1]["authorization"] == "Bearer t"


async def test_requests_that_fail_together_are_all_asked_again_elsewhere() -> None:
    """Each goes on to the address after its own, however many others have failed at the same time."""
    for number in (2, 5, 20):
        async with fakes([None], [(202, SCALING)]) as (one, two), FleetClient(one.url, two.url) as client:
            async with anyio.create_task_group() as tasks:
                for _ in range(number):
                    tasks.start_soon(client.scale, "a", 3)
            assert len(two.asked) == number
            await client.scale("a", 3)
            assert len(two.asked) == number + 1, "it stays with the one that answers"


async def test_a_stream_that_breaks_turns_no_request_away_from_who_answers() -> None:
    happened = {"seq": 1, "at": "2026-01-01T00:00:00Z", "cluster_name": "a", "kind": "note.x"}
    frame = f"id: 1\nevent: note.x\ndata: {json.dumps(happened)}\n\n".encode()
    async with (
        fakes([(202, SCALING)], [(200, frame, {"content-type": "text/event-stream"})]) as (one, two),
        FleetClient(one.url, two.url) as client,
    ):
        one.answers = [(503, b""), (202, SCALING)]  # it cannot stream now
        with anyio.fail_after(10):
            async with aclosing(cast("Any", client.stream("a"))) as stream:
                await anext(stream)
        await client.scale("a", 3)
        assert one.asked[-1][0].startswith("PUT"), "the stream has gone on elsewhere, the requests have not"
        assert len(two.asked) == 1


async def test_a_refusal_is_not_asked_again() -> None:
    async with (
        fakes([problem(409, "refused")], [(202, SCALING)]) as (one, two),
        FleetClient(one.url, two.url) as client,
    ):
        with pytest.raises(OperationRefused):
            await client.scale("a", 3)
        assert len(two.asked) == 0


async def test_nobody_answers() -> None:
    async with fakes([None], [None]) as (one, two), FleetClient(one.url, two.url) as client:
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await client.scale("a", 3)
    async with FleetClient("http://127.0.0.1:1") as client:
        with pytest.raises(BackendUnavailable):
            await client.cluster("a")


async def test_who_is_silent_leaves_time_for_another() -> None:
    async with fakes(["silence"], [(202, SCALING)]) as (one, two), FleetClient(one.url, two.url, timeout=1.0) as client:
        assert (await client.scale("a", 3)).operation_id == "2"
    async with fakes(["silence"]) as (one,), FleetClient(one.url, timeout=0.2) as client:
        with pytest.raises((DeadlineExceeded, BackendUnavailable)):
            await client.scale("a", 3)


async def test_a_token_may_change() -> None:
    tokens = iter(["first", "second"])
    async with fakes([(200, EMPTY)]) as (one,), FleetClient(one.url, token=lambda: next(tokens)) as client:
        for _ in range(2):
            assert [each async for each in client.clusters()] == []
        assert [headers["authorization"] for _, headers in one.asked] == ["Bearer first", "Bearer second"]


async def test_redirects_are_not_followed_and_odd_answers_are_errors() -> None:
    for answer in ((302, b"", {"location": "http://169.254.169.254/"}), (200, b"<html>"), (200, {"items": 1})):
        async with fakes([answer]) as (one,), FleetClient(one.url) as client:
            with pytest.raises(BackendUnavailable):
                _ = [each async for each in client.clusters()]
            assert len(one.asked) == 1


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (401, "unauthenticated", AccessDenied),
        (403, "forbidden", AccessDenied),
        (404, "not-found", NotFound),
        (409, "conflict", Conflict),
        (412, "precondition-failed", Conflict),
        (409, "refused", OperationRefused),
        (422, "key-reused", KeyReused),
        (422, "invalid", SpecError),
        (400, "malformed", SpecError),
        (502, "engine-refused", BackendRefused),
        (503, "unavailable", BackendUnavailable),
        (504, "deadline-exceeded", DeadlineExceeded),
        (500, "internal", BackendUnavailable),
        (429, "too-many-requests", BackendUnavailable),
    ],
)
def test_problems_are_the_librarys_errors(status: int, kind: str, error: type[Exception]) -> None:
    _, body, _ = problem(status, kind, "why", errors=[{"field": "a", "message": "b"}, {"field": "c", "message": "d"}])
    made = error_of("GET /x", status, json.dumps(body).encode())
    assert type(made) is error
    assert str(made) == "GET /x: why\n  a: b\n  c: d"


def test_a_page_of_a_proxy_is_an_error_too() -> None:
    assert isinstance(error_of("GET /x", 503, b"<html>no</html>"), BackendUnavailable)
    assert isinstance(error_of("GET /x", 404, b"nothing"), BackendRefused)


@pytest.mark.parametrize(
    "urls",
    [(), ("ftp://x",), ("http://",), ("http://user:password@x",), ("http://x?q=1",), ("http://x:port",), ("nonsense",)],
)
def test_wrong_addresses(urls: tuple[str, ...]) -> None:
    with pytest.raises(SpecError, match="urls"):
        FleetClient(*urls)


async def test_a_client_is_open_once_and_only_within_its_block() -> None:
    client = FleetClient("http://127.0.0.1:1")
    with pytest.raises(OperationRefused, match="not open"):
        await client.cluster("a")
    async with client:
        with pytest.raises(OperationRefused, match="already"):
            await client.__aenter__()


def test_frames() -> None:
    frames = Frames()
    lines = ("retry: 1000", "", ": beat", "", "id: 7", "event: x.y", "data: {", "data: }", "", "data:plain", "")
    found = [frame for line in lines if (frame := frames.line(line)) is not None]
    assert found == [("7", "x.y", "{\n}"), ("7", "", "plain")]


async def test_a_stream_that_breaks_is_taken_up_elsewhere() -> None:
    event = {"at": "2026-01-01T00:00:00Z", "cluster_name": "a", "kind": "note.x"}

    def frame(seq: int) -> bytes:
        return f"id: {seq}\nevent: note.x\ndata: {json.dumps(event | {'seq': seq})}\n\n".encode()

    answers: list[list[Any]] = [
        [(200, frame(1) + frame(2))],
        [problem(503, "unavailable"), (200, frame(3) + b": cut in the mid")],
    ]
    async with fakes(*answers) as (one, two), FleetClient(one.url, two.url) as client:
        seen: list[int] = []
        with anyio.fail_after(20):
            stream = client.stream("a", after=0, kinds=["note."])
            while len(seen) < 3:
                seen.append((await anext(stream)).seq)
        assert seen == [1, 2, 3]
        assert "after=2" in two.asked[0][0]
        assert "kind=note." in two.asked[0][0]
    async with fakes([problem(404, "not-found")]) as (one,), FleetClient(one.url) as client:
        with pytest.raises(NotFound):
            assert [each async for each in client.stream("a")]


async def test_a_stream_that_breaks_before_its_first_event_misses_none() -> None:
    """Its server has said where it begins; the next one is asked from there on."""
    happened = {"seq": 8, "at": "2026-01-01T00:00:00Z", "cluster_name": "a", "kind": "note.x"}
    stream = {"content-type": "text/event-stream"}
    silent = (200, b"retry: 1000\nid: 7\n\n: still here\n\n", stream)
    told = (200, f"retry: 1000\nid: 7\n\nid: 8\nevent: note.x\ndata: {json.dumps(happened)}\n\n".encode(), stream)
    async with fakes([silent], [told]) as (one, two), FleetClient(one.url, two.url) as client:
        with anyio.fail_after(10):
            async with aclosing(cast("Any", client.stream("a"))) as stream:
                assert (await anext(stream)).seq == 8
        assert one.asked[0][0].endswith("/events/stream")
        assert two.asked[0][0].endswith("/events/stream?after=7")
