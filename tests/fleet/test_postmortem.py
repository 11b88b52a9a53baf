"""What `RolloutFailed` says: how many failed, how the last one did, and what it wrote."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

import anyio
import pytest
from tests.fleet.world import World, spec

from agentfleet import BackendUnavailable, Event, RecoveryPolicy, RolloutFailed, RolloutPolicy
from agentfleet.postmortem import Postmortem
from agentfleet.testing import virtual

Logs = Callable[[str], Awaitable[Sequence[str]]]
READY = RolloutPolicy(min_ready=20.0)


async def failure(world: World, version: str = "bad") -> str:
    async with world.deployed() as fleet:
        with pytest.raises(RolloutFailed) as caught:
            await fleet.upgrade(version)
        return str(caught.value)


@virtual
async def test_a_crash_is_told_with_its_code_and_its_last_line() -> None:
    """The message counts the failures and names the last instance, its exit code and its last line."""
    world = World(spec(rollout=READY))
    world.backend.behave(version="bad", crash_after=1.0, exit_code=17)
    message = await failure(world)
    assert "revision 2 could not be rolled out: 3 new instances turned sick or exited" in message
    assert re.search(r"for example a-\d+-\w+ exited with code 17, its last line: '.* exited with 17'", message)
    assert message.endswith("the fleet runs revision 1 (1)")


@virtual
async def test_sickness_is_told_with_its_reason() -> None:
    world = World(spec(rollout=RolloutPolicy(min_ready=60.0)))
    world.backend.behave(version="bad", unhealthy_after=3.0)
    assert "turned unhealthy (" in await failure(world)


@virtual
async def test_a_refused_creation_is_told_with_what_the_backend_said() -> None:
    world = World(spec(4, rollout=RolloutPolicy(max_unavailable=0)))
    async with world.deployed() as fleet:
        world.faults.refuse(times=9, actions=("create",), reason="no such image")
        with pytest.raises(RolloutFailed, match=r"last failed action: create of a-\d+-\w+: .*no such image"):
            await fleet.upgrade("2")
        world.faults.clear()


@virtual
async def test_a_revision_that_recovery_gives_up_says_so() -> None:
    """A rollout that recovery ends is not blamed on somebody who asked for another revision."""
    rollout = RolloutPolicy(min_ready=300.0, max_failed=50)
    recovery = RecoveryPolicy(restarts=0, replacements=0, elsewhere=0, settle=10.0)
    world = World(spec(4, rollout=rollout, recovery=recovery))
    world.backend.behave(version="bad", unhealthy_after=3.0)
    message = await failure(world)
    assert world.events("recovery.roll_back")
    assert "another revision was asked for" not in message


@virtual
async def test_why_is_told_without_reading_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of an explanation does not grow with the history."""
    world = World(spec(4, rollout=READY))
    world.backend.behave(version="bad", crash_after=1.0)
    async with world.deployed() as fleet:
        monkeypatch.setattr(world.journal, "read", None)
        with pytest.raises(RolloutFailed, match="exited with code 1"):
            await fleet.upgrade("bad")
        monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ alone


async def nothing(id: str) -> Sequence[str]:
    return ()


def told(kind: str, data: dict[str, object], instance: str | None = None, why: str = "") -> Event:
    return Event(0.0, "a", kind, instance, data, ({"text": why},) if why else ())


def exited(revision: int, code: int, instance: str = "a-1") -> Event:
    return told("instance.exited", {"revision": revision, "exit_code": code}, instance)


def book_of(rolling: int | None = 2, logs: Logs = nothing) -> Postmortem:
    return Postmortem(lambda: rolling, lambda _: 2, logs)


@virtual
async def test_logs_that_cannot_be_had_are_left_out() -> None:
    """An error is told without a last line when the backend fails, says nothing, or takes too long."""

    async def fails(id: str) -> Sequence[str]:
        raise BackendUnavailable("down")

    async def breaks(id: str) -> Sequence[str]:
        raise KeyError(id)

    async def hangs(id: str) -> Sequence[str]:
        await anyio.sleep_forever()
        raise AssertionError

    async def blank(id: str) -> Sequence[str]:
        return ("", "  ")

    for logs in (nothing, fails, breaks, hangs, blank):
        book = book_of(2, logs)
        async with anyio.create_task_group() as tasks:
            book.bind(tasks)
            book.note(exited(2, 3))
            book.note(told("rollout.failed", {"revision": 2}, why="too many"))
            assert await book.explain(2) == "too many; for example a-1 exited with code 3"


@virtual
async def test_of_many_failures_at_once_one_is_read() -> None:
    """A thousand instances that exit together are not a thousand requests for output."""
    asked: list[str] = []

    async def logs(id: str) -> Sequence[str]:
        asked.append(id)
        await anyio.sleep(0.1)
        return ("begin", "boom", "")

    book = book_of(2, logs)
    async with anyio.create_task_group() as tasks:
        book.bind(tasks)
        for number in range(1000):
            book.note(exited(2, 1, f"a-{number}"))
        book.note(told("rollout.failed", {"revision": 2}, why="too many"))
        assert await book.explain(2) == "too many; for example a-0 exited with code 1, its last line: 'boom'"
    assert asked == ["a-0"]


@virtual
async def test_only_the_rollouts_own_failures_are_told() -> None:
    """What failed before it began, or of another revision, is not its cause; the first verdict stands."""
    book = book_of(2)
    book.note(exited(2, 1))
    book.note(told("rollout.started", {"revision": 2}))
    assert await book.explain(2) is None
    book.note(exited(1, 1))
    book.note(told("rollout.failed", {"revision": 2}, why="no progress"))
    book.note(told("rollout.rolled_back", {"from": 2, "to": 1}, why="recovery"))
    assert await book.explain(2) == "no progress"
    assert await book.explain(1) is None
    idle = book_of(None)
    idle.note(exited(2, 1))
    idle.note(told("action.failed", {"action": "stop", "message": "no"}, "a-1"))
    idle.note(told("rollout.rolled_back", {"from": 2, "to": 1}, why="recovery"))
    assert await idle.explain(2) == "recovery"


@virtual
async def test_what_is_remembered_is_bounded() -> None:
    """However many revisions fail, the newest few are remembered, in few words each."""
    revision = 0
    book = Postmortem(lambda: revision, lambda _: revision, nothing)
    for revision in range(1000):
        book.note(exited(revision, 1))
        book.note(told("action.failed", {"action": "create", "message": "x" * 100_000}, "a-1"))
        book.note(told("rollout.failed", {"revision": revision}, why="no"))
    assert len(book._cases) <= 16
    assert "code 1" in str(await book.explain(999))
    assert await book.explain(1) is None
    assert len(str(await book.explain(999))) < 1000
