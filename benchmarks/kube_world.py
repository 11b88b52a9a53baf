"""What the measurements on a control plane share: the plane and its nodes, kubectl, an onlooker, a fleet's spec."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import psutil
import yaml

from agentfleet import (
    AgentTemplate,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryJournal,
    RecoveryPolicy,
    RolloutPolicy,
)
from agentfleet.backends.kubernetes import Connection, KubeConfig, KubernetesBackend
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.manifests import render
from agentfleet.kubespec import KubernetesOptions
from agentfleet.testing.kube import ControlPlane, KubeletProcess
from benchmarks.kube_onlooker import Onlooker

SIZE, SMALL, NODES = 1_000, 200, 20
RBAC = Path(__file__).parent.parent / "examples" / "kubernetes" / "rbac.yaml"
NAMESPACE, ACCOUNT = "ai-agents", "agentfleet-manager"
"""What those permissions are written for."""
LOOK = 0.05
"""Seconds between two looks where there is nothing to wait for."""
ROLLOUT = RolloutPolicy(max_surge="25%", max_unavailable="25%", min_ready=0, progress_deadline=60)

Row = dict[str, object]


def spec(name: str, replicas: int, version: str = "1", path: str = "/health") -> FleetSpec:
    """A fleet of small agents."""
    template = AgentTemplate(
        command=("agent",),
        version=version,
        port=8080,
        cpu="10m",
        memory="16Mi",
        drain=5.0,
        kubernetes=KubernetesOptions(image="agent:{version}"),
    )
    health = HealthPolicy(checks=(HttpCheck(path=path, period=10.0, timeout=2.0, failures=3),))
    return FleetSpec(
        name=name,
        template=template,
        replicas=replicas,
        health=health,
        rollout=ROLLOUT,
        recovery=RecoveryPolicy(max_disrupted="10%"),
    )


@dataclass
class World:
    """One plane with its nodes, a namespace, and the rows that were measured in it."""

    plane: ControlPlane
    nodes: KubeletProcess
    namespace: str
    config: Path
    """The admin's way in, for kubectl."""
    onlooker: Onlooker
    rows: list[Row] = field(default_factory=list)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    backend: KubernetesBackend = field(default_factory=KubernetesBackend)
    """Of the latest manager."""
    account: Path | None = None
    """The managers' own way in."""

    async def permit(self) -> None:
        """Have managers do what they do as the account of the examples, not as the admin."""
        await self.kubectl("apply", "--server-side", "-f", str(RBAC))
        access = await self.plane.service_account(self.namespace, ACCOUNT, seconds=7200)
        self.account = self.plane.kubeconfig(access, namespace=self.namespace)

    def say(self, name: str, seconds: float | None = None, size: int | None = None, note: str = "") -> None:
        """Keep a row, and show that something happens."""
        self.rows.append({"name": name, "seconds": seconds, "size": size, "note": note})
        print(f"  {name}: {'' if seconds is None else f'{seconds:.2f} s'} {note}", file=sys.stderr, flush=True)

    async def kubectl(self, *arguments: str, given: str | None = None) -> None:
        """Run kubectl to its end."""
        command = ["kubectl", "--kubeconfig", str(self.config), *arguments]
        await anyio.run_process(command, input=None if given is None else given.encode(), stderr=subprocess.DEVNULL)

    async def at(self, name: str, size: int) -> float:
        """The moment at which a Deployment says that it has that size and all is ready."""
        return await self.onlooker.until(name, lambda seen: seen.shows(size))

    async def no_pods(self) -> None:
        """Wait until the namespace is empty, so that what was is no burden on what comes."""
        while (await self.plane.api.get(f"/api/v1/namespaces/{self.namespace}/pods?limit=1"))["items"]:
            await anyio.sleep(0.2)

    async def plain(self, name: str, replicas: int) -> str:
        """What a fleet would be, as objects that nobody manages: the same Deployment, Service and disruption budget."""
        api = ApiVersions.discovered(await self.plane.api.get("/version"), await self.plane.api.get("/apis"))
        rendered = render(spec(name, replicas), api, namespace=self.namespace, replicas=replicas)
        return yaml.safe_dump_all(rendered.objects)

    @asynccontextmanager
    async def fleet(self, wanted: FleetSpec) -> AsyncIterator[tuple[Fleet, Connection]]:
        """A manager with a connection of its own."""
        async with Connection(KubeConfig(self.account or self.config), qps=500, burst=1000) as connection:
            self.backend = KubernetesBackend(connection, namespace=self.namespace)
            async with Fleet(wanted, backend=self.backend, journal=self.journal, seed=1) as fleet:
                yield fleet, connection


def cpu() -> tuple[float, float]:
    """CPU seconds so far: of this process, and of the control plane, the nodes and the onlooker."""
    times = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            spent = child.cpu_times()
            times.append(spent.user + spent.system)
    return time.process_time(), sum(times)
