"""What a deposed leader sends late, past every check of its own: the API server refuses it, of whatever kind it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.permissions import grant

from agentfleet import AgentTemplate, FleetSpec, NotLeader
from agentfleet.backends.kubernetes import Connection, KubeConfig
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.apply import apply, path_of
from agentfleet.backends.kubernetes.guard import EPOCH, Guard
from agentfleet.backends.kubernetes.manifests import Configuration, render
from agentfleet.backends.kubernetes.marking import mark_one
from agentfleet.backends.kubernetes.objects import Pod
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, PODS
from agentfleet.backends.kubernetes.sending import merge, send
from agentfleet.backends.kubernetes.singles import delete, evict, isolate
from agentfleet.backends.kubernetes.standing import standing
from agentfleet.core.fence import NoFence
from agentfleet.errors import Conflict
from agentfleet.instances import Isolation
from agentfleet.kubespec import ClusterAutoscaler, ConfigFiles, KubernetesOptions
from agentfleet.specs import CpuTarget, ScalingPolicy
from agentfleet.testing.kube import ApiRefused, ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]

KINDS = ("ConfigMap", "Service", "PodDisruptionBudget", "Deployment", "HorizontalPodAutoscaler")


class Passing(NoFence):
    """The fence of a process that was stopped after its last check: it lets through what is sent, in its old epoch."""

    def __init__(self, epoch: int, writes: int | None = None) -> None:
        self.epoch = epoch
        self.writes = writes
        """How many writes it lets through; all for None."""

    @contextmanager
    def writing(self, timeout: float, *, least: float = 0.1) -> Iterator[float]:
        if self.writes is not None:
            if not self.writes:
                raise NotLeader("it has checked again")
            self.writes -= 1
        yield timeout


class Place:
    """A namespace, and leaders of the fleet "agents" in it."""

    def __init__(self, plane: ControlPlane, namespace: str, connection: Connection, api: ApiVersions) -> None:
        self.plane = plane
        self.namespace = namespace
        self.connection = connection
        self.api = api
        self.pods: dict[str, Pod] = {}
        """As the old leader has seen them last."""

    def leader(self, epoch: int, *, writes: int | None = None) -> Guard:
        return Guard(self.connection, self.namespace, "agents", Passing(epoch, writes), pod=self.pods.get)

    def manifest(self, kind: str, version: str = "1", port: int = 8080) -> dict[str, Any]:
        spec = FleetSpec(
            name="agents",
            replicas=3,
            scaling=ScalingPolicy(min_replicas=1, max_replicas=9, targets=(CpuTarget(utilization=50),)),
            template=AgentTemplate(
                command=("agent",),
                version=version,
                port=port,
                cpu="10m",
                memory="16Mi",
                kubernetes=KubernetesOptions(
                    image="agent:{version}",
                    config=ConfigFiles(files={"who.txt": version}),
                    autoscaler=ClusterAutoscaler(enabled=True),
                ),
            ),
        )
        rendered = render(spec, self.api, namespace=self.namespace, configuration=Configuration(1, {}))
        found = rendered.get(kind)
        assert found is not None
        return found

    async def now(self, kind: str) -> dict[str, Any] | None:
        with suppress(ApiRefused):
            found: dict[str, Any] = await self.plane.api.get(path_of(self.manifest(kind)))
            return found
        return None

    async def pod(self) -> Pod:
        """A new pod, which the old leader has seen."""
        made = await self.plane.api.post(
            PODS.path(self.namespace),
            {
                "metadata": {"generateName": "agents-", "labels": {"app.kubernetes.io/instance": "agents"}},
                "spec": {"containers": [{"name": "agent", "image": "agent:1"}], "nodeName": "nowhere"},
            },
        )
        name = made["metadata"]["name"]
        self.pods[name] = PODS.read(await self.connection.request("GET", PODS.path(self.namespace, name)))
        return self.pods[name]


@asynccontextmanager
async def place(plane: ControlPlane) -> AsyncIterator[Place]:
    """A namespace with a fleet's account. No nodes: nothing of it is to run."""
    namespace = await plane.namespace()
    access = await grant(plane, namespace)
    config = access.write(plane.folder / f"{namespace}.kubeconfig", namespace=namespace)
    api = ApiVersions.discovered(await plane.api.get("/version"), await plane.api.get("/apis"))
    async with Connection(KubeConfig(config), qps=500, burst=500) as connection:
        yield Place(plane, namespace, connection, api)
    await plane.api.delete(DEPLOYMENTS.path(namespace))


