"""1,000 instances on 20 nodes of a real control plane: the time that we add to what that needs by itself.

Every operation is done several times in turns on the same plane: by kubectl on a Deployment with the same pods, Service
and disruption budget that nobody manages, and by a `Fleet`, which may do what examples/kubernetes/rbac.yaml grants and
no more. Both are timed by the same onlooker, a process that watches the Deployments (`kube_onlooker`). Then what a
steady fleet costs the API server, how long crashes and a lost node stay unseen, and who dies when a fleet with busy
instances is halved.

The control plane, the nodes and the manager share this machine: where they use all of it, what the manager computes
and what the server encodes for its watch is time that the control plane lacks. Each row tells the share of CPU.

Run: `python -m benchmarks.bench_kube_fleet [lifecycle] [steady] [faults] [outage] [busy]`; all of it takes half
an hour. Needs the programs of a control plane (see `agentfleet.testing.kube`) and kubectl.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import time

import anyio

from agentfleet import Event
from agentfleet.testing.kube import AssetsMissing, Behaviour, ControlPlane, KubeletOptions, KubeletProcess
from benchmarks.kube_lifecycle import lifecycle
from benchmarks.kube_onlooker import Onlooker
from benchmarks.kube_world import LOOK, NAMESPACE, NODES, SIZE, Row, World, spec

STEADY = 120.0
ROUNDS = 10
OUTAGE = 45.0
"""Seconds; for longer than the 40 s after which the control plane takes silent nodes for lost when it is back."""

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
        since = len(world.journal.read())
        for victim in rng.sample(list(fleet.instances), 50):
            began = time.time()
            await world.nodes.crash(f"{world.namespace}/{victim.id}")
            seen = await _event(world, since, "instance.exited", victim.id)
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
        seen = await _event(world, since, "instance.lost")
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


async def _event(world: World, since: int, kind: str, instance: str | None = None) -> Event:
    """The first event of a kind in the journal from a position on, about one instance or about any."""
    with anyio.fail_after(60):
        async for event in world.journal.follow(after=since):
            if event.kind == kind and instance in (None, event.instance):
                return event
    raise AssertionError("unreachable: a journal has no end")


# ---------------------------------------------------------------------------------------------------- outage


async def outage(world: World) -> None:
    """The API server is killed; what comes to it afterwards, and how long until all is seen again.

    Then the same with a Deployment that nobody manages: what the control plane needs by itself until its nodes count
    as ready again, and their pods.
    """
    async with world.fleet(spec("fleet", SIZE)) as (fleet, connection):
        await fleet.deploy(timeout=300)
        await fleet.ready(timeout=120)
        before = {each.id for each in fleet.instances}
        await _dead_apiserver(world)
        calls, began = connection.traffic.calls, time.monotonic()
        at: list[float] = []

        async def look() -> None:
            at.append(await world.at("fleet", SIZE + 20))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            await fleet.scale(SIZE + 20)
            with anyio.fail_after(120):
                while fleet.status()["good"] != SIZE + 20:
                    await anyio.sleep(LOOK)
            seconds = time.monotonic() - began
        kept = len(before & {each.id for each in fleet.instances})
        ours, calls = at[0] - began, connection.traffic.calls - calls
        await fleet.delete(timeout=300)
    await world.no_pods()

    text = await world.plain("plain", SIZE)
    await world.kubectl("apply", "-f", "-", given=text)
    await world.at("plain", SIZE)
    await _dead_apiserver(world)
    began = time.monotonic()
    await world.kubectl("scale", "deployment", "plain", f"--replicas={SIZE + 20}")
    theirs = await world.at("plain", SIZE + 20) - began
    await world.kubectl("delete", "-f", "-", given=text)
    await world.no_pods()
    note = f"the Deployment after {ours:.1f} s, one that nobody manages after {theirs:.1f} s"
    note += f"; {calls} calls; {kept} of {SIZE} instances are the same"
    world.say(f"converged after an outage of {OUTAGE:.0f} s", seconds, SIZE, note)


async def _dead_apiserver(world: World) -> None:
    """An outage; returns when the API server answers again."""
    world.plane.kill_apiserver()
    await anyio.sleep(OUTAGE)
    await world.plane.restart_apiserver()


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

    text = await world.plain("plain", 200)
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
        namespace = await plane.namespace(NAMESPACE)
        config = plane.kubeconfig(namespace=namespace)
        async with Onlooker(config, namespace) as onlooker:
            world = World(plane, nodes, namespace, config, onlooker)
            await world.permit()
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
