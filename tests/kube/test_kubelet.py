"""Fake nodes on a real control plane: what a real kubelet would show, they show."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.kube.kube_objects import condition, container, deployment, ready

from agentfleet.errors import BackendRefused, DeadlineExceeded, InstanceGone, SpecError
from agentfleet.signals.http import HttpClient, HttpError
from agentfleet.testing.kube import (
    Behaviour,
    ControlPlane,
    FakeKubelet,
    KubeletOptions,
    KubeletProcess,
    NodeFaults,
    PodSeen,
    Timing,
)

pytestmark = [pytest.mark.anyio, pytest.mark.integration, pytest.mark.slow]
QUICK = Timing(restart=0.2, backoff=0.5, backoff_cap=5, pull_backoff=0.3)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def nodes(plane: ControlPlane) -> AsyncIterator[FakeKubelet]:
    """Four nodes in this process."""
    options = KubeletOptions(nodes=4, prefix=f"n-{secrets.token_hex(3)}", timing=QUICK, lease_period=2)
    async with FakeKubelet(plane.access, options) as kubelet:
        yield kubelet


class World:
    """A namespace for one Deployment."""

    def __init__(self, plane: ControlPlane, namespace: str, nodes: FakeKubelet) -> None:
        self.plane = plane
        self.namespace = namespace
        self._nodes = nodes
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        self.deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"

    async def deploy(self, replicas: int, *, wait: bool = True, **more: Any) -> None:
        await self.plane.api.post(self.deployments, deployment("agents", replicas, **more))
        if wait:
            await self.plane.api.wait(f"{self.deployments}/agents", ready(replicas), timeout=60)

    async def named(self) -> list[str]:
        return [each["metadata"]["name"] for each in (await self.plane.api.get(self.pods))["items"]]

    async def until(self, pod: str, holds: Any, timeout: float = 30) -> Any:
        return await self.plane.api.wait(f"{self.pods}/{pod}", holds, timeout=timeout)

    async def on_nodes(self) -> list[PodSeen]:
        """Its pods, as their nodes see them."""
        return [pod for pod in await self._nodes.pods() if pod.name.startswith(f"{self.namespace}/")]

    def full(self, pod: str) -> str:
        return f"{self.namespace}/{pod}"


@pytest.fixture
async def world(plane: ControlPlane, nodes: FakeKubelet) -> AsyncIterator[World]:
    made = World(plane, await plane.namespace(), nodes)
    yield made
    await plane.api.delete(made.deployments)  # or its pods would settle on the next test's nodes
    await plane.api.delete(made.pods)
    await plane.api.wait(made.pods, lambda pods: not pods["items"])


async def ask(pod: PodSeen, path: str, timeout: float = 5) -> int:
    async with HttpClient() as client:
        answer = await client.request("GET", f"{pod.address}:{pod.ports[0]}", path, timeout=timeout)
        return answer.status


async def seen(nodes: NodeFaults, name: str) -> PodSeen:
    (found,) = [each for each in await nodes.pods() if each.name == name]
    return found


# ------------------------------------------------------------------------------------------------ all is well


async def test_a_deployment_of_50_becomes_ready_in_a_process_of_its_own(plane: ControlPlane) -> None:
    namespace = await plane.namespace()
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    async with KubeletProcess(plane.access, KubeletOptions(nodes=20, prefix="own")) as nodes:
        begun = time.monotonic()
        await plane.api.post(path, deployment("agents", 50))
        await plane.api.wait(f"{path}/agents", ready(50), timeout=60)
        print(f"50 pods ready after {time.monotonic() - begun:.1f} s")
        pods = [pod for pod in await nodes.pods() if pod.name.startswith(f"{namespace}/")]
        assert len({pod.address for pod in pods}) == 50
        assert len({pod.node for pod in pods}) > 10
        for pod in pods:
            assert await ask(pod, "/health") == await ask(pod, "/status") == 200
        with pytest.raises(InstanceGone, match="namespace/name"):
            await nodes.crash("nobody")
        with pytest.raises(SpecError, match="know no command"):
            await nodes._do("dance", {})
        assert (await nodes.cost())["patches"] == 50
    left = [each["metadata"]["name"] for each in (await plane.api.get("/api/v1/nodes"))["items"]]
    assert not [name for name in left if name.startswith("own-")]


async def test_nodes_look_like_nodes(plane: ControlPlane, nodes: FakeKubelet) -> None:
    name = f"{nodes.options.prefix}-1"
    node = await plane.api.wait(f"/api/v1/nodes/{name}", lambda node: condition(node, "Ready")["status"] == "True")
    assert node["metadata"]["labels"]["topology.kubernetes.io/zone"] == "zone-b"
    assert node["status"]["allocatable"]["pods"] == "110"
    lease = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}"
    first = (await plane.api.get(lease))["spec"]["renewTime"]
    await plane.api.wait(lease, lambda lease: lease["spec"]["renewTime"] > first)


async def test_readiness_gates_are_respected(world: World) -> None:
    await world.deploy(1, wait=False, readinessGates=[{"conditionType": "example.com/gate"}])
    await world.plane.api.wait(world.pods, lambda pods: len(pods["items"]) == 1)
    (pod,) = await world.named()
    shown = await world.until(pod, lambda pod: condition(pod, "ContainersReady").get("status") == "True")
    assert condition(shown, "Ready")["status"] == "False"
    assert condition(shown, "Ready")["reason"] == "ReadinessGatesNotReady"
    for status in ("True", "False"):
        gate = {"status": {"conditions": [{"type": "example.com/gate", "status": status}]}}
        await world.plane.api.patch(f"{world.pods}/{pod}/status", gate, kind="application/strategic-merge-patch+json")
        shown = await world.until(pod, lambda pod, status=status: condition(pod, "Ready")["status"] == status)
        assert condition(shown, "example.com/gate")["status"] == status


async def test_a_slow_start_and_one_that_never_ends(world: World, nodes: FakeKubelet) -> None:
    await nodes.image("slow:*", Behaviour(start=1, ready=1))
    await nodes.image("never:*", Behaviour(ready=None))
    await world.deploy(1, wait=False, image="slow:1")
    await world.plane.api.wait(world.pods, lambda pods: len(pods["items"]) == 1)
    (pod,) = await world.named()
    shown = await world.until(pod, container)
    assert shown["status"]["phase"] == "Pending"
    assert container(shown)["state"]["waiting"]["reason"] == "ContainerCreating"
    shown = await world.until(pod, lambda pod: "running" in container(pod)["state"])
    assert shown["status"]["phase"] == "Running"
    assert condition(shown, "Ready")["status"] == "False"
    await world.until(pod, lambda pod: condition(pod, "Ready")["status"] == "True")
    template = deployment("agents", 1, image="never:1")["spec"]["template"]
    await world.plane.api.patch(f"{world.deployments}/agents", {"spec": {"template": template}})
    await world.plane.api.wait(world.pods, lambda pods: len(pods["items"]) == 2)
    (newer,) = set(await world.named()) - {pod}
    shown = await world.until(newer, lambda pod: "running" in container(pod).get("state", {}))
    assert condition(shown, "Ready")["reason"] == "ContainersNotReady"


async def test_a_deleted_pod_works_to_its_end_or_to_that_of_its_grace(world: World, nodes: FakeKubelet) -> None:
    await world.deploy(3, terminationGracePeriodSeconds=6)
    idle, finishing, endless = await world.named()
    await nodes.busy(world.full(finishing), world.full(endless))
    for pod in (idle, finishing, endless):
        await world.plane.api.delete(f"{world.pods}/{pod}")
    await world.until(idle, lambda pod: pod is None)
    assert await ask(await seen(nodes, world.full(finishing)), "/ready") == 503
    assert (await seen(nodes, world.full(finishing))).in_flight == 1
    await nodes.busy(world.full(finishing), in_flight=0)
    await world.until(finishing, lambda pod: pod is None, timeout=5.9)
    await world.until(endless, lambda pod: pod is None)
    assert await nodes.killed_busy() == [world.full(endless)]
    assert await nodes.problems() == []


# ------------------------------------------------------------------------------------------------ pods fail


async def test_a_crash_is_restarted_and_a_loop_is_backed_off(world: World, nodes: FakeKubelet) -> None:
    await world.deploy(2)
    crashing, looping = await world.named()
    before = await seen(nodes, world.full(crashing))
    await nodes.oom(world.full(crashing))
    with pytest.raises(HttpError):
        await ask(before, "/health")
    shown = await world.until(crashing, lambda pod: container(pod)["restartCount"] == 1 and container(pod)["ready"])
    assert container(shown)["lastState"]["terminated"]["exitCode"] == 137
    assert container(shown)["lastState"]["terminated"]["reason"] == "OOMKilled"
    assert shown["status"]["phase"] == "Running"
    assert await ask(await seen(nodes, world.full(crashing)), "/health") == 200

    await nodes.crash_loop(world.full(looping), exit_code=3)
    shown = await world.until(
        looping, lambda pod: container(pod)["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff"
    )
    assert container(shown)["lastState"]["terminated"]["exitCode"] == 3
    assert condition(shown, "Ready")["status"] == "False"
    assert shown["status"]["phase"] == "Running"
    events = f"/api/v1/namespaces/{world.namespace}/events?fieldSelector=involvedObject.name={looping}"
    await world.plane.api.wait(events, lambda events: any(each["reason"] == "BackOff" for each in events["items"]))
    await nodes.heal(world.full(looping))
    shown = await world.until(looping, lambda pod: condition(pod, "Ready")["status"] == "True")
    assert container(shown)["restartCount"] >= 2


async def test_an_image_that_never_arrives(world: World, nodes: FakeKubelet) -> None:
    await nodes.image("*:bad", Behaviour(pull=None))
    await world.deploy(1, wait=False, image="agent:bad")
    await world.plane.api.wait(world.pods, lambda pods: len(pods["items"]) == 1)
    (pod,) = await world.named()

    def waits(reason: str) -> Any:
        return lambda pod: container(pod).get("state", {}).get("waiting", {}).get("reason") == reason

    await world.until(pod, waits("ErrImagePull"))
    shown = await world.until(pod, waits("ImagePullBackOff"))
    assert shown["status"]["phase"] == "Pending"
    assert "agent:bad" in container(shown)["state"]["waiting"]["message"]
    await nodes.image("*:bad", None)
    await world.until(pod, lambda pod: condition(pod, "Ready")["status"] == "True")


async def test_sick_hung_and_unready_pods(world: World, nodes: FakeKubelet) -> None:
    await world.deploy(3)
    sick, hung, unready = await world.named()
    await nodes.sick(world.full(sick))
    await nodes.hang(world.full(hung))
    await nodes.unready(world.full(unready))
    assert await ask(await seen(nodes, world.full(sick)), "/health") == 503
    with pytest.raises(DeadlineExceeded):
        await ask(await seen(nodes, world.full(hung)), "/health", timeout=0.3)
    await world.until(unready, lambda pod: condition(pod, "Ready")["status"] == "False")
    await nodes.heal(*(world.full(each) for each in (sick, hung, unready)))
    await world.until(unready, lambda pod: condition(pod, "Ready")["status"] == "True")
    for pod in (sick, hung, unready):
        assert await ask(await seen(nodes, world.full(pod)), "/health") == 200


def needing(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Fields of a pod with a container that has a variable of each source, and one that just runs."""
    env = [{"name": f"V{index}", "valueFrom": source} for index, source in enumerate(sources)]
    agent = {"name": "agent", "image": "agent:1", "env": env, **more}
    return {"containers": [agent, {"name": "beside", "image": "beside:1"}]}


