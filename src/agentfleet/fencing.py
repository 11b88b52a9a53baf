"""What a fleet's parts are given in place of the outside world when another manager may lead: nothing stale passes.

What may be repeated is refused; what happened is kept back until it is certain that nobody else has led meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol, runtime_checkable

from agentfleet.core.fence import Fence
from agentfleet.errors import NotLeader
from agentfleet.events import Event
from agentfleet.signals.http import HttpError, Requests, Response
from agentfleet.stores.journal import Journal

MOST_KEPT = 10_000
"""Events kept back while the lease has lapsed; a fleet that has more to tell begins again when it leads again."""


def allows(fence: Fence) -> bool:
    """Whether anything may be done now."""
    try:
        fence.ensure()
    except NotLeader:
        return False
    return True


@runtime_checkable
class Fenced(Protocol):
    """A backend that fences each of its own requests, because one action may take many of them."""

    def fenced(self, fleet: str, fence: Fence) -> None:
        """From now on a fleet is written to in this term; what earlier terms knew of it is forgotten."""
        ...


class Standing:
    """The fence of a manager that waits for its turn: it refuses everything, and says who leads."""

    epoch = 0

    def __init__(self, refuse: Callable[[], NotLeader]) -> None:
        self._refuse = refuse

    def ensure(self) -> int:
        """Always raises `NotLeader`."""
        raise self._refuse()

    def deadline(self, timeout: float, *, least: float = 0.1) -> float:  # noqa: ARG002 - as every fence
        """Always raises `NotLeader`."""
        raise self._refuse()

    def writing(self, timeout: float, *, least: float = 0.1) -> AbstractContextManager[float]:  # noqa: ARG002
        """Always raises `NotLeader`."""
        raise self._refuse()


class FencedJournal:
    """A journal that several managers share, for the one that leads.

    Each event carries the epoch of its term, so that the journal itself refuses a deposed leader, however late.
    While its lease has lapsed events are kept back; they are appended when the term goes on, because then nobody else
    has written, and never if it does not: the next leader has written on from what was there.
    """

    def __init__(self, journal: Journal, fence: Fence) -> None:
        self._journal = journal
        self._fence = fence
        self._kept: deque[Event] = deque()

    def append(self, event: Event) -> Event:
        """Record one event, or keep it back: then it has no `seq` yet.

        Raises:
            JournalError: It could not be recorded.
            NotLeader: Too many are kept back, or another has led since.
        """
        event = replace(event, epoch=self._fence.epoch)
        if not allows(self._fence):
            if len(self._kept) >= MOST_KEPT:
                raise NotLeader(f"{event.fleet}: the lease has lapsed for so long that {MOST_KEPT} events wait for it")
            self._kept.append(event)
            return event
        self.settle()
        return self._journal.append(event)

    def settle(self) -> None:
        """Append what was kept back, if that is allowed now."""
        while self._kept and allows(self._fence):
            self._journal.append(self._kept[0])
            self._kept.popleft()

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """See `Journal`."""
        return self._journal.read(fleet=fleet, after=after)

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """See `Journal`."""
        return self._journal.last_state(fleet, kind)

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """See `Journal`."""
        return self._journal.last_states(fleet, prefix)

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        """See `Journal`."""
        return self._journal.follow(fleet=fleet, after=after)


class FencedRequests:
    """Requests to agents that change them: a manager whose lease has lapsed sends none."""

    def __init__(self, inner: Requests, fence: Fence) -> None:
        self._inner = inner
        self._fence = fence

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        """See `Requests.request`; raises `HttpError` when nothing may be sent now."""
        try:
            self._fence.ensure()
        except NotLeader as error:
            raise HttpError(str(error)) from error
        return await self._inner.request(method, address, path, body=body, headers=headers, timeout=timeout)
