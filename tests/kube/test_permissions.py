"""What a manager may do is what it does: each verb that examples/kubernetes/rbac.yaml grants is used, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import yaml

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import SIZE, Faulty, on, until
from tests.kube.story import EXAMPLES
from tests.kube.test_cluster_autoscaler import autoscaled
from tests.kube.test_faults_intermediate import configured

from agentfleet import Fleet
from agentfleet.errors import BackendUnavailable, InstanceGone
from agentfleet.testing.kube import ControlPlane, status_answer

pytestmark = [pytest.mark.integration, pytest.mark.slow]

Permission = tuple[str, str, str]
"""Group, resource and verb."""
NODES = "kube-node-lease/"
"""Before the resource, where it is about the heartbeats of nodes."""
COLLECTED = {
    ("", "configmaps", "delete"),
    ("", "services", "delete"),
    ("policy", "poddisruptionbudgets", "delete"),
    ("autoscaling", "horizontalpodautoscalers", "delete"),
}
"""Deleted by the fleet, unless the cluster's garbage collector was faster, as their owner has gone before."""
TARGET = re.compile(
    r"/apis?/(?:(?P<group>[a-z0-9.]+)/)?v\w+/(?:namespaces/(?P<space>[^/?]+)/)?(?P<resource>[a-z]+)(?:/(?P<name>[^/?]+))?"
    r"(?:/(?P<part>[a-z]+))?(?:\?(?P<query>.*))?$"
)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
ELSEWHERE = {("authentication.k8s.io", "tokenreviews", "create")}
"""Granted for the REST API, which no fleet needs: `test_tokenreview.py`."""


def granted() -> Iterator[Permission]:
    """What the example's roles say."""
    for manifest in yaml.safe_load_all((EXAMPLES / "rbac.yaml").read_text()):
        space = NODES if manifest["metadata"]["name"] == "agentfleet-node-leases" else ""
        for rule in manifest.get("rules", ()):
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    for verb in rule["verbs"]:
                        yield group, space + resource, verb


def used(requests: list[tuple[str, str]]) -> Iterator[Permission]:
    """What these requests need."""
    for method, target in requests:
        found = TARGET.match(target)
        if found is None:  # "/version", "/apis": everybody's
            continue
        verb = VERBS.get(method)
        if verb is None:
            watches = "watch=" in (found["query"] or "")
            verb = "get" if found["name"] else "watch" if watches else "list"
        part = "" if found["part"] is None else f"/{found['part']}"
        space = NODES if found["space"] == NODES.rstrip("/") else ""
        yield found["group"] or "", space + found["resource"] + part, verb


async def live(fleet: Fleet, there: Faulty) -> None:
    """All that a fleet can do on Kubernetes."""
    await fleet.deploy(timeout=60)
    for _ in range(2):  # what is told again is counted
        await fleet.pause()
        await fleet.resume()
    there.proxy.inject(status_answer(409), method="POST", path="/eviction")  # so it is looked at, and tried again
    await fleet.replace(fleet.instances[0].id)
    await fleet.ready(timeout=60)
    moved = fleet.instances[0].id
    await fleet.replace(moved, elsewhere=True)
    await until(lambda: moved not in fleet.view.members)
    await fleet.ready(timeout=60)
    apart = fleet.instances[0].id
    await fleet.isolate(apart, reason="to be looked at")
    await until(lambda: bool(there.proxy.requests("PATCH", f"/pods/{apart}")))
    await fleet.release(apart)
    await fleet.ready(timeout=60)
    with suppress(BackendUnavailable, InstanceGone):  # fake nodes keep no logs
        await there.backend.logs(fleet.name, fleet.instances[0].id)
    with pytest.raises(InstanceGone):  # there is no metrics server
        await there.backend.usage(fleet.name)
    await fleet.scale(SIZE - 2)
    await fleet.ready(timeout=60)
    await fleet.upgrade("2", timeout=60)
    await fleet.delete(timeout=60)


def test_each_permission_is_used(plane: ControlPlane) -> None:
    async def test(there: Faulty) -> None:
        async with there.fleet(configured()) as fleet:
            await live(fleet, there)
        async with there.fleet(autoscaled(3)) as fleet:
            await fleet.deploy(timeout=60)
            await fleet.delete(timeout=60)
        assert there.leases is not None
        found, allowed = set(used(there.proxy.requests())), set(granted()) - ELSEWHERE
        assert sorted(allowed - found - COLLECTED) == [], "granted and not used"
        assert sorted(found - allowed) == [], "used and not granted"

    on(plane, test)
