"""What a copy of 5,000 pods of a real API server costs: ours beside kubernetes-asyncio's typed models.

Times are CPU seconds of this process, so that the server and other work on the machine do not count. Needs etcd and
kube-apiserver (see `agentfleet.testing.kube`); takes about a minute and a half, most of it to create the pods.

Run: `python benchmarks/bench_kube_sync.py`
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import msgspec

from agentfleet.backends.kubernetes import MERGE_PATCH, PODS, Connection, Informer, KubeConfig, Pod
from agentfleet.backends.kubernetes.informer_cache import ObjectCache
from agentfleet.backends.kubernetes.watching import Modified, event_reader
from agentfleet.testing.kube import AssetsMissing, ControlPlane, PlaneOptions

PODS_WANTED = 5_000
ROUNDS = 5
EVENTS = 2_000
WRITERS = 32


def make_pod(number: int) -> dict[str, Any]:
    """A pod as a fleet's Deployment makes it: about 5.7 KB as the server tells it."""
    env: list[dict[str, Any]] = [
        {"name": f"AGENT_SETTING_{each}", "value": f"https://models.example.com/v1/{each:x}"} for each in range(6)
    ]
    env.append({"name": "API_KEY", "valueFrom": {"secretKeyRef": {"name": "model", "key": "key"}}})
    labels = {
        "app.kubernetes.io/name": "agent",
        "app.kubernetes.io/instance": "researchers",
        "app.kubernetes.io/version": "1.4.0",
        "app.kubernetes.io/managed-by": "agentfleet",
        "agentfleet.io/fleet": "researchers",
        "pod-template-hash": "7c6b8d9f54",
    }
    probe = {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 10, "failureThreshold": 3}
    container = {
        "name": "agent",
        "image": "registry.example.com/agents/researcher:1.4.0",
        "env": env,
        "ports": [{"containerPort": 8080, "name": "http"}],
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        "readinessProbe": probe,
        "livenessProbe": probe,
    }
    owner = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": "researchers-7c6b8d9f54",
        "uid": "3f0c9a0e-9d8e-4c35-8c39-52a4a2f1a7d1",
        "controller": True,
        "blockOwnerDeletion": True,
    }
    name = f"researchers-7c6b8d9f54-{number:05d}"
    meta = {"name": name, "labels": labels, "ownerReferences": [owner]}
    return {"metadata": meta, "spec": {"schedulerName": "nobody", "containers": [container]}}


def make_status(number: int) -> dict[str, Any]:
    """The status that a kubelet reports of a running pod."""
    now = "2026-11-23T22:00:00Z"
    conditions = [
        {"type": each, "status": "True", "lastTransitionTime": now, "lastProbeTime": None}
        for each in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    ]
    container = {
        "name": "agent",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "image": "registry.example.com/agents/researcher:1.4.0",
        "imageID": "registry.example.com/agents/researcher@sha256:" + "4f" * 32,
        "containerID": f"containerd://{number:064x}",
        "state": {"running": {"startedAt": now}},
        "lastState": {},
    }
    ip = f"10.244.{number >> 8}.{number & 255}"
    return {
        "status": {
            "phase": "Running",
            "conditions": conditions,
            "containerStatuses": [container],
            "hostIP": "10.0.0.1",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "startTime": now,
        }
    }


async def fill(connection: Connection, namespace: str) -> None:
    """Create the pods and let them run, as far as the API server can tell."""
    numbers = iter(range(PODS_WANTED))

    async def write(numbers: Iterator[int]) -> None:
        for number in numbers:
            pod = make_pod(number)
            await connection.request("POST", PODS.path(namespace), body=msgspec.json.encode(pod), timeout=60)
            path = PODS.path(namespace, pod["metadata"]["name"], "status")
            status = msgspec.json.encode(make_status(number))
            await connection.request("PATCH", path, body=status, content_type=MERGE_PATCH, timeout=60)

    async with anyio.create_task_group() as tasks:
        for _ in range(WRITERS):
            tasks.start_soon(write, numbers)


@dataclass
class Blocks:
    """The longest turn of the event loop, in seconds by the wall and in CPU seconds of its thread."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def watched_loop() -> Iterator[Blocks]:
    """Measure every turn that any task or callback takes."""
    found = Blocks()
    real = asyncio.Handle._run

    def run(handle: asyncio.Handle) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            real(handle)
        finally:
            found.wall = max(found.wall, time.perf_counter() - wall)
            found.cpu = max(found.cpu, time.thread_time() - cpu)

    asyncio.Handle._run = run  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        asyncio.Handle._run = real  # type: ignore[method-assign]


async def cpu_of(work: Callable[[], Awaitable[None]], rounds: int = ROUNDS) -> float:
    """CPU seconds of this process for one round of the work: the median of several."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        begun = time.process_time()
        await work()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


async def watch_line(connection: Connection, namespace: str) -> bytes:
    """One event of a real watch, as it came."""
    query: dict[str, str | int | bool] = {
        "watch": True,
        "fieldSelector": "metadata.name=researchers-7c6b8d9f54-00000",
        "timeoutSeconds": 5,
    }
    begin = b""
    async with connection.stream(PODS.path(namespace), query=query, silence=10) as pieces:
        async for piece in pieces:
            begin += piece
            if b"\n" in begin:
                break
    return begin.partition(b"\n")[0].replace(b'"ADDED"', b'"MODIFIED"', 1)


