"""Fleets on a real API server: what users do, what clusters do to them, and what others do behind their back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.world import Cluster, cluster, spec

from agentfleet import RolloutFailed, RolloutPolicy
from agentfleet.testing.kube import ControlPlane
from agentfleet.testing.kube.behaviour import Behaviour

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def plane(mortal_plane: ControlPlane) -> ControlPlane:
    """The control plane that may be hurt."""
    return mortal_plane


def on(plane: ControlPlane, test: Callable[[Cluster], Awaitable[None]], *, nodes: int = 3) -> None:
    """Run a test in a namespace of its own, within three minutes."""

    async def run() -> None:
        with anyio.fail_after(180):
            async with cluster(plane, nodes=nodes) as there:
                await test(there)

    anyio.run(run)


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that only the cluster can bring about."""
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.05)


def test_a_fleet_lives_on_a_cluster(plane: ControlPlane) -> None:
    """Deploy, scale, upgrade, roll back, stop, start, delete; and nothing is left behind."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(12)) as fleet:
            await fleet.deploy(timeout=60)
            assert sorted(member.instance.slot for member in fleet.view.members.values()) == list(range(12))
            await fleet.scale(20)
            await fleet.ready(timeout=60)
            assert fleet.status()["good"] == 20
            await fleet.upgrade(version="2", timeout=120)
            await until(lambda: {instance.version for instance in fleet.instances} == {"2"})
            await fleet.rollback(timeout=120)
            await until(lambda: {instance.revision for instance in fleet.instances} == {1})
            await fleet.stop(timeout=60)
            assert fleet.status()["desired"] == 0
            await fleet.start(timeout=60)
            assert fleet.status()["good"] == 20
            native = await there.objects("replicasets")
            assert len(native["replicasets"]) == 2, "a rollback goes to the old ReplicaSet, not to a third"
            await fleet.delete(timeout=60)
        with anyio.fail_after(30):
            while True:
                left = await there.objects("deployments", "replicasets", "services", "poddisruptionbudgets", "pods")
                if not any(left.values()):
                    break
                await anyio.sleep(0.1)

    on(plane, test)


def test_no_busy_instance_dies_in_a_scale_down(plane: ControlPlane) -> None:
    """Half of a fleet goes, and it is the idle half, also on a server that knows no deletion cost."""

    async def test(there: Cluster) -> None:
        await there.kubelet.image("agent:*", Behaviour(start=3.0))  # longer than a scale-down takes
        async with there.fleet(spec(24)) as fleet:
            await fleet.deploy(timeout=60)
            busy = set(there.pods_of(fleet)[::2])
            await there.kubelet.busy(*busy)
            await until(lambda: fleet.status()["busy"] == 12)
            await fleet.scale(12)
            await until(lambda: len(fleet.instances) == 12 and fleet.status()["good"] == 12)
            assert set(there.pods_of(fleet)) == busy
            assert not await there.kubelet.killed_busy()

    on(plane, test)


def test_a_bad_image_is_stopped_within_its_budget_and_rolled_back(plane: ControlPlane) -> None:
    """An image that never arrives: no more than surge and unavailability are touched, and the user is told."""

    async def test(there: Cluster) -> None:
        await there.kubelet.image("agent:9", Behaviour(pull=None))
        policy = RolloutPolicy(progress_deadline=8.0, max_surge="25%", max_unavailable="25%")
        async with there.fleet(spec(12, rollout=policy)) as fleet:
            await fleet.deploy(timeout=60)
            least = 12

            async def watch() -> None:
                nonlocal least
                while True:
                    least = min(least, fleet.status()["good"])
                    await anyio.sleep(0.02)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                with pytest.raises(RolloutFailed, match="no progress"):
                    await fleet.upgrade(version="9", timeout=120)
                await fleet.ready(timeout=60)
                tasks.cancel_scope.cancel()
            assert least >= 9
            await until(lambda: {instance.version for instance in fleet.instances} == {"1"})

    on(plane, test)


def test_a_crashed_pod_is_seen_and_a_crash_loop_is_replaced(plane: ControlPlane) -> None:
    """What the kubelet restarts is left to it; what it restarts in vain is replaced."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(6)) as fleet:
            await fleet.deploy(timeout=60)
            victim = fleet.instances[0]
            await there.kubelet.crash_loop(f"{there.namespace}/{victim.id}")
            await until(lambda: victim.id not in fleet.view.members)
            await fleet.ready(timeout=60)
            assert there.events("instance.exited")
            assert there.events("instance.recovered")

    on(plane, test)


def test_a_lost_node_is_known_before_the_control_plane_says_so(plane: ControlPlane) -> None:
    """Its pods are lost within 20 s of the last heartbeat, and get no more work."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(9)) as fleet:
            await fleet.deploy(timeout=60)
            node = fleet.instances[0].node
            assert node is not None
            there_before = {instance.id for instance in fleet.instances if instance.node == node}
            gone_at = anyio.current_time()
            await there.kubelet.node_gone(node, answering=True)
            await until(lambda: bool(there.events("instance.lost")), 40)
            assert anyio.current_time() - gone_at < 20
            assert not {member.instance.id for member in fleet.view.serving()} & there_before

    on(plane, test, nodes=4)


def test_somebody_elses_scale_is_adopted_and_explained(plane: ControlPlane) -> None:
    """`kubectl scale` is an operator's word: it holds, and the journal says whose it was."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(4)) as fleet:
            await fleet.deploy(timeout=60)
            path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents/scale"
            await anyio.sleep(1.1)  # the server dates writers in whole seconds
            await there.plane.api.patch(f"{path}?fieldManager=kubectl", {"spec": {"replicas": 7}})
            await until(lambda: fleet.status()["desired"] == 7)
            await fleet.ready(timeout=60)
            (seen,) = there.events("fleet.foreign_change")
            assert seen.data["what"] == "scaled"
            assert seen.data["by"] in {"kubectl", "somebody else"}, "servers before 1.22 do not say who used scale"
            await anyio.sleep(2)
            deployment = await there.plane.api.get(path)
            assert deployment["spec"]["replicas"] == 7

    on(plane, test)


def test_the_next_manager_takes_over_without_a_twitch(plane: ControlPlane) -> None:
    """A new manager finds its fleet and writes nothing."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(5)) as fleet:
            await fleet.deploy(timeout=60)
            known = set(there.pods_of(fleet))
        writes = there.connection.traffic.writes
        async with there.fleet(spec(5)) as fleet:
            await fleet.ready(timeout=60)
            await anyio.sleep(3)
            assert set(there.pods_of(fleet)) == known
            assert there.connection.traffic.writes - writes <= 3, "at most one apply of its own objects"

    on(plane, test)


def test_the_api_server_is_killed_in_the_middle_of_a_rollout(plane: ControlPlane) -> None:
    """Kill -9 and a restart ten seconds later: the rollout goes on to its end."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(10)) as fleet:
            await fleet.deploy(timeout=60)
            await fleet.upgrade(version="2", wait=False)
            await anyio.sleep(0.3)
            there.plane.kill_apiserver()
            await anyio.sleep(5)
            good = fleet.status()["good"]
            assert good >= 7, "a silent server shrinks nothing"
            await there.plane.restart_apiserver()
            await until(
                lambda: {instance.version for instance in fleet.instances} == {"2"} and fleet.status()["good"] == 10, 90
            )

    on(plane, test)
