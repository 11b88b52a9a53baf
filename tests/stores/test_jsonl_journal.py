"""What the journal in a file promises beyond the port: crashes, compaction, one writer, full disks, tailing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentfleet.errors import JournalError, SpecError
from agentfleet.events import Event
from agentfleet.stores import jsonl_file
from agentfleet.stores.jsonl_journal import JsonlJournal
from agentfleet.stores.jsonl_tail import JournalTail


def event(number: int, kind: str = "instance.ready", fleet: str = "a") -> Event:
    return Event(at=float(number), fleet=fleet, kind=kind, data={"number": number})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def fill(path: Path, count: int, **options: Any) -> None:
    with JsonlJournal(path, **options) as journal:
        for _ in range(count):
            journal.append(event(len(journal.read()) + 1))


# ------------------------------------------------------------------------------------------------ reopening


def test_seq_goes_on_after_reopening(path: Path) -> None:
    for start in (1, 6, 11):
        with JsonlJournal(path) as journal:
            assert [journal.append(event(n)).seq for n in range(5)] == list(range(start, start + 5))


def test_seq_goes_on_when_compaction_left_little(path: Path) -> None:
    last = 0
    for _ in range(10):
        with JsonlJournal(path, limit_bytes=4096) as journal:
            for number in range(100):
                found = journal.append(event(number, "state.fleet" if number == 50 else "k"))
                assert found.seq == last + 1
                last = found.seq
            assert path.stat().st_size <= 4096


def test_a_torn_last_line_of_any_length_is_cut_off_and_noted(path: Path) -> None:
    fill(path, 3)
    whole = path.read_bytes()
    starts = [0, *[i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = sum(1 for start in starts if 0 < start <= length)
        torn = length - max(start for start in starts if start <= length)
        with JsonlJournal(path) as journal:
            found = list(journal.read())
            assert [e.kind for e in found[:kept]] == ["instance.ready"] * kept
            if torn:
                assert (found[kept].kind, found[kept].data) == (
                    "journal.repaired",
                    {"torn_bytes": torn, "damaged_lines": 0},
                )
            assert len(found) == kept + bool(torn)
            assert journal.append(event(9)).seq == len(found) + 1
        with JsonlJournal(path) as again:
            assert len(again.read()) == len(found) + 1  # repaired once, not at each opening


def test_damage_in_the_middle_is_set_aside_and_noted(path: Path) -> None:
    fill(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    damage = [
        b"\0" * 40 + b"\n",
        lines[0],
        b'{"seq":"x","at":1,"fleet":"a","kind":"k"}\n',
        b'{"seq":3,"at":1,"fleet":[]}\n',
    ]
    lines[3:4] = damage
    path.write_bytes(b"".join(lines))
    with JsonlJournal(path) as journal:
        assert [e.seq for e in journal.read()] == [1, 2, 3, 5, 6, 7]
        assert journal.read()[-1].data == {"torn_bytes": 0, "damaged_lines": 4}
    assert path.with_name("journal.jsonl.damaged").read_bytes() == b"".join(damage)
    with JsonlJournal(path) as again:
        assert [e.seq for e in again.read(after=2)] == [3, 5, 6, 7]


@pytest.mark.parametrize("content", [b"name: researchers\n", b"{}\n", b'{"seq":"one"}\n', b"\xff\xfe", b"{"])
def test_another_file_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if content == b"{":  # what a crash in the first write may leave
        JsonlJournal(path).close()
        return
    with pytest.raises(JournalError, match="is no journal"):
        JsonlJournal(path)
    assert path.read_bytes() == content


def test_places_that_cannot_hold_a_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be opened"):
        JsonlJournal(tmp_path)
    with pytest.raises(JournalError, match="cannot be opened: No such file"):
        JsonlJournal(tmp_path / "none" / "journal")
    with pytest.raises(SpecError, match="limit_bytes"):
        JsonlJournal(tmp_path / "j", limit_bytes=100)


def test_closing_frees_everything(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
    journal = JsonlJournal(path)
    journal.append(event(1))
    journal.close()
    journal.close()
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    for use in (lambda: journal.append(event(2)), journal.read):
        with pytest.raises(JournalError, match="is closed"):
            use()


@pytest.mark.anyio
async def test_closing_ends_followers(path: Path) -> None:
    journal = JsonlJournal(path)
    ended = []

    async def read() -> None:
        ended.extend([found.seq async for found in journal.follow()])
        ended.append(0)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            journal.append(event(1))
            await anyio.wait_all_tasks_blocked()
            journal.close()
    assert ended == [1, 0]


# ------------------------------------------------------------------------------------------------ compaction


def test_compaction_keeps_the_newest_half_and_the_states(path: Path) -> None:
    with JsonlJournal(path, limit_bytes=8192) as journal:
        state = journal.append(event(0, "state.fleet"))
        sizes = []
        for number in range(1000):
            journal.append(event(number))
            sizes.append(path.stat().st_size)
        assert max(sizes) <= 8192
        drops = [after for before, after in pairwise(sizes) if after < before]
        assert drops
        assert min(drops) > 3500  # half, less the grain of the index
        kept = journal.read()
    assert kept[0] == state
    assert [e.seq for e in kept[1:]] == list(range(kept[1].seq, 1002))
    with JsonlJournal(path, limit_bytes=8192) as again:
        assert again.read() == kept
        assert again.last_state("a", "state.fleet") == state
        for after in (0, 1, kept[1].seq - 2, kept[1].seq, 990, 1001):
            assert again.read(after=after) == [e for e in kept if e.seq > after]


def test_states_larger_than_the_limit_do_not_compact_at_each_append(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = jsonl_file.replace_file

    def counted(*args: Any, **options: Any) -> int:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(jsonl_file, "replace_file", counted)
    with JsonlJournal(path, limit_bytes=4096) as journal:
        for number in range(400):
            journal.append(event(number, "state.fleet", fleet=f"fleet-{number % 200}"))
        assert len(calls) < 20
        assert all(journal.last_state(f"fleet-{n}", "state.fleet") for n in range(200))


CRASHES = """
import os, sys
from pathlib import Path
from agentfleet.events import Event
from agentfleet.stores import jsonl_file, jsonl_journal

