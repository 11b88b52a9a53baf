"""The managers as manager.yaml runs them: its arguments and variables, its account, a PostgreSQL, tokens and TLS.

What is mounted into the pods lies in files here, and the processes run beside the real API server instead of within it.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import yaml

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from tests.kube.manifests import one
from tests.kube.story import EXAMPLES
from tests.kube.world import Cluster, cluster, spec

from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.client import FleetClient
from agentfleet.liveness import ask
from agentfleet.testing.kube import ControlPlane, free_ports
from agentfleet.testing.kube.certificates import Authority, Certificate
from agentfleet.testing.postgres import Postgres, PostgresMissing

if not EXAMPLES.exists():
    pytest.skip("no examples here: these are the tests of a wheel", allow_module_level=True)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TOKEN = "a-token-for-everything-of-these-tests-alone"
DEADLINE = 60.0


@dataclass
class Mounted:
    """What Secrets, ConfigMap and environment would bring into a pod."""

    database: str
    tokens: Path
    rules: Path
    schemas: Path
    tls: Certificate
    kubeconfig: Path

    def environment(self, identity: str, port: int) -> dict[str, str]:
        """The variables of manager.yaml, each from here or as it stands there; every one must be known."""
        brought = {
            "AGENTFLEET_DATABASE": self.database,
            "AGENTFLEET_IDENTITY": identity,
            "AGENTFLEET_PORT": str(port),
            "AGENTFLEET_ACCESS_RULES": str(self.rules),
            "AGENTFLEET_CONFIG_SCHEMAS": str(self.schemas),
            "AGENTFLEET_TOKEN_FILE": str(self.tokens),
            "AGENTFLEET_TLS_CERT": str(self.tls.certificate),
            "AGENTFLEET_TLS_KEY": str(self.tls.key),
        }
        (container,) = one("Deployment")["spec"]["template"]["spec"]["containers"]
        said = {each["name"]: each.get("value") for each in container["env"]}
        assert brought.keys() <= said.keys()
        found = {name: brought.get(name, value) for name, value in said.items()}
        assert None not in found.values(), found.keys()
        surroundings = {"PATH": os.environ["PATH"], "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.rules.parent)}
        return {**surroundings, **{name: str(value) for name, value in found.items()}}


class Manager:
    """One manager's process."""

    def __init__(self, process: anyio.abc.Process, port: int, mounted: Mounted) -> None:
        self.process = process
        self.port = port
        self._certificate = mounted.tls.certificate
        self.said = b""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Take down what it logs."""
        assert self.process.stderr is not None
        with suppress(anyio.ClosedResourceError):
            async for piece in self.process.stderr:
                self.said += piece

    async def until_ready(self) -> None:
        """Wait until its readiness probe would succeed."""
        with anyio.fail_after(DEADLINE):
            while not await anyio.to_thread.run_sync(self._is_ready):
                assert self.process.returncode is None, self.said.decode()
                await anyio.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return bool(ask("127.0.0.1", self.port, path="/readyz", certificate=self._certificate))
        except (OSError, RuntimeError):
            return False

    async def leave(self) -> None:
        """End it as a kubelet does; it must end well and in time."""
        self.process.send_signal(signal.SIGTERM)
        with anyio.fail_after(30):
            assert await self.process.wait() == 0, self.said.decode()


@asynccontextmanager
async def managers(mounted: Mounted, count: int) -> AsyncIterator[list[Manager]]:
    """As many as the Deployment has."""
    (container,) = one("Deployment")["spec"]["template"]["spec"]["containers"]
    command = [sys.executable, "-m", "agentfleet.cli", *container["args"]]
    async with anyio.create_task_group() as tasks:
        made: list[Manager] = []
        try:
            for number, port in enumerate(free_ports(count)):
                env = mounted.environment(f"agentfleet-manager-{number}", port)
                made.append(Manager(await anyio.open_process(command, env=env, stdin=None), port, mounted))
                tasks.start_soon(made[-1].listen)
            for manager in made:
                await manager.until_ready()
            yield made
        finally:
            with anyio.CancelScope(shield=True):
                for manager in made:
                    if manager.process.returncode is None:
                        manager.process.kill()
                    await manager.process.aclose()
            tasks.cancel_scope.cancel()


async def mount(there: Cluster, authority: Authority, database: str, folder: Path) -> Mounted:
    """Write what is mounted."""
    (folder / "tokens").write_text(f"tests admin * {TOKEN}\n")
    rules = one("ConfigMap")["data"]["rules.yaml"].replace(
        "serviceaccount:monitoring", f"serviceaccount:{there.namespace}"
    )
    (folder / "rules.yaml").write_text(rules)
    kubeconfig = there.plane.folder / f"{there.namespace}.kubeconfig"  # the manager's own account
    schemas = folder / "config-schemas"
    schemas.mkdir()  # as for a ConfigMap that is optional and not there
    certificate = authority.server("manager")
    return Mounted(database, folder / "tokens", folder / "rules.yaml", schemas, certificate, kubeconfig)


def metrics(text: str) -> dict[str, float]:
    """The samples of an answer to /metrics."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_two_managers_run_as_the_example_says(plane: ControlPlane, tmp_path: Path) -> None:
    """With the rights of their account alone they keep a fleet, and one takes over what the other leaves."""
    try:
        server = Postgres()
    except PostgresMissing as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must provide PostgreSQL: {error}")
        pytest.skip(str(error))
    authority = Authority(tmp_path)
    count = one("Deployment")["spec"]["replicas"]

    async def test() -> None:
        with server:
            async with cluster(plane) as there:
                mounted = await mount(there, authority, server.database(), tmp_path)
                async with managers(mounted, count) as both:
                    await play(there, authority, both)

    anyio.run(test)


