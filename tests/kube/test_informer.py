"""An informer against servers that say what a test tells them to: every way in which lists and watches go wrong."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tests.kube.informer_world import STREAM, Asked, Scripted, chunk, connect, scripted, whole, write_config

from agentfleet.backends.kubernetes import PODS, Changed, Connection, Forbidden, Informer, Pod, Removed, Snapshot
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.errors import BackendUnavailable, DeadlineExceeded

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def pod(name: str, version: int, uid: str | None = None, **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n", "uid": uid or name, "resourceVersion": str(version)}, **more}


def listed(version: int, *items: dict[str, Any], more: str = "") -> bytes:
    return whole(200, {"metadata": {"resourceVersion": str(version), "continue": more}, "items": list(items)})


def line(kind: str, what: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": what}).encode() + b"\n"


Watch = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


async def quiet(_asked: Asked, writer: asyncio.StreamWriter) -> None:
    """A watch in which nothing happens."""
    writer.write(STREAM)
    await asyncio.sleep(30)


def says(*lines: bytes, end: bool = True) -> Watch:
    """A watch that says this and then ends, cleanly or never."""

    async def watch(_asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + b"".join(chunk(each) for each in lines))
        if end:
            writer.write(b"0\r\n\r\n")
        else:
            await asyncio.sleep(30)

    return watch


@dataclass
class Story:
    """Lists and watches, one after the other; the last ones are repeated."""

    lists: list[bytes]
    watches: list[Watch] = field(default_factory=lambda: [quiet])

    async def __call__(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "watch" in asked.query:
            await (self.watches.pop(0) if len(self.watches) > 1 else self.watches[0])(asked, writer)
        else:
            writer.write(self.lists.pop(0) if len(self.lists) > 1 else self.lists[0])


@asynccontextmanager
async def informed(
    folder: Path, story: Story, **options: Any
) -> AsyncIterator[tuple[Informer[Pod], Scripted, Connection]]:
    async with (
        scripted(story) as server,
        connect(write_config(folder, server.url), attempts=1) as connection,
        Informer(connection, PODS, namespace="n", rng=random.Random(1), **options) as pods,
    ):
        yield pods, server, connection


async def until(holds: Callable[[], object], seconds: float = 10) -> None:
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await anyio.sleep(0.01)


def watches(server: Scripted) -> list[Asked]:
    return [asked for asked in server.asked if "watch" in asked.query]


async def test_a_clean_end_goes_on_from_the_last_version(tmp_path: Path) -> None:
    story = Story(
        [listed(5, pod("a", 3))],
        [
            says(line("ADDED", pod("b", 6))),
            says(line("BOOKMARK", pod("", 9))),
            says(line("DELETED", pod("a", 10))),
            quiet,
        ],
    )
    async with informed(tmp_path, story) as (pods, server, _):
        await until(lambda: pods.metrics.watches == 4)
        assert [asked.query["resourceVersion"] for asked in watches(server)] == ["5", "6", "9", "10"]
        assert all(asked.query["allowWatchBookmarks"] == "true" for asked in watches(server))
        assert list(pods.cache) == ["n/b"]
        assert (pods.metrics.lists, pods.metrics.reconnects, pods.metrics.bookmarks) == (1, 3, 1)
        assert pods.version == 10


async def test_a_server_that_closes_at_once_is_not_asked_hot(tmp_path: Path) -> None:
    async with informed(tmp_path, Story([listed(5)], [says()])) as (pods, server, _):
        await pods.wait_synced()
        await anyio.sleep(2)
        assert 2 <= len(watches(server)) <= 8
        times = [asked.at for asked in watches(server)]
        assert times[-1] - times[-2] > times[1] - times[0]


async def test_expired_history_means_a_new_list_that_tells_what_differs(tmp_path: Path) -> None:
    gone = line("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"})
    same, before, after = pod("same", 1), pod("other", 2), pod("other", 8)
    story = Story([listed(5, same, before, pod("gone", 3)), listed(9, same, after, pod("new", 7))], [says(gone), quiet])
    async with informed(tmp_path, story) as (pods, _, __), aclosing(pods.events()) as events:
        first = await anext(events)
        assert isinstance(first, Snapshot)
        assert len(first.objects) == 3
        told = [await anext(events) for _ in range(3)]
        assert {(type(each), each.object.metadata.name) for each in told if not isinstance(each, Snapshot)} == {
            (Changed, "other"),
            (Changed, "new"),
            (Removed, "gone"),
        }
        assert (pods.metrics.relists, pods.metrics.expired) == (1, 1)


async def test_a_410_in_the_middle_of_a_list_begins_it_anew(tmp_path: Path) -> None:
    gone = whole(410, {"kind": "Status", "code": 410, "reason": "Expired", "message": "continue token too old"})
    story = Story([listed(5, pod("a", 1), more="x"), gone, listed(9, pod("b", 7), more="y"), listed(9, pod("c", 8))])
    async with informed(tmp_path, story, page=1) as (pods, server, _):
        await pods.wait_synced()
        assert sorted(pods.cache) == ["n/b", "n/c"]
        asked = [each.query for each in server.asked if "watch" not in each.query]
        assert [each.get("continue") for each in asked] == [None, "x", None, "y"]
        assert {each["limit"] for each in asked} == {"1"}


async def test_repeated_late_and_lost_events(tmp_path: Path) -> None:
    lines = [
        line("ADDED", pod("a", 6)),
        line("MODIFIED", pod("a", 8)),
        line("MODIFIED", pod("a", 7)),  # late
        line("MODIFIED", pod("a", 8)),  # again
        line("ADDED", pod("b", 9)),
        line("DELETED", pod("b", 11)),
        line("MODIFIED", pod("b", 10)),  # late, of one that is gone
    ]
    # the removal of "a" (12) is lost on the way; only the periodic list can tell
    async with informed(tmp_path, Story([listed(5), listed(13)], [says(*lines, end=False), quiet]), relist_every=1) as (
        pods,
        _,
        __,
    ):
        await until(lambda: pods.metrics.events == 7)
        assert {key: each.metadata.resource_version for key, each in pods.cache.items()} == {"n/a": "8"}
        assert (pods.dropped, pods.version) == (3, 11)
        await until(lambda: not pods.cache)
        assert pods.metrics.relists == 1


async def test_another_uid_under_the_same_name_is_told_as_removed_and_new(tmp_path: Path) -> None:
    story = Story([listed(5, pod("a", 1, "u1"))], [says(line("ADDED", pod("a", 9, "u2")), end=False)])
    async with informed(tmp_path, story) as (pods, _, __), aclosing(pods.events()) as events:
        assert isinstance(await anext(events), Snapshot)
        removed, added = await anext(events), await anext(events)
        assert isinstance(removed, Removed)
        assert isinstance(added, Changed)
        assert (removed.object.metadata.uid, added.object.metadata.uid, added.before) == ("u1", "u2", None)


async def test_silence_ends_a_watch(tmp_path: Path) -> None:
    story = Story([listed(5)], [quiet, says(line("ADDED", pod("a", 6)), end=False)])
    async with informed(tmp_path, story, silence=0.3) as (pods, _, __):
        await pods.wait_for(6, timeout=5)
        assert pods.metrics.failures >= 1
        assert pods.metrics.relists == 0


@pytest.mark.parametrize(
    "watch",
    [
        says(b"<html>", b"<h1>502 Bad Gateway</h1>\n"),
        says(line("ADDED", pod("a", 6))[:-9]),
        says(line("ERROR", {"kind": "Status", "code": 500, "reason": "InternalError"})),
        says(line("SURPRISE", pod("a", 6))),
    ],
    ids=["html", "cut off in a line", "error 500", "unknown event"],
)
async def test_what_is_no_watch_is_tried_again_and_listed_at_last(tmp_path: Path, watch: Watch) -> None:
    async with informed(tmp_path, Story([listed(5), listed(7, pod("a", 6))], [watch, watch, watch, quiet])) as (
        pods,
        _,
        __,
    ):
        await pods.wait_for(7, timeout=10)
        assert list(pods.cache) == ["n/a"]
        assert (pods.metrics.relists, pods.metrics.failures) == (1, 3)
        assert pods.error is None


async def test_a_huge_event_and_a_burst_leave_the_loop_free(tmp_path: Path) -> None:
    huge = line("ADDED", pod("huge", 6, data="x" * 6_000_000))
    burst = b"".join(line("MODIFIED", pod("huge", version, data="x" * 500)) for version in range(7, 8000))
    pieces = [huge[begin : begin + 100_000] for begin in range(0, len(huge), 100_000)]
    async with informed(tmp_path, Story([listed(5)], [says(*pieces, burst, end=False)])) as (pods, _, __):
        turns = 0
        while pods.version < 7999:
            await anyio.lowlevel.checkpoint()
            turns += 1
        assert turns > 10
        assert pods.cache["n/huge"].metadata.resource_version == "7999"


async def test_a_refusal_before_the_first_list_is_raised_and_later_ones_are_not(tmp_path: Path) -> None:
    forbidden = whole(403, {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "cannot list pods"})
    async with informed(tmp_path, Story([forbidden, forbidden, listed(5, pod("a", 1))])) as (pods, _, __):
        with pytest.raises(Forbidden, match="cannot list pods"):
            await pods.wait_synced()
        await until(lambda: pods.synced)  # the permission was given meanwhile
        assert list(pods.cache) == ["n/a"]


async def test_waiting_has_a_deadline_that_tells_why(tmp_path: Path) -> None:
    async with informed(tmp_path, Story([whole(500, b"no leader")])) as (pods, _, __):
        with pytest.raises(DeadlineExceeded, match="no leader"):
            await pods.wait_synced(0.5)
    async with informed(tmp_path, Story([listed(5)])) as (pods, _, __):
        await pods.wait_for("5")
        with pytest.raises(DeadlineExceeded, match="at resource version 5, not at 6"):
            await pods.wait_for("6", timeout=0.1)
    with pytest.raises(BackendUnavailable, match="closed"):
        await pods.wait_for("6")


async def test_leaving_ends_every_reader_and_selectors_are_sent(tmp_path: Path) -> None:
    story = Story([listed(5)])
    seen: list[object] = []
    chosen = {"labels": {"app": "x", "tier": "y"}, "fields": "spec.nodeName=n1"}
    async with anyio.create_task_group() as tasks, informed(tmp_path, story, **chosen) as (pods, server, _):

        async def read() -> None:
            seen.extend([event async for event in pods.events()])

        tasks.start_soon(read)
        await pods.wait_synced()
        await until(lambda: watches(server))
    assert seen == [Snapshot(())]
    for asked in server.asked:
        assert (asked.query["labelSelector"], asked.query["fieldSelector"]) == ("app=x,tier=y", "spec.nodeName=n1")


async def test_an_error_of_the_body_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with informed(tmp_path, Story([listed(5)])) as (pods, _, __):
            await pods.wait_synced()
            pods.cache["nobody"]


class Late(Requests):
    """A server whose watch says something at the very moment at which nobody wants to hear it any more."""

    def __init__(self) -> None:
        self.word: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.heard = False

    async def request(self, method: str, path: str, **more: Any) -> bytes:
        return b'{"metadata":{"resourceVersion":"1"},"items":[]}'

    @asynccontextmanager
    async def stream(self, path: str, **more: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield b""
            said = await self.word
            self.heard = True
            yield said
            await anyio.sleep_forever()

        yield pieces()


async def test_what_the_server_says_while_an_informer_is_closed_is_no_error() -> None:
    """A task is not cancelled before it has taken in what it has waited for."""
    connection = Late()
    async with Informer(connection, PODS) as pods:
        await pods.wait_synced(5)
        await anyio.wait_all_tasks_blocked()
        connection.word.set_result(line("BOOKMARK", pod("", 2)))
    assert connection.heard
    assert pods.last_word.silence is None
