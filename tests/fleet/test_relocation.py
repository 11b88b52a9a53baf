"""Instances that are replaced away from their nodes by an engine that places instances itself: stand-ins, in all cases.

On the simulated engine, in virtual time; `tests/kube/test_elsewhere.py` has the same on a real scheduler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from tests.fleet.test_workload import Engine
from tests.fleet.world import HEALTH, spec

from agentfleet import Fleet, FleetSpec, Instance, MemoryBackend, RecoveryPolicy, RolloutPolicy
from agentfleet.backends.memory import MemoryDeployments
from agentfleet.errors import BackendRefused, BackendUnavailable, InstanceGone, OperationRefused
from agentfleet.instances import Phase
from agentfleet.testing import virtual

AWAY = RecoveryPolicy(restarts=0, replacements=0, elsewhere=2, cooldown=5.0, settle=20.0)
SIZE = 6
START = 60.0
"""Seconds that an instance of version "slow" takes to start."""


class Troubled(MemoryDeployments):
    """Fails on demand, and counts."""

    def __init__(self, cluster: MemoryBackend) -> None:
        super().__init__(cluster)
        self.trouble: dict[str, Exception] = {}
        self.calls: list[str] = []

    async def stand_in(self, fleet: str, id: str, *, away_from: str) -> None:
        self._note("stand_in")
        await super().stand_in(fleet, id, away_from=away_from)

    async def exchange(self, fleet: str, id: str, stand_in: str, *, grace: float) -> None:
        self._note("exchange")
        await super().exchange(fleet, id, stand_in, grace=grace)

    async def discard(self, fleet: str, stand_in: str) -> None:
        self._note("discard")
        await super().discard(fleet, stand_in)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.trouble:
            raise self.trouble[call]


class Place(Engine):
    """A simulated cluster of three nodes with an engine that may fail."""

    backend: Troubled

    def __init__(self, wanted: FleetSpec | None = None, *, room: int | None = None, **more: Any) -> None:
        super().__init__(wanted or spec(SIZE, health=HEALTH, recovery=AWAY, **more))
        self.cluster = MemoryBackend(seed=1, start_delay=(1.0, 2.0), capacity_per_node=room)
        self.backend = Troubled(self.cluster)

    @property
    def stand_ins(self) -> list[Instance]:
        """What the engine has that is no member."""
        return [each for each in self.backend.kept("a")._instances.values() if each.stands_in_for is not None]

    def slow(self) -> None:
        """Whatever starts from now on takes a minute."""
        self.cluster.behave(version="1", start_delay=START)

    def codes(self, kind: str) -> list[str]:
        return [event.reasons[0]["code"] for event in self.events(kind)]


async def until(holds: Callable[[], bool], seconds: float = 600.0) -> None:
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - in virtual time, and it has no event
            await anyio.sleep(0.5)


async def whole(place: Place, fleet: Fleet, size: int = SIZE) -> None:
    """Wait until all is as wanted, and see that it stays so and nothing is left."""
    await until(lambda: len(fleet.endpoints()) == size == len(fleet.instances))
    await anyio.sleep(60)
    assert len(fleet.endpoints()) == size == len(fleet.instances)
    assert not place.stand_ins
    assert len({each.slot for each in fleet.instances}) == size
    assert not fleet._runtime.desk.moving
    assert not fleet._runtime.turn.sizing._reserved
    assert place.cluster.count("a") == size


# ------------------------------------------------------------------------------------------------ it is done


@virtual
async def test_a_sick_one_is_replaced_away_from_its_node() -> None:
    """Its stand-in is no member while it waits, takes its slot and its history, and nothing else is made."""
    place = Place()
    async with place.deployed() as fleet:
        sick = fleet.instances[2]
        ids = {each.id for each in fleet.instances}
        place.slow()
        place.cluster.faults.hang(sick.id, sticky=True)
        await until(lambda: bool(place.stand_ins))
        (stand_in,) = place.stand_ins
        assert {each.id for each in fleet.instances} == ids
        assert fleet.status()["good"] == SIZE - 1
        await anyio.sleep(30)
        assert len(place.events("recovery.elsewhere")) == 1, "it is left alone meanwhile"
        await until(lambda: stand_in.id in fleet.endpoints())
        await whole(place, fleet)
        new = fleet.view.members[stand_in.id].instance
        assert new.slot == sick.slot
        assert new.node != sick.node
        assert {each.id for each in fleet.instances} == ids - {sick.id} | {stand_in.id}
        assert place.backend.calls == ["stand_in", "exchange"]
        (ready,) = place.events("elsewhere.ready")
        assert (ready.data["slot"], ready.data["by"], ready.data["to"]) == (sick.slot, stand_in.id, new.node)
        (recovered,) = place.events("instance.recovered")
        assert recovered.data["slot"] == sick.slot


@virtual
async def test_one_that_serves_does_so_until_the_other_is_ready() -> None:
    place = Place()
    async with place.deployed() as fleet:
        id = fleet.instances[0].id
        place.slow()
        await fleet.replace(id, elsewhere=True)
        await anyio.sleep(START / 2)
        assert id in fleet.endpoints()
        await until(lambda: id not in fleet.view.members)
        await whole(place, fleet)


@virtual
async def test_one_that_serves_asks_the_governor_again() -> None:
    """Two were admitted while nothing was taken out of service; one after the other is exchanged."""
    place = Place(spec(SIZE, health=HEALTH, recovery=AWAY.replace(max_disrupted=1)))
    async with place.deployed() as fleet:
        first, second = (each.id for each in fleet.instances[:2])
        place.slow()
        await fleet.replace(first, elsewhere=True)
        await anyio.sleep(1)
        await fleet.replace(second, elsewhere=True)
        least = SIZE
        while first in fleet.view.members or second in fleet.view.members:
            await anyio.sleep(0.1)
            least = min(least, len(fleet.endpoints()))
        assert least >= SIZE - 1
        await whole(place, fleet)
        admitted = [event for event in place.events("governor.admitted") if event.data["action"] == "exchange"]
        assert len(admitted) == 2


@virtual
async def test_those_of_a_lost_node_come_to_others() -> None:
    place = Place()
    async with place.deployed() as fleet:
        node = fleet.instances[0].node
        assert node is not None
        place.cluster.faults.partition(node)
        await until(lambda: bool(place.events("elsewhere.ready")))
        await until(lambda: len(fleet.endpoints()) == SIZE)
        assert node not in {fleet.view.members[id].instance.node for id in fleet.endpoints()}
        assert len({fleet.view.members[id].instance.slot for id in fleet.endpoints()}) == SIZE


# ------------------------------------------------------------------------------------------------ it cannot be done


@pytest.mark.parametrize("asked", [False, True])
@virtual
async def test_where_no_other_node_has_room(asked: bool) -> None:
    """Recovery replaces it wherever there is room; for an operator it stays as it is."""
    place = Place(room=2)
    async with place.deployed() as fleet:
        victim = fleet.instances[0]
        if asked:
            await fleet.replace(victim.id, elsewhere=True)
        else:
            place.cluster.faults.hang(victim.id)
        await until(lambda: bool(place.events("elsewhere.failed")))
        failed = place.events("elsewhere.failed")[0]
        assert failed.data == {"slot": victim.slot, "node": victim.node, "then": "kept" if asked else "replaced"}
        assert failed.reasons[0]["code"] == "elsewhere.unplaced"
        await whole(place, fleet)
        assert (victim.id in fleet.view.members) is asked


@pytest.mark.parametrize(("crash_after", "why"), [(None, "elsewhere.late"), (1.0, "elsewhere.broken")])
@virtual
async def test_a_stand_in_that_does_not_become_ready(crash_after: float | None, why: str) -> None:
    place = Place(rollout=RolloutPolicy(progress_deadline=100.0))
    async with place.deployed() as fleet:
        place.cluster.behave(version="1", never_ready=True, crash_after=crash_after)
        place.cluster.faults.hang(fleet.instances[0].id)
        await until(lambda: bool(place.events("elsewhere.failed")))
        place.cluster.behave(version="1")
        assert place.codes("elsewhere.failed") == [why]
        await whole(place, fleet)


@virtual
async def test_an_engine_that_refuses_or_is_out_of_reach() -> None:
    """What is refused is done without; what could not be asked does not count as an attempt."""
    place = Place()
    async with place.deployed() as fleet:
        place.backend.trouble["stand_in"] = BackendUnavailable("no route")
        sick = fleet.instances[0]
        place.cluster.faults.hang(sick.id, sticky=True)
        await until(lambda: len(place.events("recovery.elsewhere")) > 4)
        assert not place.events("recovery.ask")
        assert sick.id in fleet.view.members
        place.backend.trouble["stand_in"] = BackendRefused("quota")
        await until(lambda: sick.id not in fleet.view.members)
        assert place.codes("elsewhere.failed") == ["elsewhere.refused"]
        await whole(place, fleet)


@pytest.mark.parametrize("error", [BackendUnavailable("no route"), BackendRefused("budget")])
@virtual
async def test_an_exchange_that_fails(error: Exception) -> None:
    """The instance stays what it was, its stand-in is ended; a refusal counts as an attempt that has failed."""
    place = Place()
    async with place.deployed() as fleet:
        place.backend.trouble["exchange"] = error
        sick = fleet.instances[0]
        place.cluster.faults.hang(sick.id, sticky=True)
        if isinstance(error, BackendRefused):
            await until(lambda: bool(place.events("recovery.ask")))
        else:
            await until(lambda: place.backend.calls.count("exchange") > 20)
            assert not place.events("recovery.ask")
        assert sick.id in fleet.view.members
        place.backend.trouble.clear()
        await until(lambda: sick.id not in fleet.view.members, 2000)
        await whole(place, fleet)


@virtual
async def test_an_exchange_whose_end_is_not_known() -> None:
    """The stand-in has its place already: it is a member, and the other one is another's case."""

    class Half(Troubled):
        async def exchange(self, fleet: str, id: str, stand_in: str, *, grace: float) -> None:
            kept = self.kept(fleet)
            if stand_in in kept._stand_ins:
                del kept._stand_ins[stand_in]
                kept._show(kept.known(stand_in))
            await anyio.sleep(1)
            raise BackendUnavailable("broken off")

    place = Place()
    place.backend = Half(place.cluster)
    async with place.deployed() as fleet:
        sick = fleet.instances[0].id
        place.cluster.faults.hang(sick, sticky=True)
        await until(lambda: bool(place.events("action.failed")))
        by = place.events("elsewhere.ready")[0].data["by"]
        await until(lambda: len(fleet.instances) == SIZE)
        assert by in fleet.view.members
        await whole(place, fleet)