async def gone(to: Guard, manifest: dict[str, Any], uid: str) -> None:
    body = json.dumps({"preconditions": {"uid": uid}}).encode()
    await to.request("DELETE", path_of(manifest), body=body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_apply_or_deletion_is_refused(kind: str, plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            await send(old, apply(here.manifest(kind, "1")))
            await send(new, apply(here.manifest(kind, "2")))
            before = await here.now(kind)
            assert before is not None
            assert before["metadata"]["annotations"][EPOCH] == "2"
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await send(old, apply(here.manifest(kind, "3")))
            again = here.leader(1)
            again._known = {path_of(here.manifest("Deployment")): None}  # it has not looked since
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await gone(again, here.manifest(kind), before["metadata"]["uid"])
            after = await here.now(kind)
            assert after is not None
            assert _told(after) == _told(before)

    anyio.run(test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_deletion_on_the_version_that_was_seen_is_refused(kind: str, plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            await send(old, apply(here.manifest(kind)))
            made = await here.now(kind)
            assert made is not None
            await send(new, apply(here.manifest(kind)))
            with pytest.raises(NotLeader):
                await gone(old, here.manifest(kind), made["metadata"]["uid"])
            assert await here.now(kind) is not None

    anyio.run(test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_creation_is_refused_by_what_the_next_leader_has_made(kind: str, plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            path = path_of(here.manifest(kind))
            old._known = {path: None, path_of(here.manifest("Deployment")): None}  # so it was when it looked
            await send(new, apply(here.manifest(kind, "2")))
            before = await here.now(kind)
            assert before is not None
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await send(old, apply(here.manifest(kind, "1")))
            after = await here.now(kind)
            assert after is not None
            assert _told(after) == _told(before)

    anyio.run(test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_apply_does_not_bring_back_what_the_next_leader_has_deleted(kind: str, plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            await send(old, apply(here.manifest(kind)))
            made = await here.now(kind)
            assert made is not None
            await gone(new, here.manifest(kind), made["metadata"]["uid"])
            with pytest.raises(Conflict):
                await send(old, apply(here.manifest(kind)))
            assert await here.now(kind) is None

    anyio.run(test)


def test_a_late_creation_of_a_fleet_that_is_deleted_by_now_begins_no_instance(plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            late = here.leader(1, writes=1)
            with pytest.raises(NotLeader):
                await send(late, apply(here.manifest("Deployment")))
            shell = await here.now("Deployment")
            assert shell is not None
            assert (shell["spec"]["replicas"], shell["spec"]["paused"]) == (0, True)
            await send(here.leader(2), apply(here.manifest("Deployment")))  # and is in nobody's way
            made = await here.now("Deployment")
            assert made is not None
            assert made["spec"]["replicas"] == 3
            assert not made["spec"].get("paused")

    anyio.run(test)


def test_a_late_size_is_refused(plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            scale = DEPLOYMENTS.path(here.namespace, "agents", "scale")
            await send(old, apply(here.manifest("Deployment")))
            await merge(old, scale, {"spec": {"replicas": 4}})
            await merge(new, scale, {"spec": {"replicas": 5}})
            with pytest.raises(NotLeader):
                await merge(old, scale, {"spec": {"replicas": 1}})
            with pytest.raises(NotLeader):
                await merge(old, DEPLOYMENTS.path(here.namespace, "agents"), {"spec": {"paused": True}})
            made = await here.now("Deployment")
            assert made is not None
            assert made["spec"]["replicas"] == 5
            assert not made["spec"].get("paused")

    anyio.run(test)


@pytest.mark.parametrize("read", ["by the first", "by the next"])
def test_a_late_apply_upon_a_version_that_was_read_in_the_next_term_is_refused(read: str, plane: ControlPlane) -> None:
    """To have read what the next leader has written makes nobody its writer; nor what was read before it."""

    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            await send(old, apply(here.manifest("Deployment", "1")))
            if read == "by the first":
                upon = await standing(old, here.namespace, "agents")
            await send(new, apply(here.manifest("Deployment", "2")))
            before = await here.now("Deployment")
            if read == "by the next":
                upon = await standing(old, here.namespace, "agents")
            late = here.manifest("Deployment", "1")
            assert upon is not None
            late["metadata"] |= {"uid": upon.uid, "resourceVersion": upon.version}
            with pytest.raises(NotLeader if read == "by the next" else Conflict):
                await send(old, apply(late))
            with pytest.raises(NotLeader):
                await send(old, apply(late))
            assert before is not None
            after = await here.now("Deployment")
            assert after is not None
            assert _told(after) == _told(before)

    anyio.run(test)


@pytest.mark.parametrize("what", ["mark", "evict", "delete", "isolate"])
def test_a_late_write_to_a_pod_that_the_next_leader_has_written_is_refused(what: str, plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            old, new = here.leader(1), here.leader(2)
            await send(old, apply(here.manifest("Deployment")))
            pod = await here.pod()
            isolation = Isolation(0.0, "to be looked at")
            if what == "isolate":
                await mark_one(new, pod)
            else:
                await isolate(new, pod, {}, isolation)
            before = await here.plane.api.get(PODS.path(here.namespace, pod.metadata.name))
            late: dict[str, Callable[[], Awaitable[object]]] = {
                "mark": lambda: mark_one(old, pod),
                "evict": lambda: evict(old, pod, grace=0, minor=20),
                "delete": lambda: delete(old, pod, grace=0),
                "isolate": lambda: isolate(old, pod, {}, isolation),
            }
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await late[what]()
            after = await here.plane.api.get(PODS.path(here.namespace, pod.metadata.name))
            assert after["metadata"] == before["metadata"]

    anyio.run(test)


def test_a_pod_that_has_only_changed_by_itself_is_written_nevertheless(plane: ControlPlane) -> None:
    async def test() -> None:
        async with place(plane) as here:
            leader = here.leader(1)
            await send(leader, apply(here.manifest("Deployment")))
            pod = await here.pod()
            await here.plane.api.patch(
                PODS.path(here.namespace, pod.metadata.name), {"metadata": {"annotations": {"somebody": "else"}}}
            )
            assert await mark_one(leader, pod) is not None
            await delete(leader, pod, grace=0)

    anyio.run(test)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_created_so_is_as_good_as_applied(kind: str, plane: ControlPlane) -> None:
    """A field that a later apply does not say any more is gone, whoever has created it."""

    async def test() -> None:
        async with place(plane) as here:
            leader, manifest = here.leader(1), here.manifest(kind)
            more = {**manifest, "metadata": {**manifest["metadata"], "annotations": {"once": "said"}}}
            await send(leader, apply(more))
            await send(leader, apply(manifest))
            made = await here.now(kind)
            assert made is not None
            assert "once" not in made["metadata"]["annotations"]
            writers = {(each["manager"], each["operation"]) for each in made["metadata"]["managedFields"]}
            assert ("agentfleet", "Apply") in writers

    anyio.run(test)


def test_what_a_leader_leaves_half_made_the_next_one_finishes(plane: ControlPlane) -> None:
    """It ends at each of its writes in turn; the objects of the next one are whole, and its own to change."""

    async def test() -> None:
        async with place(plane) as here:
            for writes in range(40):
                ended, epoch = False, 1
                first = here.leader(epoch, writes=writes)
                try:
                    for kind in KINDS:
                        await send(first, apply(here.manifest(kind)))
                except NotLeader:
                    ended = True
                second = here.leader(epoch + 1)
                for kind in KINDS:
                    await send(second, apply(here.manifest(kind, "2", port=9090)))
                made = {kind: await here.now(kind) or {} for kind in KINDS}
                assert [each["port"] for each in made["Service"]["spec"]["ports"]] == [9090]
                assert made["Deployment"]["spec"]["replicas"] == 3
                assert not made["Deployment"]["spec"].get("paused")
                (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
                assert [each["containerPort"] for each in container["ports"]] == [9090]
                for kind, each in made.items():
                    assert each["metadata"]["annotations"][EPOCH] == "2"
                    await gone(second, here.manifest(kind), each["metadata"]["uid"])
                if not ended:
                    assert writes > len(KINDS)
                    return
            raise AssertionError("it never ends")

    anyio.run(test)


def _told(thing: dict[str, Any]) -> dict[str, Any]:
    """All but what controllers report about it."""
    noise = ("resourceVersion", "managedFields")
    metadata = {key: value for key, value in thing["metadata"].items() if key not in noise}
    metadata["annotations"] = {
        key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith("deployment.kube")
    }
    return {"metadata": metadata, **{key: thing[key] for key in ("spec", "data") if key in thing}}
