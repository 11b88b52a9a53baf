"""A small world to test fleets in: a simulated cluster, one journal, managers that come and go, and a watchman.

The `Watchman` sees each event as it is recorded and each action as it reaches the engine, and fails the test when an
invariant is broken. He keeps his own books: what the fleet says of its budget is not believed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from agentfleet import (
    AgentTemplate,
    Event,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    Instance,
    MemoryJournal,
    Phase,
    RolloutFailed,
    SystemClock,
)
from agentfleet.autoscaler import MetricSource
from agentfleet.backends.base import Creation
from agentfleet.backends.memory import MemoryBackend
from agentfleet.stores.following import Follower
from agentfleet.units import share_of
from agentfleet.view import SERVING

EPOCH = 1_700_000_000.0
HEALTH = HealthPolicy(checks=(HttpCheck(period=5.0, timeout=2.0),))
TEMPLATE = AgentTemplate(command=("agent",), drain=5.0)
PATIENCE = 3600.0
"""Virtual seconds within which a fleet that nothing disturbs any more must be as wanted."""

Step = Callable[["World", Fleet], Awaitable[None]]


def spec(replicas: int = 10, **fields: object) -> FleetSpec:
    """A fleet "a" with a health check."""
    known: dict[str, object] = {"name": "a", "template": TEMPLATE, "health": HEALTH, "replicas": replicas} | fields
    return FleetSpec(**known)  # type: ignore[arg-type]


class Crash(BaseException):
    """The manager dies here, like a process that is killed: nothing in the library may catch it."""


@dataclass
class Plan:
    """When the manager dies: at its n-th journal write or n-th action of the engine, right before or right after it."""

    at: str = "never"
    """ "write" or "action"."""
    number: int = 0
    side: str = "before"
    gaps: list[int] = field(default_factory=list)
    """Writes or actions from each death to the next one."""
    counts: Counter[str] = field(default_factory=Counter)
    crashed: int = 0

    def begin(self, what: str) -> int:
        """Count one write or action that is about to happen; raise if it is the fatal one."""
        self.counts[what] += 1
        self._pass(what, self.counts[what], "before")
        return self.counts[what]

    def end(self, what: str, number: int) -> None:
        """One has happened; raise if it was the fatal one."""
        self._pass(what, number, "after")

    def _pass(self, what: str, number: int, side: str) -> None:
        if (what, number, side) == (self.at, self.number, self.side):
            if self.gaps:
                self.number = self.counts[what] + self.gaps.pop()
            else:
                self.at = "never"
            self.crashed += 1
            raise Crash(f"{side} {what} {number}")


class Journal:
    """A journal in memory that shows each event to the watchman, and where a manager may die."""

    def __init__(self, plan: Plan, watchman: Watchman) -> None:
        self._inner = MemoryJournal(limit=None)
        self._plan, self._watchman = plan, watchman

    def append(self, event: Event) -> Event:
        number = self._plan.begin("write")
        kept = self._inner.append(event)
        self._watchman.see(kept)
        self._plan.end("write", number)
        return kept

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        return self._inner.read(fleet=fleet, after=after)

    def last_state(self, fleet: str, kind: str) -> Event | None:
        return self._inner.last_state(fleet, kind)

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        return self._inner.last_states(fleet, prefix)

    def follow(self, *, fleet: str | None = None, after: int = 0) -> Follower:
        return self._inner.follow(fleet=fleet, after=after)


class Engine(MemoryBackend):
    """A simulated cluster that shows each action to the watchman, and where a manager may die."""

    def __init__(self, plan: Plan, watchman: Watchman, *, clock: SystemClock, seed: int, nodes: int) -> None:
        super().__init__(seed=seed, clock=clock, nodes=nodes)
        self._plan, self._watchman = plan, watchman
        self.created: dict[str, int] = {}
        """Slot of each instance that ever was."""
        self.stopped: set[str] = set()
        self.restarted: list[str] = []

    async def create(self, creation: Creation) -> None:
        number = self._plan.begin("action")
        self._watchman.creates(creation)
        try:
            await super().create(creation)
        finally:
            if creation.id in self._world.agents:
                self.created[creation.id] = creation.slot
        self._plan.end("action", number)

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        number = self._plan.begin("action")
        self._watchman.stops(id)
        await super().stop(fleet, id, grace=grace)
        self._watchman.acted(id)
        self.stopped.add(id)
        self._plan.end("action", number)

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        number = self._plan.begin("action")
        self._watchman.restarts(id)
        await super().restart(fleet, id, grace=grace)
        self._watchman.acted(id)
        self.restarted.append(id)
        self._plan.end("action", number)


class Watchman:
    """Holds every event and action to the invariants. Broken ones are listed in `wrongs`."""

    def __init__(self) -> None:
        self.fleet: Fleet | None = None
        self.wrongs: list[str] = []
        self.disrupted: dict[int, float] = {}
        """Slots out of service by the fleet's own doing, and since when."""
        self.most_disrupted = 0
        self._ordered: dict[str, set[str]] = {"create": set(), "stop": set(), "restart": set()}
        self._sized: set[str] = set()
        self._gone: set[str] = set()
        self._missed: set[str] = set()
        self._unacted: dict[str, int] = {}
        """Instances whose disruption was admitted and has not reached the engine, and their slots."""

    def take_charge(self, fleet: Fleet) -> None:
        """Watch this manager from now on; its predecessor is dead."""
        self.fleet = fleet
        for slot in self._unacted.values():
            self.disrupted.pop(slot, None)  # its manager died before it could do it
        self._unacted.clear()
        turn = fleet._runtime.turn
        take = turn.take

        def watched(now: float) -> float | None:
            self._sized.clear()
            due = take(now)
            self._must(len(self._sized) < 2, f"one turn both added and removed: {self._sized}")
            return due

        turn.take = watched  # type: ignore[method-assign]

    def _must(self, holds: bool, law: str) -> None:
        if not holds:
            now = self.fleet.clock.now() - EPOCH if self.fleet is not None else 0.0
            self.wrongs.append(f"{now:.2f}: {law}")

    # ------------------------------------------------------------------------------------------ events

    def see(self, event: Event) -> None:
        """Take note of an event."""
        assert self.fleet is not None
        self._recount()
        kind, id = event.kind, event.instance
        slot: int = event.data.get("slot", -1)
        if kind == "instance.created":
            assert id is not None
            self._ordered["create"].add(id)
            self._sized.add("add")
            self._fits(id)
        elif kind == "instance.removing":
            assert id is not None
            self._ordered["stop"].add(id)
            self._sized.add("remove")
            if id not in self._missed:
                self.disrupted.pop(slot, None)  # its place is given up
        elif kind in ("recovery.replace", "recovery.elsewhere") or kind == "instance.released":
            assert id is not None
            self._ordered["stop"].add(id)
        elif kind == "recovery.restart":
            assert id is not None
            self._ordered["restart"].add(id)
        elif kind == "action.failed" and event.data["error"] in ("BackendRefused", "Conflict"):
            member = self.fleet.view.members.get(str(id))
            self.disrupted.pop(-1 if member is None else member.instance.slot, None)  # nothing was done
        elif kind == "recovery.ask":
            self.disrupted.pop(slot, None)  # left to a human: nothing is done there any more
        elif kind == "governor.admitted":
            self._admitted(event, slot)
        elif kind in ("instance.ready", "instance.unhealthy", "instance.exited", "instance.lost"):
            holder = self.fleet.view.holder(slot)
            if holder is not None and holder.instance.id == id:
                self.disrupted.pop(slot, None)

    def _recount(self) -> None:
        """A disruption is over, too, when the fleet is not short of that many instances any more."""
        assert self.fleet is not None
        state = self.fleet.state
        if state is None:
            return
        short = max(0, state.desired - self.fleet.view.total_counts().good)
        for slot in sorted(self.disrupted, key=self.disrupted.__getitem__)[: max(0, len(self.disrupted) - short)]:
            del self.disrupted[slot]

    def _admitted(self, event: Event, slot: int) -> None:
        assert self.fleet is not None
        assert self.fleet.state is not None
        member = self.fleet.view.members[str(event.instance)]
        desired, good = self.fleet.state.desired, self.fleet.view.total_counts().good
        budget = self.fleet.spec.recovery.budget(desired)
        serving = member.condition in SERVING
        surplus = event.data["action"] == "remove"
        if surplus and (good > desired or not serving):
            return  # it is not missed
        if surplus:
            self._missed.add(member.instance.id)
        if serving:
            self._must(good - 1 >= desired - budget, f"{event.instance} taken: {good} good of {desired}, {budget}")
        self.disrupted[slot] = event.at
        self._unacted[member.instance.id] = slot
        self.most_disrupted = max(self.most_disrupted, len(self.disrupted))
        self._must(len(self.disrupted) <= budget, f"{len(self.disrupted)} disrupted, {budget} allowed: {event}")

    def _fits(self, id: str) -> None:
        assert self.fleet is not None
        state, view = self.fleet.state, self.fleet.view
        assert state is not None
        total, target = view.total_counts().total, view.counts(state.target).total
        surge = share_of(self.fleet.spec.rollout.max_surge, state.desired, round_up=True) if total > target else 0
        self._must(total <= state.desired + surge, f"{id} makes {total} of {state.desired} (surge {surge})")

    # ------------------------------------------------------------------------------------------ actions

    def creates(self, creation: Creation) -> None:
        """An id is ordered first and never used again."""
        self._must(creation.id in self._ordered["create"], f"{creation.id} created without a record")
        self._must(creation.id not in self._gone, f"{creation.id} used again")

    def stops(self, id: str) -> None:
        """No stop without a record of why; what was told to go is not created again."""
        self._gone.add(id)
        self._must(id in self._ordered["stop"], f"{id} stopped without a record")

    def restarts(self, id: str) -> None:
        """No restart without a record of why."""
        self._must(id in self._ordered["restart"], f"{id} restarted without a record")

    def acted(self, id: str) -> None:
        """The engine has done it."""
        self._unacted.pop(id, None)