async def test_a_container_waits_for_the_secret_that_its_variables_come_from(world: World) -> None:
    """Looked up at the API server: missing, there without the key, there; what is optional is not waited for."""
    api, base = world.plane.api, f"/api/v1/namespaces/{world.namespace}"
    key = {"secretKeyRef": {"name": "login", "key": "password"}}
    optional = {"configMapKeyRef": {"name": "nobody", "key": "nothing", "optional": True}}
    await world.deploy(1, wait=False, **needing(key, optional, envFrom=[{"configMapRef": {"name": "words"}}]))
    await api.wait(world.pods, lambda pods: len(pods["items"]) == 1)
    (pod,) = await world.named()

    def waits(message: str) -> Any:
        told = {"reason": "CreateContainerConfigError", "message": message}
        return lambda pod: container(pod).get("state", {}).get("waiting") == told

    shown = await world.until(pod, waits('configmap "words" not found'))
    assert (shown["status"]["phase"], condition(shown, "Ready")["status"]) == ("Pending", "False")
    assert shown["status"]["containerStatuses"][1]["state"] == {"waiting": {"reason": "ContainerCreating"}}
    await api.post(f"{base}/configmaps", {"metadata": {"name": "words"}})
    await world.until(pod, waits('secret "login" not found'))
    await api.post(f"{base}/secrets", {"metadata": {"name": "login"}})
    await world.until(pod, waits(f"couldn't find key password in Secret {world.namespace}/login"))
    await api.patch(f"{base}/secrets/login", {"stringData": {"password": "x"}})
    shown = await world.until(pod, lambda pod: condition(pod, "Ready")["status"] == "True")
    assert container(shown)["restartCount"] == 0
    events = await api.get(f"{base}/events?fieldSelector=involvedObject.name={pod},reason=Failed")
    assert 'Error: secret "login" not found' in {each["message"] for each in events["items"]}


