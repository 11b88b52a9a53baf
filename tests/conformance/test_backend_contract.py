"""The contract of `agentfleet.backends.base`, clause by clause, against every registered backend.

Test names start with the clause's number. What a clause says of time is tested by order and by generous deadlines in
the backend's own time, never by speed.
"""

from __future__ import annotations

import anyio
import pytest

from agentfleet.backends.base import Changed, Removed, Snapshot
from agentfleet.errors import BackendRefused, BackendUnavailable, InstanceGone
from agentfleet.instances import Phase

from .harness import FLEET, World, contract

# ------------------------------------------------------------------------------------------------ 1. identity


@contract
async def test_1_the_caller_chooses_id_slot_and_revision(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", slot=4))
        instance = await seen.ready("a")
        assert (instance.id, instance.fleet, instance.slot, instance.revision) == ("a", FLEET, 4, 3)
        assert instance.version == world.harness.template().version
        assert instance.restarts == 0
        assert instance.phase is Phase.RUNNING


@contract
async def test_1_creating_an_existing_id_succeeds_and_changes_nothing(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", slot=1))
        await backend.create(world.creation("a", slot=2))
        before = await seen.ready("a")
        await backend.create(world.creation("a", slot=3))
        await backend.create(world.creation("z", slot=9))  # its arrival shows that the repetition had its chance
        await seen.ready("z")
        assert seen.instances["a"] == before
        assert before.slot == 1


@contract
async def test_1_creating_twice_at_once_makes_one(world: World) -> None:
    async with world.open() as (backend, seen):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(backend.create, world.creation("a"))
        await seen.ready("a")
        async with world.watching(backend) as fresh:
            snapshot = await fresh.next()
        assert isinstance(snapshot, Snapshot)
        assert [i.id for i in snapshot.instances] == ["a"]


# ------------------------------------------------------------------------------------------------ 2. observation


@contract
async def test_2_a_watch_starts_with_a_snapshot_even_of_nothing(world: World) -> None:
    async with world.open() as (_, seen):
        first = await seen.next()
        assert isinstance(first, Snapshot)
        assert first.instances == ()


@contract
async def test_2_a_later_watch_sees_all_that_exists(world: World) -> None:
    async with world.open() as (backend, seen):
        for slot, id in enumerate(("a", "b", "c")):
            await backend.create(world.creation(id, slot=slot))
        for id in ("a", "b", "c"):
            await seen.ready(id)
        async with world.watching(backend) as later:
            first = await later.next()
            assert isinstance(first, Snapshot)
            assert {i.id: i for i in first.instances} == seen.instances


@contract
async def test_2_what_an_earlier_manager_created_is_seen(world: World) -> None:
    if not world.harness.outlives:
        pytest.skip("instances end with this backend")
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", slot=5))
        before = await seen.ready("a")
    async with world.open() as (backend, seen):
        first = await seen.next()
        assert isinstance(first, Snapshot)
        assert [(i.id, i.slot, i.revision, i.started_at) for i in first.instances] == [("a", 5, 3, before.started_at)]
        await backend.stop(FLEET, "a", grace=0)
        await seen.gone("a")


@contract
async def test_2_watches_are_independent_and_see_one_fleet(world: World) -> None:
    async with (
        world.open() as (backend, seen),
        world.watching(backend) as twin,
        world.watching(backend, "other") as other,
    ):
        await backend.create(world.creation("a"))
        await backend.create(world.creation("x", fleet="other"))
        await seen.ready("a")
        await twin.ready("a")
        await other.ready("x")
        assert seen.instances.keys() == twin.instances.keys() == {"a"}
        assert set(other.instances) == {"x"}


@contract
async def test_2_order_respects_each_instances_history(world: World) -> None:
    async with world.open() as (backend, seen):
        ids = [f"i{n}" for n in range(6)]
        for slot, id in enumerate(ids):
            await backend.create(world.creation(id, slot=slot))
        for id in ids:
            await seen.ready(id)
        for id in ids:
            await backend.stop(FLEET, id, grace=5)
        for id in ids:
            await seen.gone(id)
        order = [Phase.PENDING, Phase.RUNNING, Phase.DRAINING]
        for id in ids:
            phases = seen.phases(id)
            assert phases == [phase for phase in order if phase in phases]
            after = [o for o in seen.history if isinstance(o, Changed | Removed)]
            last = [o for o in after if (o.id if isinstance(o, Removed) else o.instance.id) == id][-1]
            assert last == Removed(id)


@contract
async def test_2_after_a_gap_a_new_snapshot_tells_what_was_missed(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await backend.create(world.creation("b", slot=1))
        await seen.ready("a")
        await seen.ready("b")
        if not await world.harness.unplug(backend):
            pytest.skip("this engine has no unreachable state")
        await world.harness.crash(backend, FLEET, "a")
        await world.harness.plug(backend)
        count = len(seen.history)
        await seen.phase("a", Phase.EXITED)
        assert any(isinstance(o, Snapshot) for o in seen.history[count:])
        assert seen.instances["b"].phase is Phase.RUNNING


@contract
async def test_2_closing_one_watch_leaves_the_others(world: World) -> None:
    async with world.open() as (backend, seen):
        async with world.watching(backend) as brief:
            await brief.next()
        await backend.create(world.creation("a"))
        await seen.ready("a")


@contract
async def test_2_the_stream_ends_when_the_backend_is_closed(world: World) -> None:
    ended = False

    async def read() -> None:
        nonlocal ended
        async for _ in stream:
            pass
        ended = True

    async with anyio.create_task_group() as tasks:
        async with world.harness.make() as backend:
            stream = backend.watch(FLEET)
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(world.harness.deadline):
            while not ended:  # noqa: ASYNC110 - polling keeps the clause free of any order of wake-ups
                await anyio.sleep(0.01)


# ------------------------------------------------------------------------------------------------ 3. action


@contract
async def test_3_actions_on_what_does_not_exist(world: World) -> None:
    async with world.open() as (backend, _):
        await backend.stop(FLEET, "nobody", grace=1)
        with pytest.raises(InstanceGone):
            await backend.restart(FLEET, "nobody", grace=1)
        with pytest.raises(InstanceGone):
            await backend.logs(FLEET, "nobody")


@contract
async def test_3_actions_on_what_is_removed(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=0)
        await seen.gone("a")
        await backend.stop(FLEET, "a", grace=0)
        with pytest.raises(InstanceGone):
            await backend.restart(FLEET, "a", grace=0)


@contract
async def test_3_an_unreachable_engine_says_so(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        if not await world.harness.unplug(backend):
            pytest.skip("this engine has no unreachable state")
        with pytest.raises(BackendUnavailable):
            await backend.create(world.creation("b"))
        with pytest.raises(BackendUnavailable):
            await backend.stop(FLEET, "a", grace=0)
        with pytest.raises(BackendUnavailable):
            await backend.restart(FLEET, "a", grace=0)
        with pytest.raises(BackendUnavailable):
            await backend.usage(FLEET)
        await world.harness.plug(backend)
        await backend.create(world.creation("b", slot=1))
        await seen.ready("b")
        assert seen.instances["a"].phase is Phase.RUNNING


@contract
async def test_3_a_refusal_is_typed_and_has_no_effect(world: World) -> None:
    async with world.open() as (backend, seen):
        if not await world.harness.refuse_next(backend):
            pytest.skip("this engine cannot be made to refuse")
        with pytest.raises(BackendRefused):
            await backend.create(world.creation("a"))
        await backend.create(world.creation("b"))
        await seen.ready("b")
        assert set(seen.instances) == {"b"}


@contract
async def test_3_logs_end_with_the_newest_line(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        lines = await backend.logs(FLEET, "a", lines=5)
        assert len(lines) <= 5
        assert not any("\n" in line for line in lines)


@contract
async def test_3_usage_covers_only_the_fleets_instances(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await backend.create(world.creation("x", fleet="other"))
        await seen.ready("a")
        used = await backend.usage(FLEET)
        assert set(used) <= {"a"}
        assert all(u.cpu >= 0 and u.memory >= 0 and u.window >= 0 for u in used.values())


# ------------------------------------------------------------------------------------------------ 4. stop


@contract
async def test_4_stop_drains_and_then_removes(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=30)
        draining = await seen.phase("a", Phase.DRAINING)
        assert not draining.ready
        await seen.gone("a")
        assert Phase.EXITED not in seen.phases("a")


@contract
async def test_4_grace_ends_in_the_kill(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.stubborn()))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=0.5)
        await seen.phase("a", Phase.DRAINING)
        await seen.gone("a")


@contract
async def test_4_no_grace_kills_at_once(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.stubborn()))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=0)
        await seen.gone("a")


@contract
async def test_4_a_repeated_stop_can_only_hasten_the_end(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.stubborn()))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=10 * world.harness.deadline)
        await seen.phase("a", Phase.DRAINING)
        await backend.stop(FLEET, "a", grace=0)
        await backend.stop(FLEET, "a", grace=10 * world.harness.deadline)
        await seen.gone("a")