class World:
    """A cluster, a journal, and a succession of managers of one fleet.

    Args:
        wanted: The fleet's spec.
        plan: When a manager dies.
        seed: Of everything random.
        nodes: In the cluster.
        metrics: Given to each manager.
    """

    def __init__(
        self,
        wanted: FleetSpec | None = None,
        *,
        plan: Plan | None = None,
        seed: int = 0,
        nodes: int = 3,
        metrics: Mapping[str, MetricSource] | None = None,
        usage_period: float = 60.0,
    ) -> None:
        self.spec = wanted if wanted is not None else spec()
        self.plan = plan if plan is not None else Plan()
        self.seed = seed
        self.clock = SystemClock(EPOCH)
        self.watchman = Watchman()
        self.journal = Journal(self.plan, self.watchman)
        self.backend = Engine(self.plan, self.watchman, clock=self.clock, seed=seed, nodes=nodes)
        self.faults = self.backend.faults
        self.metrics = metrics or {}
        self.usage_period = usage_period

    def fleet(self) -> Fleet:
        """A new manager, not open yet."""
        fleet = Fleet(
            self.spec,
            backend=self.backend,
            journal=self.journal,
            clock=self.clock,
            metrics=self.metrics,
            seed=self.seed,
            usage_period=self.usage_period,
        )
        self.watchman.take_charge(fleet)
        return fleet

    @asynccontextmanager
    async def deployed(self) -> AsyncIterator[Fleet]:
        """A manager whose fleet is up, watched to the end."""
        async with self.fleet() as fleet:
            await fleet.deploy()
            yield fleet
            self.check()

    # ------------------------------------------------------------------------------------------ what is so

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self.clock.now() - EPOCH

    @property
    def instances(self) -> tuple[Instance, ...]:
        """What truly exists."""
        return self.backend.instances(self.name)

    @property
    def versions(self) -> Counter[str]:
        return Counter(instance.version for instance in self.instances)

    def ids(self) -> list[str]:
        return [instance.id for instance in self.instances]

    def events(self, *kinds: str) -> list[Event]:
        """What was recorded, but for states; of some kinds."""
        found = self.journal.read(fleet=self.name)
        return [event for event in found if (event.kind in kinds if kinds else not event.kind.startswith("state."))]

    def story(self) -> str:
        """All events as text, for the message of a failed test."""
        return "\n".join(f"{e.at - EPOCH:9.2f} {e.kind} {e.instance or ''} {dict(e.data)}" for e in self.events())

    def check(self) -> None:
        """No invariant was broken so far."""
        assert not self.watchman.wrongs, "\n".join([*self.watchman.wrongs[:5], self.story()[-6000:]])

    def as_wanted(self, fleet: Fleet) -> str | None:
        """Why the world is not as the fleet's desired state says; None when it is."""
        state, isolated = fleet.state, fleet.isolated
        seen = [each for each in self.instances if each.id not in isolated]
        assert state is not None
        if len(seen) != state.desired:
            return f"{len(seen)} instances exist, {state.desired} are wanted"
        if state.rolling and state.desired:  # one that was stopped goes on when it is started
            return f"a rollout to {state.target} is under way"
        wrong = [each.id for each in seen if each.phase is not Phase.RUNNING or each.revision != state.target]
        if wrong:
            return f"not running revision {state.target}: {wrong}"
        if len({each.slot for each in seen}) != len(seen):
            return "two instances have the same slot"
        if set(self.backend.running(self.name)) - set(isolated) != {each.id for each in seen}:
            return "processes run that nobody sees"
        view = {id: member.instance for id, member in fleet.view.members.items() if id not in isolated}
        if view != {each.id: each for each in seen}:
            return "the fleet does not see what is so"
        if fleet.view.total_counts().good != state.desired or fleet.status()["frozen"]:
            return f"not all are known to be healthy: {fleet.status()}"
        serving = {each.id: each.address for each in seen}
        if {id: each.address for id, each in fleet.endpoints().items()} != serving:
            return "work would be sent elsewhere than to the instances"
        return None

    async def settled(self, fleet: Fleet, *, within: float = PATIENCE, stays: float = 60.0) -> None:
        """Wait until the world is as wanted and stays so; fail if it does not come to that in time."""
        due = self.clock.now() + within
        calm_since: float | None = None
        while True:
            why = self.as_wanted(fleet)
            now = self.clock.now()
            if why is not None:
                calm_since = None
            elif calm_since is None:
                calm_since = now
            elif now >= calm_since + stays:
                break
            assert now < due or why is None, f"not as wanted after {within:g} s: {why}\n{self.story()[-6000:]}"
            await anyio.sleep(1.0)
        self.check()

    def digest(self, fleet: Fleet) -> dict[str, object]:
        """What the end state is compared by: everything that must not depend on what went wrong on the way."""
        state = fleet.state
        assert state is not None
        return {
            "replicas": state.replicas,
            "version": state.template.version,
            "good": [(each.template.version, each.good) for each in state.revisions],
            "running": dict(self.versions),
            "slots": sorted(each.slot for each in self.instances),
        }

    def effort(self) -> tuple[int, int, int]:
        """How many instances were ever created, stopped and restarted."""
        return len(self.backend.created), len(self.backend.stopped), len(self.backend.restarted)

    # ------------------------------------------------------------------------------------------ lives

    async def live(self, steps: Iterable[Step], *, downtime: float = 0.0) -> dict[str, object]:
        """Managers follow one another, each going on where the last one died, until all steps are done.

        Returns:
            The digest of the end state.
        """
        left = list(steps)
        while True:
            try:
                async with self.fleet() as fleet:
                    while left:
                        await left[0](self, fleet)
                        del left[0]
                    await self.settled(fleet)
                    return self.digest(fleet)
            except (Crash, BaseExceptionGroup) as error:
                if not died(error):
                    raise
            await anyio.sleep(downtime)


