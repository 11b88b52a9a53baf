"""Acting on one instance: replaced, replaced elsewhere, set apart for examination, and let go of again."""

from __future__ import annotations

import random

import anyio
import pytest
from tests.fleet.world import Crash, Plan, World, died, placed, spec

from agentfleet import OperationRefused, Phase, RecoveryPolicy, SpecError
from agentfleet.backends.memory import Load
from agentfleet.testing import run_virtual, virtual

PLENTY = RecoveryPolicy(max_disrupted=10)


# ------------------------------------------------------------------------------------------------ replace


@virtual
async def test_one_is_replaced_in_its_place() -> None:
    """An operator's replacement ends the instance, and another comes into the same slot; the rest is not touched."""
    world = World()
    async with world.deployed() as fleet:
        before = set(world.ids())
        victim = fleet.instances[3]
        await fleet.replace(victim.id)
        assert victim.id not in fleet.endpoints()
        await world.settled(fleet)
        (new,) = set(world.ids()) - before
        assert fleet.view.members[new].instance.slot == victim.slot
        assert before - set(world.ids()) == {victim.id}
        (event,) = world.events("recovery.replace")
        assert event.reasons[0]["code"] == "operator.replace"


@virtual
async def test_one_is_replaced_away_from_its_node() -> None:
    """`elsewhere` stays away from the old node; without another node it is refused and nothing happens."""
    world = World()
    async with world.deployed() as fleet:
        victim = fleet.instances[0]
        before = set(world.ids())
        await fleet.replace(victim.id, elsewhere=True)
        await world.settled(fleet)
        (new,) = set(world.ids()) - before
        assert fleet.view.members[new].instance.node != victim.node

    alone = World(nodes=1)
    async with alone.deployed() as fleet:
        with pytest.raises(OperationRefused, match="no other node is ready"):
            await fleet.replace(fleet.instances[0].id, elsewhere=True)
        assert alone.effort() == (10, 0, 0)


@virtual
async def test_a_replacement_asks_the_governor() -> None:
    """Beyond the budget it is refused, with the rule; wrong arguments are refused before anything is done."""
    world = World(spec(10, recovery=RecoveryPolicy(max_disrupted=1)))
    async with world.deployed() as fleet:
        ids = world.ids()
        await fleet.replace(ids[0])
        with pytest.raises(OperationRefused, match="1 of 1 allowed disruptions"):
            await fleet.replace(ids[1])
        with pytest.raises(OperationRefused, match="1 of 1 allowed disruptions"):
            await fleet.isolate(ids[1], reason="slow")
        with pytest.raises(OperationRefused, match="unknown"):
            await fleet.replace("nobody")
        with pytest.raises(SpecError, match="elsewhere"):
            await fleet.replace(ids[1], elsewhere="b")  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="id"):
            await fleet.replace(7)  # type: ignore[arg-type]
        await world.settled(fleet)
    assert world.effort() == (11, 1, 0)


# ------------------------------------------------------------------------------------------------ isolate, one by one


@virtual
async def test_an_isolated_one_stays_and_is_replaced() -> None:
    """It gets no work from that moment, its slot goes to another, the size stays, and it runs on."""
    world = World()
    async with world.deployed() as fleet:
        odd = fleet.instances[4]
        now = world.clock.now()
        await fleet.isolate(odd.id, reason="answers nonsense", keep="2h")
        assert odd.id not in fleet.endpoints()
        (isolation,) = fleet.isolated.values()
        assert (isolation.since, isolation.until, isolation.reason) == (now, now + 7200, "answers nonsense")
        assert fleet.status()["good"] == 9
        await world.settled(fleet)
        assert (fleet.status()["desired"], fleet.status()["good"], fleet.status()["isolated"]) == (10, 10, 1)
        assert len(fleet.endpoints()) == 10
        holder = fleet.view.holder(odd.slot)
        assert holder is not None
        assert holder.instance.id != odd.id
        assert odd.id in world.backend.running("a")
        assert "isolated" in str(fleet.report())
        (event,) = world.events("instance.isolated")
        assert event.data["reason"] == "answers nonsense"
        assert world.effort() == (11, 0, 0)


