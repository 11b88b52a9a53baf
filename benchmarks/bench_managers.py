"""Managers that die: what clients, instances and records notice of it.

`chaos` runs two `agentfleet serve` processes on one PostgreSQL and one real API server, asks them for changes all the
time, and every 20 s kills the one that leads most: mostly by SIGKILL, sometimes by SIGTERM, twice by a SIGSTOP of 60 s.
It tells how many requests were answered (each may be sent twice, to either address), how long fleets were without a
leader, whether a deposed one has written anything, and whether any size moved that nobody had asked for.

Their leases are Kubernetes' own, as in the deployment manifests, or rows of the database (`--leases database`).

`kills` is in `manager_kills`.

Run: `python -m benchmarks.bench_managers [chaos] [kills] [--minutes 10] [--kills 200] [--leases database]`; there is
`--only leave`, too. Chaos needs PostgreSQL and the programs of a control plane (`agentfleet.testing.kube`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyio

from agentfleet import AgentTemplate, BackendUnavailable, DeadlineExceeded, FleetSpec, NotFound, OperationRefused
from agentfleet.client import FleetClient
from agentfleet.events import Event
from agentfleet.kubespec import KubernetesOptions
from agentfleet.stores.sql import SqlJournal
from agentfleet.testing.kube import AssetsMissing, ControlPlane, KubeletOptions, KubeletProcess
from agentfleet.testing.kube.apiclient import ApiClient
from agentfleet.testing.postgres import Postgres, PostgresMissing
from agentfleet.testing.serving import ServedManager
from benchmarks import manager_kills
from benchmarks.manager_kills import Killed

FLEETS, SIZE = 6, 8
EVERY = 20.0
FROZEN = 60.0
ASKERS = 6
SEEN_WITHIN = 2.0
"""Seconds within which a watch shows what was written, on a machine that has all of this to do."""
Row = dict[str, object]
LeaseKind = Literal["kubernetes", "database"]


@dataclass
class Asked:
    """What clients saw."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Every size that was ever asked for."""

    async def ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """One request; a refusal is an answer, too."""
        began = time.perf_counter()
        try:
            answer = await call()
        except (BackendUnavailable, DeadlineExceeded) as error:
            self.failed.append(f"{type(error).__name__}: {error}")
            return None
        except (OperationRefused, NotFound):
            answer = None
        self.answered += 1
        self.spans.append(time.perf_counter() - began)
        return answer

    @property
    def availability(self) -> float:
        """Share of requests that were answered."""
        return self.answered / (self.answered + len(self.failed))


def spec(number: int) -> FleetSpec:
    """A fleet of small agents on Kubernetes."""
    kubernetes = KubernetesOptions(image="agent:{version}")
    template = AgentTemplate(command=("agent",), port=8080, cpu="10m", memory="16Mi", drain=2.0, kubernetes=kubernetes)
    return FleetSpec(name=f"fleet-{number}", template=template, replicas=SIZE)


# ------------------------------------------------------------------------------------------------ chaos


@dataclass
class Blow:
    """What was done to a manager, when, and what it led."""

    seen: float
    """When it was begun to be looked who leads: whoever takes a fleet after that counts."""
    at: float
    kind: str
    victim: str
    led: frozenset[str]


class Told(NamedTuple):
    """What a Deployment was told at a time: its size, and the epoch that is stamped on it."""

    at: float
    size: int
    epoch: int


@dataclass
class Platform:
    """Two managers, what they share, and what happens to them."""

    managers: dict[str, ServedManager]
    journal_url: str
    plane: ControlPlane
    namespace: str
    asked: Asked = field(default_factory=Asked)
    blows: list[Blow] = field(default_factory=list)
    seen: dict[str, list[Told]] = field(default_factory=dict)
    """Of each Deployment every size and epoch that it ever had."""

    def client(self) -> FleetClient:
        """One that may ask either."""
        return FleetClient(*(each.url for each in self.managers.values()), timeout=10.0)


