"""Calls that are waited for no longer than a deadline, whatever the server does."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
import pytest

from agentfleet.errors import JournalError
from agentfleet.events import Event
from agentfleet.stores.sql import SqlJournal
from agentfleet.stores.sql.bounded import Bounded
from agentfleet.testing.postgres import Postgres

SHORT = 0.2


class Line:
    """A session with a server that answers when it is let."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.dropped = threading.Event()

    def ask(self) -> str:
        aborted = self._server.opened(self)
        while not self._server.answers.wait(0.01):
            if aborted.is_set():
                raise ConnectionError("broken off")
        return "answer"

    def probe(self) -> None:
        self.ask()

    def abort(self) -> None:
        self._server.opened(self).set()

    def drop(self) -> None:
        self.dropped.set()


class Server:
    """What a `Line` leads to."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self._aborted: dict[Line, threading.Event] = {}

    def opened(self, line: Line) -> threading.Event:
        return self._aborted.setdefault(line, threading.Event())

    @property
    def lines(self) -> list[Line]:
        return list(self._aborted)


def until(so: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    ended = threading.Event()
    for _ in range(3000):
        if so():
            return
        ended.wait(0.01)
    raise AssertionError("it did not come to be")


def works(bounded: Bounded[Line]) -> bool:
    try:
        return bounded.call(Line.ask) == "answer"
    except JournalError:
        return False


def test_one_call_waits_and_the_next_ones_are_refused_until_the_server_answers() -> None:
    server = Server()
    bounded = Bounded(lambda: Line(server), timeout=SHORT, pause=0.01)
    with pytest.raises(JournalError, match="within 0.2 s; whether it has done what it was asked is unknown"):
        bounded.call(Line.ask)
    asked = len(server.lines)
    with pytest.raises(JournalError, match="the database does not answer"):
        bounded.call(lambda line: pytest.fail(f"{line} was asked"))
    until(server.lines[0].dropped.is_set)  # its thread was woken, and has let go
    until(lambda: len(server.lines) > asked)  # the server is probed
    server.answers.set()
    until(lambda: works(bounded))
    last = server.lines[-1]
    bounded.close()
    assert last.dropped.is_set()


def test_what_a_call_raises_is_its_callers() -> None:
    server = Server()
    server.answers.set()
    bounded = Bounded(lambda: Line(server), timeout=30.0)

    def fail(_: Line) -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        bounded.call(fail)
    assert works(bounded), "nothing was broken off"
    bounded.close()
    with pytest.raises(JournalError):
        bounded.call(Line.ask)


def test_a_closed_one_probes_no_more() -> None:
    server = Server()
    bounded = Bounded(lambda: Line(server), timeout=SHORT, pause=0.01)
    with pytest.raises(JournalError):
        bounded.call(Line.ask)
    bounded.close()
    server.answers.set()
    until(lambda: not any(each.name == "database probe" for each in threading.enumerate()))
    with pytest.raises(JournalError):
        bounded.call(Line.ask)


@pytest.mark.integration
@pytest.mark.anyio
async def test_a_server_that_is_paused_holds_up_no_event_loop() -> None:
    """A disk that stalls looks the same: the kernel acknowledges, and nobody answers."""
    with Postgres() as server, SqlJournal(server.database(), timeout=0.5) as journal:
        journal.append(Event(0.0, "f", "a.b"))
        seen: list[int] = []
        beats = 0

        async def follow() -> None:
            follower = journal.follow()
            while True:
                try:
                    async for event in follower:
                        seen.append(event.seq)  # noqa: PERF401 - one after the other
                except JournalError:
                    await anyio.sleep(0.01)

        async def beat() -> None:
            nonlocal beats
            while True:
                await anyio.sleep(0.01)
                beats += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            tasks.start_soon(beat)
            while seen != [1]:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            with server.paused():
                with pytest.raises(JournalError, match="did not answer within 0.5 s"):
                    journal.append(Event(0.0, "f", "a.b"))
                with pytest.raises(JournalError, match="does not answer"):
                    journal.append(Event(0.0, "f", "a.b"))
                before = beats
                while beats < before + 100:  # noqa: ASYNC110 - the loop goes round while the follower cannot read
                    await anyio.sleep(0.01)
            last = 0
            with anyio.fail_after(30):
                while not last:
                    try:
                        last = journal.append(Event(0.0, "f", "c.d")).seq
                    except JournalError:
                        await anyio.sleep(0.01)
                while seen[-1] != last:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert seen == sorted(set(seen)), "nothing twice"
            tasks.cancel_scope.cancel()
