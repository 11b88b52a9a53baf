"""Whose node is silent: from the moments at which nodes' heartbeats came, by our own clock. Pure: time is an argument.

A node is lost when its heartbeat (its Lease, KEP-589) has not moved for a grace. Heartbeats also stay away because the
API server is slow, or we are; then those of many nodes do. So what is late at several nodes at once lengthens the
grace for all, up to half of it; where nothing comes from anybody, or most are silent, nothing new is said; and the
time in which nothing came from anybody is nobody's silence: after an outage nodes come back one after the other.

How long nothing may come before we are blind is learnt from the longest of the ordinary pauses. It is not computed from
the number of nodes: three kubelets that were started together send all their heartbeats within the same second of ten.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

_BLIND_SHARE = 0.5
"""Share of the nodes that may be lost at once before it is our own sight that is doubted."""
_STRETCH = 0.5
"""By which share the grace is lengthened at most: 24 s instead of 16, where the control plane itself waits 40 s."""
_LONGER = 1.5
"""Nobody's heartbeat came for so many times the longest ordinary pause: we are blind."""
_SHORTEST_PAUSE = 2.0
"""Seconds without anybody's heartbeat that are nothing special, however many nodes there are."""
_SLACK = (1.25, 1.0)
"""A node that lives sends a heartbeat within so many usual periods and so many seconds."""
_ROUNDS = 4
"""Periods over which pauses are remembered."""
_REMEMBERED = 4096
"""Heartbeats of which it is remembered how long they took."""


class Heartbeats:
    """The heartbeats of all nodes.

    Args:
        grace: Seconds of silence after which a node is lost, when those of the others come in time.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self._at: dict[str, float] = {}
        """When each node's heartbeat came last; later, by as long as nothing came from anybody."""
        self._came: dict[str, float] = {}
        """When it really came, if it has."""
        self._took: dict[str, float] = {}
        """Seconds between the last two heartbeats of a node."""
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._usual = math.inf
        """Seconds between two heartbeats of a node, over the last rounds: one slow round makes it no usual thing."""
        self._uncounted = 0
        self._newest = 0.0
        """When a heartbeat came last, of whatever node."""
        self._pauses: deque[tuple[float, float]] = deque()
        """When pauses between two heartbeats of any nodes ended, and how long each was, without those of which a later
        one was as long: the first is the longest."""
        self._lost: frozenset[str] = frozenset()

    def beat(self, node: str, now: float) -> None:
        """A node's heartbeat came."""
        if self._is_blind(now):
            pause = now - self._newest
            unheard = pause if pause > self._due() else pause - self._pauses[0][1]
            self._at = {each: at + unheard for each, at in self._at.items()}
        before = self._came.get(node)
        if before is not None:
            self._took[node] = now - before
            self._learn(now - before)
            self._remember(min(now - self._newest, self._usual), now)
        self._at[node] = self._came[node] = self._newest = now

    def listed(self, nodes: set[str], now: float) -> None:
        """All that exist: when they were renewed is not known, so they get a new grace."""
        self._at |= dict.fromkeys(nodes, now)
        self._newest = now

    def gone(self, node: str) -> None:
        """A node does not exist any more."""
        self._at.pop(node, None)
        self._came.pop(node, None)
        self._took.pop(node, None)
        self._lost -= {node}

    def lost(self, now: float) -> frozenset[str]:
        """The nodes that are lost now; those of the last answer where our own sight is doubted."""
        if self._is_blind(now):
            return self._lost
        overdue = sum(now - at > min(self._due(), self.grace) for at in self._at.values())
        if overdue <= max(1, math.floor(_BLIND_SHARE * len(self._at))):
            grace = self.grace + self._late(now)
            self._lost = frozenset(node for node, at in self._at.items() if now - at > grace)
        return self._lost

    def _is_blind(self, now: float) -> bool:
        return now - self._newest > self._longest_pause()

    def _longest_pause(self) -> float:
        """Seconds for which nothing may come from anybody while heartbeats come through."""
        if not self._pauses:
            return math.inf
        return min(max(_SHORTEST_PAUSE, _LONGER * self._pauses[0][1]), self._due())

    def _due(self) -> float:
        """Seconds within which a node that lives sends a heartbeat."""
        periods, more = _SLACK
        return periods * self._usual + more

    def _remember(self, pause: float, now: float) -> None:
        while self._pauses and self._pauses[-1][1] <= pause:
            self._pauses.pop()
        self._pauses.append((now, pause))
        while self._pauses[0][0] < now - _ROUNDS * self._usual:
            self._pauses.popleft()

    def _late(self, now: float) -> float:
        """Seconds by which heartbeats are late at more nodes than one: those that came last, and those overdue."""
        waits = sorted(max(took, now - self._at[node]) for node, took in self._took.items() if node not in self._lost)
        if len(waits) < 2:
            return 0.0
        return min(max(0.0, waits[-2] - self._usual), self.grace * _STRETCH)

    def _learn(self, took: float) -> None:
        """Note how long a heartbeat took; what is usual is computed again when a quarter of the nodes have sent one."""
        self._recent.append(took)
        self._uncounted += 1
        if self._uncounted >= len(self._at) // 4 or self._usual == math.inf:
            self._usual, self._uncounted = statistics.median_low(self._recent), 0
