"""Faults on demand: what can go wrong with instances, nodes, the engine, its watch and its actions.

Everything takes effect now. Methods that pick instances take an `id`, a `node` or a `fleet` (several narrow the choice,
none means every instance there is) and return how many were hit. `seconds` limits a fault in time; without it the
fault lasts until it is undone, or, where it ails a process, until that process is restarted. `sticky` ailments survive
restarts in place, so that only a replacement helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

from agentfleet.backends.memory.agent import Agent, Condition, Machine
from agentfleet.backends.memory.watch import Watch
from agentfleet.backends.memory.world import World
from agentfleet.errors import BackendError, BackendRefused, Conflict, InstanceGone
from agentfleet.instances import Phase

Action = Literal["create", "stop", "restart", "usage", "logs"]
CHANGES: tuple[Action, ...] = ("create", "stop", "restart")


class Among(TypedDict, total=False):
    """Which instances a fault hits: those on a node, those of a fleet, or those of which both are true."""

    node: str | None
    fleet: str | None


class Ailing(Among, total=False):
    """Whom an ailment hits, how long it lasts, and whether it survives a restart in place."""

    seconds: float | None
    sticky: bool


@dataclass(slots=True)
class _Trouble:
    """What the next `times` actions of some kinds run into."""

    actions: tuple[Action, ...]
    times: int | None
    error: BackendError | None = None
    seconds: float = 0.0
    reply_lost: bool = False

    def meets(self, action: Action) -> bool:
        """Whether this action runs into it; counts it if so."""
        if action not in self.actions or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Faults:
    """The faults of one `MemoryBackend`, at its attribute `faults`. See the module's text for what is common to all."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._troubles: list[_Trouble] = []
        self._slow: list[_Trouble] = []
        self._quotas: dict[str | None, int] = {}
        self._ends: dict[tuple[str, str], float] = {}
        """When each fault with a limit in time ends, by what it is about and its kind."""

    # -------------------------------------------------------------------------------------------- instances

    def crash(self, id: str | None = None, *, code: int | None = 1, **among: Unpack[Among]) -> int:
        """End processes with an exit code; negative is a signal, None is unknown."""
        now = self._world.advance()
        hit = [agent for agent in self._pick(id, **among) if agent.runs]
        for agent in hit:
            self._world.exit(agent, now, code)
        return len(hit)

    def hang(self, id: str | None = None, **how: Unpack[Ailing]) -> int:
        """The process runs but answers nothing: HTTP probes time out, SIGTERM is ignored. TCP is still accepted."""
        return self._ail("hung", True, id, **how)

    def slow(self, latency: float, id: str | None = None, **how: Unpack[Ailing]) -> int:
        """Answers take `latency` seconds."""
        return self._ail("slow", latency, id, **how)

    def unhealthy(self, id: str | None = None, **how: Unpack[Ailing]) -> int:
        """HTTP probes are answered with 503."""
        return self._ail("unhealthy", True, id, **how)

    def stall(self, id: str | None = None, **how: Unpack[Ailing]) -> int:
        """Probes are answered well, but /status tells of a task without progress since now."""
        return self._ail("stalled_since", self._world.advance(), id, **how)

    def ignore_term(self, id: str | None = None, **among: Unpack[Among]) -> int:
        """SIGTERM is ignored: a drain takes its whole grace and ends in the kill."""
        return self._ail("ignores_term", True, id, **among)

    def unready(self, id: str | None = None, **how: Unpack[Ailing]) -> int:
        """The engine takes processes for not ready, whatever their probes say."""
        return self._ail("unready", True, id, **how)

    def cure(self, id: str | None = None, **among: Unpack[Among]) -> int:
        """Undo everything that ails processes."""
        now = self._world.advance()
        hit = [agent for agent in self._pick(id, **among) if agent.condition is not None]
        for agent in hit:
            agent.condition = None
            self._world.refresh(agent, now)
        return len(hit)

    # -------------------------------------------------------------------------------------------- nodes

    def partition(self, node: str, *, seconds: float | None = None) -> None:
        """Cut a node off: its instances are LOST, and go on unseen. Orders to them wait until it is back."""
        now, machine = self._world.advance(), self._machine(node)
        self._world.cut(machine, now)
        self._until(now, (node, "partition"), seconds, lambda at: self._world.join(machine, at))

    def node_down(self, node: str, *, seconds: float | None = None) -> None:
        """A node fails: it is cut off, and its processes end (seen as EXITED, code unknown, when it is back)."""
        now, machine = self._world.advance(), self._machine(node)
        self._world.cut(machine, now)
        for agent in list(machine.agents.values()):
            if agent.phase is not Phase.EXITED:
                self._world.exit(agent, now, None)
        self._until(now, (node, "partition"), seconds, lambda at: self._world.join(machine, at))

    def heal(self, node: str) -> None:
        """Bring a node back."""
        now, machine = self._world.advance(), self._machine(node)
        self._ends.pop((node, "partition"), None)
        self._world.join(machine, now)

    def cordon(self, node: str, *, schedulable: bool = False) -> None:
        """Place nothing new on a node; `schedulable=True` undoes it."""
        now, machine = self._world.advance(), self._machine(node)
        machine.node = replace(machine.node, schedulable=schedulable)
        self._world.place_waiting(now)
        self._world.relist()

    # -------------------------------------------------------------------------------------------- the engine

    def unavailable(self, *, seconds: float | None = None) -> None:
        """The engine cannot be reached: actions raise `BackendUnavailable`, watches are silent. Instances go on."""
        now = self._world.advance()
        self._world.available = False
        self._until(now, ("", "unavailable"), seconds, lambda _: self._reconnect())

    def available(self) -> None:
        """The engine can be reached again; every watcher gets a new snapshot."""
        self._world.advance()
        self._ends.pop(("", "unavailable"), None)
        self._reconnect()

    def quota(self, limit: int | None, *, fleet: str | None = None) -> None:
        """Refuse to create beyond `limit` instances, of one fleet or of all together; None lifts it."""
        if limit is None:
            self._quotas.pop(fleet, None)
        else:
            self._quotas[fleet] = limit

    # -------------------------------------------------------------------------------------------- the watch

    def lose_events(self, count: int, *, fleet: str | None = None) -> None:
        """The next `count` events reach no watcher that exists now; a snapshot repairs it `resync` seconds later."""
        for watch in self._watches(fleet):
            watch.lose += count

    def double_events(self, count: int, *, fleet: str | None = None) -> None:
        """The next `count` events are told twice."""
        for watch in self._watches(fleet):
            watch.double += count

    def reorder_events(self, count: int, *, within: float = 1.0, fleet: str | None = None) -> None:
        """The next `count` events (those within `within` seconds) are told in another order, each instance's kept."""
        now = self._world.advance()
        for watch in self._watches(fleet):
            watch.reorder(count, now + within)

    def lag(self, seconds: float, *, fleet: str | None = None) -> None:
        """Events are told `seconds` late from now on; zero undoes it. Without `fleet` also to later watchers."""
        if fleet is None:
            self._world.lag = seconds
        for watch in self._watches(fleet):
            watch.lag = seconds

    def gap(self, *, fleet: str | None = None) -> None:
        """Watchers miss what they have not read yet, and get a new snapshot (as after 410 Gone)."""
        self._world.advance()
        for watch in self._watches(fleet):
            watch.gap()

    # -------------------------------------------------------------------------------------------- actions

    def conflict(self, *, times: int = 1, actions: tuple[Action, ...] = CHANGES) -> None:
        """The next actions raise `Conflict` and do nothing."""
        self._troubles.append(_Trouble(actions, times, Conflict("simulated: the object changed since it was read")))

    def refuse(
        self, *, times: int | None = 1, actions: tuple[Action, ...] = CHANGES, reason: str = "simulated refusal"
    ) -> None:
        """The next actions (None: all until `allow`) raise `BackendRefused` and do nothing."""
        self._troubles.append(_Trouble(actions, times, BackendRefused(reason)))

    def lose_reply(self, *, times: int = 1, actions: tuple[Action, ...] = CHANGES) -> None:
        """The next actions do their work and raise `BackendUnavailable` all the same."""
        self._troubles.append(_Trouble(actions, times, reply_lost=True))

    def slow_actions(self, seconds: float, *, times: int | None = None, actions: tuple[Action, ...] = CHANGES) -> None:
        """The next actions (None: all until `allow`) take `seconds` before they do anything."""
        self._slow.append(_Trouble(actions, times, seconds=seconds))

    def allow(self) -> None:
        """Undo every fault of actions; quotas stay."""
        self._troubles.clear()
        self._slow.clear()

    def clear(self) -> None:
        """Undo every fault of whatever kind; quotas and cordons, which are no faults, stay."""
        self.allow()
        self.cure()
        self.lag(0.0)
        for watch in self._world.watches():
            watch.lose = watch.double = 0
        for machine in self._world.machines.values():
            if not machine.reachable:
                self.heal(machine.node.name)
        self._ends.clear()
        if not self._world.available:
            self.available()

    # -------------------------------------------------------------------------------------------- for the backend

    def delay_of(self, action: Action) -> float:
        """Seconds that this action takes before it does anything."""
        return sum(trouble.seconds for trouble in self._slow if trouble.meets(action))

    def trouble_of(self, action: Action) -> tuple[BackendError | None, bool]:
        """The error that this action meets before it does anything, and whether its reply is lost after."""
        met = next((trouble for trouble in self._troubles if trouble.meets(action)), None)
        self._troubles = [trouble for trouble in self._troubles if trouble.times != 0]
        return (None, False) if met is None else (met.error, met.reply_lost)

    def over_quota(self, fleet: str) -> str | None:
        """Why no more may be created, None while more may be."""
        for name, size in ((fleet, self._world.size(fleet)), (None, len(self._world.agents))):
            limit = self._quotas.get(name)
            if limit is not None and size >= limit:
                return f"quota exceeded: {size} of {limit} instances {'in all' if name is None else f'of {name!r}'}"
        return None

    # -------------------------------------------------------------------------------------------- inside

    def _pick(self, id: str | None, *, node: str | None = None, fleet: str | None = None) -> list[Agent]:
        """The instances meant, oldest first."""
        if id is not None and id not in self._world.agents:
            raise InstanceGone(f"there is no instance {id!r} (any more) to make a fault in")
        pool = self._world.agents if node is None else self._machine(node).agents
        found = list(pool.values()) if id is None else [pool[id]] if id in pool else []
        return [agent for agent in found if fleet is None or agent.fleet == fleet]

    def _ail(
        self,
        what: str,
        value: object,
        id: str | None,
        *,
        seconds: float | None = None,
        sticky: bool = False,
        **among: Unpack[Among],
    ) -> int:
        """Set one field of the conditions of those meant, until it is undone."""
        now = self._world.advance()
        hit = self._pick(id, **among)
        for agent in hit:
            condition = agent.ail()
            setattr(condition, what, value)
            condition.sticky = condition.sticky or sticky
            self._world.refresh(agent, now)
            self._until(now, (agent.id, what), seconds, self._curing(agent, condition, what))
        return len(hit)

    def _curing(self, agent: Agent, condition: Condition, what: str) -> Callable[[float], None]:
        def cure(at: float) -> None:
            if agent.condition is condition:
                setattr(condition, what, getattr(Condition(), what))
                if self._world.agents.get(agent.id) is agent:  # else it is gone by now
                    self._world.refresh(agent, at)

        return cure

    def _until(self, now: float, key: tuple[str, str], seconds: float | None, undo: Callable[[float], None]) -> None:
        """Undo a fault after `seconds`, unless it was renewed or undone by then."""
        self._ends.pop(key, None)
        if seconds is None:
            return
        end = self._ends[key] = now + seconds

        def happen(at: float) -> None:
            if self._ends.get(key) == end:
                del self._ends[key]
                undo(at)

        self._world.later(end, happen)

    def _reconnect(self) -> None:
        self._world.available = True
        self._world.relist()

    def _machine(self, name: str) -> Machine:
        machine = self._world.machines.get(name)
        if machine is None:
            raise ValueError(f"there is no node {name!r}; there are {', '.join(self._world.machines)}")
        return machine

    def _watches(self, fleet: str | None) -> list[Watch]:
        return self._world.watches(fleet)
