"""1,000 instances on 20 nodes of a real control plane: the time that we add to what that needs by itself.

Every operation is done twice on the same plane in the same run: by kubectl on a Deployment with the same pods, Service
and disruption budget that nobody manages, and by a `Fleet`. Both are timed by the same onlooker, who asks for the
Deployment's status until it is as wanted; the fleet also until it says so itself. Then what a steady fleet costs the
API server, how long crashes and a lost node stay unseen, and who dies when a fleet with busy instances is
halved.

The control plane, the nodes and the manager share this machine: where they use all of it, what the manager computes
and what the server encodes for its watch is time that the control plane lacks. Each row tells the share of CPU.

Run: `python benchmarks/bench_kube_fleet.py [lifecycle] [steady] [faults] [outage] [busy]`; all of it takes a quarter of
an hour. Needs the programs of a control plane (see `agentfleet.testing.kube`) and kubectl.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import psutil
import yaml

from agentfleet import (
    AgentTemplate,
    Event,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryJournal,
    RecoveryPolicy,
    RolloutFailed,
    RolloutPolicy,
)
from agentfleet.backends.kubernetes import Connection, KubeConfig, KubernetesBackend
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.manifests import render
from agentfleet.kubespec import KubernetesOptions
from agentfleet.testing.kube import (
    ApiRefused,
    AssetsMissing,
    Behaviour,
    ControlPlane,
    KubeletOptions,
    KubeletProcess,
)

SIZE, SMALL, NODES = 1_000, 200, 20
STEADY = 120.0
ROUNDS = 10
ROLLOUT = RolloutPolicy(max_surge="25%", max_unavailable="25%", min_ready=0, progress_deadline=60)
LOOK = 0.05

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
    rows: list[Row] = field(default_factory=list)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    backend: KubernetesBackend = field(default_factory=KubernetesBackend)
    """Of the latest manager."""

    def say(self, name: str, seconds: float | None = None, size: int | None = None, note: str = "") -> None:
        """Keep a row, and show that something happens."""
        self.rows.append({"name": name, "seconds": seconds, "size": size, "note": note})
        print(f"  {name}: {'' if seconds is None else f'{seconds:.2f} s'} {note}", file=sys.stderr, flush=True)

    async def kubectl(self, *arguments: str, given: str | None = None) -> None:
        """Run kubectl to its end."""
        command = ["kubectl", "--kubeconfig", str(self.config), *arguments]
        await anyio.run_process(command, input=None if given is None else given.encode(), stderr=subprocess.DEVNULL)

    async def generation(self, name: str) -> int:
        """How often a Deployment has been told something; 0 when there is none."""
        try:
            seen = await self.plane.api.get(f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{name}")
        except ApiRefused:
            return 0
        return int(seen["metadata"]["generation"])

    async def shows(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until a Deployment's status is as wanted."""
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{name}"
        while True:
            seen = await self.plane.api.get(path)
            status = seen.get("status", {})
            if status.get("observedGeneration", 0) >= seen["metadata"]["generation"] and wanted(status):
                return
            await anyio.sleep(LOOK)

    async def at(self, name: str, size: int) -> None:
        """Wait until so many instances, and no others, are up to date and ready."""
        keys = ("replicas", "updatedReplicas", "readyReplicas")
        await self.shows(name, lambda status: all(status.get(key, 0) == size for key in keys))

    async def no_pods(self) -> None:
        """Wait until the namespace is empty, so that what was is no burden on what comes."""
        while (await self.plane.api.get(f"/api/v1/namespaces/{self.namespace}/pods?limit=1"))["items"]:
            await anyio.sleep(0.2)

    @asynccontextmanager
    async def fleet(self, wanted: FleetSpec) -> AsyncIterator[tuple[Fleet, Connection]]:
        """A manager with a connection of its own."""
        async with Connection(KubeConfig(self.config), qps=500, burst=1000) as connection:
            self.backend = KubernetesBackend(connection, namespace=self.namespace)
            async with Fleet(wanted, backend=self.backend, journal=self.journal, seed=1) as fleet:
                yield fleet, connection


