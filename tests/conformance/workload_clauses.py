"""The contract of `agentfleet.backends.base` for engines that keep whole fleets, clause by clause.

`CLAUSES` are run against the simulated engine (`test_workload_contract.py`) and against a real control plane
(`tests/kube/test_workload_contract.py`). Names start with the clause's number. That something did *not* happen is shown
by something later that did, never by a pause.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

import anyio
import pytest

from agentfleet import BackendError, BackendUnavailable, FleetSpec, InstanceGone, Outdated
from agentfleet.backends.base import Ordered, Relocating, Snapshot, Workload, WorkloadBackend
from agentfleet.instances import NO_SLOT, Instance, Isolation

from .harness import Watched

FLEET = "agents"


class WorkloadWorld(Protocol):
    """An engine with nothing on it, open, and the hands of others."""

    deadline: float
    """Seconds in the engine's time within which anything that is waited for must happen."""

    @property
    def backend(self) -> WorkloadBackend:
        """The engine."""
        ...

    def spec(self, replicas: int, version: str) -> FleetSpec:
        """A fleet of well-behaved agents."""
        ...

    async def scale_by_hand(self, replicas: int) -> None:
        """Somebody else sets the size."""
        ...

    async def remove_by_hand(self, id: str) -> None:
        """Somebody else deletes an instance."""
        ...

    def unreachable(self) -> AbstractAsyncContextManager[None]:
        """While the engine cannot be reached."""
        ...


class Seen(Watched):
    """A watch of a fleet that its engine keeps."""

    @property
    def ordered(self) -> Ordered | None:
        """What the engine was told, as shown last."""
        return next((each for each in reversed(self.history) if isinstance(each, Ordered)), None)

    @property
    def counted(self) -> dict[str, Instance]:
        """The instances that count for the size."""
        members = ((id, each) for id, each in self.instances.items() if each.stands_in_for is None)
        return {id: each for id, each in members if each.isolated is None}

    async def told(self, replicas: int) -> str | None:
        """Read until the engine was told a size; returns by whom."""
        await self.until(lambda: self.ordered is not None and self.ordered.replicas == replicas)
        assert self.ordered is not None
        return self.ordered.by

    async def whole(self, size: int, version: str = "1") -> set[str]:
        """Read until the fleet is of a size and a version, all ready; returns the ids."""

        def holds() -> bool:
            those = self.counted.values()
            return len(those) == size and all(each.ready and each.version == version for each in those)

        await self.until(holds)
        return set(self.counted)