@virtual
async def test_a_released_one_ends_with_its_drain() -> None:
    world = World()
    async with world.deployed() as fleet:
        odd = fleet.instances[4].id
        await fleet.isolate(odd, reason="why", keep=None)
        await world.settled(fleet)
        others = placed(fleet)
        await fleet.release(odd)
        await anyio.sleep(0.01)
        assert world.backend.count("a", Phase.DRAINING) == 1
        await world.settled(fleet)
        assert set(world.ids()) == others
        assert fleet.isolated == {}
        (event,) = world.events("instance.released")
        assert event.data["reason"] == "released"


@virtual
async def test_an_expired_one_ends_by_itself() -> None:
    world = World()
    async with world.deployed() as fleet:
        odd = fleet.instances[4].id
        await fleet.isolate(odd, reason="why", keep=600)
        await anyio.sleep(599)
        assert odd in fleet.isolated
        await anyio.sleep(2)
        await world.settled(fleet)
        assert odd not in world.ids()
        (event,) = world.events("instance.released")
        assert (event.data["reason"], event.data["seconds"]) == ("expired", 600.0)


@virtual
async def test_recovery_leaves_an_isolated_one_alone() -> None:
    """Whatever becomes of it, it is not repaired and blamed on nobody; the dead stay for examination, too."""
    world = World(spec(10, recovery=PLENTY))
    async with world.deployed() as fleet:
        hung, dead, lost = (instance for instance in fleet.instances[:3])
        for each in (hung, dead, lost):
            await fleet.isolate(each.id, reason="why")
        await world.settled(fleet)
        effort = world.effort()
        world.faults.hang(hung.id)
        world.faults.crash(dead.id)
        await anyio.sleep(600)
        await world.settled(fleet)
        assert world.effort() == effort
        assert set(fleet.isolated) == {hung.id, dead.id, lost.id}
        assert await fleet.logs(dead.id)
        assert not world.events("recovery.restart", "recovery.replace", "governor.held")
        for id in tuple(fleet.isolated):
            await fleet.release(id)
        await world.settled(fleet)
        assert len(world.ids()) == 10


@virtual
async def test_a_sick_one_can_be_isolated_instead_of_repaired() -> None:
    """What recovery was about to do to it is not done."""
    world = World(spec(10, recovery=RecoveryPolicy(max_disrupted=1)))
    async with world.deployed() as fleet:
        sick = fleet.instances[2]
        world.faults.crash(sick.id)
        world.faults.hang(fleet.instances[5].id)
        await anyio.sleep(0.02)
        await fleet.isolate(sick.id, reason="crashed")
        await world.settled(fleet)
        assert sick.id in fleet.isolated
        assert sick.id in world.ids()


@virtual
async def test_isolation_shrinks_nothing() -> None:
    """With one set apart a scale-down and a rollout touch it not, and count it not."""
    world = World()
    async with world.deployed() as fleet:
        odd = fleet.instances[4].id
        await fleet.isolate(odd, reason="why")
        await fleet.scale(4)
        await world.settled(fleet)
        await fleet.upgrade("2")
        await world.settled(fleet)
        assert len(placed(fleet)) == 4
        assert fleet.view.members[odd].instance.version == "1"


@virtual
async def test_an_isolated_one_keeps_nobody_waiting() -> None:
    """A configuration is delivered without it, and the autoscaler does not see its load."""
    world = World(usage_period=1.0)
    async with world.deployed() as fleet:
        odd = fleet.instances[4].id
        world.backend.load(Load(cpu=50.0), id=odd)
        await fleet.isolate(odd, reason="why")
        world.faults.hang(odd)
        await world.settled(fleet)
        await fleet.configure({"a": 1}, timeout=60)
        assert odd not in fleet._runtime.feed.running


@virtual
async def test_what_cannot_be_isolated() -> None:
    world = World()
    async with world.deployed() as fleet:
        first, second = world.ids()[:2]
        await fleet.isolate(first, reason="why")
        for refused, words in (
            (fleet.isolate(first, reason="again"), "it is isolated"),
            (fleet.replace(first), "it is isolated"),
            (fleet.restart(first), "it is isolated"),
            (fleet.release(second), "not isolated"),
            (fleet.isolate("nobody", reason="why"), "unknown"),
        ):
            with pytest.raises(OperationRefused, match=words):
                await refused
        for wrong, words in (
            (fleet.isolate(second, reason=""), "reason"),
            (fleet.isolate(second, reason="x" * 1001), "reason"),
            (fleet.isolate(second, reason="why", keep="soon"), "keep"),
            (fleet.isolate(second, reason="why", keep=0), "keep"),
        ):
            with pytest.raises(SpecError, match=words):
                await wrong
        await world.settled(fleet)


