"""One instance's life, from its first launch to its removal: one task that launches, waits, drains and cleans up.

Callers never act on a process themselves. They leave a wish (run, restart, stop) and wake the task, so each process
is started, signalled and reaped in one place and two requests can never race.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any, Protocol

import anyio
import anyio.to_thread

from agentfleet.backends.process import output
from agentfleet.backends.process.handle import Process
from agentfleet.backends.process.ports import HOST, Ports
from agentfleet.backends.process.records import Record, StateDir
from agentfleet.backends.process.spawn import launch
from agentfleet.clock import Clock
from agentfleet.errors import BackendRefused
from agentfleet.instances import Instance, Phase

_log = logging.getLogger("agentfleet.backends.process")
_KILL_PATIENCE = 10.0  # seconds after SIGKILL until it is worth a warning: the process sits in the kernel
_NOT_EXECUTABLE = 126  # the exit code that a shell gives a command it cannot execute


class Wish(IntEnum):
    """What the caller wants of an instance; a later member outranks an earlier one."""

    RUN = 0
    RESTART = 1
    STOP = 2


class Shared(Protocol):
    """What the instances of one backend share."""

    state: StateDir
    ports: Ports
    clock: Clock
    node: str
    spawns: anyio.CapacityLimiter
    files: anyio.CapacityLimiter

    def changed(self, keeper: Keeper) -> None:
        """The keeper's instance looks different now."""
        ...

    def removed(self, keeper: Keeper) -> None:
        """The keeper's instance and all that belonged to it are gone."""
        ...

    def ended(self, pid: int) -> None:
        """A process ended."""
        ...


def new_launch() -> str:
    """A name for one start of a process, unlike any other."""
    return uuid.uuid4().hex[:16]