folder = Path(sys.argv[1])

def workload(path, acks):
    with jsonl_journal.JsonlJournal(path, limit_bytes=4096) as journal:
        for number in range(60):
            kind = "state.fleet" if number in (3, 40) else "k"
            found = journal.append(Event(1.0, "a", kind, data={"pad": "x" * 40, "number": number}))
            real_write(acks, b"%d\\n" % found.seq)

real_write, real_replace, real_truncate, real_unlink = os.write, Path.replace, os.ftruncate, Path.unlink

def crash_at(step, torn):
    left = [step]
    def armed(real, partial=False):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if torn and partial:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                elif torn:
                    real(*args, **kwargs)
                os._exit(9)
            return real(*args, **kwargs)
        return call
    os.write = armed(real_write, partial=True)
    Path.replace = armed(real_replace)
    Path.unlink = armed(real_unlink)
    os.ftruncate = armed(real_truncate)

for torn in (False, True):
    for step in range(1, 1000):
        place = folder / f"{step}-{torn}"
        place.mkdir()
        child = os.fork()
        if child == 0:
            acks = os.open(place / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            crash_at(step, torn)
            workload(place / "j", acks)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
    else:
        sys.exit("the workload never ended")
"""


@pytest.mark.integration
def test_a_crash_at_every_system_call_leaves_a_valid_journal(tmp_path: Path) -> None:
    """Before, after and halfway through every write, rename, truncation and removal, compaction included."""
    subprocess.run([sys.executable, "-c", CRASHES, str(tmp_path)], check=True, timeout=120)
    places = sorted(tmp_path.iterdir())
    assert len(places) > 100
    for place in places:
        acks = [int(line) for line in (place / "acks").read_text().split()]
        with JsonlJournal(place / "j", limit_bytes=4096) as journal:
            found = journal.read()
            seqs = [e.seq for e in found if e.kind != "journal.repaired"]
            last = acks[-1] if acks else 0
            assert seqs == sorted(set(seqs))
            assert (seqs[-1] if seqs else 0) in (last, last + 1), place.name
            history = [e.seq for e in found if not e.kind.startswith("state.")]
            assert set(range(history[0], last + 1)) <= {e.seq for e in found} if history else last <= 1
            state = journal.last_state("a", "state.fleet")
            assert (state.seq if state else 0) in (
                {0, 4} if last == 3 else {4, 41} if last == 40 else {0 if last < 4 else 4 if last < 41 else 41}
            )
            assert journal.append(event(1)).seq == found[-1].seq + 1 if found else True


WRITER = """
import sys
from agentfleet.events import Event
from agentfleet.stores.jsonl_journal import JsonlJournal
journal = JsonlJournal(sys.argv[1], limit_bytes=16384)
while True:
    print(journal.append(Event(1.0, "a", "k", data={"pad": "x" * 200})).seq, flush=True)
"""


@pytest.mark.integration
def test_kill_9_loses_nothing_that_was_acknowledged(path: Path) -> None:
    last = 0
    for enough in (1, 50, 400):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        with writer, writer.stdout:
            first = int(writer.stdout.readline())
            assert first == last + 1 or first == last + 2  # one more may have been written than told
            for line in writer.stdout:
                if int(line) >= first + enough:
                    break
            writer.send_signal(signal.SIGKILL)
            rest = [line for line in writer.stdout if line.endswith("\n")]
        told = int(rest[-1]) if rest else first + enough
        with JsonlJournal(path, limit_bytes=16384) as journal:
            last = journal.read()[-1].seq
            assert last >= told


@pytest.mark.integration
def test_two_processes_cannot_write_one_journal(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer, writer.stdout:
        writer.stdout.readline()
        with pytest.raises(JournalError, match=f"is being written by process {writer.pid} on "):
            JsonlJournal(path)
        writer.kill()
        writer.wait()
        JsonlJournal(path).close()


def test_one_process_cannot_open_a_journal_twice(path: Path) -> None:
    with JsonlJournal(path), pytest.raises(JournalError, match=f"process {os.getpid()}"):
        JsonlJournal(path)
    JsonlJournal(path).close()


# ------------------------------------------------------------------------------------------------ full disks


def test_a_full_disk_is_an_error_and_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    room = [0]

    def short(fd: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with JsonlJournal(path) as journal:
        journal.append(event(1))
        monkeypatch.setattr(os, "write", short)
        with pytest.raises(JournalError, match="No space left"):
            journal.append(event(2))
        room[0] = 10
        with pytest.raises(JournalError, match=r"took only 10 of \d+ bytes: is the disk full"):
            journal.append(event(2))
        monkeypatch.setattr(os, "ftruncate", refuse)
        room[0] = 10
        with pytest.raises(JournalError, match="took only 10"):
            journal.append(event(2))
        room[0] = 1000
        with pytest.raises(JournalError, match="cannot be written"):
            journal.append(event(2))
        monkeypatch.undo()
        assert journal.append(event(3)).seq == 2
    with JsonlJournal(path) as again:
        assert [e.at for e in again.read()] == [1.0, 3.0]


def refuse(*args: object, **options: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_failing_compaction_is_noted_and_the_record_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with JsonlJournal(path, limit_bytes=4096) as journal:
        monkeypatch.setattr(Path, "replace", refuse)
        for number in range(120):
            journal.append(event(number))
        found = journal.read()
        failed = [e for e in found if e.kind == "journal.compaction_failed"]
        assert 1 <= len(failed) <= 10
        assert "Input/output error" in failed[0].data["error"]
        assert [e.seq for e in found] == list(range(1, len(found) + 1))
        assert not path.with_name("journal.jsonl.compact").exists()
        monkeypatch.undo()
        for number in range(60):
            journal.append(event(number))
        assert path.stat().st_size <= 4096


def test_a_failing_fsync_says_so_and_burns_the_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with JsonlJournal(path, fsync=True) as journal:
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(JournalError, match="event 1 is written but may not survive a power loss"):
            journal.append(event(1))
        monkeypatch.undo()
        assert journal.append(event(2)).seq == 2


def test_an_event_too_large_for_the_file_is_refused(path: Path) -> None:
    with JsonlJournal(path, limit_bytes=4096) as journal:
        with pytest.raises(JournalError, match="more than a quarter"):
            journal.append(Event(1.0, "a", "k", data={"pad": "x" * 2000}))
        assert journal.append(event(1)).seq == 1


# ------------------------------------------------------------------------------------------------ tailing


class Script:
    """A clock on which each wait is the writer's turn; after the last turn the reader has waited for nothing."""

    def __init__(self, turns: Iterator[object]) -> None:
        self.turns = turns
        self.slept: list[float] = []

    def now(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        try:
            next(self.turns)
        except StopIteration:
            raise EndOfScript from None


class EndOfScript(Exception):
    """The writer has had its last turn."""


async def read_all(tail: JournalTail) -> list[int]:
    seqs: list[int] = []
    with pytest.raises(EndOfScript):
        await drain(tail, seqs)
    await tail.aclose()
    return seqs


async def drain(tail: JournalTail, seqs: list[int]) -> None:
    async for found in tail:
        seqs.append(found.seq)  # noqa: PERF401 - what came before an error counts


def tailing(path: Path, writer: Callable[[], Iterator[object]], **options: Any) -> JournalTail:
    return JsonlJournal.tail(path, clock=Script(writer()), **options)


@pytest.mark.anyio
async def test_tail_waits_for_the_file_and_follows_it_through_compactions(path: Path) -> None:
    def writer() -> Iterator[None]:
        yield
        yield
        with JsonlJournal(path, limit_bytes=4096) as journal:
            for number in range(300):
                for _ in range(number % 7):
                    journal.append(event(number))
                yield

    assert await read_all(tailing(path, writer)) == list(range(1, sum(n % 7 for n in range(300)) + 1))


@pytest.mark.anyio
async def test_tail_reads_only_whole_lines_and_survives_a_repair(path: Path) -> None:
    def writer() -> Iterator[None]:
        fill(path, 2)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length]) if length < 3 else path.open("ab").close()
            yield
        path.write_bytes(whole + whole[:20])
        yield
        fill(path, 1)  # the next opening cuts the torn line off
        yield

    assert await read_all(tailing(path, writer)) == [1, 2, 3, 4]