async def took(work: Awaitable[None]) -> float:
    """Seconds until something is done."""
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def cpu() -> tuple[float, float]:
    """CPU seconds so far: of this process, and of the control plane and the nodes."""
    times = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            spent = child.cpu_times()
            times.append(spent.user + spent.system)
    return time.process_time(), sum(times)


# ---------------------------------------------------------------------------------------------------- lifecycle


async def lifecycle(world: World) -> None:
    """Deploy, 1,000 → 200 → 1,000, upgrade; a bad image. The plain Deployment first, then the fleet."""
    theirs = await _by_kubectl(world)
    await world.no_pods()
    async with world.fleet(spec("fleet", SIZE)) as (fleet, _):
        ours = {"deploy": await _both(world, lambda: fleet.deploy(timeout=300), "fleet", SIZE)}

        def scale(size: int) -> Callable[[], Awaitable[None]]:
            async def run() -> None:
                await fleet.scale(size)
                await fleet.ready(timeout=300)

            return run

        ours["scale down"] = await _both(world, scale(SMALL), "fleet", SMALL)
        ours["scale up"] = await _both(world, scale(SIZE), "fleet", SIZE)

        async def upgrade() -> None:
            await fleet.upgrade(version="2", timeout=600)

        ours["upgrade"] = await _both(world, upgrade, "fleet", SIZE)
        for name, (shown, said, manager, rest) in ours.items():
            theirs_took = theirs[name]
            note = f"kubectl {theirs_took:.2f} s: {shown / theirs_took:.2f}x; the fleet says so after {said:.2f} s"
            note += f"; CPU {manager:.1f} s of {manager + rest:.1f} s"
            world.say(name, shown, SIZE, note)
        await _bad_image(world, fleet)
        await fleet.delete(timeout=300)
    await world.no_pods()


async def _both(
    world: World, act: Callable[[], Awaitable[None]], name: str, size: int
) -> tuple[float, float, float, float]:
    """Seconds until the Deployment is as wanted for the first time, until the fleet has said so, and of CPU."""
    spent = cpu()
    before = await world.generation(name)
    began = time.perf_counter()
    shown = said = 0.0

    async def look() -> None:
        nonlocal shown
        while await world.generation(name) == before:
            await anyio.sleep(LOOK)
        await world.at(name, size)
        shown = time.perf_counter() - began

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        await act()
        said = time.perf_counter() - began
    manager, rest = (now - before for now, before in zip(cpu(), spent, strict=True))
    return shown, said, manager, rest


async def _by_kubectl(world: World) -> dict[str, float]:
    text, name = await _plain(world), "plain"

    async def deploy() -> None:
        await world.kubectl("apply", "-f", "-", given=text)
        await world.at(name, SIZE)

    def scale(size: int) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await world.kubectl("scale", "deployment", name, f"--replicas={size}")
            await world.at(name, size)

        return run

    async def upgrade() -> None:
        await world.kubectl("set", "image", f"deployment/{name}", "agent=agent:2")
        await world.at(name, SIZE)

    times = {
        "deploy": await took(deploy()),
        "scale down": await took(scale(SMALL)()),
        "scale up": await took(scale(SIZE)()),
        "upgrade": await took(upgrade()),
    }
    for what, seconds in times.items():
        print(f"  kubectl {what}: {seconds:.2f} s", file=sys.stderr, flush=True)
    await world.kubectl("delete", "-f", "-", given=text)
    return times


async def _plain(world: World, name: str = "plain", replicas: int = SIZE) -> str:
    """What a fleet would be, as objects that nobody manages: the same Deployment, Service and disruption budget."""
    api = ApiVersions.discovered(await world.plane.api.get("/version"), await world.plane.api.get("/apis"))
    rendered = render(spec(name, replicas), api, namespace=world.namespace, replicas=replicas)
    return yaml.safe_dump_all(rendered.objects)


