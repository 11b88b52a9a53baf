"""Specs that the cluster cannot carry out: the rollout stops at its budget, says why, and going back heals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, on, until
from tests.kube.world import spec

from agentfleet import Fleet, FleetSpec, RolloutFailed, RolloutPolicy
from agentfleet.testing.kube import ControlPlane
from agentfleet.testing.kube.behaviour import Behaviour

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NOWHERE = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "moon", "operator": "Exists"}]}]
        }
    }
}
WRONG: Mapping[str, Mapping[str, Any]] = {
    "node selector": {"node_selector": {"moon": "yes"}},
    "service account": {"service_account": "nobody"},
    "priority class": {"priority_class": "nothing"},
    "image": {"image": "agent:missing"},
}
"""Options that the API server takes, and that no pod can be made or started with."""


def patient(**more: object) -> FleetSpec:
    """A fleet whose rollouts fail after a few seconds without progress, and stay as they are."""
    return spec(SIZE, rollout=RolloutPolicy(progress_deadline=6.0, **more))  # type: ignore[arg-type]


def changed(wanted: FleetSpec, **options: Any) -> FleetSpec:
    """The same fleet with other options."""
    assert wanted.template.kubernetes is not None
    kubernetes = wanted.template.kubernetes.replace(**options)
    return wanted.replace(template=wanted.template.replace(kubernetes=kubernetes))


async def stops_and_returns(there: Faulty, options: Mapping[str, Any]) -> None:
    """An upgrade to such options fails within the budget, and the fleet ends as it was."""
    await there.kubelet.image("agent:missing", Behaviour(pull=None))
    async with there.fleet(patient()) as fleet:
        await fleet.deploy(timeout=60)
        template = changed(patient(), **options).template
        before = await there.outcome()
        there.pods.begin()
        with pytest.raises(RolloutFailed, match="no progress"):
            await fleet.upgrade(kubernetes=template.kubernetes, timeout=90)
        await fleet.ready(timeout=60)
        state = await there.outcome()
        assert there.pods.least >= LEAST
        assert state.end.template == before.end.template
        assert (state.end.sizes, state.end.ready) == ((SIZE,), SIZE)
        assert state.created - before.created <= 2 * 4, "surge and what was unavailable, there and back"


@pytest.mark.parametrize("what", WRONG)
def test_a_spec_that_no_pod_can_be_made_of_stops_at_the_budget_and_is_undone(plane: ControlPlane, what: str) -> None:
    """Scenario 24: no more than the budget is touched, and the fleet goes back by itself to what it was."""

    async def test(there: Faulty) -> None:
        await stops_and_returns(there, WRONG[what])

    on(plane, test)


@pytest.mark.xfail(strict=True, reason="the server keeps an empty affinity: the way back makes new pods")
def test_an_affinity_that_no_node_satisfies_leaves_no_trace(plane: ControlPlane) -> None:
    """Scenario 24: as the others."""

    async def test(there: Faulty) -> None:
        await stops_and_returns(there, {"affinity": NOWHERE})

    on(plane, test)


def test_reverting_the_spec_by_hand_heals_too(plane: ControlPlane) -> None:
    """Scenarios 24, 26: nothing is rolled back by itself; deploying the spec from before is enough."""

    async def test(there: Faulty) -> None:
        good = patient(auto_rollback=False)
        async with there.fleet(good) as fleet:
            await fleet.deploy(timeout=60)
        there.pods.begin()
        async with there.fleet(changed(good, affinity=NOWHERE)) as fleet:
            with pytest.raises(RolloutFailed):
                await fleet.deploy(timeout=60)
        async with there.fleet(good) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.status()["good"] == SIZE
        assert there.pods.least >= LEAST
        state = await there.outcome()
        assert (state.end.sizes, state.end.ready) == ((SIZE,), SIZE)

    on(plane, test)


def test_a_field_that_cannot_change_is_refused_by_name_and_harms_nobody(plane: ControlPlane) -> None:
    """Scenarios 25, 26: another selector is refused by the server; the instances stay, and reverting is enough."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
        there.pods.begin()
        async with there.fleet(changed(spec(SIZE), selector={"app": "other"})) as fleet:
            await fleet.deploy(wait=False)
            await until(lambda: bool(there.events("action.failed")))
            (failed, *_) = there.events("action.failed")
            assert "selector" in str(failed.data)
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.status()["good"] == SIZE
            await fleet.upgrade("2", timeout=60)
        assert there.pods.least >= LEAST
        assert len(there.pods.created) <= 3 * SIZE

    on(plane, test)


def test_of_two_specs_in_one_second_one_wins_whole(plane: ControlPlane) -> None:
    """Scenario 26: two upgrades at once, with another size: the last one is what runs, and nothing is half."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()

            async def lose(fleet: Fleet) -> None:
                with pytest.raises(RolloutFailed, match="another revision"):
                    await fleet.upgrade("2", timeout=60)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lose, fleet)
                await anyio.sleep(0.2)
                await fleet.upgrade("3", timeout=60)
            await until(lambda: {each.version for each in fleet.instances} == {"3"})
            await fleet.ready(timeout=60)
            assert there.pods.least >= LEAST
            assert len((await there.objects("deployments"))["deployments"]) == 1

    on(plane, test)
