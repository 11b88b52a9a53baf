"""ACT: carries decided actions out through the backend: bounded, with deadlines, retried, and always recorded.

An action runs in a task of its own, so that a slow engine never holds up the turn. While it runs its instance is
`busy` and recovery leaves it alone; when it ends the turn is woken. An instance's actions never overlap: one that is
ordered meanwhile follows when the first has ended, so that a stop never overtakes the creation it is to undo.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import anyio
from anyio.abc import TaskGroup

from agentfleet.backends.base import Backend, Creation, Engine, Relocating, Workload, WorkloadBackend
from agentfleet.clock import Clock
from agentfleet.core.fence import Fence, NoFence
from agentfleet.errors import BackendError, DeadlineExceeded, NotLeader
from agentfleet.fencing import Fenced
from agentfleet.instances import Isolation
from agentfleet.retries import transient

Failure = BackendError | DeadlineExceeded | NotLeader
Outcome = Callable[[str, str, Failure | None, float], None]
"""Called with the action's name, the instance's id, the final error if it failed, and the seconds it took."""


class Actuator:
    """Executes actions of one fleet.

    Args:
        backend: Where the instances live.
        fleet: Name of the fleet.
        clock: Times deadlines and waits.
        rng: Draws the jitter of retries.
        on_done: Told of each action's end, successful or not.
        concurrency: Actions at one time.
        deadline: Seconds that the engine may take to accept one attempt.
        fence: Asked before each attempt; who does not lead drops the action.
    """

    def __init__(
        self,
        backend: Engine,
        fleet: str,
        *,
        clock: Clock,
        rng: random.Random,
        on_done: Outcome,
        concurrency: int = 64,
        deadline: float = 30.0,
        fence: Fence | None = None,
    ) -> None:
        self._backend = backend
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._on_done = on_done
        self._concurrency = concurrency
        self._deadline = deadline
        self._fence: Fence = NoFence() if fence is None else fence
        self._limiter: anyio.CapacityLimiter | None = None
        self._tasks: TaskGroup | None = None
        self.busy: dict[str, str] = {}
        """Instances with an action under way, and which."""
        self._next: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = {}

    def bind(self, tasks: TaskGroup) -> None:
        """Run actions in this task group from now on."""
        self._tasks = tasks
        self._limiter = anyio.CapacityLimiter(self._concurrency)

    def create(self, creation: Creation) -> None:
        """Begin to bring an instance into being; only where instances are made one by one."""
        backend = cast("Backend", self._backend)
        self._begin("create", creation.id, lambda: backend.create(creation))

    def apply(self, workload: Workload) -> None:
        """Begin to have the whole fleet be so; of several that wait the last counts."""
        backend = cast("WorkloadBackend", self._backend)
        self._begin("apply", workload.fleet, lambda: backend.apply(workload))

    def delete(self, fleet: str) -> None:
        """Begin to remove whatever is left of the fleet."""
        backend = cast("WorkloadBackend", self._backend)
        self._begin("delete", fleet, lambda: backend.delete(fleet))

    def stop(self, id: str, *, grace: float) -> None:
        """Begin to drain and end an instance."""
        self._begin("stop", id, lambda: self._backend.stop(self._fleet, id, grace=grace))

    def restart(self, id: str, *, grace: float) -> None:
        """Begin to restart an instance in place."""
        self._begin("restart", id, lambda: self._backend.restart(self._fleet, id, grace=grace))

    def isolate(self, id: str, isolation: Isolation) -> None:
        """Begin to have the engine let go of an instance that stays; only where it keeps fleets by itself."""
        backend = cast("WorkloadBackend", self._backend)
        self._begin("isolate", id, lambda: backend.isolate(self._fleet, id, isolation=isolation))

    def stand_in(self, id: str, *, away_from: str) -> None:
        """Begin to have a stand-in for an instance; only where the engine can."""
        backend = cast("Relocating", self._backend)
        self._begin("stand_in", id, lambda: backend.stand_in(self._fleet, id, away_from=away_from))

    def exchange(self, id: str, stand_in: str, *, grace: float) -> None:
        """Begin to have an instance's stand-in take its place."""
        backend = cast("Relocating", self._backend)
        self._begin("exchange", id, lambda: backend.exchange(self._fleet, id, stand_in, grace=grace))

    def discard(self, stand_in: str) -> None:
        """Begin to end a stand-in."""
        backend = cast("Relocating", self._backend)
        self._begin("discard", stand_in, lambda: backend.discard(self._fleet, stand_in))

    def _begin(self, name: str, id: str, call: Callable[[], Awaitable[None]]) -> None:
        assert self._tasks is not None, "bind() comes first"
        if id in self.busy:
            self._next[id] = (name, call)
            return
        self.busy[id] = name
        self._tasks.start_soon(self._run, name, id, call, name=f"{name} {id}")

    async def _run(self, name: str, id: str, call: Callable[[], Awaitable[None]]) -> None:
        assert self._limiter is not None
        error: Failure | None = None
        began = self._clock.now()
        async with self._limiter:
            try:
                async for attempt in transient(self._clock, self._rng):
                    with attempt:
                        await self._once(name, id, call)
            except (BackendError, DeadlineExceeded, NotLeader) as failed:
                error = failed
        del self.busy[id]
        following = self._next.pop(id, None)
        if following is not None:
            self._begin(following[0], id, following[1])
        self._on_done(name, id, error, self._clock.now() - began)

    def _writing(self) -> AbstractContextManager[object]:
        """Around one attempt; a backend that makes many requests of it fences each of them by itself."""
        return nullcontext() if isinstance(self._backend, Fenced) else self._fence.writing(self._deadline)

    async def _once(self, name: str, id: str, call: Callable[[], Awaitable[None]]) -> None:
        try:
            self._fence.ensure()
            with anyio.fail_after(self._deadline), self._writing():
                await call()
        except (BackendError, DeadlineExceeded, NotLeader):
            raise
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{name} of {id}: the backend did not accept it within {self._deadline:g} s; its effect is unknown"
            ) from error
        except Exception as error:  # a backend of the user's own may raise anything; that must not end the fleet
            raise BackendError(
                f"{name} of {id}: the backend raised {type(error).__name__}, which is no BackendError: {error}"
            ) from error