def placed(fleet: Fleet) -> set[str]:
    """The instances that hold a place."""
    return {instance.id for instance in fleet.instances if instance.isolated is None}


def died(error: BaseException) -> bool:
    """Whether a planned crash is all that went wrong."""
    if isinstance(error, BaseExceptionGroup):
        return all(died(each) for each in error.exceptions)
    return isinstance(error, Crash)


# ------------------------------------------------------------------------------------------------ steps of workloads
# Each can be taken again by the next manager when the first died in it.


async def deploy(world: World, fleet: Fleet) -> None:
    await fleet.deploy()


def scale(replicas: int) -> Step:
    async def step(world: World, fleet: Fleet) -> None:
        await fleet.scale(replicas)
        await fleet._runtime.until(lambda: fleet.state is not None and fleet.state.replicas == replicas, 600.0, "taken")
        await world.settled(fleet, stays=0.0)

    return step


def upgrade(version: str) -> Step:
    async def step(world: World, fleet: Fleet) -> None:
        if version not in {each.template.version for each in fleet.revisions()}:
            try:
                await fleet.upgrade(version)
            except RolloutFailed:
                assert version.startswith("bad"), world.story()
        await world.settled(fleet, stays=0.0)

    return step


def rollback(version: str) -> Step:
    async def step(world: World, fleet: Fleet) -> None:
        assert fleet.state is not None
        if fleet.state.template.version != version:
            await fleet.rollback()
        await world.settled(fleet, stays=0.0)

    return step