@contract
async def test_4_stop_works_before_the_start_and_after_the_exit(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("young"))
        await backend.stop(FLEET, "young", grace=1)
        await backend.create(world.creation("old", slot=1, template=world.harness.exiting(0)))
        await seen.phase("old", Phase.EXITED)
        await backend.stop(FLEET, "old", grace=1)
        await seen.gone("old")
        async with world.watching(backend) as fresh:
            await fresh.until(lambda: fresh.instances == {})


# ------------------------------------------------------------------------------------------------ 5. restart


@contract
async def test_5_restart_keeps_the_identity(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", slot=2))
        before = await seen.ready("a")
        await backend.restart(FLEET, "a", grace=5)
        after = await seen.ready("a", restarts=1)
        assert (after.id, after.slot, after.revision, after.version, after.created_at, after.fleet) == (
            before.id,
            before.slot,
            before.revision,
            before.version,
            before.created_at,
            before.fleet,
        )
        assert before.started_at is not None
        assert after.started_at is not None
        assert after.started_at >= before.started_at
        assert "a" not in seen.removed


@contract
async def test_5_restart_works_on_the_exited(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        code = await world.harness.crash(backend, FLEET, "a")
        assert (await seen.phase("a", Phase.EXITED)).exit_code == code
        await backend.restart(FLEET, "a", grace=5)
        assert (await seen.ready("a", restarts=1)).phase is Phase.RUNNING


@contract
async def test_5_restart_kills_the_stubborn(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.stubborn()))
        await seen.ready("a")
        await backend.restart(FLEET, "a", grace=0.2)
        await seen.ready("a", restarts=1)


@contract
async def test_5_stop_overrides_a_restart(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.stubborn()))
        await seen.ready("a")
        await backend.restart(FLEET, "a", grace=10 * world.harness.deadline)
        await backend.stop(FLEET, "a", grace=0)
        await seen.gone("a")


