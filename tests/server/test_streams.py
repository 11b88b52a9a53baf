"""Streams of events: in order, resumed without a gap, ended when they must."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tests.server.world import A_READER, world

from agentfleet.events import Event
from agentfleet.server.leaving import Leaving
from agentfleet.server.limits import Limits
from agentfleet.server.streams import Hub, Wanted, frames
from agentfleet.stores.memory_journal import MemoryJournal

pytestmark = pytest.mark.anyio


def parsed(body: bytes) -> list[dict[str, Any]]:
    found = []
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields and "id" in fields:
            told = json.loads(fields["data"])
            assert str(told["seq"]) == fields["id"]
            assert told["kind"] == fields["event"]
            found.append(told)
    return found


async def test_a_stream_is_resumed_where_it_was_left(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(rate=1e6, burst=10**6, stream=0.2)) as here:
        await here.cluster()
        path = "/api/v1/clusters/a/events/stream"
        whole = parsed((await here.ask("GET", f"{path}?after=0")).body)
        assert whole[0]["kind"] == "manager.started"
        assert not any(each["kind"].startswith("state.") for each in whole)
        middle = whole[len(whole) // 2]["seq"]
        rest = await here.ask("GET", path, headers={"Last-Event-ID": str(middle)})
        assert rest.headers["content-type"].startswith("text/event-stream")
        assert [each["seq"] for each in parsed(rest.body)] == [each["seq"] for each in whole if each["seq"] > middle]
        assert parsed((await here.ask("GET", path)).body) == []  # from now on: nothing happens
        pages = (await here.ask("GET", "/api/v1/clusters/a/events?limit=1000")).json["items"]
        assert [each["seq"] for each in pages] == [each["seq"] for each in whole]
        some = parsed((await here.ask("GET", f"{path}?after=0&kind=instance.")).body)
        assert {each["kind"].partition(".")[0] for each in some} == {"instance"}
        odd = await here.ask("GET", path, headers={"Last-Event-ID": "x"})
        assert (odd.status, odd.fields()) == (422, ["Last-Event-ID"])


async def test_events_newest_first_and_decisions_with_their_reasons(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        await here.finished(await here.ask("PUT", "/api/v1/clusters/a/scale", {"replicas": 4}))
        path = "/api/v1/clusters/a/events"
        forward = [each["seq"] for each in (await here.ask("GET", f"{path}?limit=1000")).json["items"]]
        back: list[int] = []
        cursor: str | None = ""
        while cursor is not None:
            page = (await here.ask("GET", f"{path}?newest=true&limit=3{cursor}")).json
            back += [each["seq"] for each in page["items"]]
            cursor = None if page["next"] is None else f"&cursor={page['next']}"
        assert back == forward[::-1]
        why = {"code": "above", "text": "CPU is at 95 %", "numbers": {"now": 95}}
        here.manager.journal.append(Event(at=1.0, fleet="a", kind="scaling.decision", reasons=(why,)))
        decided = (await here.ask("GET", "/api/v1/clusters/a/decisions")).json["items"]
        assert (decided[0]["kind"], decided[0]["reasons"]) == ("scaling.decision", [why])
        scaled = next(each for each in decided if each["kind"] == "fleet.scaled")
        assert (scaled["data"]["from"], scaled["data"]["to"]) == (2, 4)


async def test_what_happens_is_seen_as_it_happens_by_everybody(tmp_path: Path) -> None:
    journal = MemoryJournal()
    hub, leaving = Hub(journal), Leaving()
    seen: dict[int, list[int]] = {number: [] for number in range(50)}
    wanted = Wanted(0, "a", (), 60.0, 60.0)

    async def look_on(number: int) -> None:
        async for frame in frames(hub, wanted, leaving, _yes):
            seen[number] += [each["seq"] for each in parsed(frame)]

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for number in seen:
                tasks.start_soon(look_on, number)
            for number in range(300):
                journal.append(Event(at=0.0, fleet="ab"[number % 2], kind="note.x"))
                if number % 7 == 0:
                    await anyio.lowlevel.checkpoint()
            while any(not each or each[-1] != 299 for each in seen.values()):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            leaving.begin()
    assert all(each == list(range(1, 300, 2)) for each in seen.values())


async def _yes() -> bool:
    return True


async def test_a_reader_who_was_left_behind_catches_up_and_is_told_of_what_is_gone() -> None:
    journal = MemoryJournal(limit=1000)
    hub = Hub(journal)
    for _ in range(10):
        journal.append(Event(at=0.0, fleet="a", kind="note.x"))
    assert await hub.newest() == 10
    for _ in range(5000):
        journal.append(Event(at=0.0, fleet="a", kind="note.x"))
    got = b"".join([each async for each in _for(hub, Wanted(10, "a", (), 0.3, 10.0))])
    assert b'event: journal.trimmed\ndata: {"after":10,"trimmed":4010}' in got
    assert [each["seq"] for each in parsed(got)] == list(range(4011, 5011))


async def _for(hub: Hub, wanted: Wanted) -> AsyncIterator[bytes]:
    async for frame in frames(hub, wanted, Leaving(), _yes):
        yield frame


async def test_a_stream_ends_with_the_right_to_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentfleet.server.credentials._LOOK", 0.0)
    async with world(tmp_path, limits=Limits(beat=0.05)) as here:
        await here.cluster()
        ask = here.ask.by(A_READER)
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:

                async def stream() -> None:
                    reply = await ask("GET", "/api/v1/clusters/a/events/stream")
                    assert reply.status == 200

                tasks.start_soon(stream)
                while not here.app.state.api.places.open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                here.token_file.write_text("nobody read b " + "z" * 40 + "\n")


async def test_streams_are_bounded(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(streams_each=2, stream=0.5)) as here:
        await here.cluster()
        path, answers = "/api/v1/clusters/a/events/stream", []
        async with anyio.create_task_group() as tasks:

            async def stream() -> None:
                answers.append((await here.ask("GET", path)).status)

            for _ in range(2):
                tasks.start_soon(stream)
            while here.app.state.api.places.open < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            refused = await here.ask("GET", path)
            assert (refused.status, refused.kind) == (429, "too-many-requests")
        assert answers == [200, 200]
        metrics = (await here.ask("GET", "/metrics")).body.decode()
        assert "agentfleet_api_streams 0.0" in metrics
        assert 'agentfleet_api_limited_total{limit="streams"} 1.0' in metrics
        assert 'route="/api/v1/clusters/{id}/events/stream",method="GET",status="2xx"' in metrics.replace(
            'method="GET",route="/api/v1/clusters/{id}/events/stream"',
            'route="/api/v1/clusters/{id}/events/stream",method="GET"',
        )


async def test_a_stream_begins_with_its_place(tmp_path: Path) -> None:
    """Who loses it before the first event comes back to there, and misses nothing."""
    async with world(tmp_path, limits=Limits(stream=0.1)) as here:
        await here.cluster()
        newest = await here.app.state.api.hub.newest()
        got = (await here.ask("GET", "/api/v1/clusters/a/events/stream")).body.decode()
        first = got.partition("\n\n")[0].splitlines()
        assert f"id: {newest}" in first
        assert not [line for line in first if line.startswith("data")]


async def test_the_first_stream_after_a_rest_reads_no_backlog() -> None:
    class Counted(MemoryJournal):
        taken = 0

        async def batch(self, after: int, limit: int) -> Any:
            found = await super().batch(after, limit)
            self.taken += len(found)
            return found

    journal = Counted()
    hub = Hub(journal)
    journal.append(Event(at=0.0, fleet="a", kind="note.x"))
    assert len(parsed(b"".join([each async for each in _for(hub, Wanted(0, "a", (), 0.1, 10.0))]))) == 1
    for _ in range(5000):
        journal.append(Event(at=0.0, fleet="a", kind="note.x"))
    journal.taken = 0
    got: list[dict[str, Any]] = []
    async for frame in _for(hub, Wanted(await hub.newest(), "a", (), 5.0, 10.0)):
        got += parsed(frame)
        if got:
            break
        journal.append(Event(at=0.0, fleet="a", kind="note.last"))
    assert [each["kind"] for each in got] == ["note.last"]
    assert journal.taken == 1
    whole = b"".join([each async for each in _for(hub, Wanted(4000, "a", (), 0.3, 10.0))])
    assert [each["seq"] for each in parsed(whole)] == list(range(4001, 5003)), "unless it asks for it"
