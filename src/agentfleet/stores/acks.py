"""RECORD: the port to where it is kept who runs which configuration, by the instances' own word; and one in memory.

Instances speak to whichever manager they reach; what was heard there is written in batches, so that a thousand of them
cost a few writes a second, and read by the manager that leads their fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agentfleet.stores.following import Bell


@dataclass(frozen=True, slots=True)
class ConfigAck:
    """What one instance has said of its configuration."""

    instance: str
    revision: int
    """The revision that it runs; 0 is none."""
    refused: int = 0
    """The newest revision that it has refused since; 0 is none."""
    why: str = ""
    """Why it refused that."""
    via: str = "push"
    """How it gets its configuration: "push", "stream" or "poll"."""
    at: float = 0.0
    """When it was heard, in seconds since the epoch."""

    @property
    def answered(self) -> int:
        """The newest revision that it has answered for, well or not."""
        return max(self.revision, self.refused)

    def says(self, other: ConfigAck | None) -> bool:
        """Whether this says something else than another one."""
        return other is None or (self.revision, self.refused, self.via) != (other.revision, other.refused, other.via)


class ConfigAcks(Protocol):
    """Where it is kept who runs which revision. One contract suite (`tests/stores`) holds for every implementation.

    Every method may raise `ConfigError` when the place cannot be reached.
    """

    async def write(self, key: str, acks: Sequence[ConfigAck], gone: Sequence[str] = ()) -> None:
        """Keep what was heard, all or nothing: the last word of each instance. Those that are gone are forgotten."""
        ...

    async def after(self, key: str, batch: int) -> tuple[int, Sequence[ConfigAck]]:
        """What was written after a batch, and the number of the newest; from 0 everything there is."""
        ...

    async def changed(self, key: str, batch: int) -> None:
        """Wait until there is a batch after this one. May return early, never late."""
        ...


class MemoryAcks:
    """Who runs which revision, in memory."""

    def __init__(self) -> None:
        self._batches: dict[str, int] = {}
        self._kept: dict[str, dict[str, tuple[int, ConfigAck]]] = {}
        self._bells: dict[str, Bell] = {}

    async def write(self, key: str, acks: Sequence[ConfigAck], gone: Sequence[str] = ()) -> None:
        """Keep what was heard."""
        batch = self._batches[key] = self._batches.get(key, 0) + 1
        kept = self._kept.setdefault(key, {})
        kept.update({ack.instance: (batch, ack) for ack in acks})
        for instance in gone:
            kept.pop(instance, None)
        if key in self._bells:
            self._bells.pop(key).ring()

    async def after(self, key: str, batch: int) -> tuple[int, Sequence[ConfigAck]]:
        """What was written after a batch."""
        kept: Mapping[str, tuple[int, ConfigAck]] = self._kept.get(key, {})
        return self._batches.get(key, 0), [ack for number, ack in kept.values() if number > batch]

    async def changed(self, key: str, batch: int) -> None:
        """Wait until there is a batch after this one."""
        if self._batches.get(key, 0) <= batch:
            await self._bells.setdefault(key, Bell()).wait()
