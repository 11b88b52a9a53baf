"""Configuration in rings: a good one arrives, a bad one stops where it is and goes back, whoever manages meanwhile."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from tests.fleet.world import World, spec

from agentfleet import (
    ConfigRollout,
    DeadlineExceeded,
    Fleet,
    OperationRefused,
    RecoveryPolicy,
    RolloutFailed,
    RolloutPolicy,
    SpecError,
)
from agentfleet.signals.http import HttpError, Response
from agentfleet.testing import virtual

GOOD, BAD = {"model": "small"}, {"model": "poison"}
RINGS = ConfigRollout(rings=(1, "25%", "100%"), bake=120.0, confirm=10.0)


class Agents:
    """What becomes of simulated agents by what they are told, and who has ever had what."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.running: dict[str, tuple[int, Any]] = {}
        """What each process has, by address."""
        self.had: dict[int, set[str]] = {}
        """Which instances have ever had a revision."""
        self.sick_after: dict[str, float] = {"poison": 90.0}
        """Seconds after which a model makes an agent sick."""
        self.immune: set[str] = set()
        self.refuses: set[str] = set()
        self.silent: set[str] = set()
        self._due: dict[str, tuple[float, str]] = {}
        self.on_accepted: Callable[[int], None] = lambda _revision: None
        """Told the number of each revision that an agent has just accepted."""

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        assert (method, path) == ("PUT", "/config")
        await anyio.sleep(0.02)
        id = next((each.id for each in self.world.instances if each.address == address), None)
        if id is None or id in self.silent:
            raise HttpError("connection refused")
        message = json.loads(body or b"")
        revision, document = message["revision"], message["document"]
        had = self.running.get(address, (0, None))[0]
        if had > revision:
            return Response(409, {}, json.dumps({"revision": had}).encode())
        if document["model"] in self.refuses:
            return Response(422, {}, b"this model is not known here")
        self.running[address] = (revision, document)
        self.had.setdefault(revision, set()).add(id)
        self._due.pop(address, None)
        if document["model"] in self.sick_after and id not in self.immune:
            self._due[address] = (self.world.now + self.sick_after[document["model"]], id)
        self.on_accepted(revision)
        return Response(200, {}, json.dumps({"revision": revision}).encode())

    async def suffer(self) -> None:
        """Make those sick whose time has come."""
        while True:
            for address, (at, id) in tuple(self._due.items()):
                if at <= self.world.now:
                    del self._due[address]
                    if any(each.address == address for each in self.world.instances):
                        self.world.faults.unhealthy(id)
            await anyio.sleep(0.5)

    def now(self) -> dict[str, tuple[int, Any]]:
        """What each instance that exists has."""
        return {each.id: self.running.get(str(each.address), (0, None)) for each in self.world.instances}

    def documents(self) -> Counter[str]:
        return Counter(str(document and document["model"]) for _, document in self.now().values())


def attach(fleet: Fleet, agents: Agents) -> Fleet:
    """Let the fleet's pushes go to the simulated agents."""
    make = fleet._reign._make

    def made(**more: Any) -> Any:
        runtime = make(**more)
        runtime.feed._http = agents
        return runtime

    fleet._reign._make = made
    fleet._runtime.feed._http = agents
    return fleet


@asynccontextmanager
async def configured(world: World) -> AsyncIterator[tuple[Fleet, Agents]]:
    """A fleet that is up and runs the good document, as revision 1."""
    agents = Agents(world)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agents.suffer)
        async with attach(world.fleet(), agents) as fleet:
            await fleet.deploy()
            await fleet.configure(GOOD)
            yield fleet, agents
            world.check()
        tasks.cancel_scope.cancel()


def told(world: World) -> list[str]:
    """What was told of rollouts, in its order."""
    return [event.kind.removeprefix("config.") for event in world.events() if event.kind in TOLD]


async def begun(fleet: Fleet, ring: int) -> None:
    """Wait until a ring has begun."""
    async for event in fleet.events():
        if event.kind == "config.ring" and event.data["ring"] == ring:
            return


TOLD = (
    "config.rollout",
    "config.ring",
    "config.held",
    "config.halted",
    "config.rolled_back",
    "config.rolled_out",
    "config.superseded",
)


