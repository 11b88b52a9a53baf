"""Where work may be sent: a live view of a fleet's serving instances, for any load balancer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import anyio

from agentfleet.view import SERVING, FleetView


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One instance that takes work."""

    id: str
    address: str
    """host:port"""
    token: str | None = None
    """Bearer token that it wants to see with work."""
    node: str | None = None
    version: str = ""

    def __repr__(self) -> str:  # the token must not reach a log
        return f"Endpoint({self.id} at {self.address})"


class Endpoints(Mapping[str, Endpoint]):
    """The serving instances by id, always current; iterate it, look ids up, or wait for a change.

    An instance enters when it has proved healthy (or nothing is known against it) and is configured. It leaves before
    it is told to drain, or as soon as it is found sick: traffic never reaches an instance that is known not to work.
    """

    def __init__(
        self, view: FleetView, *, credential: Callable[[str], str | None], admits: Callable[[str], bool]
    ) -> None:
        self._view = view
        self._credential = credential
        self._admits = admits
        self._serving: dict[str, Endpoint] = {}
        self._changed = anyio.Event()

    def __getitem__(self, id: str) -> Endpoint:
        return self._serving[id]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._serving))

    def __len__(self) -> int:
        return len(self._serving)

    def exists(self, id: str) -> bool:
        """Whether an instance still exists, serving or not: while it does, it may yet answer."""
        member = self._view.members.get(id)
        return member is not None

    async def changed(self) -> None:
        """Wait until an instance enters or leaves."""
        await self._changed.wait()

    def refresh(self, id: str) -> None:
        """Take over one instance's present worth (called by the fleet)."""
        member = self._view.members.get(id)
        serves = member is not None and member.condition in SERVING and self._admits(id)
        address = member.instance.address if member is not None and serves else None
        if member is not None and address is not None:
            known = self._serving.get(id)
            if known is not None and known.address == address:
                return
            instance = member.instance
            self._serving[id] = Endpoint(id, address, self._credential(id), instance.node, instance.version)
        elif self._serving.pop(id, None) is None:
            return
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change; also called when an instance that did not serve is gone for good."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