@asynccontextmanager
async def platform(folder: Path, leases: LeaseKind) -> AsyncIterator[Platform]:
    """Everything real: database, control plane, nodes, two managers."""
    with Postgres() as server:
        url = server.database()
        async with ControlPlane() as plane, KubeletProcess(plane.access, KubeletOptions(nodes=4)):
            namespace = await plane.namespace()
            config = plane.access.write(folder / "kubeconfig", namespace=namespace)
            managers = {
                identity: ServedManager(
                    database=url,
                    backend="kubernetes",
                    folder=folder,
                    identity=identity,
                    options=["--leases", leases, "--namespace", namespace],
                    env={"KUBECONFIG": str(config)},
                )
                for identity in ("ann", "ben")
            }
            for each in managers.values():
                await each.start()
            try:
                yield Platform(managers, url, plane, namespace)
            finally:
                for each in managers.values():
                    each.thaw()
                    await each.leave(within=15)


async def keep_asking(there: Platform, seed: int, done: anyio.Event) -> None:
    """One client: mostly looks, sometimes changes something."""
    rng = random.Random(seed)
    async with there.client() as client:
        while not done.is_set():
            await _ask_one(there.asked, client, rng)
            await anyio.sleep(rng.uniform(0.02, 0.2))


async def _ask_one(asked: Asked, client: FleetClient, rng: random.Random) -> None:
    name, dice = f"fleet-{rng.randrange(FLEETS)}", rng.random()
    if dice < 0.5:
        await asked.ask(partial(client.cluster, name))
    elif dice < 0.75:
        await asked.ask(partial(_all, client.clusters()))
    elif dice < 0.85:
        await asked.ask(partial(client.health, name))
    elif dice < 0.95:
        size = rng.randint(4, 12)
        asked.sizes[name].append(size)  # it may be done although nobody heard of it
        made = await asked.ask(partial(client.scale, name, size))
        asked.operations += [made.operation_id] if made is not None else []
    else:
        made = await asked.ask(partial(client.deploy, name, str(rng.randint(1, 5))))
        asked.operations += [made.operation_id] if made is not None else []


async def _all(pages: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in pages]


async def watch_deployments(there: Platform) -> None:
    """Take down each size and epoch that a Deployment ever has; a watch passes over none."""
    path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments"
    async with ApiClient(there.plane.access) as api:
        since = "0"  # none is there yet
        while True:
            async for line in api.lines(f"{path}?watch=1&resourceVersion={since}", silence=600):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise RuntimeError(f"the watch of the Deployments ended, so sizes may be missed: {event['object']}")
                since = event["object"]["metadata"]["resourceVersion"]
                _take_down(there.seen, event["object"])


def _take_down(seen: dict[str, list[Told]], deployment: dict[str, Any]) -> None:
    metadata = deployment["metadata"]
    epoch = int(metadata.get("annotations", {}).get("agentfleet.io/epoch", "0"))
    told = Told(time.time(), deployment["spec"].get("replicas", 1), epoch)
    story = seen.setdefault(metadata["name"], [])
    if not story or story[-1][1:] != told[1:]:
        story.append(told)


async def strike(there: Platform, kind: str, frozen: float) -> None:
    """Hit the manager that leads most, and have it come back."""
    seen = time.time()
    with SqlJournal(there.journal_url) as journal:
        leads: dict[str, set[str]] = {identity: set() for identity in there.managers}
        for number in range(FLEETS):
            state = journal.last_state(f"fleet-{number}", "state.leader")
            if state is not None and state.data["leads"]:
                leads[state.data["identity"].rpartition("-")[0]].add(f"fleet-{number}")
    victim = max(leads, key=lambda identity: len(leads[identity]))
    manager = there.managers[victim]
    there.blows.append(Blow(seen, time.time(), kind, victim, frozenset(leads[victim])))
    print(f"  {kind} {victim}, which leads {len(leads[victim])}", file=sys.stderr, flush=True)
    if kind == "freeze":
        manager.freeze()
        await anyio.sleep(frozen)
        manager.thaw()
        return
    if kind == "kill":
        manager.kill()
    else:
        manager.ask_to_leave()
    await manager.ended()
    await manager.start()


