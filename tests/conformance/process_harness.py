"""Holds real processes to the contract, in real time on both event loops."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import psutil
import pytest

from agentfleet.backends.base import Backend, Changed, Observation, Snapshot
from agentfleet.backends.process import ProcessBackend
from agentfleet.instances import Instance, Phase
from agentfleet.specs import AgentTemplate

from .harness import register


class _Harness:
    """Processes of a state directory of their own. Agents are shell scripts: they start in a millisecond."""

    deadline = 30.0
    outlives = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "state"
        self._before = _descriptors()
        self._left: list[str] = []

    def run(self, loop: str, test: Callable[[], Awaitable[None]]) -> None:
        try:
            anyio.run(test, backend=loop)
        finally:
            self._left = [f"descriptor {name}" for name in _descriptors() - self._before]
            if self.outlives:
                anyio.run(self._end)

    def make(self) -> Backend:
        return ProcessBackend(state_dir=self._directory, on_close="keep" if self.outlives else "stop", close_grace=0.5)

    def template(self, *, drain: float = 5.0) -> AgentTemplate:
        return AgentTemplate(command=("sleep", "600"), version="good", drain=drain)

    def exiting(self, code: int) -> AgentTemplate:
        return AgentTemplate(command=("sh", "-c", f"exit {code}"))

    def stubborn(self) -> AgentTemplate:
        return AgentTemplate(command=("sh", "-c", "trap '' TERM; while :; do sleep 600; done"))

    async def crash(self, backend: Backend, fleet: str, id: str) -> int:
        stream = backend.watch(fleet)
        instance = _find(await anext(stream), id)
        while instance is None or instance.phase is not Phase.RUNNING:
            instance = _find(await anext(stream), id) or instance
        assert isinstance(backend, ProcessBackend)
        for process in psutil.process_iter():
            if process.pid in _of(self._directory, id):
                os.kill(process.pid, signal.SIGKILL)
        return -signal.SIGKILL

    async def unplug(self, backend: Backend) -> bool:
        return False  # the operating system is always there

    async def plug(self, backend: Backend) -> None:
        raise NotImplementedError("nothing was unplugged")

    async def refuse_next(self, backend: Backend) -> bool:
        return False  # see test_process_refusals.py

    def leaks(self) -> list[str]:
        left = list(self._left)
        left += [f"record {path.name}" for path in (self._directory / "instances").iterdir()]
        left += [f"output {path.name}" for path in (self._directory / "output").iterdir()]
        left += [f"process {pid}" for pid in _of(self._directory)]
        return left

    async def _end(self) -> None:
        async with ProcessBackend(state_dir=self._directory, close_grace=0):
            pass


@register("process", marks=(pytest.mark.integration,))
class ProcessHarness(_Harness):
    """Instances end with their manager."""


@register("process-keep", marks=(pytest.mark.integration,))
class KeepingHarness(_Harness):
    """Instances outlive their manager."""

    outlives = True


def _find(observation: Observation, id: str) -> Instance | None:
    found = observation.instances if isinstance(observation, Snapshot) else ()
    if isinstance(observation, Changed):
        found = (observation.instance,)
    return next((instance for instance in found if instance.id == id), None)


def _of(directory: Path, id: str | None = None) -> set[int]:
    """Pids of the processes that write to an output in `directory`: a way that the backend itself does not use."""
    pids = set()
    for process in psutil.process_iter():
        try:
            target = Path(f"/proc/{process.pid}/fd/1").readlink()
        except OSError:
            continue  # ended, or not ours
        if target.parent == directory / "output" and id in (None, target.stem):
            pids.add(process.pid)
    return pids


def _descriptors() -> set[str]:
    folder = Path("/proc/self/fd")
    return {f"{entry.name} {entry.readlink()}" for entry in folder.iterdir() if entry.exists()}