@virtual
async def test_a_good_one_arrives_ring_by_ring() -> None:
    """Each ring has as many as it says and no more, and bakes; then all have it."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        began = world.now
        assert await fleet.configure({"model": "large"}, rollout=RINGS) == 2
        assert 3 * 120 <= world.now - began < 3 * 120 + 700
        assert agents.documents() == {"large": 20}
        rings = world.events("config.ring")
        assert [(ring.data["ring"], ring.data["target"]) for ring in rings] == [(0, 1), (1, 5), (2, 20)]
        for ring, following in zip(rings, [*rings[1:], None], strict=True):
            released = [event for event in world.events("config.released") if event.data["ring"] == ring.data["ring"]]
            assert released[0].at >= ring.at
            if following is not None:
                assert all(event.at < following.at for event in released)
                assert following.at - released[-1].at >= 120
        everybody = [id for event in world.events("config.released") for id in event.data["instances"]]
        assert sorted(everybody) == sorted(world.ids())
        assert told(world) == ["rollout", "ring", "ring", "ring", "rolled_out"]
        status = await fleet.config_status()
        assert (status.revision, status.trial, status.counts) == (2, 0, {2: 20})


@virtual
async def test_scenario_43_what_makes_agents_sick_after_a_while_stops_in_ring_0_and_goes_back() -> None:
    """It passes every check and kills after 90 s: one instance has had it, and all run the old content again."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        began = world.now
        with pytest.raises(RolloutFailed, match=r"configuration 2 .*1 of 1 instances turned sick.*content of 1 is"):
            await fleet.configure(BAD, rollout=RINGS)
        assert 90 < world.now - began < 90 + 60
        assert len(agents.had[2]) == 1
        assert told(world) == ["rollout", "ring", "held", "halted", "rolled_back"]
        (back,) = world.events("config.rolled_back")
        assert back.data == {"revision": 2, "to": 3, "restores": 1}
        await world.settled(fleet)
        assert agents.documents() == {"small": 20}
        assert all(now == (3, GOOD) for now in agents.now().values())
        status = await fleet.config_status()
        assert (status.revision, status.trial, status.counts) == (3, 0, {3: 20})
        assert status.rollout is not None
        assert (status.rollout.phase, status.rollout.failed) == ("rolled_back", 1)
        newest = await fleet.config.get("a")
        assert (newest.author, newest.restores) == ("agentfleet", 1)
        assert newest.reason.startswith("revision 2 has failed: 1 of 1 instances turned sick")


@virtual
@pytest.mark.parametrize("rungs", [{"restarts": 2}, {"restarts": 0}, {"restarts": 0, "replacements": 0}], ids=str)
async def test_recovery_that_is_quicker_than_a_look_hides_nothing(rungs: dict[str, int]) -> None:
    """What falls sick is restarted or replaced at once, and nothing of it is left to see: it counts all the same."""
    world = World(spec(20, recovery=RecoveryPolicy(max_disrupted="100%", **rungs)))  # type: ignore[arg-type]
    async with configured(world) as (fleet, agents):
        agents.sick_after["poison"] = 90.4
        with pytest.raises(RolloutFailed, match="1 of 1 instances turned sick"):
            await fleet.configure(BAD, rollout=RINGS, timeout=300)
        assert len(agents.had[2]) == 1


@virtual
async def test_a_restart_by_hand_is_not_held_against_it() -> None:
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        await fleet.configure({"model": "large"}, rollout=RINGS, wait=False)
        await anyio.sleep(65)
        (tried,) = agents.had[2]
        await fleet.restart(tried)
        await fleet._runtime.configuring.rings.over(2)
        assert told(world) == ["rollout", "ring", "ring", "ring", "rolled_out"]


@virtual
async def test_when_a_rollout_is_over_soon_nothing_is_at_risk_any_more() -> None:
    """A bake shorter than what a check takes: what it took of the budget is given back when nothing has shown."""
    world = World(spec(4, recovery=RecoveryPolicy(max_disrupted=2, settle="1h")))
    async with configured(world) as (fleet, _):
        for model in ("large", "huge"):
            await fleet.configure({"model": model}, rollout=RINGS.replace(bake=1.0), timeout=300)


