"""The two halves of a running agent and the line between them.

The server's loop (a thread of its own) owns admission, answers and the drain; the user's loop runs the tasks. They talk
only by callbacks posted to each other's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from agentfleet.agent.api import Api, describe
from agentfleet.agent.config import Configuration, Intake
from agentfleet.agent.kept import KeptConfig
from agentfleet.agent.ledger import Ledger, Run
from agentfleet.agent.server import Server, address_of, listen
from agentfleet.agent.settings import Settings
from agentfleet.agent.vitals import BEAT, Vitals
from agentfleet.agent.worker import Worker
from agentfleet.errors import SpecError

_SPARE = 128
"""Connections beyond those that wait for tasks: probes must always get through."""
_CANCEL_TIMEOUT = 1.0
_FORCE_AFTER = 2.0


class Service:
    """One agent's run, from listening to the last answer. Created in the user's loop.

    Args:
        settings: Where and how.
        concurrency: Tasks at once.
        queue: Tasks that may wait beyond them.
        force: Whether the process is ended by force when its main thread does not let go after the drain.

    Raises:
        OperationRefused: The address cannot be had.
        SpecError: The settings name a place for the configuration, and not whose it is.
    """

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        vitals: Vitals,
        config: Configuration,
        *,
        concurrency: int,
        queue: int,
        force: bool,
    ) -> None:
        if settings.config_url is not None:
            if settings.instance is None:
                raise SpecError("AGENTFLEET_CONFIG_URL is set and AGENTFLEET_INSTANCE is not: say who asks")
            from agentfleet.agent.fetch import Target  # noqa: PLC0415  only agents that subscribe pay for it

            Target.of(settings.config_url)
        self._settings = settings
        self._worker = worker
        self._vitals = vitals
        self._config = config
        self._force = force
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._beat: asyncio.TimerHandle | None = None
        self.ended = asyncio.Event()
        """Set in the user's loop when the drain is over."""
        self.unfinished: list[str] = []
        """Ids of tasks that the drain had to give up."""
        sock = listen(settings.host, settings.port)
        self.address = address_of(sock)
        waiters = max(256, 2 * (concurrency + queue))
        self._server = Server(settings, sock, describe=describe, max_connections=waiters + _SPARE)
        self._ledger = Ledger(self._server.loop, concurrency, queue, self._start)
        path = settings.config_file
        kept = None if path is None else KeptConfig(path, settings.instance)
        self._intake = Intake(config, self._apply, kept=kept, warn=_write)
        self._server.api = Api(settings, self._ledger, vitals, config, intake=self._intake, max_waiters=waiters)
        self._configuring: asyncio.Task[None] | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None
        self._hurried = False

    def start(self) -> None:
        """Begin to serve, and to fetch the configuration."""
        self._server.start()
        if self._settings.config_url is not None or self._settings.config_file is not None:
            self._server.post(self._begin_configuring)

    def drain(self, *, hurry: bool = False) -> None:
        """Begin to end, from any thread or signal handler: tasks may finish, unless there is a `hurry`. Repeatable."""
        self._server.post(lambda: self._begin_drain(hurry=hurry))

    @property
    def draining(self) -> bool:
        """Whether the agent takes no new tasks any more."""
        return self._ledger.draining

    async def cancel_rest(self) -> None:
        """Cancel tasks that the drain gave up, and wait a little for them."""
        self._worker.ending = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CANCEL_TIMEOUT)

    def close(self) -> None:
        """Stop serving, whatever goes on; returns when the server's thread has ended."""
        if self._beat is not None:
            self._beat.cancel()
        self._server.stop()

    # ------------------------------------------------------------------------------------ in the server's loop

    def _start(self, run: Run) -> None:
        self._tell_user(self._spawn, run)

    def _tell_user(self, call: Any, *args: Any) -> None:
        # a closed loop means that the agent's main function has ended; the server is about to be stopped
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    async def _apply(self, revision: int, document: Mapping[str, Any]) -> str | None:
        accepting = asyncio.run_coroutine_threadsafe(self._accept(revision, document), self._loop)
        async with asyncio.timeout(self._settings.config_timeout):
            return await asyncio.wrap_future(accepting)

    def _begin_configuring(self) -> None:
        self._configuring = self._server.loop.create_task(self._configure())

    async def _configure(self) -> None:
        """Fetch the configuration; what is kept of an earlier one is used when nobody answers soon, or can be asked."""
        settings = self._settings
        if settings.config_url is None:
            await self._intake.recall()
            return
        from agentfleet.agent.subscribe import Subscription  # noqa: PLC0415  only agents that subscribe pay for it

        subscription = Subscription(
            settings.config_url,
            settings.instance or "",
            offer=self._intake.offer,
            running=lambda: self._config.revision,
            token=settings.present_config_token,
            poll=settings.config_poll,
            warn=_write,
        )
        fetching = self._server.loop.create_task(subscription.run())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.config_patience):
                await subscription.heard.wait()
        await self._intake.recall()  # does nothing if what is kept is not newer
        subscription.note()
        await fetching

    def _begin_drain(self, *, hurry: bool) -> None:
        self._hurried = self._hurried or hurry
        if self._drain_task is None:
            self._drain_task = self._server.loop.create_task(self._drain())
        elif self._hurried and self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(self._server.loop.time())

    async def _drain(self) -> None:
        started = self._server.loop.time()
        self._ledger.drain()
        allowed = 0.0 if self._hurried else self._settings.drain
        with contextlib.suppress(TimeoutError):  # what is unfinished then is reported below
            async with asyncio.timeout(allowed) as self._deadline:
                await self._ledger.idle()
        self._deadline = None
        self.unfinished = self._ledger.give_up()
        if self.unfinished:
            self._report()
        left = max(1.0, started + allowed - self._server.loop.time())
        with contextlib.suppress(TimeoutError):  # results that nobody fetched: whoever wanted them sends again
            async with asyncio.timeout(0.5 if self._hurried else min(self._settings.linger, left)):
                await self._ledger.fetched()
                await self._server.quiet()
        self._tell_user(self.ended.set)
        if self._force:
            await asyncio.sleep(_FORCE_AFTER)
            _write("the main thread does not end; ending the process")
            os._exit(1)

    def _report(self) -> None:
        shown = ", ".join(self.unfinished[:20]) + (", …" if len(self.unfinished) > 20 else "")
        _write(f"drain ended with {len(self.unfinished)} unfinished task(s): {shown}")

    # ------------------------------------------------------------------------------------ in the user's loop

    async def _accept(self, revision: int, document: Mapping[str, Any]) -> str | None:
        me = asyncio.current_task()
        try:
            await self._config.accept(revision, document)
        except asyncio.CancelledError:
            if me is None or me.cancelling():
                raise
            return "on_config was cancelled by its own code"
        except Exception as error:  # noqa: BLE001  the user's code may raise anything; it means that it refuses
            return f"{type(error).__name__}: {error}"[:2_000]
        return None

    def _spawn(self, run: Run) -> None:
        task = self._loop.create_task(self._execute(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._beat is None:
            self._next_beat()

    async def _execute(self, run: Run) -> None:
        self._vitals.progress()
        outcome = await self._worker.run(run.task)
        self._vitals.progress()
        self._server.post(lambda: self._ledger.finish(run, outcome))

    def _next_beat(self) -> None:
        self._vitals.expect_beat()
        self._beat = self._loop.call_later(BEAT, self._on_beat)

    def _on_beat(self) -> None:
        # beats only while there is work: a thousand idle agents should not wake a machine twice a second each
        self._vitals.beat()
        if self._tasks:
            self._next_beat()
        else:
            self._beat = None
            self._vitals.rest()


def _write(text: str) -> None:
    # one write, so that lines of several threads do not mix; a broken stderr must not stop the drain
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"agentfleet: {text}\n")
        sys.stderr.flush()