@pytest.mark.anyio
async def test_tail_selects(path: Path) -> None:
    with JsonlJournal(path) as journal:
        for number in range(10):
            journal.append(event(number, fleet="ab"[number % 2]))
    async with JsonlJournal.tail(path, fleet="b", after=4, follow=False) as tail:
        assert [found.seq async for found in tail] == [6, 8, 10]
    async with JsonlJournal.tail(path, follow=False) as tail:
        assert [found.seq async for found in tail] == list(range(1, 11))
    async with JsonlJournal.tail(path.with_name("none"), follow=False) as tail:
        assert [found.seq async for found in tail] == []
    with pytest.raises(SpecError, match="period"):
        JsonlJournal.tail(path, period=0)


@pytest.mark.anyio
async def test_tail_reads_lines_longer_than_its_buffer(path: Path) -> None:
    with JsonlJournal(path) as journal:
        journal.append(Event(1.0, "a", "k", data={"pad": "x" * 1_000_000}))
        journal.append(event(2))
    async with JsonlJournal.tail(path, follow=False) as tail:
        assert [found.seq async for found in tail] == [1, 2]


@pytest.mark.anyio
async def test_tail_says_what_it_missed_and_goes_on(path: Path) -> None:
    def writer() -> Iterator[None]:
        with JsonlJournal(path, limit_bytes=4096) as journal:
            journal.append(event(1, "state.fleet"))
            yield
            for number in range(500):
                journal.append(event(number))
            yield

    tail = tailing(path, writer)
    seqs: list[int] = []
    with pytest.raises(JournalError, match=r"trimmed before it read events \d+ to"):
        await drain(tail, seqs)
    rest = await read_all(tail)
    assert rest == list(range(rest[0], 502))
    assert seqs == list(range(1, len(seqs) + 1))


def damage_second_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])


@pytest.mark.anyio
async def test_tail_names_damage_and_goes_on(path: Path) -> None:
    fill(path, 3)
    damage_second_line(path)
    async with JsonlJournal.tail(path, follow=False) as tail:
        assert (await tail.__anext__()).seq == 1
        with pytest.raises(JournalError, match="not a journal line"):
            await tail.__anext__()
        assert [found.seq async for found in tail] == [3]


@pytest.mark.anyio
async def test_tail_names_what_it_cannot_read(tmp_path: Path) -> None:
    async with JsonlJournal.tail(tmp_path) as tail:
        with pytest.raises(JournalError, match="cannot be read: Is a directory"):
            await tail.__anext__()