async def play(there: Cluster, authority: Authority, both: list[Manager]) -> None:
    """What happens to the fleet."""
    trusts = ssl.create_default_context(cafile=authority.ca)
    async with FleetClient(*(each.url for each in both), token=TOKEN, tls=trusts) as client:
        created = await client.create(spec(4))
        done = await client.finished(created.operation_id, timeout=DEADLINE)
        assert done.status == "succeeded", done
        found = await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
        assert found["spec"]["replicas"] == 4

        leader, other = await who_leads(there, both)
        led = metrics(await read(there, leader))
        assert led['agentfleet_instances{fleet="agents",state="idle"}'] == 4
        assert led['agentfleet_nodes{fleet="agents",state="ready"}'] == 3
        named = set(re.findall(r"agentfleet_\w+", yaml.safe_dump(rules())))
        for manager in both:
            exported = set(re.findall(r"^# TYPE (\S+) ", await read(there, manager), re.MULTILINE))
            assert named <= exported, "the alert rules are about what is really exported"
        assert 'agentfleet_instances{fleet="agents",state="idle"}' not in metrics(await read(there, other))

        await leader.leave()
        scaled = await client.scale(created.cluster_id, 6)
        assert (await client.finished(scaled.operation_id, timeout=DEADLINE)).status == "succeeded"
        assert metrics(await read(there, other))['agentfleet_instances{fleet="agents",state="idle"}'] == 6
        await other.leave()
    after = await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
    assert after["spec"]["replicas"] == 6, "the instances stay"


def rules() -> Any:
    """The example's alert rules."""
    return one("PrometheusRule")["spec"]


async def who_leads(there: Cluster, both: list[Manager]) -> tuple[Manager, Manager]:
    """The one that leads the fleet, and another."""
    epochs = [metrics(await read(there, each)).get('agentfleet_leading_epoch{fleet="agents"}', 0) for each in both]
    (leading,) = [place for place, epoch in enumerate(epochs) if epoch]
    return both[leading], both[1 - leading]


async def read(there: Cluster, manager: Manager) -> str:
    """Its /metrics, as Prometheus' own account reads them: by a token of Kubernetes, which the API server reviews."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "prometheus"}}
    path = f"/api/v1/namespaces/{there.namespace}/serviceaccounts/prometheus?fieldManager=test&force=true"
    await there.plane.api.patch(path, account, kind="application/apply-patch+yaml")
    access = await there.plane.service_account(there.namespace, "prometheus")
    assert access.token is not None
    return await anyio.to_thread.run_sync(_read, manager, access.token)


def _read(manager: Manager, token: str) -> str:
    import urllib.request  # noqa: PLC0415 - here alone

    context = ssl.create_default_context(cafile=manager._certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    request = urllib.request.Request(f"{manager.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        text: str = answer.read().decode()
    return text