@contract
async def test_5_stop_ends_a_restart_wherever_it_is(world: World) -> None:
    async with world.open() as (backend, seen):
        for turns in (0, 1, 2, 3, 5, 8, 13, 21):
            id = f"after-{turns}"
            await backend.create(world.creation(id, template=world.harness.stubborn()))
            await seen.ready(id)
            await backend.restart(FLEET, id, grace=0)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            await backend.stop(FLEET, id, grace=0)
            await seen.gone(id)


# ------------------------------------------------------------------------------------------------ 6. exit


@contract
async def test_6_an_exit_is_reported_with_its_code_and_left_alone(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.exiting(3)))
        exited = await seen.phase("a", Phase.EXITED)
        assert exited.exit_code == 3
        assert not exited.ready
        await backend.create(world.creation("z", slot=1))
        await seen.ready("z")  # time has passed, and
        assert seen.instances["a"].phase is Phase.EXITED
        assert seen.instances["a"].restarts == 0


@contract
async def test_6_exit_zero_is_an_exit_too(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a", template=world.harness.exiting(0)))
        assert (await seen.phase("a", Phase.EXITED)).exit_code == 0


@contract
async def test_6_a_kill_from_outside_is_reported(world: World) -> None:
    async with world.open() as (backend, seen):
        await backend.create(world.creation("a"))
        await seen.ready("a")
        code = await world.harness.crash(backend, FLEET, "a")
        exited = await seen.phase("a", Phase.EXITED)
        assert exited.exit_code == code
        assert "a" not in seen.removed


# ------------------------------------------------------------------------------------------------ 7. leaving


@contract
async def test_7_leaving_with_everything_going_on_leaves_nothing(world: World) -> None:
    async with world.open() as (backend, seen):
        for slot, id in enumerate(("a", "b", "c", "d")):
            await backend.create(world.creation(id, slot=slot))
        await seen.ready("a")
        await backend.stop(FLEET, "a", grace=30)
        await backend.restart(FLEET, "b", grace=30)
        # what is left is checked by the harness once the loop has ended


@contract
async def test_7_cancellation_leaves_nothing(world: World) -> None:
    async def manage() -> None:
        async with world.open() as (backend, seen):
            for slot in range(4):
                await backend.create(world.creation(f"i{slot}", slot=slot))
            await seen.ready("i0")
            running.set()
            await seen.until(lambda: False)

    running = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manage)
        with anyio.fail_after(world.harness.deadline):
            await running.wait()
        tasks.cancel_scope.cancel()


@contract
async def test_7_an_error_inside_passes_through(world: World) -> None:
    async def fail() -> None:
        async with world.open() as (backend, _):
            await backend.create(world.creation("a"))
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await fail()
