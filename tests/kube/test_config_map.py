"""The configuration document in the fleet's ConfigMap: kept up to date, and no reason to roll a pod."""

from __future__ import annotations

import json
from typing import Any, cast

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube import test_sharing
from tests.kube.test_backend import on
from tests.kube.world import Cluster, spec

from agentfleet import FleetSpec, SpecError
from agentfleet.backends.base import Workload
from agentfleet.backends.kubernetes import Connection, NotFound
from agentfleet.backends.kubernetes.backend import KubernetesBackend
from agentfleet.backends.kubernetes.manifests import Configuration, config_document
from agentfleet.core.fence import NoFence
from agentfleet.kubespec import ConfigFiles
from agentfleet.testing import run_virtual
from agentfleet.testing.kube import ControlPlane


def configured(replicas: int, *, version: str = "1", files: dict[str, str] | None = None) -> FleetSpec:
    """A fleet whose configuration is a ConfigMap, too."""
    plain = spec(replicas, version=version)
    options = plain.template.kubernetes
    assert options is not None
    options = options.replace(config=ConfigFiles(files=files or {}))
    return plain.replace(template=plain.template.replace(kubernetes=options))


def test_the_documents_part_holds_nothing_of_the_rest() -> None:
    made = config_document(
        configured(1, files={"prompt.txt": "hello"}), Configuration(4, {"model": "small"}), namespace="ai", owner="u"
    )
    assert made is not None
    assert set(made["data"]) == {"config.json"}
    assert json.loads(made["data"]["config.json"]) == {"model": "small"}
    assert made["metadata"]["annotations"] == {"agentfleet.io/config-revision": "4"}
    assert made["metadata"]["name"] == "agents-config"
    assert made["metadata"]["ownerReferences"][0]["uid"] == "u"


def test_there_is_none_where_the_spec_asks_for_none() -> None:
    assert config_document(spec(1), Configuration(4, {}), namespace="ai") is None


def test_a_document_that_a_config_map_cannot_hold_is_refused() -> None:
    with pytest.raises(SpecError, match="a ConfigMap holds"):
        config_document(
            configured(1, files={"a": "x" * 900_000}), Configuration(1, {"b": "y" * 300_000}), namespace="ai"
        )


class Empty(test_sharing.Cluster):
    """Has no Deployment before it is told of one, and notes the documents that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.documents: list[str] = []

    async def request(self, method: str, path: str, *, body: bytes | None = None, **more: Any) -> bytes:
        if method == "GET":
            if path.endswith("/deployments/agents"):
                raise NotFound("no", "GET", 404)
            if path.endswith("/deployments"):
                return b'{"metadata": {"resourceVersion": "1"}, "items": []}'
            return await super().request(method, path, **more)
        sent = json.loads(body or b"{}")
        if "config.json" in sent.get("data", {}):
            self.documents.append(json.loads(sent["data"]["config.json"])["model"])
        return json.dumps({**sent, "metadata": {"uid": "u", "resourceVersion": "7", **sent["metadata"]}}).encode()


@pytest.mark.parametrize("how", ["another term", "deletion"])
def test_a_document_of_before_is_not_written_again(how: str) -> None:
    """By then another manager may have published a newer one, or it was another fleet's of the same name."""

    async def main() -> None:
        cluster, fleet = Empty(), configured(2)
        workload = Workload(fleet, 1, fleet.template, 2)
        async with KubernetesBackend(cast("Connection", cluster)) as backend:
            await backend.configure(fleet, 5, {"model": "m5"})
            await backend.apply(workload)
            assert cluster.documents.pop() == "m5"
            if how == "deletion":
                await backend.delete(fleet.name)
            else:
                backend.fenced(fleet.name, NoFence())
            backend._guards.clear()  # it is alone: what is asked is what is sent
            cluster.documents.clear()
            await backend.apply(workload)
            assert not cluster.documents
            await backend.configure(fleet, 6, {"model": "m6"})
            assert cluster.documents == ["m6"]

    run_virtual(main)


@pytest.mark.integration
@pytest.mark.slow
def test_what_is_published_is_in_the_config_map(plane: ControlPlane) -> None:
    """Before the first deployment, later, through an upgrade, by the next manager, and after a delete."""

    async def test(there: Cluster) -> None:
        path = f"/api/v1/namespaces/{there.namespace}/configmaps"

        async def kept(revision: int) -> dict[str, Any]:
            with anyio.fail_after(20):
                while True:
                    for each in (await there.plane.api.get(path))["items"]:
                        if each["metadata"].get("annotations", {}).get("agentfleet.io/config-revision") == str(
                            revision
                        ):
                            assert json.loads(each["data"]["config.json"])["model"] == f"m{revision}"
                            data: dict[str, Any] = each["data"]
                            return data
                    await anyio.sleep(0.1)

        files = {"prompt.txt": "hello"}
        async with there.fleet(configured(2, files=files)) as fleet:
            await fleet.configure({"model": "m1"}, wait=False)
            await fleet.deploy(timeout=60)
            assert (await kept(1))["prompt.txt"] == "hello"
            pods = {instance.id for instance in fleet.instances}
            await fleet.configure({"model": "m2"}, wait=False)
            await kept(2)
            assert {instance.id for instance in fleet.instances} == pods, "a document rolls nothing"
            await fleet.upgrade(version="2", timeout=120)
            assert (await kept(2))["prompt.txt"] == "hello"
        async with there.fleet(configured(2, version="2", files=files)) as fleet:
            await fleet.deploy(timeout=60)
            await kept(2)
            await fleet.configure({"model": "m3"}, wait=False)
            assert (await kept(3))["prompt.txt"] == "hello"
            await fleet.delete(timeout=60)
            assert not [
                each
                for each in (await there.plane.api.get(path))["items"]
                if each["metadata"]["name"] == "agents-config"
            ]
            await fleet.deploy(timeout=60)
            await kept(3)
        assert not there.events("config.not_kept")

    on(plane, test)