async def test_a_container_that_restarts_needs_its_secret_anew(world: World, nodes: FakeKubelet) -> None:
    api, secrets = world.plane.api, f"/api/v1/namespaces/{world.namespace}/secrets"
    await api.post(secrets, {"metadata": {"name": "login"}, "stringData": {"password": "x"}})
    await world.deploy(2, **needing({"secretKeyRef": {"name": "login", "key": "password"}}))
    crashed, deleted = await world.named()
    await api.delete(f"{secrets}/login")
    await nodes.crash(world.full(crashed), world.full(deleted))
    for pod in (crashed, deleted):
        shown = await world.until(pod, lambda pod: "CreateContainerConfigError" in str(container(pod)["state"]))
        assert container(shown)["lastState"]["terminated"]["exitCode"] == 1
    await api.delete(f"{world.pods}/{deleted}")
    await world.until(deleted, lambda pod: pod is None)
    await api.post(secrets, {"metadata": {"name": "login"}, "stringData": {"password": "x"}})
    await world.until(crashed, lambda pod: condition(pod, "Ready")["status"] == "True")


# ------------------------------------------------------------------------------------------------ nodes fail


async def test_a_lost_node_comes_back_with_its_old_pods(world: World, nodes: FakeKubelet) -> None:
    await world.deploy(8)
    before = await world.on_nodes()
    node = before[0].node
    stranded = [pod for pod in before if pod.node == node]
    begun = time.monotonic()
    await nodes.node_gone(node)
    api = world.plane.api
    await api.wait(f"/api/v1/nodes/{node}", lambda node: condition(node, "Ready")["status"] == "Unknown", timeout=60)
    print(f"node Unknown after {time.monotonic() - begun:.1f} s")
    old = stranded[0].name.partition("/")[2]
    shown = await world.until(old, lambda pod: "deletionTimestamp" in pod["metadata"], timeout=60)
    assert condition(shown, "Ready")["status"] == "False"
    await api.wait(f"{world.deployments}/agents", ready(8), timeout=60)
    assert await ask(stranded[0], "/health") == 200  # it runs on, unseen
    await nodes.node_back(node)
    for pod in stranded:
        await world.until(pod.name.partition("/")[2], lambda pod: pod is None)
    await api.wait(f"/api/v1/nodes/{node}", lambda node: condition(node, "Ready")["status"] == "True")
    with pytest.raises(HttpError):
        await ask(stranded[0], "/health")


