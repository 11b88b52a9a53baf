"""A week in the life of a fleet: load that comes and goes, faults of every kind, upgrades, new managers."""

from __future__ import annotations

import math
import random
import time

import anyio
import pytest
from tests.fleet.world import World, prepare, spec

from agentfleet import (
    BackendUnavailable,
    Fleet,
    HealthPolicy,
    HttpCheck,
    Phase,
    QueueTarget,
    RolloutFailed,
    RolloutPolicy,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
)
from agentfleet.testing import run_virtual

DAY = 86_400.0
NODES = 5
KINDS = ("crash",) * 8 + ("hang",) * 6 + ("partition", "node_down", "unavailable", "lose_events", "gap", "slow")
BAD_DAYS = {2: "bad-crash", 5: "bad-sick"}
SPEC = spec(
    8,
    health=HealthPolicy(checks=(HttpCheck(period=30.0, timeout=5.0),)),
    rollout=RolloutPolicy(min_ready=90.0),
    scaling=ScalingPolicy(
        min_replicas=4,
        max_replicas=20,
        targets=(QueueTarget(length=5),),
        period=60.0,
        down=ScalingBehavior(stabilization=600.0, rules=(ScalingRule(percent=20, period=300.0),)),
    ),
)


class Life:
    """The world of one fleet, what troubles it, and how well it lives."""

    def __init__(self, seed: int) -> None:
        self.world = prepare(World(SPEC, seed=seed, nodes=NODES, metrics={"queue": self.queue}, usage_period=300.0))
        self.rng = random.Random(seed)
        self.fleet: Fleet | None = None
        self.wanted = self.worked = 0
        self.samples = 0
        self.troubles: dict[str, int] = {}

    def queue(self) -> float:
        """Tasks, by the time of day: twenty at night, a hundred at noon."""
        return 20 + 80 * max(0.0, math.sin(2 * math.pi * (self.world.now / DAY - 0.25))) ** 3

    def working(self) -> int:
        """How many instances truly do their work, whatever anybody believes of them."""
        agents = self.world.backend._world.agents.values()
        there = [agent for agent in agents if agent.phase is Phase.RUNNING and agent.ready and not agent.lost]
        ails = [agent.condition for agent in there if agent.condition is not None]
        return len(there) - sum(1 for ail in ails if ail.hung or ail.unhealthy)

    async def watch(self) -> None:
        """Sample the fleet once a minute of its life."""
        while True:
            await anyio.sleep(60.0)
            state = self.fleet.state if self.fleet is not None else None
            if state is not None:
                self.samples += 1
                self.wanted += state.desired
                self.worked += min(self.working(), state.desired)

    async def trouble(self) -> None:
        """Something goes wrong about once an hour."""
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 3600))
            kind = self.rng.choice(KINDS)
            ids = self.world.ids()
            if not ids:
                continue
            self.troubles[kind] = self.troubles.get(kind, 0) + 1
            faults = self.world.faults
            match kind:
                case "crash" | "hang":
                    getattr(faults, kind)(self.rng.choice(ids))
                case "slow":
                    faults.slow(8.0, self.rng.choice(ids))
                case "partition" | "node_down":
                    getattr(faults, kind)(f"node-{self.rng.randint(1, NODES)}", seconds=self.rng.uniform(30, 600))
                case "unavailable":
                    faults.unavailable(seconds=self.rng.uniform(10, 600))
                case "lose_events":
                    faults.lose_events(20)
                case _:
                    faults.gap()

    async def day(self, number: int) -> None:
        """One manager's day: take over, upgrade in the morning, leave somewhere in the night."""
        began = self.world.now
        async with await self.manager() as self.fleet:
            if number == 0:
                await self.fleet.deploy()
            await anyio.sleep(DAY * 0.4)
            version = BAD_DAYS.get(number, f"good-{number}")
            try:
                await self.fleet.upgrade(version)
            except RolloutFailed:
                self.troubles[f"failed upgrades to {version}"] = 1
            else:
                assert number not in BAD_DAYS, f"{version} was taken for good"
            await anyio.sleep(max(0.0, began + DAY - self.rng.uniform(60, 600) - self.world.now))
        await anyio.sleep(self.rng.uniform(1, 60))

    async def manager(self) -> Fleet:
        """A manager for an engine that may be out of reach just now: who starts it tries again, as systems do."""
        while True:
            try:
                async with self.world.fleet():
                    pass
            except BackendUnavailable:
                self.troubles["managers that could not start"] = 1
            else:
                return self.world.fleet()

    async def live(self, days: int) -> None:
        """All of it."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.watch)
            tasks.start_soon(self.trouble)
            for number in range(days):
                await self.day(number)
            tasks.cancel_scope.cancel()
        self.world.faults.clear()
        async with self.world.fleet() as fleet:
            await self.world.settled(fleet)
            assert self.world.versions.keys() == {f"good-{days - 1}"}


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio"])
def test_a_week_of_a_fleets_life(loop: str) -> None:
    """Through a week of faults, bad upgrades and new managers at least 99 % of the wanted instances do their work.

    Nothing is lost or left over at its end, and at no instant was more disrupted than the budget allows.
    """
    life = Life(seed=7)
    began = time.perf_counter()
    run_virtual(life.live, 7, backend=loop)
    seconds = time.perf_counter() - began
    availability = life.worked / life.wanted
    created, stopped, restarted = life.world.effort()
    print(
        f"\na week in {seconds:.1f} s: availability {availability:.4%}, {life.samples} samples, "
        f"{created} created, {stopped} stopped, {restarted} restarted, troubles {life.troubles}"
    )
    life.world.check()
    assert availability >= 0.99
    assert life.samples >= 7 * 1400
    assert set(BAD_DAYS.values()) == {key.split()[-1] for key in life.troubles if key.startswith("failed")}


def test_a_day_of_a_fleets_life_on_trio() -> None:
    """One such day on the other event loop."""
    life = Life(seed=11)
    run_virtual(life.live, 1, backend="trio")
    assert life.worked / life.wanted >= 0.98