class Keeper:
    """Keeps one instance. Start `run` as a task; `stop` and `restart` only leave a wish.

    Args:
        house: What it shares with the others.
        record: What was asked for; without a process and not exited, it is launched.
        process: Its process, for an adopted instance.

    Attributes:
        instance: The instance as it is now.
        record: What the next manager would need.
        settled: Set once the first launch has succeeded or failed.
        refusal: Why it failed, if it did.
    """

    __slots__ = (
        "_draining",
        "_house",
        "_kill_at",
        "_scope",
        "_wish",
        "instance",
        "process",
        "record",
        "refusal",
        "settled",
    )

    def __init__(self, house: Shared, record: Record, process: Process | None = None) -> None:
        self.record = record
        self.process = process
        self.instance = _describe(record, house.node, running=process is not None)
        self.settled = anyio.Event()
        self.refusal: str | None = None
        self._house = house
        self._wish = Wish.RUN
        self._kill_at = math.inf
        self._scope: anyio.CancelScope | None = None
        self._draining = False
        if process is not None or record.exited:
            self.settled.set()

    @property
    def stopping(self) -> bool:
        """Whether a stop was accepted."""
        return self._wish is Wish.STOP

    def stop(self, grace: float) -> None:
        """Have the instance drained within `grace` seconds and removed. A shorter grace shortens an earlier one."""
        stop_by = self._house.clock.now() + max(0.0, grace)
        if self.record.stop_by is not None:
            stop_by = min(stop_by, self.record.stop_by)
        self.record = replace(self.record, stop_by=stop_by)
        self._ask(Wish.STOP, grace)

    def restart(self, grace: float) -> None:
        """Have the process drained within `grace` seconds and started again. A start under way is not repeated."""
        if self.instance.phase is not Phase.PENDING:
            self._ask(Wish.RESTART, grace)

    async def run(self) -> None:
        """Keep the instance until it is removed. Cancelled, it leaves the process running."""
        try:
            while not await self._turn():
                pass
        finally:
            if self.process is not None:
                self.process.close()

    def _ask(self, wish: Wish, grace: float) -> None:
        self._wish = max(self._wish, wish)
        self._kill_at = min(self._kill_at, anyio.current_time() + max(0.0, grace))
        if self.instance.phase in (Phase.PENDING, Phase.RUNNING):
            self._show(phase=Phase.DRAINING, ready=False, ready_at=None)
        if self._scope is not None:
            if self._draining:
                self._scope.deadline = self._kill_at
            else:
                self._scope.cancel()

    async def _turn(self) -> bool:
        """Do the next thing there is to do. True when the instance is gone."""
        if self.process is not None:
            if self._wish is Wish.RUN:
                await self._until_asked(self.process.wait)
            else:
                await self._drain(self.process)
            if self.process.ended:
                await self._end(self.process)
            return False
        if self._wish is Wish.STOP:
            await self._remove()
            return True
        if not self.record.exited:
            return await self._first_launch()
        if self._wish is Wish.RESTART:
            await self._relaunch()
        else:
            await self._until_asked(anyio.sleep_forever)
        return False

    async def _until_asked(self, wait: Callable[[], Awaitable[None]]) -> None:
        with anyio.CancelScope() as scope:
            self._scope = scope
            try:
                await wait()
            finally:
                self._scope = None

    # ------------------------------------------------------------------------------------------------ starting

    async def _first_launch(self) -> bool:
        """Start the process. True when that was refused and nothing of the instance is left."""
        try:
            await self._launch(replace(self.record, started_at=self._house.clock.now()))
        except BackendRefused as error:
            self.refusal = str(error)
            await self._remove()
            return True
        finally:
            self.settled.set()
        return False

    async def _relaunch(self) -> None:
        self._wish, self._kill_at = Wish.RUN, math.inf
        before = self.record
        restarts = before.restarts + 1
        self.record = replace(before, launch=new_launch(), restarts=restarts, exited=False, pid=None, identity=None)
        self._show(phase=Phase.PENDING, restarts=restarts, ready=False, ready_at=None)
        try:
            await self._launch(replace(self.record, started_at=self._house.clock.now()))
        except BackendRefused as error:
            stop_by = self.record.stop_by  # a stop may have come meanwhile
            self.record = replace(before, restarts=restarts, exit_code=_NOT_EXECUTABLE, stop_by=stop_by)
            path, text = self._house.state.output(before.id), str(error)
            await self._file("note why it did not start", lambda: output.note(path, text))
            await self._save()
            self._show_exit()
        else:
            if before.port is not None and before.port != self.record.port:
                self._house.ports.release(before.port)

    async def _launch(self, record: Record) -> None:
        """Start the process and show it. Returns without one if a stop came first."""
        house = self._house
        async with house.spawns:
            if self._wish is Wish.STOP:
                self.record = replace(self.record, exited=True)
                return
            done = await anyio.to_thread.run_sync(launch, record, house.state, house.ports, limiter=house.files)
        assert done.pid is not None
        assert done.identity is not None
        self.record = replace(done, stop_by=self.record.stop_by)  # a stop may have come meanwhile
        self.process = Process.open(done.pid, done.identity)
        if self.process is None:  # ended already, and reaped by someone else: SIGCHLD is ignored in this program
            self.record = replace(self.record, exited=True, exit_code=None)
            await self._save()
            self._show_exit()
            return
        asked = self._wish is not Wish.RUN
        self._show(
            phase=Phase.DRAINING if asked else Phase.RUNNING,
            started_at=done.started_at,
            ready=not asked,
            ready_at=None if asked else done.started_at,
            address=f"{HOST}:{done.port}",
        )

    # ------------------------------------------------------------------------------------------------ ending

    async def _drain(self, process: Process) -> None:
        if self._kill_at > anyio.current_time() and not process.frozen():  # a frozen process cannot finish its work
            if self.record.stop_by is not None:
                await self._save()  # should this manager be killed now, the next one goes on with the stop
            process.terminate()
            with anyio.CancelScope(deadline=self._kill_at) as scope:
                self._scope, self._draining = scope, True
                try:
                    await process.wait()
                finally:
                    self._scope, self._draining = None, False
        while not process.ended:
            process.kill()
            with anyio.move_on_after(_KILL_PATIENCE):
                await process.wait()
            if not process.ended:
                _log.warning("process %d of instance %s does not end after SIGKILL", process.pid, self.record.id)

    async def _end(self, process: Process) -> None:
        """Take note that the process has ended."""
        process.close()
        self.process = None
        self._house.ended(process.pid)
        self.record = replace(self.record, exited=True, exit_code=process.code)
        if self._wish is Wish.RUN:
            self._show_exit()
        else:
            self.instance = replace(self.instance, exit_code=process.code)
        if self._wish is not Wish.STOP:
            await self._save()

    async def _remove(self) -> None:
        await self._file("remove the files", lambda: self._house.state.remove(self.record.id))
        if self.record.port is not None:
            self._house.ports.release(self.record.port)
        self.settled.set()
        self._house.removed(self)

    # ------------------------------------------------------------------------------------------------ telling

    def _show(self, **changes: Any) -> None:
        self.instance = replace(self.instance, **changes)
        self._house.changed(self)

    def _show_exit(self) -> None:
        self._show(
            phase=Phase.EXITED,
            ready=False,
            ready_at=None,
            restarts=self.record.restarts,
            exit_code=self.record.exit_code,
        )

    async def _save(self) -> None:
        record = self.record
        await self._file("record", lambda: self._house.state.write(record))

    async def _file(self, what: str, work: Callable[[], None]) -> None:
        """Do file work in a thread. The instance goes on without it: a full disk must not keep it from stopping."""
        try:
            await anyio.to_thread.run_sync(work, limiter=self._house.files)
        except OSError as error:
            _log.error("cannot %s of instance %s: %s", what, self.record.id, error)


def _describe(record: Record, node: str, *, running: bool) -> Instance:
    if running:
        phase = Phase.RUNNING if record.stop_by is None else Phase.DRAINING
    else:
        phase = Phase.EXITED if record.exited else Phase.PENDING
    ready = phase is Phase.RUNNING
    return Instance(
        id=record.id,
        fleet=record.fleet,
        slot=record.slot,
        revision=record.revision,
        version=record.template.version,
        phase=phase,
        created_at=record.created_at,
        started_at=record.started_at,
        ready=ready,
        ready_at=record.started_at if ready else None,
        node=node,
        address=f"{HOST}:{record.port}" if record.port is not None else None,
        restarts=record.restarts,
        exit_code=record.exit_code,
    )
