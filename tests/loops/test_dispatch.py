"""The dispatcher: in virtual time over invented agents, and over real ones."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent.helpers import AgentProcess, running

from agentfleet.clock import SystemClock
from agentfleet.dispatch import Dispatcher, Result
from agentfleet.dispatch import record as record_module
from agentfleet.errors import DeadlineExceeded, JournalError, OperationRefused, SpecError
from agentfleet.events import Event
from agentfleet.signals.http import HttpClient, HttpError, Response
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.testing import run_virtual, virtual

HOLD = {"hold": True}


@dataclass(frozen=True)
class Spot:
    """Where an invented agent answers."""

    address: str
    token: str | None = None


class Invented:
    """An agent as the wire shows it: joins, keeps answers, refuses; `hold` tasks end when told."""

    def __init__(self, id: str, capacity: int, token: str | None) -> None:
        self.id = id
        self.capacity = capacity
        self.token = token
        self.alive = True
        self.draining = False
        self.kept: dict[str, bytes] = {}
        self.running: dict[str, list[anyio.Event]] = {}
        self.begun: list[tuple[str, int]] = []

    def finish(self, task: str, *, ok: bool = True) -> None:
        outcome = {"ok": True, "result": f"{task}@{self.id}"} if ok else {"ok": False, "cause": "no", "error": "nope"}
        self.kept[task] = json.dumps({"id": task, **outcome}).encode()
        for waiter in self.running.pop(task):
            waiter.set()

    def die(self) -> None:
        self.alive = False
        self.hang_up()
        self.running.clear()

    def hang_up(self) -> None:
        for waiters in self.running.values():
            while waiters:
                waiters.pop().set()

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> Response:
        if not self.alive:
            raise HttpError("refused", sent=False)
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return Response(401, {}, b"{}")
        data = json.loads(body)
        task, payload = data["id"], data["payload"]
        if task not in self.kept and task not in self.running:
            if data.get("resume"):
                return Response(404, {}, b'{"error":"unknown"}')
            if self.draining:
                return Response(503, {}, b'{"error":"draining"}')
            if len(self.running) >= self.capacity:
                return Response(429, {"retry-after": "2"}, b'{"error":"busy"}')
            self.running[task] = []
            self.begun.append((task, data["attempt"]))
            match payload:
                case {"kill": True}:
                    self.die()
                    raise HttpError("reset")
                case {"fail": True}:
                    self.finish(task, ok=False)
                case {"hold": True}:
                    pass
                case _:
                    self.finish(task)
        if task not in self.kept:
            waiter = anyio.Event()
            self.running[task].append(waiter)
            await waiter.wait()
            if task not in self.kept:
                raise HttpError("reset")
        return Response(200, {}, self.kept[task])


class World:
    """Endpoints and HTTP at once: a fleet whose agents do as the test says."""

    def __init__(self, *ids: str, capacity: int = 100, token: str | None = None) -> None:
        self.agents: dict[str, Invented] = {}
        self.serving: dict[str, Spot] = {}
        self.existing: set[str] = set()
        self.token = token
        self.capacity = capacity
        self._changed = anyio.Event()
        for id in ids:
            self.add(id)

    def __iter__(self) -> Iterator[str]:
        return iter(self.serving)

    def __getitem__(self, id: str) -> Spot:
        return self.serving[id]

    def exists(self, id: str) -> bool:
        return id in self.existing

    async def changed(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def add(self, id: str) -> None:
        self.agents.setdefault(id, Invented(id, self.capacity, self.token))
        self.serving[id] = Spot(f"{id}:1", self.token)
        self.existing.add(id)
        self._notify()

    def leave(self, id: str) -> None:
        self.serving.pop(id, None)
        self._notify()

    def remove(self, id: str) -> None:
        self.existing.discard(id)
        self.leave(id)

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        assert (method, path) == ("POST", "/tasks")
        with anyio.move_on_after(timeout):
            return await self.agents[address.removesuffix(":1")].answer(body or b"", headers or {})
        raise DeadlineExceeded("late")

    @property
    def begun(self) -> list[tuple[str, str, int]]:
        return [(id, task, attempt) for id, agent in self.agents.items() for task, attempt in agent.begun]


def dispatcher(world: World, journal: Any = None, **options: Any) -> Dispatcher:
    journal = MemoryJournal() if journal is None else journal
    return Dispatcher(world, http=world, clock=SystemClock(0.0), journal=journal, fleet="f", **options)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(600):
        while not condition():  # noqa: ASYNC110  the condition is another party's, who sets no event
            await anyio.sleep(0.01)


def kinds(journal: MemoryJournal, task: str) -> list[str]:
    return [event.kind.removeprefix("task.") for event in journal.read() if event.data.get("id") == task]


# ------------------------------------------------------------------------------------------------ sending


@virtual
async def test_a_task_goes_where_the_fewest_are_in_flight() -> None:
    world = World("a", "b", "c")
    async with dispatcher(world, per_instance=4) as sender:
        for number in range(9):
            sender.submit_nowait(f"t{number}", HOLD)
        await until(lambda: len(world.begun) == 9)
        assert [sender.in_flight(id) for id in "abc"] == [3, 3, 3]
        for task in list(world.agents["b"].running):
            world.agents["b"].finish(task)
        await until(lambda: sender.in_flight("b") == 0)
        sender.submit_nowait("next", HOLD)
        assert sender.in_flight("b") == 1
        for number in range(10):
            sender.submit_nowait(f"more{number}", HOLD)
        await until(lambda: len(world.begun) == 9 + 1 + 5)
        assert [sender.in_flight(id) for id in "abc"] == [4, 4, 4]
        assert (sender.depth, sender.waiting) == (17, 5)


@virtual
async def test_an_answer_is_the_result() -> None:
    world, journal = World("a"), MemoryJournal()
    async with dispatcher(world, journal) as sender:
        result = await sender.submit("t", {"x": 1})
        assert result == Result("t", ok=True, value="t@a", instance="a")
        assert kinds(journal, "t") == ["submitted", "assigned", "completed"]
        assert await sender.submit("t", "whatever") == result, "an id that has ended is not run again"
        assert sender.depth == 0
    assert world.begun == [("a", "t", 1)]


@virtual
async def test_waiting_tasks_are_sent_as_instances_come() -> None:
    world = World()
    async with dispatcher(world) as sender:
        tasks = [sender.submit_nowait(f"t{number}", None) for number in range(5)]
        await anyio.sleep(100)
        assert sender.waiting == 5
        world.add("a")
        for task in tasks:
            assert (await task.result()).ok
    assert [task for _, task, _ in world.begun] == [f"t{number}" for number in range(5)], "in order"


@virtual
async def test_only_so_many_tasks_are_open() -> None:
    world = World("a")
    async with dispatcher(world, max_open=2, per_instance=2) as sender, anyio.create_task_group() as group:
        for number in range(2):
            sender.submit_nowait(f"t{number}", HOLD)
        with pytest.raises(OperationRefused, match="2 tasks are open"):
            sender.submit_nowait("t2", None)
        with anyio.move_on_after(1):
            await sender.submit("impatient", None)
        group.start_soon(sender.submit, "t3", HOLD)
        await until(lambda: len(world.begun) == 2)
        assert sender.depth == 2
        world.agents["a"].finish("t0")
        await until(lambda: ("a", "t3", 1) in world.begun)
        world.agents["a"].finish("t3")
        world.agents["a"].finish("t1")


@virtual
async def test_what_cannot_be_sent_is_not_taken() -> None:
    journal = MemoryJournal()
    async with dispatcher(World(), journal) as sender:
        for id, payload in [("", 1), ("a\nb", 1), ("x" * 257, 1), ("t", object()), ("t", float("nan"))]:
            with pytest.raises(SpecError):
                sender.submit_nowait(id, payload)
        assert (sender.depth, journal.read()) == (0, [])


@pytest.mark.parametrize("limit", ["per_instance", "max_attempts", "max_kills", "max_open", "keep", "timeout"])
@virtual
async def test_limits_must_make_sense(limit: str) -> None:
    for wrong in (0, -1, "many", True, None, float("nan")):
        with pytest.raises(SpecError, match=limit):
            dispatcher(World(), **{limit: wrong})


# ------------------------------------------------------------------------------------------------ refusals and failures


@virtual
async def test_a_busy_instance_is_left_alone_and_the_task_goes_on() -> None:
    world, journal = World("a", capacity=1), MemoryJournal()
    world.agents["a"].running["foreign"] = []
    async with dispatcher(world, journal) as sender:
        task = sender.submit_nowait("t", None)
        await until(lambda: "retried" in kinds(journal, "t"))
        world.add("b")
        assert (await task.result()).instance == "b"
        world.leave("b")
        start = anyio.current_time()
        late = sender.submit_nowait("u", None)
        await anyio.sleep(1)
        world.agents["a"].finish("foreign")
        assert (await late.result()).attempt == 1, "a refusal is no attempt"
        assert anyio.current_time() - start <= 4.1, "asked again after what Retry-After said"


@virtual
async def test_a_draining_instance_hands_the_task_back() -> None:
    world = World("a")
    world.agents["a"].draining = True
    async with dispatcher(world) as sender:
        task = sender.submit_nowait("t", None)
        await anyio.sleep(0.5)
        world.add("b")
        assert (await task.result()) == Result("t", ok=True, value="t@b", instance="b")


@virtual
async def test_nobody_listening_is_no_attempt() -> None:
    world = World("a", "b")
    world.agents["a"].alive = False
    async with dispatcher(world) as sender:
        assert await sender.submit("t", None) == Result("t", ok=True, value="t@b", instance="b")


@virtual
async def test_an_agents_own_failure_is_final_unless_more_attempts_are_asked_for() -> None:
    world = World("a", "b")
    async with dispatcher(world) as sender:
        result = await sender.submit("t", {"fail": True})
        assert (result.ok, result.cause, result.error, result.attempt) == (False, "no", "nope", 1)
    async with dispatcher(world, max_attempts=2) as sender:
        result = await sender.submit("u", {"fail": True})
        assert (result.ok, result.attempt) == (False, 2)
    assert len({id for id, task, _ in world.begun if task == "u"}) == 2, "another instance is preferred"


@virtual
async def test_an_attempt_that_takes_too_long_has_failed_and_is_not_run_again() -> None:
    world = World("a", "b")
    async with dispatcher(world, timeout=10.0, max_attempts=5) as sender:
        result = await sender.submit("t", HOLD)
    assert (result.ok, result.cause) == (False, "timeout")
    assert len(world.begun) == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"[" * 100_000, b'{"id":"other","ok":true}', b'{"id":"t","ok":1}'])
@virtual
async def test_an_answer_that_makes_no_sense_is_a_failure(body: bytes) -> None:
    world = World("a")
    world.agents["a"].kept["t"] = body
    async with dispatcher(world) as sender:
        assert (await sender.submit("t", None)).cause == "bad-answer"


# ------------------------------------------------------------------------------------------------ death


@virtual
async def test_a_task_is_handed_on_when_its_instance_dies() -> None:
    world, journal = World("a"), MemoryJournal()
    async with dispatcher(world, journal) as sender:
        task = sender.submit_nowait("t", HOLD)
        await until(lambda: world.begun)
        world.add("b")
        world.agents["a"].die()
        await until(lambda: ("b", "t", 2) in world.begun)
        world.agents["b"].finish("t")
        assert await task.result() == Result("t", ok=True, value="t@b", attempt=2, instance="b")
        assert kinds(journal, "t") == ["submitted", "assigned", "retried", "assigned", "completed"]


@virtual
async def test_a_broken_connection_is_not_a_dead_instance() -> None:
    world = World("a", "b")
    async with dispatcher(world) as sender:
        task = sender.submit_nowait("t", HOLD)
        await until(lambda: world.begun)
        world.agents["a"].hang_up()
        await until(lambda: world.agents["a"].running["t"])
        world.agents["a"].finish("t")
        assert (await task.result()).attempt == 1
    assert len(world.begun) == 1


@virtual
async def test_an_instance_that_leaves_is_awaited() -> None:
    world = World("a", "b")
    async with dispatcher(world) as sender:
        task = sender.submit_nowait("t", HOLD)
        await until(lambda: world.begun)
        world.leave("a")
        await anyio.sleep(100)
        assert (await sender.submit("u", None)).instance == "b"
        world.agents["a"].finish("t")
        assert (await task.result()).instance == "a"


@virtual
async def test_an_instance_that_is_gone_is_not() -> None:
    world, journal = World("a"), MemoryJournal()
    async with dispatcher(world, journal) as sender:
        task = sender.submit_nowait("t", HOLD)
        await until(lambda: world.begun)
        world.leave("a")
        world.remove("a")  # its connection stays silent, as that of an unplugged machine does
        world.add("b")
        await until(lambda: ("b", "t", 2) in world.begun)
        world.agents["b"].finish("t")
        assert (await task.result()).instance == "b"
        world.agents["a"].finish("t")
        await until(lambda: kinds(journal, "t")[-1] == "duplicate")
        assert kinds(journal, "t").count("completed") == 1


@virtual
async def test_a_late_answer_that_comes_first_counts() -> None:
    world, journal = World("a"), MemoryJournal()
    async with dispatcher(world, journal) as sender:
        task = sender.submit_nowait("t", HOLD)
        await until(lambda: world.begun)
        world.remove("a")
        await until(lambda: sender.waiting == 1)
        world.agents["a"].finish("t")
        assert (await task.result()).instance == "a"
        world.add("b")
        assert (await sender.submit("u", None)).ok
        assert kinds(journal, "t") == ["submitted", "assigned", "retried", "completed"]
    assert ("b", "t", 2) not in world.begun


@virtual
async def test_a_poisonous_task_is_quarantined() -> None:
    world, journal = World(*"abcde"), MemoryJournal()
    async with dispatcher(world, journal) as sender:
        result = await sender.submit("t", {"kill": True})
        assert (result.ok, result.cause, result.attempt) == (False, "quarantined", 3)
        assert result.error is not None
        assert result.error.startswith("task t was with 3 instances that died: ")
        assert (await sender.submit("u", None)).ok
    assert sum(agent.alive for agent in world.agents.values()) == 2
    assert kinds(journal, "t")[-1] == "quarantined"


# ------------------------------------------------------------------------------------------------ recovery


@virtual
async def test_a_restarted_dispatcher_loses_and_repeats_nothing() -> None:
    world, journal = World("a", "b"), MemoryJournal()
    async with dispatcher(world, journal) as first:
        assert (await first.submit("done", None)).ok
        for id in ("answered", "running", "waiting-1", "waiting-2"):
            first.submit_nowait(id, HOLD)
        await until(lambda: len(world.begun) == 3)
        orphan = first.submit_nowait("waiting-3", None)
    with pytest.raises(OperationRefused, match="closed"):
        await orphan.result()
    for agent in world.agents.values():
        agent.hang_up()
        if "answered" in agent.running:
            agent.finish("answered")  # while nobody listens
    async with dispatcher(world, journal) as second:
        assert await second.recover() == 5
        assert await second.recover() == 0
        assert (await second.submit("done", None)).value == "done@a"
        assert (await second.submit("answered", HOLD)).ok
        for id in ("running", "waiting-1", "waiting-2"):
            await until(lambda task=id: any(task in agent.running for agent in world.agents.values()))  # type: ignore[misc]
            next(agent for agent in world.agents.values() if id in agent.running).finish(id)
            assert (await second.submit(id, HOLD)).attempt == 1
        assert (await second.submit("waiting-3", None)).ok
        assert second.depth == 0
    assert max(Counter(task for _, task, _ in world.begun).values()) == 1


@virtual
async def test_recovery_hands_on_what_was_with_an_instance_that_is_gone() -> None:
    world, journal = World("a", "b"), MemoryJournal()
    async with dispatcher(world, journal) as first:
        first.submit_nowait("gone", HOLD)
        first.submit_nowait("restarted", HOLD)
        await until(lambda: len(world.begun) == 2)
    world.remove("a")
    world.agents["b"] = Invented("b", 10, None)  # restarted in place: the same id, another process
    async with dispatcher(world, journal, per_instance=2) as second:
        await second.recover()
        for id in ("gone", "restarted"):
            await until(lambda task=id: task in world.agents["b"].running)  # type: ignore[misc]
            world.agents["b"].finish(id)
            assert (await second.submit(id, HOLD)).attempt == 2


@virtual
async def test_recovery_waits_for_an_instance_that_it_may_not_ask() -> None:
    world, journal = World("a", token="sesame"), MemoryJournal()
    async with dispatcher(world, journal) as first:
        first.submit_nowait("t", HOLD)
        first.submit_nowait("u", HOLD)
        await until(lambda: world.begun)
    world.agents["a"].hang_up()
    world.leave("a")
    async with dispatcher(world, journal) as second:
        await second.recover()
        await anyio.sleep(10)
        world.add("b")
        await until(lambda: ("b", "u", 1) in world.begun)
        world.add("a")
        await until(lambda: world.agents["a"].running["t"])
        world.agents["a"].finish("t")
        assert (await second.submit("t", HOLD)).instance == "a"
    assert len(world.begun) == 2


@virtual
async def test_recovery_needs_no_more_history_than_is_kept() -> None:
    world, journal = World("a"), MemoryJournal(limit=200)
    before = record_module._CHECKPOINT_EVERY
    record_module._CHECKPOINT_EVERY = 20
    try:
        async with dispatcher(world, journal, per_instance=2) as first:
            first.submit_nowait("old", {"hold": True, "text": "é\ud800"})
            await until(lambda: world.begun)
            for number in range(500):
                await first.submit(f"t{number}", None)
        assert not any(event.data.get("id") == "old" for event in journal.read())
        async with dispatcher(world, journal) as second:
            assert await second.recover() == 1
            await until(lambda: second.in_flight("a") == 1)
            world.agents["a"].finish("old")
            assert (await second.submit("old", None)).attempt == 1
    finally:
        record_module._CHECKPOINT_EVERY = before


@virtual
async def test_a_large_result_is_not_journaled() -> None:
    world, journal = World("a"), MemoryJournal()
    world.agents["a"].kept["t"] = json.dumps({"id": "t", "ok": True, "result": "x" * 100_000}).encode()
    async with dispatcher(world, journal) as first:
        assert len((await first.submit("t", None)).value) == 100_000
    async with dispatcher(world, journal) as second:
        await second.recover()
        result = await second.submit("t", None)
        assert (result.ok, result.cause) == (True, "result-not-kept")


@virtual
async def test_a_journal_that_makes_no_sense_stops_the_recovery() -> None:
    journal = MemoryJournal()
    journal.append(Event(0.0, "f", "task.submitted", None, {"payload": 1}))
    async with dispatcher(World(), journal) as sender:
        with pytest.raises(JournalError, match="event 1 "):
            await sender.recover()


class Failing(MemoryJournal):
    """A journal that takes events until it is broken."""

    broken = False

    def append(self, event: Event) -> Event:
        if self.broken:
            raise JournalError("disk full")
        return super().append(event)


@virtual
async def test_what_cannot_be_recorded_does_not_happen() -> None:
    world, journal = World("a"), Failing()
    with pytest.raises(ExceptionGroup) as caught:
        async with dispatcher(world, journal) as sender:
            sender.submit_nowait("t", HOLD)
            await until(lambda: world.begun)
            journal.broken = True
            with pytest.raises(JournalError):
                sender.submit_nowait("u", None)
            assert sender.depth == 1
            world.agents["a"].finish("t")
            await anyio.sleep_forever()
    assert caught.value.subgroup(JournalError) is not None


@virtual
async def test_the_bodys_own_error_passes_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with dispatcher(World()) as sender:
            sender.submit_nowait("t", None)
            raise KeyError
    with pytest.raises(OperationRefused):
        sender.submit_nowait("t", None)


# ------------------------------------------------------------------------------------------------ chaos


def _disturb(world: World, rng: random.Random) -> None:
    """Something happens to the fleet."""
    alive = sorted(id for id in world.existing if world.agents[id].alive)
    busy = sorted((id, task) for id in alive for task in world.agents[id].running)
    match rng.randrange(8):
        case 0 | 1 | 2 if busy:
            id, task = rng.choice(busy)
            world.agents[id].finish(task)
        case 3 if alive:
            world.agents[rng.choice(alive)].die()
        case 4 if world.existing:
            gone = rng.choice(sorted(world.existing))
            world.agents[gone].die()
            world.remove(gone)
        case 5 if alive:
            world.leave(rng.choice(alive))
        case 6 if alive:
            world.agents[rng.choice(alive)].hang_up()
        case _:
            world.add(f"i{len(world.agents)}")


async def _calm(world: World, sender: Dispatcher) -> None:
    """The dead are buried, and everybody else gets on with it."""
    while sender.depth:
        for id in sorted(world.existing):
            if not world.agents[id].alive:
                world.remove(id)
        for agent in world.agents.values():
            for task in sorted(agent.running):
                agent.finish(task)
        await anyio.sleep(1)


async def _chaos(seed: int) -> None:
    rng = random.Random(seed)
    world, journal = World("i0", "i1", "i2", capacity=2), MemoryJournal(limit=None)
    submitted: list[str] = []
    for _ in range(3):  # three lives of the dispatcher
        async with dispatcher(world, journal, per_instance=2, max_kills=1000) as sender:
            await sender.recover()
            for _ in range(20):
                submitted.append(f"t{len(submitted)}")
                sender.submit_nowait(submitted[-1], HOLD)
                _disturb(world, rng)
                await anyio.sleep(rng.choice([0, 0.01, 1.0]))
        for agent in world.agents.values():
            agent.hang_up()
    async with dispatcher(world, journal, per_instance=2, max_kills=1000) as sender:
        await sender.recover()
        world.add("last")
        with anyio.fail_after(10_000):
            await _calm(world, sender)
    ended = Counter(event.data["id"] for event in journal.read() if event.kind == "task.completed")
    assert ended == Counter(submitted), "every task ends exactly once"
    begun = Counter((task, attempt) for _, task, attempt in world.begun)
    assert max(begun.values()) == 1, "no attempt begins twice"
    assert not [event for event in journal.read() if event.kind == "task.duplicate"]


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@given(seed=st.integers(0, 2**32))
def test_whatever_dies_every_task_ends_once(loop: str, seed: int) -> None:
    run_virtual(_chaos, seed, backend=loop, seed=seed)


# ------------------------------------------------------------------------------------------------ real agents


class Fleet(World):
    """Endpoints of real agent processes."""

    def put(self, id: str, agent: AgentProcess) -> None:
        self.serving[id] = Spot(agent.address)
        self.existing.add(id)
        self._notify()


@asynccontextmanager
async def real(fleet: Fleet, journal: MemoryJournal) -> AsyncIterator[Dispatcher]:
    async with (
        HttpClient() as http,
        Dispatcher(fleet, http=http, clock=SystemClock(), journal=journal, fleet="f") as sender,
    ):
        yield sender


@pytest.mark.integration
@pytest.mark.anyio
async def test_real_agents_die_and_dispatchers_restart(tmp_path: Path) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"
    journal = MemoryJournal()

    def runs() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    with ExitStack() as stack, anyio.fail_after(60):
        agents = {id: stack.enter_context(running(RUN_LOG=str(log))) for id in "abc"}
        fleet = Fleet()
        for id, agent in agents.items():
            fleet.put(id, agent)
        async with real(fleet, journal) as first:
            first.submit_nowait("doomed", {"wait": str(gate)})
            first.submit_nowait("kept", {"wait": str(gate)})
            await until(lambda: len(runs()) == 2)
            holder = next(id for id in "abc" if first.in_flight(id) and runs()[0].endswith(str(agents[id].process.pid)))
            doomed = runs()[0].split()[0]
            agents[holder].process.send_signal(signal.SIGKILL)
            await until(lambda: len(runs()) == 3)
        fleet.remove(holder)
        async with real(fleet, journal) as second:
            assert await second.recover() == 2
            gate.touch()
            results = {id: await second.submit(id, None) for id in ("doomed", "kept")}
        assert {id: result.attempt for id, result in results.items()} == {
            id: 2 if id == doomed else 1 for id in ("doomed", "kept")
        }
        assert len(runs()) == 3, "nothing ran twice but what had died"
        assert os.getpid() not in {result.value["pid"] for result in results.values()}