@virtual
async def test_what_is_refused_is_taken_back_at_once() -> None:
    """A refusal is judged without waiting, and the agent that refused keeps what it had."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        agents.refuses.add("odd")
        began = world.now
        with pytest.raises(RolloutFailed, match="1 of 1 instances have refused it"):
            await fleet.configure({"model": "odd"}, rollout=RINGS)
        assert world.now - began < 10
        assert 2 not in agents.had
        (refused,) = world.events("config.refused")
        assert refused.data["why"] == "this model is not known here"
        await anyio.sleep(10)
        assert all(now == (3, GOOD) for now in agents.now().values())
        assert (await fleet.config_status()).refused == {}


@virtual
async def test_without_auto_rollback_it_stops_where_it_is() -> None:
    """Who has it keeps it, nobody else gets it, no other can be tried; going back by hand ends it."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        with pytest.raises(RolloutFailed, match="the instances on trial keep it"):
            await fleet.configure(BAD, rollout=RINGS.replace(auto_rollback=False))
        await fleet.scale(25)
        await anyio.sleep(600)
        assert len(agents.had[2]) == 1
        assert [now for now in agents.now().values() if now[0] != 1] in ([], [(2, BAD)])
        with pytest.raises(OperationRefused, match=r"revision 2 is being rolled out.*rollback\(1\)"):
            await fleet.configure({"model": "large"}, rollout=RINGS)
        await fleet.config.rollback("a", 1, author="ops", reason="it is bad")
        await world.settled(fleet)
        assert all(now == (3, GOOD) for now in agents.now().values())
        assert told(world) == ["rollout", "ring", "held", "halted", "superseded"]
        assert await fleet.configure({"model": "large"}, rollout=RINGS) == 4


@virtual
async def test_publishing_to_all_ends_a_rollout() -> None:
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        async with anyio.create_task_group() as tasks:

            async def roll_out() -> None:
                with pytest.raises(RolloutFailed, match="another is out now"):
                    await fleet.configure({"model": "large"}, rollout=RINGS)

            tasks.start_soon(roll_out)
            await anyio.sleep(200)
            with pytest.raises(OperationRefused, match="revision 2 is being rolled out"):
                await fleet.configure({"model": "huge"}, rollout=RINGS)
            assert await fleet.configure({"model": "tiny"}) == 3
        assert agents.documents() == {"tiny": 20}
        assert told(world) == ["rollout", "ring", "ring", "superseded"]


@virtual
async def test_who_starts_meanwhile_gets_what_was_before() -> None:
    """A rollout is of those that are there; new instances, and replacements, run the base until it is over."""
    world = World(spec(8))
    async with configured(world) as (fleet, agents):
        await fleet.configure({"model": "large"}, rollout=RINGS, wait=False)
        await anyio.sleep(65)  # it is at risk no more, and the one disruption that the budget allows is free again
        (tried,) = agents.had[2]
        before = set(world.ids())
        await fleet.replace(next(id for id in world.ids() if id != tried))
        await anyio.sleep(15)
        await fleet.scale(12)
        await anyio.sleep(15)
        new = set(world.ids()) - before
        assert len(new) == 5
        assert all(agents.now()[id] == (1, GOOD) for id in new)
        await fleet._runtime.configuring.rings.over(2)
        await anyio.sleep(5)
        assert agents.documents() == {"large": 12}