async def _bad_image(world: World, fleet: Fleet) -> None:
    """An image that never arrives is stopped within its budget and rolled back."""
    await world.nodes.image("agent:bad", Behaviour(pull=None))
    least = SIZE

    async def watch() -> None:
        nonlocal least
        while True:
            least = min(least, fleet.status()["good"])
            await anyio.sleep(LOOK)

    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        with suppress(RolloutFailed):
            await fleet.upgrade(version="bad", timeout=900)
        await fleet.ready(timeout=300)
        tasks.cancel_scope.cancel()
    note = f"{least} served at the worst, {SIZE * 3 // 4} must"
    world.say("bad image stopped and rolled back", time.perf_counter() - began, SIZE, note)


# ---------------------------------------------------------------------------------------------------- steady


async def steady(world: World) -> None:
    """What a fleet costs the API server when nothing happens."""
    async with world.fleet(spec("fleet", SIZE)) as (fleet, connection):
        await fleet.deploy(timeout=300)
        await fleet.ready(timeout=120)
        await anyio.sleep(10)
        pods = world.backend.informers["pods"].metrics
        lists = pods.lists
        writes, calls, cpu = connection.traffic.writes, connection.traffic.calls, time.process_time()
        await anyio.sleep(STEADY)
        spent = (time.process_time() - cpu) / STEADY
        writes, calls = connection.traffic.writes - writes, connection.traffic.calls - calls
        lists = pods.lists - lists
        note = f"{writes / STEADY:.2f} writes/s, {calls / STEADY:.2f} calls/s, {lists} lists of pods, CPU {spent:.1%}"
        world.say("steady state", None, SIZE, note)


# ---------------------------------------------------------------------------------------------------- faults


async def faults(world: World) -> None:
    """Crashes seen, and a node lost with its pods replaced."""
    async with world.fleet(spec("fleet", SIZE)) as (fleet, _):
        await fleet.deploy(timeout=300)
        await fleet.ready(timeout=120)
        rng = random.Random(3)
        delays = []
        for victim in rng.sample(list(fleet.instances), 50):
            began = time.time()
            await world.nodes.crash(f"{world.namespace}/{victim.id}")
            seen = await _event(world, "instance.exited", victim.id)
            delays.append(seen.at - began)
            await anyio.sleep(0.2)
        await fleet.ready(timeout=120)
        worst = max(delays)
        world.say("crash seen", statistics.median(delays), SIZE, f"worst of {len(delays)}: {worst:.2f} s")

        node = fleet.instances[0].node
        assert node is not None
        there = {each.id for each in fleet.instances if each.node == node}
        began = time.time()
        await world.nodes.node_gone(node)
        seen = await _event(world, "instance.lost")
        world.say("node loss seen", seen.at - began, len(there), "instances on it")
        left = -1
        with anyio.move_on_after(300):
            while left:
                left = SIZE - sum(
                    1 for each in fleet.view.serving() if each.instance.id not in there and each.instance.node != node
                )
                await anyio.sleep(LOOK)
        world.say("its instances replaced", time.time() - began, len(there), f"{left} missing")
        await world.nodes.node_back(node)
        await fleet.ready(timeout=300)


async def _event(world: World, kind: str, instance: str | None = None) -> Event:
    """The first event of a kind in the journal, about one instance or about any."""
    with anyio.fail_after(60):
        while True:
            for event in world.journal.read():
                if event.kind == kind and instance in (None, event.instance):
                    return event
            await anyio.sleep(LOOK / 2)


# ---------------------------------------------------------------------------------------------------- outage


async def outage(world: World) -> None:
    """The API server is killed for 30 s; what comes to it afterwards, and how long until all is seen again."""
    async with world.fleet(spec("fleet", SIZE)) as (fleet, connection):
        await fleet.deploy(timeout=300)
        await fleet.ready(timeout=120)
        before = {each.id for each in fleet.instances}
        world.plane.kill_apiserver()
        await anyio.sleep(30)
        calls = connection.traffic.calls
        await world.plane.restart_apiserver()
        began = time.perf_counter()
        await fleet.scale(SIZE + 20)
        with anyio.fail_after(120):
            while fleet.status()["good"] != SIZE + 20:
                await anyio.sleep(LOOK)
        seconds = time.perf_counter() - began
        kept = len(before & {each.id for each in fleet.instances})
        note = f"{connection.traffic.calls - calls} calls; {kept} of {SIZE} instances are the same"
        world.say("converged after an outage of 30 s", seconds, SIZE, note)
        await fleet.scale(SIZE)
        await fleet.ready(timeout=120)


