"""What the contract suite needs of a backend, and the registry of backends that are held to it.

To hold another backend to the contract, write `tests/conformance/<name>_harness.py` with a class that has the members
of `BackendHarness` and decorate it with `@register("<name>", loops=("asyncio", "trio"))`. Nothing else: the suite
imports every `*_harness.py` beside it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import pytest

from agentfleet.backends.base import Backend, Changed, Creation, Engine, Observation, Removed, Snapshot
from agentfleet.instances import Instance, Phase
from agentfleet.specs import AgentTemplate

FLEET = "contract"


class BackendHarness(Protocol):
    """One world of instances, and the means to make and to disturb them. A fresh one is made for every test."""

    deadline: float
    """Seconds in the backend's time within which anything that is waited for must happen."""
    outlives: bool
    """Whether instances live on when `async with backend` is left (the backend's documented choice)."""

    def run(self, loop: str, test: Callable[[], Awaitable[None]]) -> None:
        """Run the async `test` on the event loop "asyncio" or "trio", in virtual or real time."""
        ...

    def make(self) -> Backend:
        """A backend upon this harness's world, not entered yet. A second call is a second manager's view of it."""
        ...

    def template(self, *, drain: float = 5.0) -> AgentTemplate:
        """An agent that runs until told to stop, and stops well within a second when told."""
        ...

    def exiting(self, code: int) -> AgentTemplate:
        """An agent that starts, and soon exits with `code` by itself."""
        ...

    def stubborn(self) -> AgentTemplate:
        """An agent that ignores SIGTERM: only the kill ends it."""
        ...

    async def crash(self, backend: Backend, fleet: str, id: str) -> int:
        """Kill the instance's process from outside; returns the exit code that must be reported."""
        ...

    async def unplug(self, backend: Backend) -> bool:
        """Make the engine unreachable; False where it has no such state (then the clause is skipped)."""
        ...

    async def plug(self, backend: Backend) -> None:
        """Make the engine reachable again. Its watchers have a gap."""
        ...

    async def refuse_next(self, backend: Backend) -> bool:
        """Have the engine refuse the next create (quota or the like); False where it cannot be arranged."""
        ...

    def leaks(self) -> list[str]:
        """What is left over now that no backend is entered: tasks, sockets, descriptors, processes, in words."""
        ...


Maker = Callable[[Path], BackendHarness]
MakerT = TypeVar("MakerT", bound=Maker)
_MAKERS: dict[str, tuple[Maker, tuple[str, ...], tuple[pytest.MarkDecorator, ...]]] = {}


def register(
    name: str, *, loops: tuple[str, ...] = ("asyncio", "trio"), marks: tuple[pytest.MarkDecorator, ...] = ()
) -> Callable[[MakerT], MakerT]:
    """Add a harness class (made with one temporary directory) to the suite, with marks for its tests."""

    def add(maker: MakerT) -> MakerT:
        _MAKERS[name] = (maker, loops, marks)
        return maker

    return add


def _discover() -> None:
    for path in sorted(Path(__file__).parent.glob("*_harness.py")):
        importlib.import_module(f"tests.conformance.{path.stem}")


class Watched:
    """A watch with its whole history, pulled on demand: no task of its own, so nothing can leak."""

    def __init__(self, backend: Engine, fleet: str, deadline: float) -> None:
        self._deadline = deadline
        self._stream = backend.watch(fleet)
        self.history: list[Observation] = []
        self.instances: dict[str, Instance] = {}
        self.removed: set[str] = set()

    async def next(self) -> Observation:
        """The next observation, applied to `instances` as a fleet would."""
        with anyio.fail_after(self._deadline):
            seen = await anext(self._stream)
        self.history.append(seen)
        match seen:
            case Snapshot():
                now = {instance.id: instance for instance in seen.instances}
                self.removed |= self.instances.keys() - now.keys()
                self.instances = now
            case Changed():
                self.instances[seen.instance.id] = seen.instance
            case Removed():
                self.instances.pop(seen.id, None)
                self.removed.add(seen.id)
        return seen

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read until `condition` holds; `TimeoutError` when it does not within the harness's deadline."""
        with anyio.fail_after(self._deadline):
            while not condition():
                await self.next()

    async def phase(self, id: str, *phases: Phase) -> Instance:
        """Read until the instance is in one of `phases`, and return it as seen then."""
        await self.until(lambda: id in self.instances and self.instances[id].phase in phases)
        return self.instances[id]

    async def ready(self, id: str, *, restarts: int = 0) -> Instance:
        """Read until the instance is ready after `restarts` restarts, and return it as seen then."""
        await self.until(
            lambda: id in self.instances and self.instances[id].ready and self.instances[id].restarts == restarts
        )
        return self.instances[id]

    async def gone(self, id: str) -> None:
        """Read until the instance is removed (by event or by absence from a snapshot)."""
        await self.until(lambda: id in self.removed)

    def phases(self, id: str) -> list[Phase]:
        """The phases seen of one instance, in order, repetitions folded."""
        seen: list[Phase] = []
        for observation in self.history:
            found = [i for i in _instances_in(observation) if i.id == id]
            if found and (not seen or seen[-1] is not found[0].phase):
                seen.append(found[0].phase)
        return seen

    async def close(self) -> None:
        """Stop watching."""
        close: Callable[[], Awaitable[None]] = getattr(self._stream, "aclose")  # noqa: B009 - not in AsyncIterator
        with anyio.CancelScope(shield=True):
            await close()


def _instances_in(observation: Observation) -> tuple[Instance, ...]:
    match observation:
        case Snapshot():
            return observation.instances
        case Changed():
            return (observation.instance,)
        case _:
            return ()


@dataclass(frozen=True)
class World:
    """What one contract test works with."""

    harness: BackendHarness

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[tuple[Backend, Watched], None]:
        """Enter a backend and watch the fleet."""
        async with self.harness.make() as backend, self.watching(backend) as seen:
            yield backend, seen

    @asynccontextmanager
    async def watching(self, backend: Backend, fleet: str = FLEET) -> AsyncGenerator[Watched, None]:
        """Watch one fleet, and close the watch at the end."""
        seen = Watched(backend, fleet, self.harness.deadline)
        try:
            yield seen
        finally:
            await seen.close()

    def creation(
        self, id: str, *, slot: int = 0, fleet: str = FLEET, template: AgentTemplate | None = None
    ) -> Creation:
        """A request for one well-behaved instance."""
        return Creation(id=id, fleet=fleet, slot=slot, revision=3, template=template or self.harness.template())


def contract(test: Callable[[World], Awaitable[None]]) -> Callable[..., None]:
    """Turn `async def test(world)` into a pytest test that runs against every registered backend and loop."""
    _discover()

    @functools.wraps(test)
    def run(case: tuple[str, str], tmp_path: Path) -> None:
        name, loop = case
        harness = _MAKERS[name][0](tmp_path)
        harness.run(loop, functools.partial(test, World(harness)))
        assert harness.leaks() == []

    del run.__wrapped__  # pytest must see this signature, not the test's
    run.__signature__ = inspect.signature(_shape)  # type: ignore[attr-defined]
    marked: Any = pytest.mark.parametrize(
        "case",
        [
            pytest.param((name, loop), id=f"{name}-{loop}", marks=marks)
            for name, (_, loops, marks) in _MAKERS.items()
            for loop in loops
        ],
    )(run)
    decorated: Callable[..., None] = marked
    return decorated


def _shape(case: tuple[str, str], tmp_path: Path) -> None:
    """The signature pytest sees."""