@virtual
async def test_discarding_is_tried_until_it_is_done() -> None:
    place = Place()
    async with place.deployed() as fleet:
        place.backend.trouble["discard"] = BackendUnavailable("no route")
        await place.backend.stand_in("a", fleet.instances[0].id, away_from="node-1")
        await until(lambda: place.backend.calls.count("discard") > 8)
        del place.backend.trouble["discard"]
        await until(lambda: not place.stand_ins)
        await whole(place, fleet)


@virtual
async def test_there_are_not_more_stand_ins_than_may_be_disrupted() -> None:
    """Those that have exited ask no governor. Those beyond are replaced wherever there is room, and it is told."""
    place = Place(spec(SIZE, health=HEALTH, recovery=AWAY.replace(max_disrupted=1)))
    async with place.deployed() as fleet:
        place.slow()
        relocations, now = fleet._runtime.turn.relocations, fleet.clock.now()
        first, second = list(fleet.view.members.values())[:2]
        assert relocations.begin(first, 5.0, now, asked=False)
        assert not relocations.begin(second, 5.0, now, asked=False)
        assert place.codes("elsewhere.failed") == ["elsewhere.crowded"]
        await until(lambda: bool(place.events("elsewhere.called_off")))  # nothing ails it
        await whole(place, fleet)


