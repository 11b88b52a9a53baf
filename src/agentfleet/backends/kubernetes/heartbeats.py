"""Whose node is silent: from the moments at which nodes' heartbeats came, by our own clock. Pure: time is an argument.

A node is lost when its heartbeat (its Lease, KEP-589) has not moved for a grace. Heartbeats also stay away because the
API server is slow, or we are; then those of many nodes do. So what is late at several nodes at once lengthens the
grace for all, up to half of it; where nothing comes from anybody, or most are silent, nothing new is said; and the time
in which nothing came from anybody is nobody's silence: after an outage nodes come back one after the other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

_BLIND_SHARE = 0.5
"""Share of the nodes that may be lost at once before it is our own sight that is doubted."""
_STRETCH = 0.5
"""By which share the grace is lengthened at most: 24 s instead of 16, where the control plane itself waits 40 s."""
_GAPS = 5.0
"""Nobody's heartbeat came for so many times the usual gap between those of any two nodes: we are blind."""
_REMEMBERED = 4096
"""Pauses between two heartbeats that are remembered."""
_SHORTEST_GAP = 2.0
"""Seconds without anybody's heartbeat that are nothing special, however many nodes there are."""


class Heartbeats:
    """The heartbeats of all nodes.

    Args:
        grace: Seconds of silence after which a node is lost, when those of the others come in time.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self._at: dict[str, float] = {}
        self._took: dict[str, float] = {}
        """Seconds between the last two heartbeats of a node."""
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._lost: frozenset[str] = frozenset()

    def beat(self, node: str, now: float) -> None:
        """A node's heartbeat came."""
        if self._is_blind(now):
            missed = now - max(self._at.values())
            self._at = {each: at + missed for each, at in self._at.items()}
        before = self._at.get(node)
        if before is not None:
            self._took[node] = now - before
            self._recent.append(now - before)
        self._at[node] = now

    def listed(self, nodes: set[str], now: float) -> None:
        """All that exist: when they were renewed is not known, so they get a new grace."""
        self._at |= dict.fromkeys(nodes, now)

    def gone(self, node: str) -> None:
        """A node does not exist any more."""
        self._at.pop(node, None)
        self._took.pop(node, None)

    def lost(self, now: float) -> frozenset[str]:
        """The nodes that are lost now; those of the last answer where our own sight is doubted."""
        if self._is_blind(now):
            return self._lost
        grace = self.grace + self._late(now)
        silent = frozenset(node for node, at in self._at.items() if now - at > grace)
        if len(silent) <= max(1, math.floor(_BLIND_SHARE * len(self._at))):
            self._lost = silent
        return self._lost

    def _is_blind(self, now: float) -> bool:
        if not self._at or not self._took:
            return False
        gap = _GAPS * self._usual() / len(self._at)
        return now - max(self._at.values()) > max(_SHORTEST_GAP, gap)

    def _late(self, now: float) -> float:
        """Seconds by which heartbeats are late at more nodes than one: those that came last, and those overdue."""
        waits = sorted(max(took, now - self._at[node]) for node, took in self._took.items() if node not in self._lost)
        if len(waits) < 2:
            return 0.0
        return min(max(0.0, waits[-2] - self._usual()), self.grace * _STRETCH)

    def _usual(self) -> float:
        """Seconds between two heartbeats of a node, over the last rounds: one slow round makes it no usual thing."""
        return statistics.median_low(self._recent)
