"""Which tasks run, wait and have finished: every task once, however often it is sent.

Lives in the server's loop and is touched from nowhere else, so it needs no locks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import StrEnum

from agentfleet.agent.task import Task

KEPT = 1024
"""Finished tasks whose answers are kept for those who ask again."""
KEPT_BYTES = 32 * 2**20


class Refused(StrEnum):
    """Why a task was not taken. It has not run."""

    BUSY = "busy"
    DRAINING = "draining"
    UNKNOWN = "unknown"


class Outcome:
    """How a run ended: the answer's body, ready to be sent."""

    __slots__ = ("body", "cause", "ok")

    def __init__(self, *, ok: bool, body: bytes, cause: str | None = None) -> None:
        self.ok = ok
        self.body = body
        self.cause = cause


class Run:
    """One task on its way through the agent."""

    __slots__ = ("delivered", "done", "outcome", "task")

    def __init__(self, task: Task, done: asyncio.Future[None]) -> None:
        self.task = task
        self.done = done
        self.outcome: Outcome | None = None
        """None when done without an outcome: the agent gave the task up to drain."""
        self.delivered = False

    def close(self, outcome: Outcome | None) -> None:
        """Wake who waits for it."""
        self.outcome = outcome
        if not self.done.done():
            self.done.set_result(None)


class Ledger:
    """Admission, joining and keeping.

    Args:
        loop: The server's loop.
        concurrency: Tasks that run at once.
        queue: Tasks that may wait beyond them.
        start: Called in the server's loop to set a run going; its end must come back by `finish`.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, concurrency: int, queue: int, start: Callable[[Run], object]
    ) -> None:
        self._loop = loop
        self._concurrency = concurrency
        self._queue = queue
        self._start = start
        self.running: dict[str, Run] = {}
        self.waiting: deque[Run] = deque()
        self._ids_waiting: dict[str, Run] = {}
        self._kept: OrderedDict[str, Run] = OrderedDict()
        self._kept_bytes = 0
        self._undelivered = 0
        self.draining = False
        self.completed = 0
        self.failed = 0
        self.cause: str | None = None
        """Cause of the newest failure, None once a task has succeeded since."""
        self._changed = asyncio.Event()

    def submit(self, task: Task, *, resume: bool = False) -> Run | Refused:
        """Join the run of this task, find its kept answer, or (unless it only wants to `resume`) take it on."""
        run = self.running.get(task.id) or self._ids_waiting.get(task.id)
        if run is not None:
            return run
        kept = self._kept.get(task.id)
        if kept is not None and kept.outcome is not None:
            if kept.outcome.ok or task.attempt <= kept.task.attempt:
                self._kept.move_to_end(task.id)
                return kept
            if not self.draining and not resume:
                self._drop(task.id)  # a failure, and this is a further attempt
        return Refused.UNKNOWN if resume else self._admit(task)

    def _admit(self, task: Task) -> Run | Refused:
        if self.draining:
            return Refused.DRAINING
        room = len(self.running) < self._concurrency
        if not room and len(self.waiting) >= self._queue:
            return Refused.BUSY
        run = Run(task, self._loop.create_future())
        if room:
            self._begin(run)
        else:
            self.waiting.append(run)
            self._ids_waiting[task.id] = run
        return run

    def _begin(self, run: Run) -> None:
        self.running[run.task.id] = run
        self._start(run)

    def finish(self, run: Run, outcome: Outcome) -> None:
        """A run has ended: answer who waits, keep the answer, start the next."""
        if self.running.get(run.task.id) is not run:
            return  # it was given up to drain, and who waited has been told so
        del self.running[run.task.id]
        if outcome.ok:
            self.completed += 1
        else:
            self.failed += 1
        self.cause = outcome.cause
        run.close(outcome)
        self._keep(run)
        while self.waiting and len(self.running) < self._concurrency:
            following = self.waiting.popleft()
            del self._ids_waiting[following.task.id]
            self._begin(following)
        self._changed.set()

    def _keep(self, run: Run) -> None:
        assert run.outcome is not None
        self._kept[run.task.id] = run
        self._kept_bytes += len(run.outcome.body)
        self._undelivered += 1
        while len(self._kept) > KEPT or (self._kept_bytes > KEPT_BYTES and len(self._kept) > 1):
            self._drop(next(iter(self._kept)))

    def _drop(self, id: str) -> None:
        run = self._kept.pop(id)
        assert run.outcome is not None
        self._kept_bytes -= len(run.outcome.body)
        self.delivered(run)

    def delivered(self, run: Run) -> None:
        """Somebody has the answer (or nobody will: it is kept no longer)."""
        if not run.delivered:
            run.delivered = True
            self._undelivered -= 1
            self._changed.set()

    def drain(self) -> None:
        """Take nothing new; what waits has not begun, so who sent it may send it elsewhere at once."""
        self.draining = True
        while self.waiting:
            run = self.waiting.popleft()
            del self._ids_waiting[run.task.id]
            run.close(None)
        self._changed.set()

    def give_up(self) -> list[str]:
        """Answer those who wait for running tasks that these will not finish here; their ids."""
        unfinished = list(self.running.values())
        self.running.clear()
        for run in unfinished:
            run.close(None)
        return [run.task.id for run in unfinished]

    async def idle(self) -> None:
        """Wait until nothing runs or waits."""
        while self.running or self.waiting:
            await self._change()

    async def fetched(self) -> None:
        """Wait until somebody has fetched every kept answer."""
        while self._undelivered:
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
