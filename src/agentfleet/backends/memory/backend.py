"""The simulated cluster as a `Backend`: seeded, in whatever time the loop keeps, with faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import anyio.lowlevel

from agentfleet.backends.base import Creation
from agentfleet.backends.memory.agent import LOG_LINES, Agent, Behavior, Load, Machine
from agentfleet.backends.memory.arguments import Range, flag, machines, seconds, seconds_or_none, span, whole
from agentfleet.backends.memory.faults import Action, Faults
from agentfleet.backends.memory.network import MemoryNetwork
from agentfleet.backends.memory.prober import MemoryProber
from agentfleet.backends.memory.watch import Watch
from agentfleet.backends.memory.world import World
from agentfleet.clock import Clock, SystemClock
from agentfleet.errors import BackendRefused, BackendUnavailable, Conflict, SpecError
from agentfleet.instances import Instance, Node, Phase, Usage
from agentfleet.units import show

LoadSource = Load | Callable[[Instance, float], Load]
_USAGE_WINDOW = 15.0


class MemoryBackend:
    """A cluster in memory that keeps the contract of `agentfleet.backends.base`.

    Instances outlive `async with`: the same object can be entered again, and by several managers at once, which is how
    restarts and successions of managers are simulated. Meanwhile time goes on in it. One object lives within one event
    loop. The same seed and the same calls at the same times give the same events; what is random about an instance
    depends on its id alone.

    Args:
        seed: Of everything random.
        clock: Dates and waits; a `SystemClock` when omitted. Give it the manager's own, so that dates agree.
        nodes: How many nodes (named node-1, node-2, …, over three zones), or the nodes themselves.
        start_delay: Least and most seconds from an instance's placement to its start; one number is both.
        stop_delay: Least and most seconds that a drain takes; one number is both.
        capacity_per_node: Instances that fit on one node; more wait as PENDING. None is no limit.
        resync: Seconds until a snapshot repairs lost events.

    Attributes:
        faults: What can be made to go wrong.

    Raises:
        SpecError: An argument is wrong; the message names it.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        clock: Clock | None = None,
        nodes: int | Iterable[Node] = 3,
        start_delay: float | Range = (0.5, 2.0),
        stop_delay: float | Range = (0.1, 0.5),
        capacity_per_node: int | None = None,
        resync: float = 30.0,
    ) -> None:
        room = None if capacity_per_node is None else whole("capacity_per_node", capacity_per_node, least=0)
        self._world = World(
            seed=whole("seed", seed),
            clock=clock or SystemClock(),
            machines=[Machine(node, room, reachable=node.ready) for node in machines(nodes)],
            start=span("start_delay", start_delay),
            stop=span("stop_delay", stop_delay),
            resync=seconds("resync", resync),
        )
        self._entered = 0
        self._loads: dict[tuple[str | None, str | None], LoadSource] = {}
        self._prober = MemoryProber(self._world, self._load_of)
        self._network = MemoryNetwork(self._world)
        self.faults = Faults(self._world)

    async def __aenter__(self) -> Self:
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            for watch in self._world.watches():
                watch.close()
                self._world.unwatch(watch)

    # -------------------------------------------------------------------------------------------- the port

    def watch(self, fleet: str) -> Watch:
        """Observe one fleet: a snapshot, then what changes. Raises `BackendUnavailable` when not entered."""
        self._check_open()
        return self._world.watch(fleet)

    async def create(self, creation: Creation) -> None:
        """Bring one instance into being; does nothing if its id exists.

        Raises:
            BackendRefused: Over quota, or the id belongs to another fleet.
            BackendUnavailable: The engine cannot be reached.
        """
        await self._act("create", lambda now: self._create(creation, now))

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """Drain for up to `grace` seconds, then kill. Already gone is success."""

        def effect(now: float) -> None:
            agent = self._world.agents.get(id)
            if agent is not None and agent.fleet == fleet:
                self._world.stop(agent, now, grace)

        await self._act("stop", effect)

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """End the process (drained like `stop`) and start it again on the same node.

        Raises:
            InstanceGone: There is no such instance.
            Conflict: It is being stopped, and what is told to go does not come back.
        """

        def effect(now: float) -> None:
            agent = self._world.find(fleet, id)
            if agent.stopping or (agent.order is not None and agent.order[0] == "stop"):
                raise Conflict(f"instance {id!r} is being stopped")
            self._world.restart(agent, now, grace)

        await self._act("restart", effect)

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """What each running instance uses now, by the loads that `load` has set."""
        used: dict[str, Usage] = {}

        def effect(now: float) -> None:
            for agent in self._world.fleets.get(fleet, {}).values():
                if agent.runs and not agent.lost:
                    load = self._load_of(agent, now)
                    used[agent.id] = Usage(now, load.cpu, load.memory, _USAGE_WINDOW)

        await self._act("usage", effect)
        return used

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines the instance wrote, oldest first; at most 200 are kept. Raises `InstanceGone`."""
        found: list[str] = []

        def effect(_: float) -> None:
            kept = (self._world.find(fleet, id).log or [])[-LOG_LINES:]
            found.extend(kept[-lines:] if lines > 0 else ())

        await self._act("logs", effect)
        return found

    def credential(self, fleet: str, id: str) -> str | None:  # noqa: ARG002 - the port asks so
        """None: simulated agents ask for no token."""
        return None

    # -------------------------------------------------------------------------------------------- the simulation

    def network(self) -> MemoryNetwork:
        """Requests to the simulated agents; a fleet uses it in place of sockets."""
        return self._network

    def prober(self) -> MemoryProber:
        """What probes these instances, in place of a network client."""
        return self._prober

    def behave(
        self,
        *,
        version: str | None = None,
        crash_after: float | None = None,
        exit_code: int = 1,
        unhealthy_after: float | None = None,
        never_ready: bool = False,
        ready_after: float = 0.0,
        slow: float = 0.0,
        ignores_term: bool = False,
        start_delay: float | Range | None = None,
    ) -> None:
        """Declare how processes of a version behave that start from now on; called without more, they behave well.

        Args:
            version: The template's version; None for every version without a declaration of its own.
            crash_after: Seconds after its start at which the process exits, with `exit_code`.
            exit_code: Of that exit.
            unhealthy_after: Seconds after its start from which it answers 503.
            never_ready: It runs and never becomes ready.
            ready_after: Seconds from its start until it is ready.
            slow: Seconds that its answers take.
            ignores_term: A drain takes its whole grace.
            start_delay: In place of the backend's.

        Raises:
            SpecError: An argument is wrong; the message names it.
        """
        if not isinstance(version, str | None):
            raise SpecError(f"version: write a template's version like '1.4.0', or None for all, not {show(version)}")
        self._world.behaviors[version] = Behavior(
            crash_after=seconds_or_none("crash_after", crash_after),
            exit_code=whole("exit_code", exit_code),
            unhealthy_after=seconds_or_none("unhealthy_after", unhealthy_after),
            never_ready=flag("never_ready", never_ready),
            ready_after=seconds("ready_after", ready_after),
            slow=seconds("slow", slow),
            ignores_term=flag("ignores_term", ignores_term),
            start_delay=None if start_delay is None else span("start_delay", start_delay),
        )

    def load(self, source: LoadSource, *, fleet: str | None = None, id: str | None = None) -> None:
        """Set what agents use: a `Load`, or a function of (instance, seconds since the epoch) that returns one.

        The setting for an instance goes before that for its fleet, and that before the one for all.
        """
        self._loads[None if id is not None else fleet, id] = source

    def log(self, id: str, line: str) -> None:
        """Write a line to an instance's log. Raises `KeyError` when there is no such instance."""
        self._world.agents[id].write(self._world.advance(), line)

    def instances(self, fleet: str) -> tuple[Instance, ...]:
        """What a watcher without any lag would see now. Costs O(instances)."""
        self._world.advance()
        return self._world.snapshot(fleet).instances

    def running(self, fleet: str) -> tuple[str, ...]:
        """Ids of the instances whose process truly exists now, also on nodes that cannot be reached."""
        self._world.advance()
        return tuple(agent.id for agent in self._world.fleets.get(fleet, {}).values() if agent.runs)

    def count(self, fleet: str, phase: Phase | None = None) -> int:
        """How many instances exist, or are seen in a phase. Costs O(1)."""
        self._world.advance()
        return self._world.size(fleet) if phase is None else self._world.count(fleet, phase)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes as they are now."""
        return tuple(machine.node for machine in self._world.machines.values())

    @property
    def watchers(self) -> int:
        """How many watches are open."""
        return len(self._world.watches())

    @property
    def steps(self) -> int:
        """How many things have happened in the simulation: its own measure of work."""
        return self._world.steps

    # -------------------------------------------------------------------------------------------- inside

    async def _act(self, action: Action, effect: Callable[[float], None]) -> None:
        """Run one action through whatever faults lie in its way. Cancelled before its effect, it had none."""
        self._check_open()
        await anyio.lowlevel.checkpoint()
        delay = self.faults.delay_of(action)
        if delay > 0:
            await self._world.clock.sleep(delay)
        now = self._world.advance()
        if not self._world.available:
            raise BackendUnavailable("the simulated engine cannot be reached")
        error, reply_lost = self.faults.trouble_of(action)
        if error is not None:
            raise error
        effect(now)
        if reply_lost:
            raise BackendUnavailable("the simulated engine did not reply; what was asked may have been done")

    def _create(self, creation: Creation, now: float) -> None:
        known = self._world.agents.get(creation.id)
        if known is not None and known.fleet != creation.fleet:
            raise BackendRefused(f"id {creation.id!r} belongs to fleet {known.fleet!r}; ids are unique for ever")
        if known is not None:
            return
        refusal = self.faults.over_quota(creation.fleet)
        if refusal is not None:
            raise BackendRefused(refusal)
        self._world.add(creation, now)

    def _load_of(self, agent: Agent, now: float) -> Load:
        loads = self._loads
        source = loads.get((None, agent.id)) or loads.get((agent.fleet, None)) or loads.get((None, None)) or _IDLE
        return source if isinstance(source, Load) else source(agent.view or agent.look(), now)

    def _check_open(self) -> None:
        if self._entered == 0:
            raise BackendUnavailable("the backend is closed; use it inside `async with backend`")


_IDLE = Load()
