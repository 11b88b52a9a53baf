"""What the dispatcher needs of others: where instances are, and how to ask them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from agentfleet.signals.http import Requests

__all__ = ["Endpoints", "Requests", "Target"]


class Target(Protocol):
    """An instance that takes work."""

    @property
    def address(self) -> str:
        """host:port."""
        ...

    @property
    def token(self) -> str | None:
        """Bearer token it wants to see, None for none."""
        ...


class Endpoints(Protocol):
    """A live view of serving instances: a mapping from id to target that also tells of changes.

    `agentfleet.endpoints.Endpoints` is one.
    """

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, id: str) -> Target: ...

    def exists(self, id: str) -> bool:
        """Whether the instance still exists, serving or not: while it does, it may yet answer."""
        ...

    async def changed(self) -> None:
        """Wait until an instance enters, leaves, moves, or ceases to exist."""
        ...