@virtual
async def test_pods_that_belong_to_nobody_any_more_climb_the_ladder() -> None:
    """As those of a dead node that the cluster has deleted: no stand-in can be made, and that is no news each turn."""

    class Orphans(Troubled):
        async def stand_in(self, fleet: str, id: str, *, away_from: str) -> None:
            if self.kept(fleet).known(id).phase is Phase.LOST:
                self.calls.append("stand_in")
                raise InstanceGone("it is in no ReplicaSet (any more)")
            await super().stand_in(fleet, id, away_from=away_from)

    place = Place()
    place.backend = Orphans(place.cluster)
    async with place.deployed() as fleet:
        node = fleet.instances[0].node
        assert node is not None
        place.cluster.faults.partition(node)
        await until(lambda: len(fleet.endpoints()) == SIZE)
        await anyio.sleep(600)
        assert len(place.events("recovery.elsewhere")) < 20
        assert len(fleet.endpoints()) == SIZE


@virtual
async def test_a_stand_in_on_a_lost_node_is_ended_now_and_then() -> None:
    """It does not go before its node is back: it is told so again, but not all the time."""
    place = Place()
    async with place.deployed() as fleet:
        place.slow()
        place.cluster.faults.hang(fleet.instances[0].id, sticky=True)
        await until(lambda: bool(place.stand_ins) and place.stand_ins[0].node is not None)
        node = place.stand_ins[0].node
        assert node is not None
        place.cluster.faults.partition(node)
        await anyio.sleep(120)
        assert 1 <= place.backend.calls.count("discard") < 20