def event_cost(line: bytes) -> float:
    """CPU seconds to read one event and to take it into the copy of 5,000 pods."""
    read = event_reader(PODS)
    event = read(line)
    assert isinstance(event, Modified)
    version = event.object.metadata.resource_version.encode()
    lines = [line.replace(version, str(int(version) + 1 + each).encode()) for each in range(EVENTS)]
    cache: ObjectCache[Pod] = ObjectCache()
    cache.put(event.object)
    begun = time.process_time()
    for each in lines:
        event = read(each)
        assert isinstance(event, Modified)
        assert cache.put(event.object)
    return (time.process_time() - begun) / EVENTS


async def typed(path: str, namespace: str, line: bytes) -> tuple[float, Blocks, float]:
    """kubernetes-asyncio's own list and watch event: CPU seconds, longest turn, CPU seconds."""
    from kubernetes_asyncio import client, config, watch  # noqa: PLC0415 - half a second of import

    configuration = client.Configuration()
    await config.load_kube_config(path, client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        core = client.CoreV1Api(api)
        await core.list_namespaced_pod(namespace, limit=1)

        async def list_all() -> None:
            assert len((await core.list_namespaced_pod(namespace)).items) == PODS_WANTED

        with watched_loop() as blocks:
            seconds = await cpu_of(list_all, rounds=2)
        stream = watch.Watch()
        await stream.close()
        stream._api_client = api
        text = line.decode()
        begun = time.process_time()
        for _ in range(EVENTS // 10):
            stream.unmarshal_event(text, client.V1Pod)  # type: ignore[arg-type]  # its stub is wrong
        event = (time.process_time() - begun) / (EVENTS // 10)
    return seconds, blocks, event


async def kept(connection: Connection, namespace: str) -> float:
    """Bytes kept for each pod, all of the informer's own included."""
    async with Informer(connection, PODS, namespace=namespace, labels="app.kubernetes.io/name=nobody") as warm:
        await warm.wait_synced()
    gc.collect()
    tracemalloc.start()
    try:
        async with Informer(connection, PODS, namespace=namespace) as pods:
            await pods.wait_synced()
            await anyio.sleep(0.2)
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / len(pods.cache)
    finally:
        tracemalloc.stop()


async def measure() -> list[dict[str, object]]:
    """All figures, against one control plane."""
    options = PlaneOptions(controllers=("*", "-garbagecollector", "-podgc"))  # the owner of these pods does not exist
    async with ControlPlane(options) as plane:
        namespace = await plane.namespace()
        path = plane.kubeconfig()
        async with Connection(KubeConfig(path), qps=10_000, burst=10_000) as connection:
            await fill(connection, namespace)
            body = await connection.request("GET", PODS.path(namespace), query={"limit": 100})
            line = await watch_line(connection, namespace)

            async def sync() -> None:
                async with Informer(connection, PODS, namespace=namespace) as pods:
                    await pods.wait_synced()
                    assert len(pods.cache) == PODS_WANTED

            await sync()
            ours = await cpu_of(sync)
            longest = []
            for _ in range(ROUNDS):
                with watched_loop() as blocks:
                    await sync()
                    await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()  # the next collection is not a turn of this sync
                gc.collect()
                longest.append(blocks)
            begun = time.perf_counter()
            await sync()
            elapsed = time.perf_counter() - begun
            bytes_kept = await kept(connection, namespace)
        event = event_cost(line)
        theirs, their_blocks, their_event = await typed(str(path), namespace, line)
    wall, cpu = (statistics.median(getattr(each, kind) for each in longest) for kind in ("wall", "cpu"))
    worst = max(each.wall for each in longest)
    return [
        row("sync, ours", ours, f"{theirs / ours:.0f}x less CPU than typed; {elapsed:.2f} s elapsed"),
        row("sync, typed", theirs, f"{len(body) / 100 / 1000:.1f} KB a pod"),
        row("watch event, ours", event, f"{their_event / event:.0f}x less CPU than typed; {len(line)} bytes"),
        row("watch event, typed", their_event, ""),
        row(
            "longest turn, ours",
            cpu,
            f"CPU, median of {ROUNDS}; by the wall {wall * 1e3:.1f} ms, worst {worst * 1e3:.1f}",
        ),
        row("longest turn, typed", their_blocks.cpu, f"by the wall {their_blocks.wall:.1f} s"),
        {"name": "kept for each pod", "size": PODS_WANTED, "per_item": f"{bytes_kept / 1000:.2f} KB", "note": ""},
    ]


def row(name: str, seconds: float, note: str) -> dict[str, object]:
    """One line of the table."""
    return {"name": name, "size": PODS_WANTED, "seconds": seconds, "note": note}


def run() -> list[dict[str, object]]:
    """The rows of `make bench`."""
    try:
        return anyio.run(measure)
    except AssetsMissing as error:
        return [{"name": "not measured", "note": str(error)}]


if __name__ == "__main__":
    for each in run():
        print(each)
