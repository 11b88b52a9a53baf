"""What the instances of one open backend share: the registry, the watchers, and the upkeep done for all of them."""

from __future__ import annotations

import logging
import weakref

import anyio
import anyio.to_thread

from agentfleet.backends.base import Changed, Removed, Snapshot
from agentfleet.backends.process import output, system
from agentfleet.backends.process.adopt import Marked, end_strays, marked
from agentfleet.backends.process.keeper import Keeper
from agentfleet.backends.process.ports import Ports
from agentfleet.backends.process.records import StateDir
from agentfleet.backends.process.usage import Meter
from agentfleet.backends.process.watching import Watcher
from agentfleet.clock import Clock
from agentfleet.instances import Node, Usage

_log = logging.getLogger("agentfleet.backends.process")
_SPAWNS = 2  # launches at once: fork holds the interpreter lock, so more would only delay the event loop
_FILES = 8  # threads for records, outputs and launches
_TRIM_PERIOD, _TRIM_FLOOD = 1.0, 0.1  # seconds between looks at the outputs; the second while one is flooding
_DYING = 0.01  # seconds between looks at what was killed and is not gone yet
_SWEEP_DELAY = 0.5  # seconds after an end until strays are looked for: one look serves many ends


class House:
    """Exists from a backend's opening to its closing. Must be made inside a running event loop."""

    def __init__(self, state: StateDir, ports: Ports, clock: Clock, node: str) -> None:
        self.state = state
        self.ports = ports
        self.clock = clock
        self.node = node
        self.spawns = anyio.CapacityLimiter(_SPAWNS)
        self.files = anyio.CapacityLimiter(_FILES)
        self.keepers: dict[str, Keeper] = {}
        self._metering = anyio.CapacityLimiter(1)
        self._meter = Meter()
        self._watchers: dict[str, weakref.WeakSet[Watcher]] = {}
        self._removal = anyio.Event()
        self._ending = anyio.Event()
        self._ended: set[int] = set()  # sessions whose leader ended since the last sweep

    # ------------------------------------------------------------------------------------------------ watching

    def watch(self, fleet: str) -> Watcher:
        """A new observer of one fleet; one that is dropped unread costs nothing."""

        def snapshot() -> Snapshot:
            mine = (keeper.instance for keeper in self.keepers.values() if keeper.instance.fleet == fleet)
            return Snapshot(instances=tuple(mine), nodes=(Node(self.node),))

        watcher = Watcher(snapshot)
        self._watchers.setdefault(fleet, weakref.WeakSet()).add(watcher)
        return watcher

    def end_watches(self) -> None:
        """Let every observer read what is buffered, and then end."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.end()
        self._watchers.clear()

    def changed(self, keeper: Keeper) -> None:
        """Tell the watchers that an instance looks different now."""
        for watcher in self._watchers.get(keeper.instance.fleet, ()):
            watcher.put(Changed(keeper.instance))

    def removed(self, keeper: Keeper) -> None:
        """Forget an instance and tell the watchers."""
        if self.keepers.get(keeper.instance.id) is keeper:
            del self.keepers[keeper.instance.id]
        for watcher in self._watchers.get(keeper.instance.fleet, ()):
            watcher.put(Removed(keeper.instance.id))
        self._removal.set()

    async def emptied(self) -> None:
        """Return when there is no instance any more."""
        while self.keepers:
            self._removal = anyio.Event()
            await self._removal.wait()

    # ------------------------------------------------------------------------------------------------ upkeep

    def ended(self, pid: int) -> None:
        """Note the end of a process."""
        self._meter.forget(pid)
        self._ended.add(pid)
        self._ending.set()

    async def measure(self, fleet: str) -> dict[str, Usage]:
        """See `ProcessBackend.usage`. One measurement at a time; each runs in a thread."""
        async with self._metering:
            leaders = {
                id: keeper.process.pid
                for id, keeper in self.keepers.items()
                if keeper.process is not None and keeper.instance.fleet == fleet
            }
            return await anyio.to_thread.run_sync(self._meter.measure, leaders, self.clock.now(), limiter=self.files)

    async def keep_trimmed(self, limit: int) -> None:
        """Keep every output within its bound, for as long as the backend is open."""
        while True:
            paths = [self.state.output(id) for id, keeper in self.keepers.items() if keeper.process is not None]
            try:
                trimmed = await anyio.to_thread.run_sync(output.trim_all, paths, limit, limiter=self.files)
            except OSError as error:
                trimmed = 0
                _log.error("cannot keep outputs within their bound: %s", error)
            await anyio.sleep(_TRIM_FLOOD if trimmed else _TRIM_PERIOD)

    async def keep_swept(self) -> None:
        """After processes ended, end what they left outside their process group."""
        while True:
            await self._ending.wait()
            await anyio.sleep(_SWEEP_DELAY)
            self._ending = anyio.Event()
            self._ended.clear()
            sessions = {keeper.process.pid for keeper in self.keepers.values() if keeper.process is not None}
            processes = await anyio.to_thread.run_sync(marked, self.state.marker, sessions, limiter=self.files)
            # Judged by what is known after the look, so that nothing started during it is taken for a stray.
            count = end_strays(processes, self._belongs)
            if count:
                _log.warning("ended %d processes that instances had left behind", count)

    async def sweep_all(self) -> None:
        """End every process that carries the marker, and return when all are gone. The caller sets the deadline."""
        while await anyio.to_thread.run_sync(self._end_all, limiter=self.files):  # noqa: ASYNC110  (nothing wakes us)
            await anyio.sleep(_DYING)

    def _end_all(self) -> bool:
        """Whether anything of ours was still there. Blocks."""
        strays = end_strays(marked(self.state.marker), lambda _: False)
        # A killed process loses its environment first and its files later, so the last moments show by the session.
        return strays > 0 or any(info.session in self._ended and info.state != "Z" for info in system.scan())

    def _belongs(self, one: Marked) -> bool:
        keeper = self.keepers.get(one.instance)
        return keeper is not None and keeper.record.launch == one.launch and not keeper.record.exited