@virtual
async def test_a_dead_stand_in_is_not_taken_for_a_new_one() -> None:
    place = Place()
    async with place.deployed() as fleet:
        id = fleet.instances[0].id
        await fleet.replace(id, elsewhere=True)
        await until(lambda: bool(place.stand_ins) and place.stand_ins[0].node is not None)
        node = place.stand_ins[0].node
        assert node is not None
        place.cluster.faults.partition(node)
        await until(lambda: bool(place.events("elsewhere.failed")))
        await until(lambda: len(fleet.endpoints()) == SIZE)
        await anyio.sleep(30)
        assert id in fleet.endpoints()
        await fleet.replace(id, elsewhere=True)
        await until(lambda: id not in fleet.view.members, 60)


@virtual
async def test_an_operator_is_told_when_it_would_be_replaced_anyway() -> None:
    place = Place(spec(SIZE, health=HEALTH, recovery=AWAY.replace(max_disrupted=3)))
    async with place.deployed() as fleet:
        place.cluster.behave(version="2", start_delay=START)
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(5)
        old = [each for each in fleet.instances if each.revision == 1 and each.id in fleet.endpoints()][-1]
        with pytest.raises(OperationRefused, match="another revision is wanted"):
            await fleet.replace(old.id, elsewhere=True)
        assert old.id in fleet.endpoints()


@virtual
async def test_an_exchange_that_is_never_admitted() -> None:
    """The instance stays, and can be acted upon again; its stand-in does not wait for ever."""

    class Stuck(Troubled):
        async def stop(self, fleet: str, id: str, *, grace: float) -> None:
            raise BackendRefused("no")

    limits = RolloutPolicy(progress_deadline=300.0)
    place = Place(spec(SIZE, health=HEALTH, recovery=AWAY.replace(max_disrupted=1), rollout=limits))
    place.backend = Stuck(place.cluster)
    async with place.deployed() as fleet:
        id = fleet.instances[0].id
        place.slow()
        await fleet.replace(id, elsewhere=True)
        await anyio.sleep(20)
        place.cluster.faults.hang(fleet.instances[3].id, sticky=True)  # so that one more would be too many
        await until(lambda: "elsewhere.held" in place.codes("elsewhere.failed"))
        assert id in fleet.endpoints()
        assert id not in fleet._runtime.desk.moving
        await until(lambda: not [each for each in place.stand_ins if each.stands_in_for == id])


# ------------------------------------------------------------------------------------------------ meanwhile


@pytest.mark.parametrize("stuck", ["no room", "never ready", "refused"])
@virtual
async def test_one_that_has_recovered_is_not_ended_because_its_stand_in_failed(stuck: str) -> None:
    limits = RolloutPolicy(progress_deadline=100.0)
    wanted = spec(SIZE, health=HEALTH, recovery=AWAY.replace(max_disrupted=3, freeze_below=0.1), rollout=limits)
    place = Place(wanted, room=2 if stuck == "no room" else None)
    async with place.deployed() as fleet:
        sick = [each.id for each in fleet.instances[:3]]
        if stuck == "never ready":
            place.cluster.behave(version="1", never_ready=True)
        if stuck == "refused":
            place.backend.trouble["stand_in"] = BackendUnavailable("no route")
        for id in sick:
            place.cluster.faults.hang(id)
        await until(lambda: {event.instance for event in place.events("recovery.elsewhere")} == set(sick))
        for id in sick:
            place.cluster.faults.cure(id)
        await until(lambda: len(fleet.endpoints()) == SIZE)
        if stuck == "refused":
            place.backend.trouble["stand_in"] = BackendRefused("quota")
        for _ in range(600):
            await anyio.sleep(0.2)
            assert len(fleet.endpoints()) == SIZE
        assert set(sick) <= set(fleet.view.members)
        assert not fleet._runtime.desk.moving


