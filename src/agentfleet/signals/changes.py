"""Changes of verdicts as a stream that never grows beyond the fleet, however slowly it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import anyio

from agentfleet.core.health import Verdict
from agentfleet.instances import AgentStatus, HealthState


@dataclass(frozen=True, slots=True)
class VerdictChange:
    """An instance's verdict has changed from the state `previous`; `status` is what the agent said, if it did."""

    id: str
    verdict: Verdict
    previous: HealthState
    status: AgentStatus | None = None


class Changes:
    """The changes since it was made, one by one, for `async for`.

    Whoever reads slowly gets the newest change of each instance and not those in between, so that what waits is never
    more than the fleet. Ends when the monitor does.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, VerdictChange] = {}
        self._news = anyio.Event()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VerdictChange:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._news = anyio.Event()
            await self._news.wait()
        return self._waiting.pop(next(iter(self._waiting)))

    def put(self, change: VerdictChange) -> None:
        """Add a change; for the monitor."""
        overtaken = self._waiting.get(change.id)
        self._waiting[change.id] = change if overtaken is None else replace(change, previous=overtaken.previous)
        self._news.set()

    def end(self) -> None:
        """No more changes will come; for the monitor."""
        self._ended = True
        self._news.set()
