"""Acting on one instance of a fleet whose engine keeps it by itself, as Kubernetes does."""

from __future__ import annotations

import anyio
from tests.fleet.test_workload import Engine
from tests.fleet.world import HEALTH, placed, spec

from agentfleet import MemoryJournal
from agentfleet.testing import virtual


@virtual
async def test_a_replacement_on_a_node_that_is_lost_is_replaced_again() -> None:
    """It is not left there, and it comes to a node that is there."""
    engine = Engine(spec(6, health=HEALTH))
    async with engine.deployed() as fleet:
        victim = fleet.instances[0]
        before = {instance.id for instance in fleet.instances}
        await fleet.replace(victim.id, elsewhere=True)
        with anyio.fail_after(60):
            while victim.id in fleet.view.members:  # noqa: ASYNC110 - in virtual time, and it has no event
                await anyio.sleep(0.5)
        await fleet.ready(timeout=60)
        (new,) = (instance for instance in fleet.instances if instance.id not in before)
        node = new.node
        assert node is not None
        engine.cluster.faults.partition(node)
        await anyio.sleep(120)
        await fleet.ready(timeout=120)
        assert new.id not in placed(fleet) or fleet.view.members[new.id].leaving
        assert {fleet.view.members[id].instance.node for id in fleet.endpoints()}.isdisjoint({node})


@virtual
async def test_an_engine_lets_go_of_it() -> None:
    """The engine replaces it and keeps it; the size stays, and a scale-down takes others."""
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        odd = fleet.instances[2]
        await fleet.isolate(odd.id, reason="why", keep="1h")
        assert odd.id not in fleet.endpoints()
        await fleet.ready(timeout=60)
        assert fleet.status()["isolated"] == 1
        assert len(fleet.view) == 7
        assert sorted(fleet.view.members[id].instance.slot for id in placed(fleet)) == list(range(6))
        await fleet.scale(3)
        await anyio.sleep(60)
        await fleet.upgrade("2", timeout=300)
        await anyio.sleep(60)
        await fleet.ready(timeout=60)
        assert len(placed(fleet)) == 3
        assert odd.id in fleet.isolated
        assert [order.replicas for order in engine.backend.orders] == [6, 3, 3]
        await anyio.sleep(3600)
        assert odd.id not in fleet.view.members
        await fleet.ready(timeout=60)
        assert len(fleet.view) == 3
        assert [event.data["reason"] for event in engine.events("instance.released")] == ["expired"]


@virtual
async def test_an_engine_out_of_reach_lets_go_later() -> None:
    """It gets no work meanwhile; once the engine is back it is told, and fills the place."""
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        odd = fleet.instances[2].id
        engine.cluster.faults.unavailable(seconds=200.0)
        await fleet.isolate(odd, reason="why")
        await anyio.sleep(150)
        assert odd not in fleet.endpoints()
        assert len(fleet.view) == 6
        await anyio.sleep(400)
        await fleet.ready(timeout=60)
        assert len(fleet.view) == 7
        engine.cluster.faults.unavailable(seconds=100.0)
        await fleet.release(odd)
        await anyio.sleep(500)
        assert odd not in fleet.view.members
        assert len(engine.events("instance.released")) == 1


@virtual
async def test_the_engine_remembers_when_the_journal_is_lost() -> None:
    """A manager with an empty journal finds the isolated one as it is: it is not counted, and expires as said."""
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        odd = fleet.instances[2].id
        await fleet.isolate(odd, reason="why", keep=600)
        await fleet.ready(timeout=60)
    for journal in (engine.journal, MemoryJournal()):
        engine.journal = journal
        async with engine.fleet() as fleet:
            await fleet.deploy(timeout=60)
            await anyio.sleep(30)
            await fleet.ready(timeout=60)
            assert set(fleet.isolated) == {odd}
            assert fleet.isolated[odd].reason == "why"
            assert len(placed(fleet)) == 6
    async with engine.fleet() as fleet:
        await anyio.sleep(700)
        assert odd not in fleet.view.members
        await fleet.delete(timeout=60)


@virtual
async def test_somebody_puts_it_back() -> None:
    """Whoever takes the mark off at the engine has it in service again; the fleet goes back to its size."""
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        odd = fleet.instances[2].id
        await fleet.isolate(odd, reason="why")
        await fleet.ready(timeout=60)
        engine.backend.kept("a").put_back(odd)
        await anyio.sleep(60)
        await fleet.ready(timeout=60)
        assert fleet.isolated == {}
        assert len(fleet.view) == 6
        (event,) = engine.events("instance.released")
        assert event.data["reason"] == "returned"
        assert len({fleet.view.members[id].instance.slot for id in placed(fleet)}) == 6


@virtual
async def test_deleting_a_fleet_ends_what_its_engine_has_let_go_of() -> None:
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        await fleet.isolate(fleet.instances[2].id, reason="why", keep=None)
        await fleet.ready(timeout=60)
        await fleet.delete(timeout=120)
        assert engine.cluster.count("a") == 0
