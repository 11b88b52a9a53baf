"""Managers that end between two writes: the next one, on the same journal, finishes what was begun, once."""

from __future__ import annotations

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, on, until, upgraded
from tests.kube.oracle import end_state
from tests.kube.world import spec

from agentfleet import Fleet, FleetSpec
from agentfleet.kubespec import ConfigFiles
from agentfleet.testing.kube import ControlPlane, Reset

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MOST_WRITES = 40
"""More than any order of a fleet takes: the end of each loop below is that there is no such write."""


def configured() -> FleetSpec:
    """A fleet that has every object that a fleet may have, a ConfigMap too."""
    made = spec(SIZE)
    assert made.template.kubernetes is not None
    options = made.template.kubernetes.replace(config=ConfigFiles(files={"agent.ini": "a = 1"}))
    return made.replace(template=made.template.replace(kubernetes=options))


async def all_run(fleet: Fleet, version: str) -> None:
    """A rollout is over, and all instances are of that version and good."""

    def over() -> bool:
        versions = {instance.version for instance in fleet.instances}
        assert fleet.state is not None
        return versions == {version} and not fleet.state.rolling and fleet.status()["good"] == SIZE

    await until(over)


async def gone(there: Faulty) -> None:
    """Nothing of a fleet is left."""
    with anyio.fail_after(60):
        while any((await end_state(there.plane, there.namespace)).owned.values()):  # noqa: ASYNC110 - as `until`
            await anyio.sleep(0.1)


def test_a_deploy_that_ends_at_any_write_is_finished_by_the_next_manager(plane: ControlPlane) -> None:
    """Scenarios 1, 2, 6, 7: no pod twice, no object missing, the ConfigMap there before pods that need it."""

    async def deploy(fleet: Fleet) -> None:
        await fleet.deploy(timeout=60)

    async def test(there: Faulty) -> None:
        for write in range(1, MOST_WRITES):
            before = len(there.pods.created)
            struck = await there.crash(configured(), deploy, write=write)
            if struck:
                found = await there.objects("configmaps", "deployments")
                assert "agents" not in found["deployments"] or any("agents" in name for name in found["configmaps"])
            async with there.fleet(configured()) as fleet:
                await fleet.deploy(timeout=60)
                await until(lambda: len(there.pods.good) == SIZE)
                state = await end_state(there.plane, there.namespace)
                assert state.owned == dict.fromkeys(state.owned, 1) | {"pods": SIZE, "horizontalpodautoscalers": 0}
                assert len(there.pods.created) - before == SIZE
                await fleet.delete(timeout=60)
            await gone(there)
            if not struck:
                assert write > 3
                return
        raise AssertionError("it never ends")

    on(plane, test)


def test_an_upgrade_and_a_rollback_that_end_at_any_write_are_finished(plane: ControlPlane) -> None:
    """Scenarios 2, 3, 4, 7: each pod is replaced once, within the budget; one revision wins."""

    async def test(there: Faulty) -> None:
        async with there.fleet(configured()) as fleet:
            await fleet.deploy(timeout=60)
        there.pods.begin()
        turns = 1
        for write in range(1, MOST_WRITES):
            version = str(write + 1)

            async def upgrade(fleet: Fleet, version: str = version) -> None:
                await fleet.upgrade(version, timeout=60)

            async def rollback(fleet: Fleet) -> None:
                await fleet.rollback(timeout=60)

            struck = await there.crash(configured(), upgrade, write=write)
            async with there.fleet(configured()) as fleet:
                await all_run(fleet, version)
            back = await there.crash(configured(), rollback, write=write)
            async with there.fleet(configured()) as fleet:
                await all_run(fleet, "1")
            turns += 2
            assert len(there.pods.created) == SIZE * turns
            assert there.pods.least >= LEAST
            if not struck and not back:
                assert write > 3
                return
        raise AssertionError("it never ends")

    on(plane, test)


def test_a_deletion_that_ends_at_any_write_leaves_nothing(plane: ControlPlane) -> None:
    """Scenarios 5, 7, 11: the next manager deletes the rest, and nothing comes back."""

    async def delete(fleet: Fleet) -> None:
        await fleet.delete(timeout=60)

    async def test(there: Faulty) -> None:
        for write in range(1, MOST_WRITES):
            async with there.fleet(configured()) as fleet:
                await fleet.deploy(timeout=60)
            made = len(there.pods.created)
            struck = await there.crash(configured(), delete, write=write)
            async with there.fleet(configured()) as fleet:
                await fleet.delete(timeout=60)
            await gone(there)
            assert len(there.pods.created) == made
            if not struck:
                assert write > 2
                return
        raise AssertionError("it never ends")

    on(plane, test)


def test_a_manager_that_ends_amid_a_rollout_is_not_missed(plane: ControlPlane) -> None:
    """Scenarios 1, 3: half of the pods are new when it ends; the end and its cost are those of an unbroken rollout."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            await fleet.upgrade("2", wait=False)
            await until(lambda: len(there.pods.created) > SIZE)
        async with there.fleet(spec(SIZE)) as fleet:
            await there.ends_as_without_faults()
            await all_run(fleet, "2")
        assert there.pods.least >= LEAST

    on(plane, test, like=upgraded)


def test_a_write_whose_answer_is_lost_is_done_once(plane: ControlPlane) -> None:
    """Scenario 7: every answer of a whole order is lost after the server has carried it out; no pod is made twice."""

    async def test(there: Faulty) -> None:
        async def lose(fleet: Fleet) -> None:
            del fleet
            there.proxy.inject(Reset(done=True), method="PATCH", times=6)

        await upgraded(there, lose)
        await there.ends_as_without_faults()
        assert there.pods.least >= LEAST

    on(plane, test, like=upgraded)
