"""Where leases are kept: the port that every store of leases implements, and one in memory.

The store for a cluster is `agentfleet.backends.kubernetes.lease.KubernetesLeases`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Protocol, runtime_checkable

from agentfleet.clock import Clock, SystemClock
from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded


class LeaseStore(Protocol):
    """Where leases are kept. Each call gives up after `timeout` seconds, raising `DeadlineExceeded`."""

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        """The lease as it is, None if there is none."""
        ...

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Make the lease and return it with its version; raises `Conflict` if there is one."""
        ...

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Change the lease and return it; raises `Conflict` unless it still is `record.version` of `record.uid`.

        Every accepted update makes a new version, also one that changes nothing else.
        """
        ...


@runtime_checkable
class Telling(Protocol):
    """A store that tells at once when a lease is given up, so that nobody has to find it by looking."""

    async def given_up(self, name: str) -> None:
        """Return when a lease was given up, or for no reason; never late on purpose. May be cancelled at any time."""
        ...


@runtime_checkable
class Forgetting(LeaseStore, Protocol):
    """A store that can remove the lease of a fleet that is no more."""

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        """Remove the lease, if it still is `record.version` of `record.uid`; raises `Conflict` if it is another."""
        ...


class MemoryLeases:
    """Leases in memory, with the troubles that real stores have: for tests, and for managers within one process.

    Args:
        clock: What faults are timed by.
        latency: Seconds that a call takes.
        trouble: Probability that a call meets a random fault.
        rng: Draws those.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        latency: float = 0.0,
        trouble: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        self.latency = latency
        self.trouble = trouble
        self.history: dict[str, list[LeaseRecord]] = {}
        """Every state of each lease, oldest first."""
        self.calls = 0
        self._clock: Clock = SystemClock() if clock is None else clock
        self._rng = random.Random(0) if rng is None else rng  # noqa: S311 - reproducible, not secret
        self._versions = 0
        self._gone: set[str] = set()
        self._hangs_until = -math.inf
        self._late: deque[tuple[float, str, LeaseRecord, bool]] = deque()
        """Writes that hang, and are applied when the store comes back, whether their sender still waits or not."""
        self._next: deque[str] = deque()
        self._stale: deque[int] = deque()

    def hang(self, seconds: float) -> None:
        """Calls get no answer for so long; writes are applied then, if their version still fits."""
        self._hangs_until = max(self._hangs_until, self._clock.now() + seconds)

    def conflict(self, times: int = 1) -> None:
        """The next writes are refused."""
        self._next.extend(["conflict"] * times)

    def lose_answer(self, times: int = 1) -> None:
        """The next writes are applied, and their sender learns nothing."""
        self._next.extend(["lost"] * times)

    def refuse_connection(self, times: int = 1) -> None:
        """The next writes fail at once, without effect."""
        self._next.extend(["unavailable"] * times)

    def stale(self, times: int = 1, *, by: int = 1) -> None:
        """The next reads show the state `by` writes ago."""
        self._stale.extend([by] * times)

    def delete(self, name: str) -> None:
        """Somebody deletes the lease."""
        self._gone.add(name)

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        """The lease, None if there is none."""
        back = self._stale.popleft() if self._stale else 0
        if self._rng.random() < self.trouble:
            back = await self._befall(timeout, ["unavailable", "stale", "hang"])
        await self._travel(timeout)
        states = self.history.get(name, [])
        if name in self._gone or not states:
            return None
        return states[max(0, len(states) - 1 - back)]

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Make the lease; raises `Conflict` if there is one."""
        return await self._send(name, record, timeout, new=True)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        """Change the lease; raises `Conflict` unless the version fits."""
        return await self._send(name, record, timeout, new=False)

    async def remove(self, name: str, record: LeaseRecord, *, timeout: float) -> None:
        """Remove the lease; raises `Conflict` unless the version fits."""
        await self._travel(timeout)
        states = self.history.get(name, [])
        if name in self._gone or not states:
            return
        present = states[-1]
        if (record.version, record.uid) != (present.version, present.uid):
            raise Conflict(f"{name}: version {record.version} is not the present one, {present.version}")
        self._gone.add(name)

    async def _send(self, name: str, record: LeaseRecord, timeout: float, *, new: bool) -> LeaseRecord:
        fault = self._next.popleft() if self._next else None
        if self._rng.random() < self.trouble:
            fault = self._rng.choice(["unavailable", "lost", "conflict", "late"])
        if fault == "late" or self._clock.now() < self._hangs_until:
            self._late.append((max(self._hangs_until, self._clock.now() + 2 * timeout), name, record, new))
            await self._silence(timeout)
        if fault == "unavailable":
            raise BackendUnavailable("simulated: connection refused")
        if fault == "conflict":
            raise Conflict("simulated: another was first")
        await self._travel(timeout)
        stored = self._apply(name, record, new=new)
        if fault == "lost":
            await self._silence(timeout)
        await self._clock.sleep(self.latency / 2)
        return stored

    async def _befall(self, timeout: float, kinds: list[str]) -> int:
        match self._rng.choice(kinds):
            case "unavailable":
                raise BackendUnavailable("simulated: connection refused")
            case "hang":
                await self._silence(timeout)
        return self._rng.randint(1, 3)

    async def _travel(self, timeout: float) -> None:
        self.calls += 1
        await self._clock.sleep(self.latency / 2)
        if self._clock.now() < self._hangs_until:
            await self._silence(timeout)
        while self._late and self._late[0][0] <= self._clock.now():
            _, name, record, new = self._late.popleft()
            try:
                self._apply(name, record, new=new)
            except Conflict:
                continue  # as it should be: the state has moved on

    async def _silence(self, timeout: float) -> None:
        await self._clock.sleep(timeout)
        raise DeadlineExceeded(f"simulated: no answer within {timeout:g} s")

    def _apply(self, name: str, record: LeaseRecord, *, new: bool) -> LeaseRecord:
        states = self.history.setdefault(name, [])
        present = None if name in self._gone or not states else states[-1]
        if new != (present is None):
            raise Conflict(f"{name}: there is {'a' if new else 'no'} such lease")
        if present is not None and (record.version, record.uid) != (present.version, present.uid):
            raise Conflict(f"{name}: version {record.version} is not the present one, {present.version}")
        self._versions += 1
        uid = f"u{self._versions}" if present is None else present.uid
        self._gone.discard(name)
        states.append(
            LeaseRecord(record.holder, record.epoch, record.duration, str(self._versions), f"v{self._versions}", uid)
        )
        return states[-1]
