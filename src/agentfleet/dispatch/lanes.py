"""Which instance gets the next task: the one with the fewest in flight, found without walking the fleet."""

from __future__ import annotations

from collections.abc import Iterator


class Lane:
    """One instance, as far as sending work to it goes."""

    __slots__ = ("address", "id", "load", "resting", "serving", "silences", "token")

    def __init__(self, id: str) -> None:
        self.id = id
        self.address = ""
        self.token: str | None = None
        self.load = 0
        """Tasks in flight."""
        self.serving = False
        """Whether new work may go there."""
        self.resting = False
        """Whether it lately said that it has no room, or could not be reached."""
        self.silences = 0
        """Consecutive times that it could not be reached."""

    @property
    def door(self) -> tuple[str, str | None]:
        """Where and with which token to ask."""
        return self.address, self.token


class Lanes:
    """Lanes in buckets by load; each operation costs the same however many there are.

    Args:
        limit: Tasks in flight that one instance takes.
    """

    def __init__(self, limit: int) -> None:
        self._all: dict[str, Lane] = {}
        # dictionaries as ordered sets: within a bucket the instance that has waited longest comes first
        self._open: list[dict[str, Lane]] = [{} for _ in range(limit)]
        self.serving = 0

    def __iter__(self) -> Iterator[Lane]:
        return iter(tuple(self._all.values()))

    def get(self, id: str) -> Lane | None:
        """The instance's lane, if there is one."""
        return self._all.get(id)

    def open(self, id: str, address: str, token: str | None) -> Lane:
        """An instance serves, perhaps elsewhere than before."""
        lane = self.known(id, address, token)
        if not lane.serving:
            lane.serving = True
            self.serving += 1
            self._place(lane)
        return lane

    def known(self, id: str, address: str, token: str | None) -> Lane:
        """An instance exists; whether it serves is not said."""
        lane = self._all.get(id)
        if lane is None:
            lane = self._all[id] = Lane(id)
        lane.address, lane.token = address, token
        return lane

    def close(self, lane: Lane) -> None:
        """The instance takes no new work."""
        if lane.serving:
            self._displace(lane)
            lane.serving = False
            self.serving -= 1

    def forget(self, lane: Lane) -> None:
        """The instance is gone."""
        self.close(lane)
        del self._all[lane.id]

    def rest(self, lane: Lane, resting: bool) -> None:
        """Take a lane out for a while, or put it back."""
        self._displace(lane)
        lane.resting = resting
        self._place(lane)

    def take(self, lane: Lane, change: int) -> None:
        """`change` is 1 when a task is sent, -1 when it has ended."""
        self._displace(lane)
        lane.load += change
        self._place(lane)

    def least(self, avoid: str | None = None) -> Lane | None:
        """The serving instance with the fewest in flight; `avoid` only if there is no other. None: all are full."""
        fallback: Lane | None = None
        for bucket in self._open:
            for id, lane in bucket.items():
                if id != avoid:
                    return lane
                fallback = lane  # looks at one more at most: only one can be the avoided
        return fallback

    def _place(self, lane: Lane) -> None:
        if lane.serving and not lane.resting and lane.load < len(self._open):
            self._open[lane.load][lane.id] = lane

    def _displace(self, lane: Lane) -> None:
        if lane.load < len(self._open) and self._open[lane.load].get(lane.id) is lane:
            del self._open[lane.load][lane.id]