# ---------------------------------------------------------------------------------------------------- busy


async def busy(world: World) -> None:
    """200 → 100 with 100 busy at random, ten times; and the same with a plain Deployment."""
    rng = random.Random(7)
    lost: list[int] = []
    await world.nodes.image("agent:*", Behaviour(start=1.0))  # what no container undercuts
    async with world.fleet(spec("halves", 200, path="/status")) as (fleet, _):
        await fleet.deploy(timeout=120)
        for _ in range(ROUNDS):
            await fleet.scale(200)
            await fleet.ready(timeout=120)
            names = [f"{world.namespace}/{each.id}" for each in fleet.instances]
            chosen = rng.sample(names, 100)
            await world.nodes.busy(*chosen)
            while fleet.status()["busy"] != 100:
                await anyio.sleep(LOOK)
            await fleet.scale(100)
            while len(fleet.instances) != 100 or fleet.status()["good"] != 100:
                await anyio.sleep(LOOK)
            alive = {f"{world.namespace}/{each.id}" for each in fleet.instances}
            lost.append(len(set(chosen) - alive))
            await world.nodes.busy(*(alive & set(chosen)), in_flight=0)
        await fleet.delete(timeout=120)
    killed = await world.nodes.killed_busy()
    note = f"busy instances killed in each of {ROUNDS} rounds: {lost}; with work in flight: {len(killed)}"
    world.say("200 -> 100 by a fleet", None, 200, note)

    text = await _plain(world, "plain", 200)
    await world.kubectl("apply", "-f", "-", given=text)
    plain: list[int] = []
    for _ in range(3):
        await world.kubectl("scale", "deployment", "plain", "--replicas=200")
        await world.at("plain", 200)
        listed = await world.plane.api.get(f"/api/v1/namespaces/{world.namespace}/pods")
        names = [name for each in listed["items"] if (name := each["metadata"]["name"]).startswith("plain-")]
        unlucky = set(rng.sample(names, 100))
        await world.kubectl("scale", "deployment", "plain", "--replicas=100")
        await world.at("plain", 100)
        listed = await world.plane.api.get(f"/api/v1/namespaces/{world.namespace}/pods")
        left = {each["metadata"]["name"] for each in listed["items"] if "deletionTimestamp" not in each["metadata"]}
        plain.append(len(unlucky - left))
    await world.kubectl("delete", "-f", "-", given=text)
    world.say("200 -> 100 by a plain Deployment", None, 200, f"of 100 chosen at random: {plain} killed")


# ---------------------------------------------------------------------------------------------------- all

PARTS = {"lifecycle": lifecycle, "steady": steady, "faults": faults, "outage": outage, "busy": busy}


async def measure(parts: list[str]) -> list[Row]:
    """Run the named parts on one plane."""
    async with ControlPlane() as plane, KubeletProcess(plane.access, KubeletOptions(nodes=NODES)) as nodes:
        namespace = await plane.namespace()
        config = plane.access.write(plane.folder / "bench.kubeconfig", namespace=namespace)
        world = World(plane, nodes, namespace, config)
        for part in parts:
            print(part, file=sys.stderr, flush=True)
            await PARTS[part](world)
        return world.rows


def run(parts: list[str] | None = None) -> list[Row]:
    """The rows of all parts, or of those that are named."""
    if shutil.which("kubectl") is None:
        return [{"name": "kubernetes fleet", "note": "not measured: kubectl is not installed"}]
    try:
        return anyio.run(measure, parts or list(PARTS))
    except AssetsMissing as error:
        return [{"name": "kubernetes fleet", "note": f"not measured: {error}"}]


if __name__ == "__main__":
    for row in run(sys.argv[1:]):
        print(row)