def workload(world: WorkloadWorld, replicas: int, revision: int = 1, **more: object) -> Workload:
    """An order for the fleet; its version is the number of its revision."""
    spec = world.spec(replicas, str(revision))
    return Workload(spec, revision, spec.template, replicas, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def watching(world: WorkloadWorld) -> AsyncIterator[Seen]:
    seen = Seen(world.backend, FLEET, world.deadline)
    try:
        yield seen
    finally:
        await seen.close()


async def accepted(world: WorkloadWorld, call: Callable[[], Awaitable[None]]) -> None:
    """Repeat what the engine does not take just now, as whoever calls it does: out of reach, or its budget used up."""
    with anyio.fail_after(world.deadline):
        while True:
            try:
                return await call()
            except BackendError:
                await anyio.sleep(0.2)


Clause = Callable[[WorkloadWorld], Awaitable[None]]
CLAUSES: list[Clause] = []


def clause(test: Clause) -> Clause:
    CLAUSES.append(test)
    return test


# ------------------------------------------------------------------------------------------------ 1. identity


@clause
async def clause_1_what_is_applied_comes_to_be_and_ids_are_the_engines_own(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        assert len(await seen.whole(3)) == 3
        assert {each.slot for each in seen.instances.values()} == {NO_SLOT}
        assert {each.revision for each in seen.instances.values()} == {1}
        assert {each.fleet for each in seen.instances.values()} == {FLEET}


@clause
async def clause_1_saying_the_same_again_changes_nothing(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        for _ in range(3):
            await world.backend.apply(workload(world, 3))
        before = await seen.whole(3)
        for _ in range(3):
            await world.backend.apply(workload(world, 3))
        await world.backend.apply(workload(world, 4))
        assert before < await seen.whole(4)
        assert not seen.removed


@clause
async def clause_1_no_id_is_used_again(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        first = await seen.whole(2)
        await world.backend.apply(workload(world, 0))
        await seen.until(lambda: not seen.instances)
        await world.backend.apply(workload(world, 2))
        assert not first & await seen.whole(2)


@clause
async def clause_1_an_order_that_is_not_about_the_size_does_not_undo_one(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        await seen.whole(2)
        await world.scale_by_hand(4)
        with pytest.raises(Outdated, match="4"):
            await world.backend.apply(workload(world, 2, 2, same_size=True))
        await seen.whole(4, "1")
        await world.backend.apply(workload(world, 4, 2, same_size=True))
        await seen.whole(4, "2")
        await world.backend.apply(workload(world, 1, 2))  # which is about it
        await seen.whole(1, "2")


# ------------------------------------------------------------------------------------------------ 2. observation


@clause
async def clause_2_of_a_fleet_that_nobody_knows_it_is_said(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        first = [await seen.next(), await seen.next()]
        (ordered,) = [each for each in first if isinstance(each, Ordered)]
        (snapshot,) = [each for each in first if isinstance(each, Snapshot)]
        assert ordered.absent
        assert snapshot.instances == ()


@clause
async def clause_2_who_looks_later_sees_all(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3, 7))
        ids = await seen.whole(3, "7")
        async with watching(world) as later:
            await later.until(lambda: bool(later.instances) and later.ordered is not None)
            assert set(later.instances) == ids
            assert later.ordered is not None
            assert (later.ordered.replicas, later.ordered.revision, later.ordered.by) == (3, 7, None)


@clause
async def clause_2_it_tells_what_others_have_told_it(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        await seen.whole(2)
        assert await seen.told(2) is None
        await world.scale_by_hand(3)
        assert await seen.told(3) is not None
        await world.backend.apply(workload(world, 4))
        assert await seen.told(4) is None


# ------------------------------------------------------------------------------------------------ 3. action


@clause
async def clause_3_what_is_done_to_nobody_is_refused_but_for_a_stop(world: WorkloadWorld) -> None:
    await world.backend.apply(workload(world, 1))
    with pytest.raises(InstanceGone):
        await world.backend.restart(FLEET, "nobody", grace=1.0)
    with pytest.raises(InstanceGone):
        await world.backend.isolate(FLEET, "nobody", isolation=Isolation(1.0, "why"))
    await world.backend.stop(FLEET, "nobody", grace=1.0)


@clause
async def clause_3_an_engine_out_of_reach_says_so_and_nothing_changes(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        before = await seen.whole(2)
        async with world.unreachable():
            with pytest.raises(BackendUnavailable):
                await world.backend.apply(workload(world, 1, 2))
        await accepted(world, lambda: world.backend.apply(workload(world, 3)))
        assert before < await seen.whole(3)
        assert not seen.removed, "what cannot be seen is not gone"


# ------------------------------------------------------------------------------------------------ 4, 5, 6. endings


@clause
async def clause_4_a_stop_ends_an_instance_and_the_engine_fills_its_place(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        victim = min(await seen.whole(3))
        await accepted(world, lambda: world.backend.stop(FLEET, victim, grace=2.0))
        await seen.gone(victim)
        assert victim not in await seen.whole(3)
        await world.backend.stop(FLEET, victim, grace=2.0)  # already done


@clause
async def clause_5_a_restart_may_let_another_take_its_place(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        victim = min(await seen.whole(3))
        await accepted(world, lambda: world.backend.restart(FLEET, victim, grace=2.0))
        await seen.until(lambda: victim in seen.removed or seen.instances[victim].restarts == 1)
        await seen.whole(3)


@clause
async def clause_6_the_place_of_one_that_somebody_deletes_is_filled(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        victim = min(await seen.whole(3))
        await world.remove_by_hand(victim)
        await seen.gone(victim)
        assert victim not in await seen.whole(3)


# ------------------------------------------------------------------------------------------------ size and revision


@clause
async def clause_6_who_is_expendable_goes_first(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 5))
        ids = sorted(await seen.whole(5))
        going = (ids[0], ids[2], ids[4])
        await world.backend.apply(workload(world, 2, expendable=going))
        assert await seen.whole(2) == {ids[1], ids[3]}


@clause
async def clause_6_another_revision_replaces_the_instances(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 4))
        old = await seen.whole(4)
        await world.backend.apply(workload(world, 4, 2))
        assert not old & await seen.whole(4, "2")
        await seen.until(lambda: seen.ordered is not None and seen.ordered.revision == 2)
        await world.backend.apply(workload(world, 4, 1))
        await seen.whole(4, "1")


@clause
async def clause_6_while_it_is_paused_no_revision_moves_but_the_size_does(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        before = await seen.whole(2)
        await world.backend.apply(workload(world, 2, 2, paused=True))
        await seen.until(lambda: seen.ordered is not None and seen.ordered.paused)
        await world.backend.apply(workload(world, 3, 2, paused=True))
        assert before < await seen.whole(3, "1")
        await world.backend.apply(workload(world, 3, 2))
        await seen.whole(3, "2")


# ------------------------------------------------------------------------------------------------ 8. isolation


@clause
async def clause_8_who_is_isolated_stays_and_its_place_is_filled(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        apart = min(await seen.whole(3))
        await world.backend.isolate(FLEET, apart, isolation=Isolation(1_700_000_000.0, "to look at"))
        await seen.until(lambda: seen.instances[apart].isolated is not None)
        found = seen.instances[apart].isolated
        assert found is not None
        assert found.reason == "to look at"
        assert apart not in await seen.whole(3)
        await world.backend.apply(workload(world, 1))
        await seen.whole(1)
        assert apart in seen.instances, "it is no part of the size"
        await world.backend.delete(FLEET)
        await seen.until(lambda: not seen.counted)
        assert apart in seen.instances, "a deletion leaves it"
        await world.backend.stop(FLEET, apart, grace=1.0)
        await seen.gone(apart)


# ------------------------------------------------------------------------------------------------ 9. stand-ins


def _relocating(world: WorkloadWorld) -> Relocating:
    assert isinstance(world.backend, Relocating)
    return world.backend


@clause
async def clause_9_a_stand_in_is_no_member_until_it_is_exchanged(world: WorkloadWorld) -> None:
    engine = _relocating(world)
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 3))
        ids = await seen.whole(3)
        old = min(ids)
        node = seen.instances[old].node
        assert node is not None
        await engine.stand_in(FLEET, old, away_from=node)
        await seen.until(lambda: any(each.stands_in_for == old and each.ready for each in seen.instances.values()))
        (new,) = (id for id, each in seen.instances.items() if each.stands_in_for is not None)
        assert (seen.instances[new].revision, seen.instances[new].slot) == (1, NO_SLOT)
        assert seen.instances[new].node not in (None, node)
        assert await seen.whole(3) == ids, "it is no part of the size"
        await accepted(world, lambda: engine.exchange(FLEET, old, new, grace=2.0))
        await seen.gone(old)
        assert await seen.whole(3) == ids - {old} | {new}
        await engine.discard(FLEET, new)  # it is one of them by now
        await world.backend.apply(workload(world, 4))
        assert new in await seen.whole(4)


@clause
async def clause_9_a_stand_in_that_is_discarded_leaves_all_as_it_was(world: WorkloadWorld) -> None:
    engine = _relocating(world)
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        ids = sorted(await seen.whole(2))
        for id in ids:
            await engine.stand_in(FLEET, id, away_from="another-node")
        await seen.until(lambda: len(seen.instances) == 4 and all(each.ready for each in seen.instances.values()))
        first, second = ((id, each.stands_in_for) for id, each in seen.instances.items() if each.stands_in_for)
        with pytest.raises(InstanceGone):
            await engine.exchange(FLEET, second[1] or "", first[0], grace=1.0)
        with pytest.raises(InstanceGone):
            await engine.exchange(FLEET, ids[0], "nobody", grace=1.0)
        with pytest.raises(InstanceGone):
            await engine.stand_in(FLEET, "nobody", away_from="another-node")
        for id in (first[0], second[0]):
            await accepted(world, partial(engine.discard, FLEET, id))
            await seen.gone(id)
            await engine.discard(FLEET, id)  # already done
        assert sorted(await seen.whole(2)) == ids


@clause
async def clause_9_a_deletion_takes_stand_ins_with_it(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.apply(workload(world, 2))
        old = min(await seen.whole(2))
        await _relocating(world).stand_in(FLEET, old, away_from="another-node")
        await seen.until(lambda: len(seen.instances) == 3)
        await world.backend.delete(FLEET)
        await seen.until(lambda: not seen.instances)


# ------------------------------------------------------------------------------------------------ the end


@clause
async def clause_7_a_deletion_leaves_nothing_and_may_be_repeated(world: WorkloadWorld) -> None:
    async with watching(world) as seen:
        await world.backend.delete(FLEET)
        await world.backend.apply(workload(world, 2))
        await seen.whole(2)
        await world.backend.delete(FLEET)
        await world.backend.delete(FLEET)
        await seen.until(lambda: not seen.instances and seen.ordered is not None and seen.ordered.absent)
        await world.backend.apply(workload(world, 1, 2))
        await seen.whole(1, "2")
        async with anyio.create_task_group() as tasks:  # also all at once
            for _ in range(3):
                tasks.start_soon(world.backend.delete, FLEET)
        await seen.until(lambda: not seen.instances)
