"""What delivers the fleets' configuration to agents that fetch it: one a fleet, from when an agent first asks on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from agentfleet.clock import Clock
from agentfleet.configstore import ConfigStore
from agentfleet.delivery import ConfigDelivery
from agentfleet.errors import OperationRefused
from agentfleet.stores.acks import ConfigAcks

_LOOK = 5.0
"""Seconds between two looks at which fleets there are still."""


class Deliveries:
    """The deliveries of one manager.

    Args:
        store: Where revisions and rollouts are kept.
        acks: Where it is kept who runs what.
        clock: Times them.
        known: Whether there is a fleet of this name; what delivers for one that is gone is ended within seconds.
    """

    def __init__(self, store: ConfigStore, acks: ConfigAcks, *, clock: Clock, known: Callable[[str], bool]) -> None:
        self._make = partial(ConfigDelivery, store, acks=acks, clock=clock)
        self._clock, self._known = clock, known
        self._begun: dict[str, tuple[ConfigDelivery, anyio.CancelScope]] = {}
        self._tasks: TaskGroup | None = None
        self._beginning: anyio.Lock | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._begun)

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Deliver until cancelled."""
        try:
            async with anyio.create_task_group() as self._tasks:
                self._beginning = anyio.Lock()
                task_status.started()
                while True:
                    await self._clock.sleep(_LOOK)
                    self._end()
        finally:
            self._tasks = None
            self._begun = {}

    def _end(self) -> None:
        """End those of fleets that are gone; their agents' streams end with them."""
        for key in [each for each in self._begun if not self._known(each)]:
            _, scope = self._begun.pop(key)
            scope.cancel()

    @staticmethod
    async def _deliver(
        made: ConfigDelivery, scope: anyio.CancelScope, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
    ) -> None:
        with scope:
            await made.run(task_status=task_status)

    async def of(self, key: str) -> ConfigDelivery:
        """The delivery of a fleet, by its name; raises `OperationRefused` unless these run."""
        if self._tasks is None or self._beginning is None:
            raise OperationRefused("configuration is not delivered here now; ask another manager")
        async with self._beginning:  # who comes meanwhile gets one that runs, or begins it if this is cancelled
            if key not in self._begun:
                made, scope = self._make(key), anyio.CancelScope()
                await self._tasks.start(self._deliver, made, scope)
                self._begun[key] = made, scope
            return self._begun[key][0]
