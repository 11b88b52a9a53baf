"""The recovery loop's book: which slots are ailing, what was tried, and what is to be asked of the governor next.

`Recovery` holds one `RecoveryMemory` per slot with a history (healthy slots cost nothing) and looks only at slots that
changed or whose waiting time is over. It works alone: a controller of one's own feeds it `examine` with its own cases.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from agentfleet.core import recovery as core
from agentfleet.core.reason import Reason
from agentfleet.core.recovery import Ailment, Case, RecoveryMemory, Remedy
from agentfleet.specs import RecoveryPolicy


@dataclass(frozen=True, slots=True)
class Wish:
    """A remedy that recovery wants for a slot, if the governor admits it."""

    slot: int
    remedy: Remedy
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Examined:
    """What looking at a slot has shown."""

    slot: int
    wish: Wish | None
    memory_changed: bool


class Recovery:
    """Decides, slot by slot, what sick instances need.

    Args:
        policy: The ladder and its waiting times.
    """

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.policy = policy
        self._memories: dict[int, RecoveryMemory] = {}
        self._touched: dict[int, None] = {}
        self._wishes: dict[int, Wish] = {}
        self._due: list[tuple[float, int]] = []
        self._due_at: dict[int, float] = {}
        self.hopeless = 0
        """Slots that were left to a human."""

    def touch(self, slot: int) -> None:
        """Say that something changed in a slot."""
        self._touched[slot] = None

    def memory(self, slot: int) -> RecoveryMemory:
        """A slot's history."""
        return self._memories.get(slot, RecoveryMemory())

    def restore(self, slot: int, memory: RecoveryMemory) -> None:
        """Take over a history from an earlier manager."""
        self._keep(slot, memory)
        self.touch(slot)

    def examine(self, case_of: Callable[[int], Case | None], now: float) -> Iterator[Examined]:
        """Look at the slots that changed or are due.

        Args:
            case_of: What is seen in a slot; None when nobody fills it, which ends any wish for it.
            now: Seconds.

        Yields:
            Each slot that was looked at.
        """
        while self._due and self._due[0][0] <= now:
            at, slot = heapq.heappop(self._due)
            if self._due_at.get(slot) == at:  # else it was put off since
                del self._due_at[slot]
                self.touch(slot)
        touched, self._touched = self._touched, {}
        for slot in touched:
            case = case_of(slot)
            if case is None:
                self._wishes.pop(slot, None)
                continue
            before = self.memory(slot)
            if case.ailment is Ailment.NONE and slot not in self._memories:
                self._wishes.pop(slot, None)
                continue
            decision, memory = core.decide(self.policy, case, before, now)
            self._keep(slot, memory)
            if decision.wake is not None and self._due_at.get(slot) != decision.wake:
                self._due_at[slot] = decision.wake
                heapq.heappush(self._due, (decision.wake, slot))
            wish = None if decision.remedy is None else Wish(slot, decision.remedy, decision.reasons)
            if wish is None:
                self._wishes.pop(slot, None)
            else:
                self._wishes[slot] = wish
            yield Examined(slot, wish, memory != before)

    def wishes(self, count: int) -> list[Wish]:
        """The `count` wishes that have waited longest."""
        return list(islice(self._wishes.values(), count))

    def wishes_of(self, slots: Collection[int]) -> list[Wish]:
        """The wishes for any of these slots; costs the smaller of the two."""
        if len(slots) < len(self._wishes):
            return [self._wishes[slot] for slot in slots if slot in self._wishes]
        return [wish for slot, wish in self._wishes.items() if slot in slots]

    def acted(self, slot: int, remedy: Remedy, now: float) -> RecoveryMemory:
        """Note that a remedy is being carried out; returns the slot's new memory, to be recorded."""
        self._wishes.pop(slot, None)
        memory = core.acted(self.memory(slot), remedy, now)
        self._keep(slot, memory)
        self.touch(slot)
        return memory

    def take_back(self, slot: int) -> bool:
        """Do not count a slot's last attempt; it is still waited for the next one. False if there was none."""
        memory = self._memories.get(slot)
        if memory is None or not memory.attempts:
            return False
        self._keep(slot, replace(memory, attempts=memory.attempts - 1))
        self.touch(slot)
        return True

    def forget(self, slot: int) -> None:
        """The slot is not wanted any more."""
        self._wishes.pop(slot, None)
        self._due_at.pop(slot, None)
        self._keep(slot, RecoveryMemory())

    def next_due(self) -> float | None:
        """When `examine` has something to do even if nothing changes."""
        if self._touched:
            return 0.0  # at once: something was touched while the last look went on
        return self._due[0][0] if self._due else None

    def _keep(self, slot: int, memory: RecoveryMemory) -> None:
        self.hopeless += memory.asked - self.memory(slot).asked
        if memory == RecoveryMemory():
            self._memories.pop(slot, None)
        else:
            self._memories[slot] = memory
