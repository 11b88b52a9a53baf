"""The engines of a manager's fleets: one a namespace, opened when it is first needed, closed with the manager."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from agentfleet.backends.base import Backend, WorkloadBackend
from agentfleet.loops import only_error
from agentfleet.telemetry import Telemetry

AnyEngine = Backend | WorkloadBackend

log = logging.getLogger(__name__)

_SHOWN = 300.0
"""Seconds for which an engine that could not be opened is shown, since one was last asked for in vain."""


@dataclass(eq=False, slots=True)
class _Opened:
    """An engine that is being opened, or is open."""

    engine: AnyEngine
    tried: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = None
    shown: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """Ends when it is shown no longer, after it could not be opened."""


class Engines:
    """Opens each engine in a task of its own, where it is closed again: none waits for another.

    Args:
        make: Makes the engine of a namespace; the same object may serve several.
        telemetry: Shown what they count, also while one is being opened and no fleet is there yet.
    """

    def __init__(self, make: Callable[[str], AnyEngine], *, telemetry: Telemetry) -> None:
        self._make = make
        self._telemetry = telemetry
        self._opened: dict[str, _Opened] = {}
        self._failed: dict[str, _Opened] = {}
        """By namespace: what could not be opened first, since it was last open. It knows for how long."""
        self._tasks: TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Open what is asked for, until cancelled; then close all of it."""
        async with anyio.create_task_group() as self._tasks:
            task_status.started()
            await anyio.sleep_forever()

    async def of(self, namespace: str) -> AnyEngine:
        """The engine of a namespace, open.

        Raises:
            Exception: It cannot be made or opened, for whatever reason; asking again tries again.
        """
        opened = self._opened.get(namespace)
        if opened is None:
            opened = self._opened[namespace] = self._begin(self._make(namespace))
        await opened.tried.wait()
        if opened.error is not None:
            self._go_on_showing(namespace, opened)
            raise opened.error
        if (failed := self._failed.pop(namespace, None)) is not None:
            failed.shown.cancel()
        return opened.engine

    def _go_on_showing(self, namespace: str, opened: _Opened) -> None:
        """Show the first engine that could not be opened as long as the next ones cannot either."""
        first = self._failed.get(namespace, opened)
        if first.shown.cancel_called:  # nobody has asked for long
            first = opened
        self._failed[namespace] = first
        if first is not opened and opened not in self._failed.values():
            opened.shown.cancel()
        first.shown.deadline = anyio.current_time() + _SHOWN

    def _begin(self, engine: AnyEngine) -> _Opened:
        for opened in self._opened.values():
            if opened.engine is engine:
                return opened
        assert self._tasks is not None, "it runs as long as fleets are opened"
        opened = _Opened(engine)
        self._tasks.start_soon(self._keep, opened)
        return opened

    async def _keep(self, opened: _Opened) -> None:
        """Keep an engine open until cancelled. What it raises closes it alone, and its fleets with it."""
        with self._telemetry.measuring(opened.engine):
            try:
                async with opened.engine:
                    opened.tried.set()
                    await anyio.sleep_forever()
            except Exception as error:  # whatever it is, the other engines go on
                cause = only_error(error) if isinstance(error, BaseExceptionGroup) else error
                was_open = opened.tried.is_set()
                if was_open:
                    log.exception("an engine has ended, and its fleets with it: %r", opened.engine)
                opened.error = cause if isinstance(cause, Exception) else error
                self._opened = {name: each for name, each in self._opened.items() if each is not opened}
                opened.tried.set()
                if was_open:
                    return
            opened.shown.deadline = min(opened.shown.deadline, anyio.current_time() + _SHOWN)
            with opened.shown:  # a server that does not answer from the start on is no less silent between two tries
                await anyio.sleep_forever()
