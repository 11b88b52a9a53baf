"""Holds the simulated cluster to the contract, in virtual time on both event loops."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from agentfleet.backends.base import Backend
from agentfleet.backends.memory import MemoryBackend
from agentfleet.specs import AgentTemplate
from agentfleet.testing import run_virtual

from .harness import register


@register("memory")
class MemoryHarness:
    """One `MemoryBackend`, which outlives whoever manages it."""

    deadline = 600.0
    outlives = True

    def __init__(self, directory: Path) -> None:
        self._backend = MemoryBackend(seed=7)

    def run(self, loop: str, test: Callable[[], Awaitable[None]]) -> None:
        run_virtual(test, backend=loop)

    def make(self) -> Backend:
        return self._backend

    def template(self, *, drain: float = 5.0) -> AgentTemplate:
        return AgentTemplate(command=("agent",), version="good", drain=drain)

    def exiting(self, code: int) -> AgentTemplate:
        self._backend.behave(version=f"exit-{code}", crash_after=0.5, exit_code=code)
        return AgentTemplate(command=("agent",), version=f"exit-{code}")

    def stubborn(self) -> AgentTemplate:
        self._backend.behave(version="stubborn", ignores_term=True)
        return AgentTemplate(command=("agent",), version="stubborn")

    async def crash(self, backend: Backend, fleet: str, id: str) -> int:
        self._backend.faults.crash(id, code=-9)
        return -9

    async def unplug(self, backend: Backend) -> bool:
        self._backend.faults.unavailable()
        return True

    async def plug(self, backend: Backend) -> None:
        self._backend.faults.available()

    async def refuse_next(self, backend: Backend) -> bool:
        self._backend.faults.refuse(times=1)
        return True

    def leaks(self) -> list[str]:
        return [f"{count} watchers" for count in (self._backend.watchers,) if count]
