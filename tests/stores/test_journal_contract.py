"""The contract of the journal port, held against every journal, on both event loops."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentfleet.errors import JournalError, NotLeader
from agentfleet.events import Event
from agentfleet.stores.journal import Journal
from agentfleet.stores.jsonl_journal import JsonlJournal
from agentfleet.stores.lines import encode
from agentfleet.stores.memory_journal import MemoryJournal

pytest.importorskip("sqlalchemy")

from sqlalchemy.exc import OperationalError

from agentfleet.stores.sql import SqlJournal
from agentfleet.testing.postgres import Postgres

AnyJournal = MemoryJournal | JsonlJournal | SqlJournal
PORTS: list[type[Journal]] = [MemoryJournal, JsonlJournal, SqlJournal]  # mypy checks that all are journals


def address(request: pytest.FixtureRequest, folder: Path) -> str:
    """Of a fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'journal.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(like=request.getfixturevalue("prepared"))


@pytest.fixture(params=["memory", "jsonl", "jsonl-fsync", "sqlite", "postgres"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        yield MemoryJournal()
    elif request.param in ("sqlite", "postgres"):
        with SqlJournal(address(request, tmp_path)) as made:
            yield made
    else:
        with JsonlJournal(tmp_path / "journal.jsonl", fsync=request.param == "jsonl-fsync") as made:
            yield made


@pytest.fixture(params=["memory", "jsonl", "sqlite", "postgres"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A journal that trims within a few hundred events."""
    if request.param == "memory":
        yield MemoryJournal(limit=20)
    elif request.param in ("sqlite", "postgres"):
        with SqlJournal(address(request, tmp_path), limit=20) as made:
            yield made
    else:
        with JsonlJournal(tmp_path / "journal.jsonl", limit_bytes=4096) as made:
            yield made


def event(number: int, fleet: str = "a", kind: str = "instance.ready") -> Event:
    return Event(at=float(number), fleet=fleet, kind=kind, instance=f"{fleet}-{number}", data={"number": number})


def test_append_numbers_from_one_and_reads_back(journal: AnyJournal) -> None:
    full = Event(
        at=1.5, fleet="a", kind="recovery.held", instance="a-1", data={"n": [1, {"x": None}]}, reasons=({"code": "c"},)
    )
    appended = [journal.append(full), journal.append(event(2, "b"))]
    assert [item.seq for item in appended] == [1, 2]
    assert list(journal.read()) == appended


def test_read_selects_by_fleet_and_position(journal: AnyJournal) -> None:
    for number in range(1, 21):
        journal.append(event(number, "a" if number % 3 else "aa"))
    assert [e.seq for e in journal.read(after=15)] == [16, 17, 18, 19, 20]
    assert [e.seq for e in journal.read(fleet="aa")] == [3, 6, 9, 12, 15, 18]
    assert [e.seq for e in journal.read(fleet="aa", after=12)] == [15, 18]
    assert journal.read(fleet="nobody") == []
    assert journal.read(after=20) == []
    assert journal.read(after=10**9) == []


def test_last_state_is_the_newest_of_each_fleet_and_kind(journal: AnyJournal) -> None:
    assert journal.last_state("a", "state.fleet") is None
    for number, (fleet, kind) in enumerate([("a", "state.fleet"), ("a", "state.scaling"), ("b", "state.fleet")] * 2):
        journal.append(event(number, fleet, kind))
    journal.append(event(9, "a", "stateful"))
    found = [journal.last_state(f, k) for f, k in [("a", "state.fleet"), ("a", "state.scaling"), ("b", "state.fleet")]]
    assert [item.seq for item in found if item is not None] == [4, 5, 6]
    assert journal.last_state("a", "stateful") is None


def test_last_states_are_the_newest_of_each_kind_that_begins_so(journal: AnyJournal) -> None:
    kinds = ["state.slot.1", "state.slot.2", "state.slot.10", "state.sl%t.1", "state.sloth", "state.Slot.1", "slot.1"]
    for number, (fleet, kind) in enumerate([*[("a", kind) for kind in kinds], ("b", kinds[0]), ("a", kinds[1])]):
        journal.append(event(number, fleet, kind))
    found = journal.last_states("a", "state.slot.")
    assert {kind: item.seq for kind, item in found.items()} == {kinds[0]: 1, kinds[1]: 9, kinds[2]: 3}
    assert found == {kind: journal.last_state("a", kind) for kind in kinds[:3]}
    assert set(journal.last_states("a", "state.sl%")) == {"state.sl%t.1"}
    assert journal.last_states("c", "state.") == {}


@pytest.mark.parametrize("journal", ["memory", "sqlite", "postgres"], indirect=True)
def test_a_deposed_leader_tells_nothing_more(journal: AnyJournal) -> None:
    led = [replace(event(number, kind="state.fleet"), epoch=epoch) for number, epoch in enumerate((3, 3, 5))]
    assert [journal.append(each).epoch for each in led] == [3, 3, 5]
    with pytest.raises(NotLeader, match="epoch 5"):
        journal.append(replace(event(9, kind="state.fleet"), epoch=4))
    journal.append(event(10))  # which nobody tells as a leader
    journal.append(replace(event(11, "b"), epoch=1))  # another fleet has another leader
    assert [(each.fleet, each.epoch, each.seq) for each in journal.read()] == [
        ("a", 3, 1),
        ("a", 3, 2),
        ("a", 5, 3),
        ("a", 0, 4),
        ("b", 1, 5),
    ]
    last = journal.last_state("a", "state.fleet")
    assert last is not None
    assert last.epoch == 5


def test_states_outlive_the_trimmed_history(small: AnyJournal) -> None:
    old = small.append(event(1, "a", "state.fleet"))
    small.append(event(1, "b", "state.scaling"))
    newer = small.append(event(2, "b", "state.scaling"))
    for number in range(500):
        small.append(event(number))
    assert small.last_state("a", "state.fleet") == old
    assert small.last_state("b", "state.scaling") == newer
    kept = small.read()
    assert list(kept[:2]) == [old, newer]
    assert [e.seq for e in kept[2:]] == list(range(kept[2].seq, 504))
    assert 10 < len(kept) < 100
    assert small.read(after=1)[0] == newer
    assert small.read(after=502) == kept[-1:]


@pytest.mark.parametrize("small", ["sqlite", "postgres"], indirect=True)
def test_an_event_is_recorded_also_if_the_oldest_cannot_be_dropped(
    small: SqlJournal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is told that it was not may record it twice, or stop acting."""
    calls = small._call

    def failing(work: Any) -> Any:
        if "trim" in str(work):
            raise OperationalError("DELETE", {}, Exception("canceling statement due to statement timeout"))
        return calls(work)

    monkeypatch.setattr(small, "_call", failing)
    for number in range(1, 61):
        assert small.append(event(number)).seq == small.newest == number
    assert len(small.read()) == 60
    assert "cannot be trimmed: canceling statement" in caplog.text
    monkeypatch.undo()
    for number in range(61, 71):
        small.append(event(number))
    assert len(small.read()) < 30


@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
def test_a_long_history_that_gets_a_limit_is_dropped_by_and_by(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never so much at once that the event loop, which waits for it, stands still; by several processes, too."""
    monkeypatch.setattr("agentfleet.stores.sql.journal._TOGETHER", 10)
    monkeypatch.setattr("agentfleet.stores.sql.journal._OFTEN", 2)
    with SqlJournal(database_url) as unlimited:
        state = unlimited.append(event(0, kind="state.fleet"))
        for number in range(100):
            unlimited.append(event(number))
    before = 101
    with SqlJournal(database_url, limit=20) as one, SqlJournal(database_url, limit=20) as two:
        for number in range(60):
            (one, two)[number // 2 % 2].append(event(number))
            kept = len(one.read()) - 1  # the state outlives it all
            assert kept >= before - 10
            before = kept
        assert 20 <= kept <= 30
        assert two.last_state("a", "state.fleet") == state
        assert [each.seq for each in one.read()][1:] == list(range(162 - kept, 162))


def test_later_changes_change_nothing_recorded(journal: AnyJournal) -> None:
    data = {"inner": {"list": [1]}}
    journal.append(Event(1.0, "a", "state.fleet", data=data))
    data["inner"]["list"].append(2)
    read = journal.read()[0]
    assert read.data == {"inner": {"list": [1]}}
    read.data["inner"]["list"].append(3)
    state = journal.last_state("a", "state.fleet")
    assert journal.read()[0].data == {"inner": {"list": [1]}}
    assert state is not None
    assert state.data == {"inner": {"list": [1]}}


class Word(StrEnum):
    """A string that is more than a string."""

    ONE = "one"


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ((1, 2), [1, 2]),
        (Word.ONE, "one"),
        ("line\nbreak\r\u2028\0", "line\nbreak\r\u2028\0"),
        ("\ud800 half a pair", "\ud800 half a pair"),
        ("snow ☃ 🦉", "snow ☃ 🦉"),
        (float("inf"), float("inf")),
        (10**30, 10**30),
    ],
)
def test_values_come_back_as_json_keeps_them(journal: AnyJournal, value: object, back: object) -> None:
    journal.append(Event(1.0, "a", "k", data={"value": value}))
    journal.append(event(2))
    assert journal.read()[0].data == {"value": back}
    assert [e.seq for e in journal.read()] == [1, 2]


def cyclic() -> list[Any]:
    knot: list[Any] = []
    knot.append(knot)
    return knot


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", cyclic(), {(1, 2): 3}, pytest.param(10**5000, id="huge")]
)
def test_what_json_cannot_write_is_refused_and_not_recorded(journal: AnyJournal, value: object) -> None:
    journal.append(event(1))
    with pytest.raises(JournalError, match=r"'the\.kind' of fleet 'a'"):
        journal.append(Event(2.0, "a", "the.kind", data={"value": value}))
    assert journal.append(event(3)).seq == 2
    assert [e.at for e in journal.read()] == [1.0, 3.0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.builds(
    Event,
    at=st.floats(0, 1e10),
    fleet=st.text(max_size=5),
    kind=st.sampled_from(["state.a", "state.b", "k"]),
    instance=st.none() | st.text(max_size=5),
    data=st.dictionaries(st.text(), JSON, max_size=3),
    reasons=st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=2).map(tuple),
)


@given(found=EVENTS, seq=st.integers(1, 10**12))
def test_a_line_is_what_the_event_itself_writes(found: Event, seq: int) -> None:
    line = encode(found, seq)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    back = Event.from_json(line)
    assert (back.seq, back.at, back.fleet, back.kind, back.data) == (seq, found.at, found.fleet, found.kind, found.data)
    assert json.loads(line) == json.loads(back.to_json())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(events=st.lists(EVENTS, max_size=30))
def test_both_journals_agree(events: list[Event], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("agree") / "j"
    memory = MemoryJournal()
    with SqlJournal(f"sqlite:///{path}.db") as sql:
        for item in events:
            sql.append(item)
            memory.append(item)
    with SqlJournal(f"sqlite:///{path}.db") as sql:
        assert sql.read() == memory.read()
        for item in events:
            assert sql.read(fleet=item.fleet, after=2) == memory.read(fleet=item.fleet, after=2)
            assert sql.last_state(item.fleet, item.kind) == memory.last_state(item.fleet, item.kind)
    memory = MemoryJournal()
    with JsonlJournal(path) as jsonl:
        for item in events:
            assert jsonl.append(item) == memory.append(item)
        assert jsonl.read() == memory.read()
    with JsonlJournal(path) as again:
        assert again.read() == memory.read()
        for item in events:
            assert again.read(fleet=item.fleet, after=2) == memory.read(fleet=item.fleet, after=2)
            assert again.last_state(item.fleet, item.kind) == memory.last_state(item.fleet, item.kind)


async def take(source: Any, count: int) -> list[int]:
    with anyio.fail_after(20):
        return [(await source.__anext__()).seq for _ in range(count)]


@pytest.mark.anyio
async def test_follow_gives_what_is_kept_and_then_what_comes(journal: AnyJournal) -> None:
    for number in range(150):
        journal.append(event(number))
    whole, rest, other = journal.follow(), journal.follow(after=100), journal.follow(fleet="b")
    assert await take(whole, 150) == list(range(1, 151))
    assert await take(rest, 50) == list(range(101, 151))
    got: dict[str, list[int]] = {}

    async def collect(name: str, source: Any, count: int) -> None:
        got[name] = await take(source, count)

    async with anyio.create_task_group() as group:
        group.start_soon(collect, "whole", whole, 100)
        group.start_soon(collect, "rest", rest, 100)
        group.start_soon(collect, "other", other, 50)
        await anyio.wait_all_tasks_blocked()
        for number in range(50):
            journal.append(event(number))
            journal.append(event(number, "b"))
    assert got["whole"] == got["rest"] == list(range(151, 251))
    assert got["other"] == list(range(152, 251, 2))


@pytest.mark.anyio
async def test_a_cancelled_wait_loses_nothing(journal: AnyJournal) -> None:
    follower = journal.follow()
    for number in range(1, 6):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await follower.__anext__()
        journal.append(event(number))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await follower.__anext__()
        assert await take(follower, 1) == [number]


@pytest.mark.anyio
async def test_appends_while_reading_neither_repeat_nor_get_lost(journal: AnyJournal) -> None:
    """A follower that appends itself, as a loop does that reacts to events."""
    journal.append(event(0))
    seen = []
    with anyio.fail_after(20):
        async for found in journal.follow():
            seen.append(found.seq)
            if len(seen) == 300:
                break
            for _ in range(1 + found.seq % 2):
                journal.append(event(found.seq))
    assert seen == list(range(1, 301))


@pytest.mark.anyio
async def test_a_follower_that_was_overtaken_is_told_once_and_goes_on(small: AnyJournal) -> None:
    follower = small.follow()
    state = small.append(event(1, kind="state.fleet"))
    assert await take(follower, 1) == [1]
    for number in range(2, 301):
        small.append(event(number))
    first = small.read(after=1)[0].seq
    with pytest.raises(JournalError, match=f"events 2 to {first - 1} were trimmed"):
        await follower.__anext__()
    assert await take(follower, 301 - first) == list(range(first, 301))
    late = small.follow()  # what was gone before it began is nothing that it lost
    assert await take(late, 2) == [state.seq, first]


@pytest.mark.anyio
async def test_closing_a_follower_ends_it(journal: AnyJournal) -> None:
    journal.append(event(1))
    follower = journal.follow()
    assert await take(follower, 1) == [1]
    await follower.aclose()
    with pytest.raises(StopAsyncIteration):
        await follower.__anext__()


def test_a_follower_left_by_one_event_loop_does_not_bind_the_journal(journal: AnyJournal) -> None:
    async def wait_and_leave() -> None:
        with anyio.move_on_after(0.001):
            await journal.follow(after=10**6).__anext__()

    async def one() -> list[int]:
        found: list[int] = []
        async with anyio.create_task_group() as group:
            group.start_soon(appender)
            found += await take(journal.follow(), 1)
        return found

    async def appender() -> None:
        await anyio.wait_all_tasks_blocked()
        journal.append(event(1))

    anyio.run(wait_and_leave, backend="asyncio")
    assert anyio.run(one, backend="trio") == [1]
