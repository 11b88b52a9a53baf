"""Virtual time: run async code on asyncio or trio with a clock that jumps to the next timer instead of waiting.

Everything that asks the event loop for the time is virtual: `anyio.sleep`, `anyio.fail_after`, `anyio.current_time`,
and `agentfleet.clock.SystemClock` (give it a fixed `epoch` and its dates are reproducible too). An hour of timers costs
what its callbacks cost.

What is not supported, because virtual time cannot tell when the outside world will answer: sockets, pipes,
subprocesses and worker threads. On asyncio they are refused when they are registered with the loop, or end in a
`Deadlock` where they are waited for; on trio in a `Deadlock`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

import anyio

ResultT = TypeVar("ResultT")
ArgsTs = TypeVarTuple("ArgsTs")


TURNS = 1_000_000
"""Turns of the event loop without any progress of time that count as a livelock."""


class Livelock(RuntimeError):
    """Under virtual time tasks keep running and time stands still: something asks again and again without waiting."""

    def __init__(self) -> None:
        super().__init__(f"livelock in virtual time: {TURNS} turns of the event loop, and no time has passed")


class Deadlock(RuntimeError):
    """Under virtual time every task waits for something, and no timer is left that could ever end the waiting."""

    def __init__(self, waiting: str) -> None:
        super().__init__(
            "deadlock in virtual time: nothing can run, no timer is pending, so nothing will ever happen. "
            f"Waiting: {waiting}. If a task waits for a socket, process or worker thread: those need real time."
        )


# ------------------------------------------------------------------------------------------------ asyncio


class _JumpingSelector(selectors.BaseSelector):
    """Holds the loop's own wake-up pipe and never waits: asked to wait for a timer, it moves the time there."""

    def __init__(self) -> None:
        self.now = 0.0
        self._turns = 0
        self.on_idle: Callable[[], NoReturn] | None = None
        self._keys: dict[object, selectors.SelectorKey] = {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            assert self.on_idle is not None
            self.on_idle()
        if timeout > 0:
            self.now += timeout
            self._turns = 0
            return []
        self._turns += 1
        if self._turns > TURNS:
            self._turns = 0  # the loop turns on while its tasks are cancelled
            raise Livelock
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self._keys:  # the first is the loop's own pipe, which other threads and signal handlers write to
            raise RuntimeError("virtual time supports no sockets, pipes or subprocesses; test these in real time")
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose time starts at 0 and jumps to the next timer whenever nothing can run.

    `run_until_complete` raises `Deadlock` when nothing can run and no timer is pending.
    """

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)
        self._virtual.on_idle = self._deadlock

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual.now

    def _deadlock(self) -> NoReturn:
        names = sorted(task.get_name() for task in asyncio.all_tasks(self))
        raise Deadlock(_listed("task", names))


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({shown})" if names else f"no {what}"


# ------------------------------------------------------------------------------------------------ trio


async def _on_trio(async_fn: Callable[[Unpack[ArgsTs]], Awaitable[ResultT]], args: tuple[*ArgsTs]) -> ResultT:
    """Run `async_fn` under a watchdog that cancels it when the autojumping clock has nowhere left to jump to."""
    import trio  # noqa: PLC0415 - only who runs on trio needs it

    scope = trio.CancelScope()
    watchdog = _trio_watchdog(scope)
    trio.lowlevel.add_instrument(watchdog)
    try:
        with scope:
            result = await async_fn(*args)
        if not scope.cancelled_caught:
            return result
        if watchdog.livelocked:
            raise Livelock
        raise Deadlock(f"{watchdog.tasks} tasks of trio")
    finally:
        with contextlib.suppress(KeyError):  # trio removes an instrument that failed
            trio.lowlevel.remove_instrument(watchdog)


def _trio_watchdog(scope: Any) -> Any:
    import trio  # noqa: PLC0415

    class Watchdog(trio.abc.Instrument):
        """Counts idle passes of the run loop: once may be `wait_all_tasks_blocked`, three in a row is a deadlock."""

        tasks = 0
        livelocked = False

        def __init__(self) -> None:
            self._idle = 0
            self._turns = 0
            self._checked_at = -1.0

        def task_scheduled(self, task: object) -> None:  # noqa: ARG002
            self._idle = 0

        def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
            self._turns += 1
            if self._turns > TURNS:
                now = trio.current_time()
                self._turns, self.livelocked = 0, now == self._checked_at
                self._checked_at = now
                if self.livelocked:
                    scope.cancel()
            self._idle += 1
            if self._idle < 3:
                return
            statistics = trio.lowlevel.current_statistics()
            if not statistics.tasks_runnable and statistics.seconds_to_next_deadline == math.inf:
                self.tasks = statistics.tasks_living
                scope.cancel()

    return Watchdog()


@contextlib.contextmanager
def _trio_seeded(seed: int) -> Iterator[dict[str, Any]]:
    """Anyio's options for trio in virtual time, its scheduler seeded meanwhile as trio does under hypothesis."""
    import trio  # noqa: PLC0415
    import trio.testing  # noqa: PLC0415

    scheduler: Any = trio._core._run  # there is no public way
    before = (scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING)
    scheduler._r.seed(seed)
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        yield {"clock": trio.testing.MockClock(autojump_threshold=0)}
    finally:
        scheduler._r.setstate(before[0])
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before[1]


# ------------------------------------------------------------------------------------------------ the public face


@contextlib.contextmanager
def _random_seeded(seed: int) -> Iterator[None]:
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def run_virtual(
    async_fn: Callable[[Unpack[ArgsTs]], Awaitable[ResultT]],
    *args: *ArgsTs,
    backend: str = "asyncio",
    seed: int = 0,
) -> ResultT:
    """Run `async_fn(*args)` to its end in virtual time, on a fresh event loop whose time starts at 0.

    Args:
        async_fn: The async function.
        args: Its positional arguments.
        backend: "asyncio" or "trio" (which must be installed).
        seed: Seeds the module `random` (jitter of retries) and trio's scheduler for the run; both are put back after.
            asyncio runs tasks in the order in which they become ready, so there the run is the same every time.

    Returns:
        What `async_fn` returned.

    Raises:
        Deadlock: Every task waits and no timer is pending.
        Livelock: Tasks run on and on without ever waiting for time to pass.
        ValueError: `backend` is neither of the two.
    """
    with _random_seeded(seed):
        if backend == "asyncio":
            return anyio.run(async_fn, *args, backend_options={"loop_factory": VirtualTimeLoop})
        if backend == "trio":
            with _trio_seeded(seed) as options:
                return anyio.run(_on_trio, async_fn, args, backend="trio", backend_options=options)
    raise ValueError(f"backend is 'asyncio' or 'trio', not {backend!r}")


def virtual(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Decorator: run an async pytest test in virtual time, once on asyncio and once on trio.

    Fixtures and parameters work as usual (they are made outside the loop). Under hypothesis put `@given` outermost::

        @virtual
        async def test_backoff_doubles(tmp_path): ...
    """
    import pytest  # noqa: PLC0415 - run_virtual alone needs no test runner

    @functools.wraps(test)
    def run(*args: Any, virtual_loop: str, **kwargs: Any) -> None:
        run_virtual(functools.partial(test, *args, **kwargs), backend=virtual_loop)

    del run.__wrapped__  # pytest asks the signature below, which has the loop as one more parameter
    shape = inspect.signature(test)
    loop = inspect.Parameter("virtual_loop", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    shape = shape.replace(parameters=[*shape.parameters.values(), loop], return_annotation=None)
    run.__signature__ = shape  # type: ignore[attr-defined]
    marked: Any = pytest.mark.parametrize("virtual_loop", ["asyncio", "trio"])(run)
    decorated: Callable[..., None] = marked
    return decorated
