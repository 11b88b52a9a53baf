"""The simulated engine: agents, nodes, and what happens to them when its time comes.

There is no task behind it. Whatever asks (a watcher, an action, a probe, a fault) first lets everything happen that
was due until now, in order of time; so it goes on while nobody manages it, and it costs nothing when nobody looks.
An event costs O(log events), a placement O(nodes); only a snapshot costs O(instances).
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import blake2b

from agentfleet.backends.base import Changed, Creation, Removed, Snapshot
from agentfleet.backends.memory.agent import Agent, Behavior, Machine
from agentfleet.backends.memory.arguments import Range
from agentfleet.backends.memory.watch import Watch
from agentfleet.clock import Clock
from agentfleet.errors import InstanceGone
from agentfleet.instances import Phase

AgentEvent = Callable[[Agent, float], None]
EngineEvent = Callable[[float], None]
Due = tuple[float, int, EngineEvent | None, AgentEvent | None, Agent | None, int]
KILLED = -9


class World:
    """Everything there is. Its methods are synchronous, and take the time at which they happen."""

    def __init__(
        self, *, seed: int, clock: Clock, machines: Iterable[Machine], start: Range, stop: Range, resync: float
    ) -> None:
        self.seed = seed
        self.clock = clock
        self.machines = {machine.node.name: machine for machine in machines}
        self.agents: dict[str, Agent] = {}
        self.fleets: dict[str, dict[str, Agent]] = {}
        self.behaviors: dict[str | None, Behavior] = {}
        self.available = True
        self.lag = 0.0
        self.resync = resync
        self.steps = 0
        """Things that happened so far: the simulation's own measure of work."""
        self._start, self._stop = start, stop
        self._heap: list[Due] = []
        self._dues: dict[str | None, list[float]] = {None: []}
        self._order = itertools.count()
        self._ports = itertools.count(20_000)
        self._unplaced: deque[Agent] = deque()
        self._watches: dict[str, weakref.WeakValueDictionary[int, Watch]] = {}
        self._counts: Counter[tuple[str, Phase | None]] = Counter()

    # -------------------------------------------------------------------------------------------- time

    def advance(self) -> float:
        """Let happen what was due, and return the time now."""
        now = self.clock.now()
        heap = self._heap
        while heap and heap[0][0] <= now:
            due, _, engine_event, agent_event, agent, life = heapq.heappop(heap)
            self.steps += 1
            if engine_event is not None:
                engine_event(due)
            elif agent is not None and agent.life == life:
                assert agent_event is not None
                agent_event(agent, due)
        return now

    def later(self, at: float, event: EngineEvent) -> None:
        """Have something happen to the engine at time `at`."""
        heapq.heappush(self._heap, (at, next(self._order), event, None, None, 0))
        heapq.heappush(self._dues[None], at)
        for watch in self.watches():
            watch.expect(at)

    def schedule(self, agent: Agent, at: float, event: AgentEvent) -> None:
        """Have something happen to an agent at time `at`, unless its life has turned by then."""
        heapq.heappush(self._heap, (at, next(self._order), None, event, agent, agent.life))
        heapq.heappush(self._dues.setdefault(agent.fleet, []), at)
        for watch in self.watches(agent.fleet):
            watch.expect(at)

    def next_due(self, fleet: str) -> float:
        """When something may next happen that a watcher of `fleet` sees. Call `advance` first."""
        pending = self._heap[0][0] if self._heap else math.inf
        first = math.inf
        for dues in (self._dues[None], self._dues.get(fleet, [])):
            while dues and dues[0] < pending:  # it has happened
                heapq.heappop(dues)
            if dues:
                first = min(first, dues[0])
        return first

    def draw(self, agent: Agent, what: str, span: Range) -> float:
        """A number within `span` that depends on seed, instance and incarnation alone, never on who asked first."""
        key = f"{self.seed}/{agent.id}/{what}/{agent.restarts}".encode()
        share = int.from_bytes(blake2b(key, digest_size=6).digest()) / 2**48
        return span[0] + share * (span[1] - span[0])

    # -------------------------------------------------------------------------------------------- observation

    def watch(self, fleet: str) -> Watch:
        """A new watcher. It is forgotten when nobody holds it."""
        watch = Watch(self, fleet, next(self._order))
        self._watches.setdefault(fleet, weakref.WeakValueDictionary())[watch.number] = watch
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Forget a watcher."""
        self._watches[watch.fleet].pop(watch.number, None)

    def watches(self, fleet: str | None = None) -> list[Watch]:
        """The watchers of one fleet, or of all."""
        if fleet is not None:
            return list(self._watches[fleet].values()) if fleet in self._watches else []
        return [watch for watches in self._watches.values() for watch in watches.values()]

    def snapshot(self, fleet: str) -> Snapshot:
        """Everything of one fleet, oldest first."""
        views = [agent.view for agent in self.fleets.get(fleet, {}).values()]
        nodes = tuple(machine.node for machine in self.machines.values())
        return Snapshot(instances=tuple(view for view in views if view is not None), nodes=nodes)

    def size(self, fleet: str) -> int:
        """How many instances of a fleet exist."""
        return self._counts[fleet, None]

    def count(self, fleet: str, phase: Phase) -> int:
        """How many instances of a fleet are seen in a phase."""
        return self._counts[fleet, phase]

    def find(self, fleet: str, id: str) -> Agent:
        """The instance; raises `InstanceGone` when the fleet has none of this id."""
        agent = self.agents.get(id)
        if agent is None or agent.fleet != fleet:
            raise InstanceGone(f"fleet {fleet!r} has no instance {id!r} (any more)")
        return agent

    def refresh(self, agent: Agent, at: float) -> None:
        """Tell the watchers if the agent looks different now."""
        before = agent.view
        if agent.lost and before is not None and before.phase is Phase.LOST:
            return  # nobody can see what happens to it
        view = agent.look()
        if view == before:
            return
        agent.view = view
        if before is None or before.phase is not view.phase:
            self._counts[agent.fleet, view.phase] += 1
            if before is not None:
                self._counts[agent.fleet, before.phase] -= 1
        for watch in self.watches(agent.fleet):
            watch.put(at, Changed(view))

    # -------------------------------------------------------------------------------------------- life

    def add(self, creation: Creation, at: float) -> None:
        """A new agent, placed as soon as there is room."""
        agent = Agent(
            id=creation.id,
            fleet=creation.fleet,
            slot=creation.slot,
            revision=creation.revision,
            version=creation.template.version,
            created_at=at,
            avoid=creation.avoid_nodes,
        )
        self.agents[agent.id] = agent
        self.fleets.setdefault(agent.fleet, {})[agent.id] = agent
        self._counts[agent.fleet, None] += 1
        if not self._place(agent):
            self._unplaced.append(agent)
        self.refresh(agent, at)
        if agent.machine is not None:
            self._begin(agent, at)

    def remove(self, agent: Agent, at: float) -> None:
        """The agent ceases to exist, and its place goes to who waits for one."""
        agent.life += 1
        del self.agents[agent.id], self.fleets[agent.fleet][agent.id]
        self._counts[agent.fleet, None] -= 1
        if agent.view is not None:
            self._counts[agent.fleet, agent.view.phase] -= 1
        for watch in self.watches(agent.fleet):
            watch.put(at, Removed(agent.id))
        if agent.machine is not None:
            del agent.machine.agents[agent.id]
            self.place_waiting(at)

    def place_waiting(self, at: float) -> None:
        """Place who waits for room, oldest first, until there is none."""
        while self._unplaced:
            agent = self._unplaced[0]
            wanted = self.agents.get(agent.id) is agent
            if wanted and not self._place(agent):
                return
            self._unplaced.popleft()
            if wanted:
                self.refresh(agent, at)
                self._begin(agent, at)

    def _place(self, agent: Agent) -> bool:
        """The emptiest node with room, one that is not to be avoided if there is such."""
        free = [machine for machine in self.machines.values() if machine.free]
        if not free:
            return False
        machine = min(free, key=lambda m: (m.node.name in agent.avoid, len(m.agents)))
        machine.agents[agent.id] = agent
        agent.machine = machine
        return True

    def _begin(self, agent: Agent, at: float) -> None:
        span = self.behavior(agent).start_delay or self._start
        self.schedule(agent, at + self.draw(agent, "start", span), self._started)

    def behavior(self, agent: Agent) -> Behavior:
        """How the agent's version behaves."""
        return self.behaviors.get(agent.version) or self.behaviors.get(None) or _GOOD

    def _started(self, agent: Agent, at: float) -> None:
        assert agent.machine is not None
        behavior = self.behavior(agent)
        agent.phase, agent.started_at = Phase.RUNNING, at
        agent.address = f"{agent.machine.node.name}.sim:{next(self._ports)}"
        if agent.condition is not None and not agent.condition.sticky:
            agent.condition = None
        if behavior.slow or behavior.ignores_term:
            condition = agent.ail()
            condition.slow = max(condition.slow, behavior.slow)
            condition.ignores_term = condition.ignores_term or behavior.ignores_term
        agent.write(at, f"started version {agent.version}")
        if not behavior.never_ready:
            if behavior.ready_after > 0:
                self.schedule(agent, at + behavior.ready_after, self._became_ready)
            else:
                agent.ready, agent.ready_at = True, at
        if behavior.unhealthy_after is not None:
            self.schedule(agent, at + behavior.unhealthy_after, _sicken)
        if behavior.crash_after is not None:
            code = behavior.exit_code
            self.schedule(agent, at + behavior.crash_after, lambda who, when: self.exit(who, when, code))
        self.refresh(agent, at)

    def _became_ready(self, agent: Agent, at: float) -> None:
        agent.ready, agent.ready_at = True, at
        self.refresh(agent, at)

    def exit(self, agent: Agent, at: float, code: int | None) -> None:
        """The process ends; what was ordered for its end is done."""
        agent.life += 1
        agent.phase, agent.ready, agent.exit_code = Phase.EXITED, False, code
        agent.write(at, f"exited with {'an unknown code' if code is None else code}")
        if not agent.lost:
            self._follow_up(agent, at)

    def _follow_up(self, agent: Agent, at: float) -> None:
        if agent.stopping:
            self.remove(agent, at)
        elif agent.restarting:
            agent.restarting = False
            agent.restarts += 1
            agent.phase = Phase.PENDING
            self.refresh(agent, at)
            self._begin(agent, at)
        else:
            self.refresh(agent, at)

    def stop(self, agent: Agent, at: float, grace: float) -> None:
        """Drain and remove; at once if there is no process."""
        agent.restarting = False
        if agent.lost:
            agent.order = ("stop", grace)
        elif not agent.runs:
            self.remove(agent, at)
        else:
            agent.stopping = True
            self._drain(agent, at, grace)

    def restart(self, agent: Agent, at: float, grace: float) -> None:
        """Drain and start again. While it starts or restarts anyway there is nothing to do."""
        if agent.lost:
            agent.order = agent.order or ("restart", grace)
        elif agent.phase is Phase.EXITED:
            agent.life += 1
            agent.restarting = True
            self._follow_up(agent, at)
        elif agent.runs:
            agent.restarting = True
            self._drain(agent, at, grace)

    def _drain(self, agent: Agent, at: float, grace: float) -> None:
        """Ask the process to end. Asked again, it can only end earlier."""
        deadline = at + grace
        if agent.phase is Phase.DRAINING:
            deadline = min(deadline, agent.drain_ends)
        else:
            agent.drain_began = at
        if grace <= 0:
            self.exit(agent, at, KILLED)
            return
        agent.life += 1
        agent.phase, agent.ready, agent.drain_ends = Phase.DRAINING, False, deadline
        done = agent.drain_began + self.draw(agent, "stop", self._stop)
        condition = agent.condition
        deaf = condition is not None and (condition.hung or condition.ignores_term)
        if deaf or done > deadline:
            self.schedule(agent, deadline, lambda who, when: self.exit(who, when, KILLED))
        else:
            self.schedule(agent, max(done, at), lambda who, when: self.exit(who, when, 0))
        self.refresh(agent, at)

    # -------------------------------------------------------------------------------------------- nodes

    def cut(self, machine: Machine, at: float) -> None:
        """The engine hears no more of a node: its instances are lost, whatever they really do."""
        machine.reachable = False
        machine.node = replace(machine.node, ready=False)
        for agent in list(machine.agents.values()):
            self.refresh(agent, at)
        self.relist()

    def join(self, machine: Machine, at: float) -> None:
        """The node is back: what happened on it is seen, and what was ordered meanwhile is done."""
        machine.reachable = True
        machine.node = replace(machine.node, ready=True)
        for agent in list(machine.agents.values()):
            if agent.phase is Phase.EXITED:
                self._follow_up(agent, at)
            else:
                self.refresh(agent, at)
            order, agent.order = agent.order, None
            if order is not None and agent.id in self.agents:
                (self.stop if order[0] == "stop" else self.restart)(agent, at, order[1])
        self.place_waiting(at)
        self.relist()

    def relist(self) -> None:
        """Every watcher gets a new snapshot: nodes, for one thing, are told in no other way."""
        for watch in self.watches():
            watch.gap()


_GOOD = Behavior()


def _sicken(agent: Agent, at: float) -> None:
    agent.ail().unhealthy = True
    agent.write(at, "became unhealthy")