async def chaos(
    minutes: float,
    every: float = EVERY,
    frozen: float = FROZEN,
    leases: LeaseKind = "kubernetes",
    only: str | None = None,
) -> Found:
    """See the module; `only` is the one kind of blow that is struck."""
    with tempfile.TemporaryDirectory() as place:
        async with platform(Path(place), leases) as there, there.client() as client:
            for number in range(FLEETS):
                made = await client.create(spec(number), namespace=there.namespace)
                there.asked.sizes[f"fleet-{number}"] = [SIZE]
                await client.finished(made.operation_id, timeout=120)
            done = anyio.Event()
            async with anyio.create_task_group() as tasks:
                watcher = anyio.CancelScope()

                async def watch() -> None:
                    with watcher:
                        await watch_deployments(there)

                tasks.start_soon(watch)
                for seed in range(ASKERS):
                    tasks.start_soon(keep_asking, there, seed, done)
                count = max(1, round(minutes * 60 / every))
                for kind in blows(count) if only is None else [only] * count:
                    due = anyio.current_time() + every
                    await strike(there, kind, frozen)
                    await anyio.sleep(max(0.0, due - anyio.current_time()))
                done.set()
                ends = await settle(there, client)
                watcher.cancel()
            return look_back(there, ends)


def blows(count: int) -> list[str]:
    """What is done in turn: mostly kills, every third a good-bye, and two long pauses."""
    made = ["leave" if number % 3 == 2 else "kill" for number in range(count)]
    for third in (count // 3, 2 * count // 3):
        made[next((place for place in range(third, count) if made[place] == "kill"), third)] = "freeze"
    return made


async def settle(there: Platform, client: FleetClient) -> Counter[str]:
    """Wait until everything that was accepted has ended; how it has."""
    ends: Counter[str] = Counter()
    for id in there.asked.operations:
        ends[(await client.finished(id, timeout=180)).status] += 1
    return ends


@dataclass
class Found:
    """What was found.

    Attributes:
        asked: What clients saw.
        ends: How operations have ended.
        leaderless: By what was done: the seconds that each fleet of the victim's had no leader, infinite where it got
            none any more.
        left: Of those that were asked to leave: the seconds until each of their fleets was given up.
        stale: Events in the journal that came after one of a later epoch.
        went_back: Times that a Deployment's epoch fell.
        strange: Sizes that nobody asked for: events, and by fleet what its Deployment was told.
    """

    asked: Asked
    ends: Counter[str]
    leaderless: dict[str, list[float]]
    left: list[float]
    stale: int
    went_back: int
    strange: list[Any]


def unasked(story: list[Told], asked: list[int], decided: list[tuple[float, int]]) -> list[int]:
    """Sizes that nobody asked for.

    A fleet that shrinks may pass others on its way down, as its governor admits: on the way to what was decided last
    when the size before was told, or to what has been decided since. A size is told up to `SEEN_WITHIN` seconds before
    it is seen here.

    Args:
        story: Each size that the Deployment was told, in order.
        asked: Each size that a client asked for; it may be told at any time, as its operation may wait.
        decided: When which size was decided, in order.
    """
    found = []
    for before, told in pairwise([Told(0.0, max(asked), 0), *story]):
        since = before.at - SEEN_WITHIN
        in_force = [size for at, size in decided if at <= since][-1:]
        in_force += [size for at, size in decided if since < at <= told.at]
        in_force += [size for at, size in decided if at > told.at][:1]  # it may be told before it is recorded
        on_its_way = told.size < before.size and any(size < told.size for size in in_force)
        if told.size not in asked and not on_its_way:
            found.append(told.size)
    return found


def look_back(there: Platform, ends: Counter[str]) -> Found:
    """Compare what was recorded and seen with what was asked."""
    with SqlJournal(there.journal_url) as journal:
        events = list(journal.read())
    scaled = [each for each in events if each.kind == "fleet.scaled"]
    strange: list[Any] = [each for each in scaled if not _as_asked(each, there.asked.sizes)]
    strange += [each for each in events if each.kind == "fleet.foreign_change"]  # nobody else is there
    for name, story in there.seen.items():
        decided = [(each.at, each.data["to"]) for each in scaled if each.fleet == name]
        strange += [(name, size) for size in unasked(story, there.asked.sizes[name], decided)]
    epochs = [[told.epoch for told in story] for story in there.seen.values()]
    return Found(
        there.asked,
        ends,
        {kind: after(there, events, kind, "manager.leads") for kind in ("kill", "leave", "freeze")},
        after(there, events, "leave", "manager.left"),
        stale(events),
        sum(later < sooner for story in epochs for sooner, later in pairwise(story)),
        strange,
    )


def _as_asked(scaled: Event, asked: dict[str, list[int]]) -> bool:
    """Whether a change of size is one that a client asked for."""
    return scaled.data["by"] == "operator" and scaled.data["to"] in asked[scaled.fleet]


def after(there: Platform, events: list[Event], kind: str, until: str) -> list[float]:
    """Seconds from each blow of a kind to the next such event of each fleet that its victim led; infinite without."""
    spans = []
    for blow in there.blows:
        for fleet in blow.led if blow.kind == kind else ():
            own = (each.at for each in events if each.fleet == fleet and each.kind == until)
            spans.append(max(0.0, next((at for at in own if at > blow.seen), math.inf) - blow.at))
    return spans


def stale(events: list[Event]) -> int:
    """Events that came after one of a later epoch of the same fleet."""
    highest: dict[str, int] = {}
    found = 0
    for each in events:
        if each.epoch:
            found += each.epoch < highest.get(each.fleet, 0)
            highest[each.fleet] = max(highest.get(each.fleet, 0), each.epoch)
    return found


# ------------------------------------------------------------------------------------------------ figures


def run(minutes: float = 10.0, kills: int = 200) -> list[Row]:
    """The figures of both, `chaos` with the leases that the deployment manifests use."""
    return [*_chaos(minutes, "kubernetes"), *rows_of_kills(anyio.run(manager_kills.kills, kills))]


def _chaos(minutes: float, leases: LeaseKind, only: str | None = None) -> list[Row]:
    try:
        return rows_of(anyio.run(chaos, minutes, EVERY, FROZEN, leases, only), leases)
    except (AssetsMissing, PostgresMissing) as error:
        return [{"name": "managers that die", "note": f"not measured: {error}"}]


def rows_of(found: Found, leases: LeaseKind) -> list[Row]:
    """What a run of `chaos` has found."""
    asked, spans = found.asked, sorted(found.asked.spans)
    p99, failed = spans[int(0.99 * len(spans))], "; ".join(asked.failed[:3])
    availability = f"availability {asked.availability:.5%}, goal: >= 99.95 %; {len(asked.failed)} failed {failed}"
    rows: list[Row] = [{"name": f"requests ({leases})", "size": len(spans), "seconds": p99, "note": availability}]
    for kind, goal in (("kill", 10.0), ("leave", 1.0), ("freeze", 10.0)):
        if gone := found.leaderless[kind]:
            never = sum(map(math.isinf, gone))
            note = f"worst of {len(gone)}, median {statistics.median(gone):.2f} s, goal: < {goal:g} s; never: {never}"
            if kind == "leave":
                note += f"; given up after {statistics.median(found.left):.2f} s, at worst {max(found.left):.2f} s"
            rows.append({"name": f"leaderless after {kind} ({leases})", "seconds": max(gone), "note": note})
    stale = f"{found.stale} events and {found.went_back} Deployments of an older epoch, goal: 0"
    rows.append({"name": f"operations ({leases})", "size": sum(found.ends.values()), "note": f"{dict(found.ends)}"})
    rows.append({"name": f"stale writes ({leases})", "note": stale})
    rows.append({"name": f"sizes that nobody asked for ({leases})", "note": f"{found.strange or 'none'}"})
    return rows


def rows_of_kills(found: Killed) -> list[Row]:
    """What a run of `kills` has found."""
    kept = f"{found.operations} operations and {found.revisions} revisions acknowledged; lost: {found.lost or 'none'}"
    starts = f"worst, median {statistics.median(found.starts):.2f} s, goal: < 5 s"
    return [
        {"name": "killed, kept", "size": len(found.starts), "note": f"{kept}; the fleet is {found.phase} in the end"},
        {"name": "killed, back after", "size": len(found.starts), "seconds": max(found.starts), "note": starts},
    ]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["chaos", "kills"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--leases", choices=("kubernetes", "database"), default="kubernetes")
    parser.add_argument("--only", choices=("kill", "leave", "freeze"), help="strike in this one way")
    given = parser.parse_args()
    rows = _chaos(given.minutes, given.leases, given.only) if "chaos" in given.parts else []
    if "kills" in given.parts:
        rows += rows_of_kills(anyio.run(manager_kills.kills, given.kills))
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