@virtual
async def test_silence_neither_advances_nor_takes_back() -> None:
    """Two of a ring cannot be reached with it: the ring waits for them, and goes on when they have answered."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        await fleet.configure({"model": "large"}, rollout=RINGS, wait=False)
        await begun(fleet, 1)
        await anyio.sleep(1)
        agents.silent = set(world.ids()) - agents.had[2]
        await anyio.sleep(900)
        assert told(world) == ["rollout", "ring", "ring"]
        status = await fleet.config_status()
        assert status.rollout is not None
        assert (status.rollout.ring, status.rollout.proved, status.rollout.failed) == (1, len(agents.had[2]), 0)
        assert status.rollout.reasons[0]["code"] in ("config.wait", "governor.budget")
        agents.silent = set()
        await fleet._runtime.configuring.rings.over(2)
        await anyio.sleep(5)
        assert agents.documents() == {"large": 20}


@virtual
@pytest.mark.parametrize("how", ["paused", "rolling", "frozen"])
async def test_it_waits_for_a_fleet_that_is_busy_with_itself(how: str) -> None:
    """While the fleet is paused, is rolling out a version or is in a storm, nobody is given anything on trial."""
    slowly = RolloutPolicy(min_ready=600.0, progress_deadline=7200.0)
    world = World(spec(20, rollout=slowly, recovery=RecoveryPolicy(cooldown=1800.0)))
    async with configured(world) as (fleet, agents):
        if how == "paused":
            await fleet.pause()
        elif how == "rolling":
            await fleet.upgrade("2", wait=False)
        else:
            for id in world.ids()[:16]:
                world.faults.unhealthy(id, sticky=True)
            await anyio.sleep(60)
        await fleet.configure({"model": "large"}, rollout=RINGS, wait=False)
        await anyio.sleep(600)
        assert 2 not in agents.had
        (held,) = world.events("config.held")
        assert held.reasons[0]["code"] == f"config.{how}"
        if how == "paused":
            await fleet.resume()
        world.faults.clear()
        world.faults.cure()
        await fleet._runtime.configuring.rings.over(2)
        await anyio.sleep(5)
        assert agents.documents() == {"large": 20}


@virtual
async def test_an_outage_of_all_is_not_held_against_it() -> None:
    """While a ring bakes, half of the fleet falls sick, on trial or not: it waits, and completes when that is over."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        await fleet.configure({"model": "large"}, rollout=RINGS, wait=False)
        await begun(fleet, 1)
        await anyio.sleep(60)
        for id in world.ids():
            world.faults.unhealthy(id, sticky=True)
        await anyio.sleep(120)
        world.faults.cure()
        await fleet._runtime.configuring.rings.over(2)
        assert "rolled_back" not in told(world)
        await anyio.sleep(5)
        assert agents.documents() == {"large": 20}


@virtual
async def test_what_kills_at_once_in_the_last_ring_never_has_more_than_the_budget_out() -> None:
    """The instances of the first rings bear it, the others fall sick at once: two of twenty at a time, then it ends."""
    world = World(spec(20, recovery=RecoveryPolicy(max_disrupted="10%", restarts=0, replacements=0, elsewhere=0)))
    async with configured(world) as (fleet, agents):
        agents.sick_after["late"] = 0.0
        agents.immune = set(world.ids())
        await fleet.configure({"model": "late"}, rollout=RINGS, wait=False)
        await begun(fleet, 2)
        agents.immune = set(agents.had[2])
        least = 20
        while not world.events("config.rolled_back"):
            least = min(least, fleet.status()["good"])
            await anyio.sleep(0.5)
        assert 20 - least <= 2
        assert len(agents.had[2]) <= 5 + 2


@virtual
async def test_what_makes_tasks_fail_is_taken_back() -> None:
    """Agents stay healthy and most of their tasks fail: the share of failures is compared with that of the others."""
    world = World(spec(20))
    async with configured(world) as (fleet, agents):
        bad: dict[str, int] = {}

        async def work() -> None:
            while True:
                for id, member in fleet.view.members.items():
                    member.completed += 1
                    if agents.running.get(str(member.instance.address), (0, {}))[1].get("model") == "dull":
                        bad[id] = bad.get(id, 0) + 1
                        member.failed += bad[id] % 2
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            with pytest.raises(RolloutFailed, match=r"3\d% of the tasks fail with it, 0% without it"):
                await fleet.configure({"model": "dull"}, rollout=RINGS)
            tasks.cancel_scope.cancel()
        assert len(agents.had[2]) == 1


@virtual
async def test_published_by_somebody_else_it_is_rolled_out_too() -> None:
    """Whoever puts it into the store: the manager that leads the fleet carries it out."""
    world = World(spec(5))
    async with configured(world) as (fleet, agents):
        await fleet.config.put("a", {"model": "large"}, author="ci", reason="nightly", rollout=RINGS)
        record = await fleet._runtime.configuring.rings.over(2)
        assert record.phase == "complete"
        await anyio.sleep(5)
        assert agents.documents() == {"large": 5}


@virtual
async def test_what_cannot_be_rolled_out_is_refused() -> None:
    world = World(spec(2))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        with pytest.raises(OperationRefused, match="no revision yet that a rollout could go back to"):
            await fleet.configure(GOOD, rollout=RINGS)
        await fleet.configure(GOOD)
        with pytest.raises(SpecError, match="rollout: must be a ConfigRollout"):
            await fleet.configure(BAD, rollout="slowly")  # type: ignore[arg-type]
        await fleet.stop()
        with pytest.raises(DeadlineExceeded):
            await fleet.configure(BAD, rollout=RINGS, timeout=60)
        assert agents.had == {1: set(agents.had[1])}