async def test_a_silent_node_answers_nothing(world: World, nodes: FakeKubelet) -> None:
    await world.deploy(4)
    pod = (await world.on_nodes())[0]
    await nodes.node_gone(pod.node, answering=False)
    with pytest.raises(DeadlineExceeded):
        await ask(pod, "/health", timeout=0.3)
    await nodes.node_back(pod.node)
    assert await ask(pod, "/health") == 200


async def test_nodes_outlive_their_api_server(mortal_plane: ControlPlane) -> None:
    plane = mortal_plane
    namespace = await plane.namespace()
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    async with FakeKubelet(plane.access, KubeletOptions(nodes=3)) as nodes:
        await plane.api.post(path, deployment("agents", 5))
        await plane.api.wait(f"{path}/agents", ready(5), timeout=60)
        await plane.restart_apiserver()
        await plane.api.patch(f"{path}/agents/scale", {"spec": {"replicas": 7}})
        await plane.api.wait(f"{path}/agents", ready(7), timeout=60)
        await plane.compact(forget=True)
        await plane.api.patch(f"{path}/agents/scale", {"spec": {"replicas": 2}})
        await plane.api.wait(f"/api/v1/namespaces/{namespace}/pods", lambda pods: len(pods["items"]) == 2, timeout=60)
        assert len(await nodes.pods()) == 2
        await plane.api.delete(path)  # or its pods come back on the next test's nodes


async def test_whoever_may_not_create_nodes_is_told_so(plane: ControlPlane) -> None:
    with pytest.raises(BackendRefused, match="refuses node other-0 with 403"):
        async with FakeKubelet(plane.nobody, KubeletOptions(nodes=3, prefix="other")):
            pass


async def test_an_image_that_arrives_at_last_just_runs(world: World, nodes: FakeKubelet) -> None:
    await nodes.image("*:late", Behaviour(pull=None))
    await world.deploy(1, wait=False, image="agent:late")
    await world.plane.api.wait(world.pods, lambda pods: len(pods["items"]) == 1)
    (pod,) = await world.named()
    await world.until(pod, container)
    await nodes.image("*:late", None)  # possibly before it was backed off
    await world.until(pod, lambda pod: condition(pod, "Ready")["status"] == "True")