def crash(*numbers: int) -> Step:
    """The n-th oldest instances exit, once."""
    hit: list[int] = []

    async def step(world: World, fleet: Fleet) -> None:
        if not hit:
            hit.extend(numbers)
            ids = world.ids()
            for number in numbers:
                world.faults.crash(ids[number])
        await anyio.sleep(1.0)
        await world.settled(fleet, stays=0.0)

    return step


def hang(*numbers: int) -> Step:
    """The n-th oldest instances hang, once."""
    hit: list[int] = []

    async def step(world: World, fleet: Fleet) -> None:
        if not hit:
            hit.extend(numbers)
            ids = world.ids()
            for number in numbers:
                world.faults.hang(ids[number])
        await anyio.sleep(30.0)
        await world.settled(fleet, stays=0.0)

    return step


def workloads() -> dict[str, list[Step]]:
    """The workloads that are disturbed in every way."""
    return {
        "deploy": [deploy],
        "scale": [deploy, scale(16), scale(4)],
        "upgrade good": [deploy, upgrade("good-2")],
        "upgrade bad": [deploy, upgrade("bad-crash")],
        "upgrade sick": [deploy, upgrade("bad-sick")],
        "rollback": [deploy, upgrade("good-2"), rollback("1")],
        "recover": [deploy, crash(0, 3, 5)],
        "heal": [deploy, hang(2, 7)],
    }


def prepare(world: World) -> World:
    """How the versions of the workloads behave."""
    world.backend.behave(version="bad-crash", crash_after=1.0)
    world.backend.behave(version="bad-sick", unhealthy_after=3.0)
    world.backend.behave(version="bad-dumb", never_ready=True)
    return world
