"""RECORD: a page of a journal: events of one fleet, of some kinds, from one end or the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agentfleet.events import Event
from agentfleet.stores.journal import Journal


@dataclass(frozen=True, slots=True)
class Page:
    """What is wanted.

    Attributes:
        fleet: Name of a fleet; None is all of them.
        after: Events with a greater `seq`.
        before: Events with a smaller `seq`.
        limit: How many, at most.
        newest: Whether the newest come first, and are kept where there are too many.
        kinds: Beginnings of kinds; none is all.
        without: Beginning of kinds that are left out; empty leaves out none.
    """

    fleet: str | None = None
    after: int = 0
    before: int | None = None
    limit: int = 100
    newest: bool = False
    kinds: tuple[str, ...] = ()
    without: str = ""

    def fits(self, event: Event) -> bool:
        """Whether an event is among those that are wanted."""
        if event.seq <= self.after or (self.before is not None and event.seq >= self.before):
            return False
        if self.without and event.kind.startswith(self.without):
            return False
        return not self.kinds or event.kind.startswith(self.kinds)


@runtime_checkable
class Paged(Protocol):
    """A journal that reads pages by itself, from any thread."""

    def page(self, wanted: Page) -> Sequence[Event]:
        """The page; raises `JournalError`."""
        ...


def read_page(journal: Journal, wanted: Page) -> Sequence[Event]:
    """A page of any journal; may wait, and may be called from any thread. Raises `JournalError`."""
    if isinstance(journal, Paged):
        return journal.page(wanted)
    found = [event for event in journal.read(fleet=wanted.fleet, after=wanted.after) if wanted.fits(event)]
    return found[: -wanted.limit - 1 : -1] if wanted.newest else found[: wanted.limit]
