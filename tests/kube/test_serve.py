"""`agentfleet serve` on a real cluster: fleets over REST, by a service account's token, with the cluster's leases."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("sqlalchemy")
pytest.importorskip("fastapi")
pytest.importorskip("aiohttp")

from tests.kube.test_tokenreview import allow
from tests.kube.world import cluster, spec

from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.client import FleetClient
from agentfleet.errors import AccessDenied, BackendUnavailable
from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_a_console_with_a_service_accounts_token_runs_a_fleet(plane: ControlPlane, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(plane) as there:
            await plane.api.post(
                f"/api/v1/namespaces/{there.namespace}/serviceaccounts", {"metadata": {"name": "console"}}
            )
            await allow(plane, there.namespace, account="agentfleet-manager")
            console = await plane.service_account(there.namespace, "console")
            assert console.token is not None
            rules = tmp_path / "rules.yaml"
            user = f"system:serviceaccount:{there.namespace}:console"
            rules.write_text(f"rules: [{{user: '{user}', scopes: [admin], fleets: ['*']}}]")
            options = {"backend": "kubernetes", "access_rules": str(rules)}
            (tmp_path / "tokens").write_text("nobody read none " + "x" * 40)
            database = f"sqlite:///{tmp_path / 'fleet.db'}"
            command = [
                sys.executable,
                "-m",
                "tests.server.served",
                database,
                str(tmp_path / "tokens"),
                json.dumps(options),
            ]
            config = plane.folder / f"{there.namespace}.kubeconfig"
            environment = {**os.environ, "KUBECONFIG": str(config)}
            async with await anyio.open_process(command, cwd=ROOT, env=environment, stderr=None) as process:
                assert process.stdout is not None
                try:
                    with anyio.fail_after(60):
                        address = (await process.stdout.receive()).decode().strip()
                    await use(plane, there.namespace, address, console.token)
                    process.send_signal(signal.SIGTERM)
                    with anyio.fail_after(30):
                        assert await process.wait() == 0
                finally:
                    if process.returncode is None:
                        process.kill()
            lease = await plane.api.get(
                f"/apis/coordination.k8s.io/v1/namespaces/{there.namespace}/leases/agentfleet-agents"
            )
            assert not lease["spec"].get("holderIdentity"), "it was handed over"

    anyio.run(test)


async def use(plane: ControlPlane, namespace: str, address: str, token: str) -> None:
    """Create, scale, deploy, look at it."""
    async with FleetClient(address, token=token) as client:
        with anyio.fail_after(30):
            while True:  # the API server takes a moment to see who may review tokens
                try:
                    assert [each async for each in client.clusters()] == []
                    break
                except BackendUnavailable:
                    await anyio.sleep(0.2)
        made = await client.create(spec(3))
        assert (await client.finished(made.operation_id, timeout=90)).status == "succeeded"
        assert (await client.cluster("agents")).namespace == namespace
        for step in (client.scale("agents", 4), client.deploy("agents", "2")):
            ended = await client.finished((await step).operation_id, timeout=90)
            assert ended.status == "succeeded", ended
        found = await plane.api.get(DEPLOYMENTS.path(namespace, "agents"))
        assert found["spec"]["replicas"] == 4
        assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "agent:2"
        with anyio.fail_after(30):
            while len([each async for each in client.instances("agents", version="2")]) != 4:  # noqa: ASYNC110
                await anyio.sleep(0.2)
        assert (await client.managers())[0].leads == 1
        actors = [each.actor async for each in client.audit()]
        assert actors[0].startswith("kubernetes/system:serviceaccount:")
    async with FleetClient(address, token="a.b.c") as stranger:
        with pytest.raises(AccessDenied):
            await stranger.cluster("agents")