@virtual
async def test_the_next_manager_knows_who_is_isolated() -> None:
    """It takes up the book, kills nobody who is in it, and ends what has expired meanwhile."""
    world = World(spec(10, recovery=PLENTY))
    async with world.deployed() as fleet:
        short, long = (instance.id for instance in fleet.instances[:2])
        await fleet.isolate(short, reason="why", keep=300)
        await fleet.isolate(long, reason="why", keep=None)
        await world.settled(fleet)
    await anyio.sleep(100)
    async with world.fleet() as fleet:
        assert set(fleet.isolated) == {short, long}
        assert not {short, long} & set(fleet.endpoints())
        await world.settled(fleet)
        assert set(fleet.isolated) == {short, long}
    await anyio.sleep(1000)
    async with world.fleet() as fleet:
        await world.settled(fleet)
        assert set(fleet.isolated) == {long}
        assert len(world.ids()) == 11
    assert world.effort() == (12, 1, 0)


@pytest.mark.parametrize("end", ["stop", "delete"])
@virtual
async def test_stopping_and_deleting_end_it_too(end: str) -> None:
    world = World()
    async with world.deployed() as fleet:
        await fleet.isolate(world.ids()[0], reason="why", keep=None)
        await world.settled(fleet)
        await (fleet.stop(timeout=60) if end == "stop" else fleet.delete(timeout=60))
        assert world.ids() == []
        (event,) = world.events("instance.released")
        assert event.data["reason"] == {"stop": "stopped", "delete": "deleted"}[end]


@pytest.mark.parametrize("at", ["write", "action"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_manager_may_die_while_it_isolates(at: str, side: str) -> None:
    """Wherever the manager dies: at the end as many run as wanted, none is doubled, and the isolated one is gone."""

    async def live(plan: Plan) -> Plan:
        world = World(plan=plan)
        steps = ["deploy", "isolate", "settle", "release", "settle"]
        odd = ""
        while steps:
            try:
                async with world.fleet() as fleet:
                    while steps:
                        if steps[0] == "deploy":
                            await fleet.deploy()
                            odd = odd or world.ids()[4]
                        elif steps[0] == "isolate" and odd not in fleet.isolated:
                            await fleet.isolate(odd, reason="why")
                        elif steps[0] == "release" and odd in fleet.isolated:
                            await fleet.release(odd)
                        elif steps[0] == "settle":
                            await world.settled(fleet, stays=5.0)
                            assert (odd in world.ids()) is (len(steps) > 1), world.story()
                        del steps[0]
            except (Crash, BaseExceptionGroup) as error:
                if not died(error):
                    raise
        assert len(world.ids()) == 10
        return plan

    last = run_virtual(live, Plan()).counts[at]
    first = 11 if at == "action" else last * 2 // 3  # the deployment comes before
    for number in range(first, last + 1):
        assert run_virtual(live, Plan(at, number, side)).crashed == 1


def test_isolating_at_random_keeps_the_size() -> None:
    """Any mixture of isolating, releasing, scaling and trouble ends with the wanted size and the known isolated."""

    async def live(seed: int) -> None:
        rng = random.Random(seed)
        world = World(spec(8, recovery=RecoveryPolicy(max_disrupted=3)), seed=seed)
        async with world.deployed() as fleet:
            for _ in range(25):
                ids = list(fleet.view.members)
                match rng.randrange(6):
                    case 0 | 1:
                        await _whatever(fleet.isolate(rng.choice(ids), reason="why", keep=rng.choice([30, 600, None])))
                    case 2 if fleet.isolated:
                        await fleet.release(rng.choice(sorted(fleet.isolated)))
                    case 3:
                        await fleet.scale(rng.randint(4, 12))
                    case 4:
                        world.faults.crash(rng.choice(world.ids()))
                    case _:
                        await _whatever(fleet.replace(rng.choice(ids), elsewhere=rng.random() < 0.5))
                await anyio.sleep(rng.choice([0.0, 0.1, 3.0, 40.0]))
            await world.settled(fleet)
            assert not set(fleet.isolated) & set(fleet.endpoints())

    for seed in range(6):
        run_virtual(live, seed)


async def _whatever(call: object) -> None:
    try:
        await call  # type: ignore[misc]
    except OperationRefused:
        return
