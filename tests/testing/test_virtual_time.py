"""Virtual time: jumps, order, deadlocks, refusals and repeatability, on both event loops."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.clock import SystemClock
from agentfleet.testing import Deadlock, Livelock, VirtualTimeLoop, run_virtual, virtual, virtual_time

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@virtual
async def test_time_starts_at_zero_and_jumps() -> None:
    assert anyio.current_time() == 0
    await anyio.sleep(86_400 * 30)
    assert anyio.current_time() == pytest.approx(86_400 * 30)


@virtual
async def test_deadlines_are_virtual() -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(3600):
        await anyio.sleep_forever()
    assert anyio.current_time() == pytest.approx(3600)


@virtual
async def test_a_system_clock_is_virtual_by_itself() -> None:
    clock = SystemClock(epoch=1_700_000_000.0)
    assert clock.now() == 1_700_000_000.0
    await clock.sleep(90)
    assert clock.now() == pytest.approx(1_700_000_090.0)


@virtual
async def test_fixtures_and_parameters_work_as_usual(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert tmp_path_factory.getbasetemp().exists()


class TestInClasses:
    """The decorator leaves `self` alone."""

    @virtual
    async def test_methods_too(self) -> None:
        assert isinstance(self, TestInClasses)


@given(spans=st.lists(st.integers(0, 10_000), max_size=20), backend=st.sampled_from(["asyncio", "trio"]))
def test_timers_fire_in_order_at_their_time(spans: list[int], backend: str) -> None:
    async def main() -> list[float]:
        fired: list[float] = []

        async def wait(span: float) -> None:
            await anyio.sleep(span)
            assert anyio.current_time() == pytest.approx(span, abs=1e-6)
            fired.append(span)

        async with anyio.create_task_group() as tasks:
            for span in spans:
                tasks.start_soon(wait, span / 10)
        return fired

    assert run_virtual(main, backend=backend) == sorted(span / 10 for span in spans)


@both
def test_waiting_for_nothing_is_a_deadlock_not_a_hang(backend: str) -> None:
    cleaned = []

    async def main() -> None:
        try:
            await anyio.Event().wait()
        finally:
            cleaned.append(True)

    with pytest.raises(Deadlock, match="no timer is pending"):
        run_virtual(main, backend=backend)
    assert cleaned


@both
def test_a_deadlock_after_some_time_is_found_too(backend: str) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 5)
            tasks.start_soon(anyio.Event().wait)

    with pytest.raises(Deadlock):
        run_virtual(main, backend=backend)


@both
def test_running_on_the_spot_is_a_livelock_not_a_hang(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "TURNS", 1_000)

    async def main() -> None:
        await anyio.sleep(5)
        while True:
            await anyio.lowlevel.checkpoint()

    with pytest.raises(Livelock, match="no time has passed"):
        run_virtual(main, backend=backend)


@virtual
async def test_waiting_until_all_are_blocked_is_no_deadlock() -> None:
    event = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(event.wait)
        await anyio.wait_all_tasks_blocked()
        event.set()


def test_sockets_are_refused_on_asyncio() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            asyncio.get_running_loop().add_reader(left.fileno(), lambda: None)

    with pytest.raises(RuntimeError, match="no sockets"):
        run_virtual(main)


@both
def test_an_error_passes_through(backend: str) -> None:
    async def main() -> None:
        await anyio.sleep(1)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run_virtual(main, backend=backend)


@both
def test_arguments_and_results_pass_through(backend: str) -> None:
    async def add(a: int, b: int) -> int:
        await anyio.sleep(1)
        return a + b

    assert run_virtual(add, 2, 3, backend=backend) == 5


def test_an_unknown_loop_is_named() -> None:
    async def main() -> None:
        """Never run."""

    with pytest.raises(ValueError, match="curio"):
        run_virtual(main, backend="curio")


@both
def test_the_same_seed_gives_the_same_run(backend: str) -> None:
    async def main() -> list[tuple[int, float]]:
        log: list[tuple[int, float]] = []

        async def work(number: int) -> None:
            for _ in range(5):
                await anyio.sleep(random.choice([1, 2, 3]))
                log.append((number, anyio.current_time()))

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(work, number)
        return log

    first = run_virtual(main, backend=backend, seed=3)
    assert run_virtual(main, backend=backend, seed=3) == first
    assert run_virtual(main, backend=backend, seed=4) != first


@both
def test_the_random_module_is_put_back(backend: str) -> None:
    async def main() -> None:
        random.random()

    random.seed(11)
    expected = random.random()
    random.seed(11)
    run_virtual(main, backend=backend, seed=5)
    assert random.random() == expected


@both
def test_no_real_time_is_waited_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError(f"really slept {seconds} s")

    monkeypatch.setattr(time, "sleep", refuse)

    async def main() -> float:
        for _ in range(1000):
            await anyio.sleep(1000)
        return anyio.current_time()

    assert run_virtual(main, backend=backend) == pytest.approx(1e6)


def test_the_loop_turns_a_bounded_number_of_times_for_a_timer() -> None:
    async def main() -> None:
        for _ in range(1000):
            await asyncio.sleep(1)

    turns = 0
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualTimeLoop)
        select = loop._virtual.select

        def counted(timeout: float | None = None) -> object:
            nonlocal turns
            turns += 1
            return select(timeout)

        loop._virtual.select = counted  # type: ignore[method-assign, assignment]
        runner.run(main())
    assert turns < 2500
