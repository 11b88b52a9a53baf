"""Helpers for the tests of real processes: everything waits on a condition, with one generous deadline."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from agentfleet.backends.base import Changed, Creation, Observation, Removed, Snapshot
from agentfleet.backends.process import ProcessBackend, system
from agentfleet.backends.process.watching import Watcher
from agentfleet.instances import Instance, Phase
from agentfleet.specs import AgentTemplate

FLEET = "f"
DEADLINE = 60.0
SLEEPER = AgentTemplate(command=("sleep", "600"))


def creation(id: str, template: AgentTemplate = SLEEPER, *, slot: int = 0, fleet: str = FLEET) -> Creation:
    return Creation(id=id, fleet=fleet, slot=slot, revision=2, template=template)


def shell(script: str, **changes: Any) -> AgentTemplate:
    return AgentTemplate(command=("sh", "-c", script), **changes)


class Seen:
    """What a watch has told so far."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.instances: dict[str, Instance] = {}
        self.history: list[Observation] = []

    async def next(self) -> None:
        seen = await anext(self._watcher)
        self.history.append(seen)
        match seen:
            case Snapshot():
                self.instances = {instance.id: instance for instance in seen.instances}
            case Changed():
                self.instances[seen.instance.id] = seen.instance
            case Removed():
                self.instances.pop(seen.id, None)

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(DEADLINE):
            while not condition():
                await self.next()

    async def phase(self, id: str, phase: Phase) -> Instance:
        await self.until(lambda: id in self.instances and self.instances[id].phase is phase)
        return self.instances[id]

    async def ready(self, id: str, *, restarts: int = 0) -> Instance:
        await self.until(
            lambda: id in self.instances and self.instances[id].ready and self.instances[id].restarts == restarts
        )
        return self.instances[id]

    async def gone(self, id: str) -> None:
        await self.until(lambda: Removed(id) in self.history)


@asynccontextmanager
async def opened(state: Path, **options: Any) -> AsyncGenerator[tuple[ProcessBackend, Seen], None]:
    """An open backend, and a watch whose snapshot has been read."""
    async with (
        ProcessBackend(state_dir=state, **{"close_grace": 0.5} | options) as backend,
        aclosing(backend.watch(FLEET)) as watcher,
    ):
        seen = Seen(watcher)
        await seen.next()
        yield backend, seen


def process_of(backend: ProcessBackend, id: str) -> int:
    assert backend._house is not None
    process = backend._house.keepers[id].process
    assert process is not None
    return process.pid


def alive(pid: int) -> bool:
    info = system.look(pid)
    return info is not None and info.state != "Z"


async def eventually(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110  (the conditions are facts of the operating system)
            await anyio.sleep(0.01)


async def dead(pid: int) -> None:
    await eventually(lambda: not alive(pid))


async def written(backend: ProcessBackend, id: str, text: str) -> list[str]:
    """The instance's lines, once `text` is among them."""
    with anyio.fail_after(DEADLINE):
        while True:
            lines = list(await backend.logs(FLEET, id, lines=100_000))
            if text in lines:
                return lines
            await anyio.sleep(0.01)


async def children(state: Path, id: str) -> int:
    """The pid that an agent has written as "child <pid>"."""
    path = state / "output" / f"{id}.log"
    await eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text().split()[-1])
