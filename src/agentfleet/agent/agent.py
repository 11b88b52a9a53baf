"""`Agent`: the public face of the agent's side."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

from agentfleet.agent.config import Configuration
from agentfleet.agent.service import Service
from agentfleet.agent.settings import Settings
from agentfleet.agent.task import Task, TaskFailed
from agentfleet.agent.vitals import Vitals
from agentfleet.agent.worker import Worker, is_async
from agentfleet.errors import DeadlineExceeded, OperationRefused, SpecError

Work = Callable[[Task, "Agent"], Any]
"""The user's function: takes the task and its agent, returns a JSON value. Sync or async."""
_Callback = TypeVar("_Callback", bound=Callable[[Mapping[str, Any]], Any])


class Agent:
    """A process that a fleet can watch, give tasks to, drain and configure. For one run.

    ``Agent(work).run()`` serves until SIGTERM or SIGINT; ``async with Agent(work) as agent`` serves inside a running
    event loop. An async `work` runs in the event loop of the main thread; a sync one in a thread per task (which is
    also the way to other event loops: ``lambda task, agent: trio.run(main, task, agent)``).

    Args:
        work: What to do with a task. Its return value, a JSON value, is the result; an exception fails the task.
        concurrency: Tasks that run at once.
        queue: Tasks that may wait beyond them; more are answered 429.
        settings: Where and how to serve; from the environment when omitted.

    Raises:
        SpecError: `concurrency` is less than 1 or `queue` less than 0.
    """

    def __init__(self, work: Work, *, concurrency: int = 1, queue: int = 0, settings: Settings | None = None) -> None:
        if concurrency < 1:
            raise SpecError(f"concurrency is {concurrency}; an agent must take at least 1 task")
        if queue < 0:
            raise SpecError(f"queue is {queue}; use 0 for none")
        self._work = work
        self._concurrency = concurrency
        self._queue = queue
        self._settings = settings
        self._vitals = Vitals()
        self._config = Configuration()
        self._service: Service | None = None
        self._asked: bool | None = None  # a drain asked for before the service exists: whether in a hurry

    # ------------------------------------------------------------------------------------ running

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Returns when everything taken has been finished.

        A second SIGINT ends the drain at once. In another than the main thread no signal is handled: call `stop`.

        Raises:
            SystemExit: With code 1: tasks were unfinished when the drain ended; they are named on stderr.
            OperationRefused: The address is taken, or this agent has already run.
            SpecError: An environment variable holds nonsense.
        """
        try:
            with self._signals():
                asyncio.run(self._main())
        finally:
            if self._service is not None:
                self._service.close()
        if self._service is not None and self._service.unfinished:
            raise SystemExit(1)

    def stop(self, *, hurry: bool = False) -> None:
        """Begin to drain, from any thread; with `hurry` running tasks are given up. Does not wait."""
        if self._service is None:
            self._asked = hurry or bool(self._asked)
        else:
            self._service.drain(hurry=hurry)

    async def __aenter__(self) -> Self:
        self._open(force=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain, as after SIGTERM; after an error at once.

        Raises:
            DeadlineExceeded: Tasks were unfinished at the drain's deadline; they were cancelled.
        """
        service = self._opened
        try:
            service.drain(hurry=error is not None)
            await service.ended.wait()  # bounded by the drain's own deadlines
            await service.cancel_rest()
        finally:
            service.close()
        if service.unfinished and error is None:
            raise DeadlineExceeded(f"unfinished when the drain ended: {', '.join(service.unfinished[:20])}")

    async def _main(self) -> None:
        service = self._open(force=True)
        sys.stderr.write(f"agentfleet: agent listening on {service.address}\n")
        sys.stderr.flush()
        await service.ended.wait()
        await service.cancel_rest()

    def _open(self, *, force: bool) -> Service:
        if self._service is not None:
            raise OperationRefused("an Agent is for one run; make another one")
        settings = self._settings or Settings.from_env()
        worker = Worker(
            lambda task: self._work(task, self), is_async=is_async(self._work), max_result=settings.max_body
        )
        service = Service(
            settings,
            worker,
            self._vitals,
            self._config,
            concurrency=self._concurrency,
            queue=self._queue,
            force=force,
        )
        self._service = service
        service.start()
        if self._asked is not None:
            service.drain(hurry=self._asked)
        return service

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals in Python, not in the event loop: a blocked loop must not keep the drain from beginning."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupts = 0

        def terminate(number: int, _frame: FrameType | None) -> None:
            nonlocal interrupts
            interrupts += number == signal.SIGINT
            self.stop(hurry=interrupts > 1)

        before = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _opened(self) -> Service:
        if self._service is None:
            raise OperationRefused("the agent does not run yet; use run() or `async with`")
        return self._service

    # ------------------------------------------------------------------------------------ what work may use

    def progress(self, step: str | None = None) -> None:
        """Say that something was achieved, optionally what; from any thread. Silence while busy means stuck."""
        self._vitals.progress(step)

    def fail(self, cause: str, error: str = "") -> NoReturn:
        """Fail the present task for a cause that /status shows, such as "provider:openai:529".

        Raises:
            TaskFailed: Always; let it pass.
        """
        raise TaskFailed(cause, error)

    def unhealthy(self, reason: str) -> None:
        """Make /health answer 503 until `healthy`: this process cannot do its work any more."""
        self._vitals.unhealthy = reason[:500]

    def healthy(self) -> None:
        """Take `unhealthy` back."""
        self._vitals.unhealthy = None

    def gauge(self, name: str, value: float) -> None:
        """Publish a number of your own in /metrics; raises ValueError for a name that Prometheus does not take."""
        self._vitals.gauge(name, value)

    @property
    def draining(self) -> bool:
        """Whether the agent has been told to finish: long work may want to save what it has."""
        return self._service is not None and self._service.draining

    @property
    def address(self) -> str:
        """host:port where the agent serves; raises `OperationRefused` before it does."""
        return self._opened.address

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration in force, read-only; empty before the first push."""
        return self._config.document

    @property
    def config_revision(self) -> int:
        """Its revision, 0 before the first push."""
        return self._config.revision

    def on_config(self, callback: _Callback) -> _Callback:
        """Have `callback` (sync or async, run in the agent's loop) judge each pushed document before it is in force.

        It takes the proposed document; an exception refuses it, with its message, and the present one stays.
        """
        self._config.callback = callback
        return callback