@virtual
async def test_one_that_recovers_by_itself_needs_none() -> None:
    place = Place()
    async with place.deployed() as fleet:
        sick = fleet.instances[0].id
        place.slow()
        place.cluster.faults.hang(sick)
        await until(lambda: bool(place.stand_ins))
        place.cluster.faults.cure(sick)
        await until(lambda: bool(place.events("elsewhere.called_off")))
        await whole(place, fleet)
        assert sick in fleet.view.members
        assert not place.events("elsewhere.ready")


async def _scaled(fleet: Fleet) -> int:
    await fleet.scale(SIZE - 2)
    return SIZE - 2


async def _upgraded(fleet: Fleet) -> int:
    await fleet.upgrade("2", wait=False)
    return SIZE


async def _stopped(fleet: Fleet) -> int:
    await fleet.stop(timeout=300)
    return 0


async def _deleted(fleet: Fleet) -> int:
    await fleet.delete(timeout=300)
    return 0


@pytest.mark.parametrize("act", [_scaled, _upgraded, _stopped, _deleted])
@virtual
async def test_what_is_wanted_otherwise_meanwhile(act: Callable[[Fleet], Awaitable[int]]) -> None:
    place = Place()
    async with place.deployed() as fleet:
        sick = fleet.instances[0].id
        place.slow()
        place.cluster.faults.hang(sick)
        await until(lambda: bool(place.stand_ins))
        size = await act(fleet)
        await whole(place, fleet, size)
        assert sick not in fleet.view.members
        assert not place.events("elsewhere.ready")


@pytest.mark.parametrize("whom", ["instance", "stand-in"])
@virtual
async def test_one_of_the_two_is_gone(whom: str) -> None:
    place = Place()
    async with place.deployed() as fleet:
        sick = fleet.instances[0].id
        place.slow()
        place.cluster.faults.hang(sick, sticky=True)
        await until(lambda: bool(place.stand_ins))
        await anyio.sleep(5)
        await place.cluster.stop("a", sick if whom == "instance" else place.stand_ins[0].id, grace=0.0)
        await until(lambda: bool(place.events("elsewhere.called_off" if whom == "instance" else "elsewhere.failed")))
        await whole(place, fleet)
        assert sick not in fleet.view.members


@virtual
async def test_nothing_else_is_done_to_it_meanwhile() -> None:
    place = Place()
    async with place.deployed() as fleet:
        id = fleet.instances[0].id
        place.slow()
        await fleet.replace(id, elsewhere=True)
        await anyio.sleep(5)
        for act in (fleet.restart(id), fleet.replace(id), fleet.isolate(id, reason="why")):
            with pytest.raises(Exception, match="being acted upon"):
                await act
        with pytest.raises(Exception, match="unknown"):
            await fleet.restart(place.stand_ins[0].id)
        await whole(place, fleet)


# ------------------------------------------------------------------------------------------------ managers


@virtual
async def test_the_next_manager_ends_what_it_does_not_know_of() -> None:
    place = Place()
    async with place.deployed() as fleet:
        place.slow()
        place.cluster.faults.hang(fleet.instances[0].id, sticky=True)
        await until(lambda: bool(place.stand_ins))
    (left,) = place.stand_ins
    async with place.fleet() as fleet:
        await until(lambda: left.id not in {each.id for each in place.stand_ins}, 5)
        await whole(place, fleet)
        assert left.id not in fleet.view.members


@virtual
async def test_a_stand_in_too_many_is_ended() -> None:
    """As of a request that was repeated."""
    place = Place()
    async with place.deployed() as fleet:
        sick = fleet.instances[0]
        place.slow()
        place.cluster.faults.hang(sick.id, sticky=True)
        await until(lambda: bool(place.stand_ins))
        assert sick.node is not None
        await place.backend.stand_in("a", sick.id, away_from=sick.node)
        await until(lambda: len(place.stand_ins) == 1)
        await whole(place, fleet)
        assert len(place.events("elsewhere.ready")) == 1
