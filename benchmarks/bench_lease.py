"""How fast a lease changes hands on a real API server, what an old leader still writes, and what leading costs.

Run: `python -m benchmarks lease`, or `python -m benchmarks.bench_lease [ROUNDS]` (10 by default). The processes are
those of `tests/kube/test_lease_processes.py`: two managers that write a register as fast as they can while they lead.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import psutil
from tests.kube.test_lease_processes import Election, Manager, make_register

from agentfleet.backends.kubernetes.connection import Connection
from agentfleet.backends.kubernetes.credentials import KubeConfig
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.leadership import Leadership
from agentfleet.testing.kube import ControlPlane

ROUNDS = 10
PAUSE = 60.0
FLEETS = 100
WINDOW = 20.0
Row = dict[str, object]


def run(rounds: int = ROUNDS) -> list[Row]:
    """The figures."""
    plane = ControlPlane()
    anyio.run(plane.start)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            kubeconfig = plane.access.write(place / "kubeconfig")
            rows = [_changes(plane, place, case, rounds) for case in CASES]
            rows.append(_paused(plane, kubeconfig, place))
            rows.append(anyio.run(_cost, plane, kubeconfig))
            return rows
    finally:
        anyio.run(plane.stop)


def _killed(leader: Manager) -> float:
    return leader.signal(signal.SIGKILL)


def _leaves(leader: Manager) -> float:
    return leader.signal(signal.SIGTERM)


CASES = (("leader killed", "goal: < 10 s", _killed), ("leader leaves", "goal: < 1 s", _leaves))


def _changes(plane: ControlPlane, place: Path, case: tuple[str, str, Callable[[Manager], float]], rounds: int) -> Row:
    """From the signal to the next leader's first accepted write, at random moments of the lease."""
    name, goal, change = case
    register = name.replace(" ", "-")
    make_register(plane, register)
    election, rng, spans = Election(plane.access.write(place / register), register, place), random.Random(7), []
    try:
        leader, other = election.pair()
        for _ in range(rounds):
            time.sleep(1.0 + rng.uniform(0, 2))
            at = change(leader)
            spans.append(other.wait("wrote", after=at)["at"] - at)
            leader.process.wait(10)
            leader, other = other, election.join()
        stale = election.stale_writes()
    finally:
        election.end()
    note = f"p50; {min(spans):.2f} to {max(spans):.2f} s; {stale} stale writes; {goal}"
    return {
        "name": name,
        "size": None,
        "seconds": statistics.median(spans),
        "per_item": f"{rounds} times",
        "note": note,
    }


def _paused(plane: ControlPlane, kubeconfig: Path, place: Path) -> Row:
    """A leader is stopped for a minute in the middle of its work, and goes on."""
    make_register(plane, "paused")
    election = Election(kubeconfig, "paused", place)
    try:
        leader, other = election.pair()
        stopped = leader.signal(signal.SIGSTOP)
        took = other.wait("wrote", after=stopped)["at"] - stopped
        time.sleep(max(0.0, stopped + PAUSE - time.monotonic()))
        continued = leader.signal(signal.SIGCONT)
        knew = leader.wait("over", after=continued)["at"] - continued
        time.sleep(3.0)
        wrote, stale = len(other.said("wrote")), election.stale_writes()
    finally:
        election.end()
    note = f"{stale} stale writes beside {wrote} of the new leader; knows it {knew:.2f} s after; goal: 0"
    return {"name": "leader stopped for 60 s", "size": None, "seconds": took, "per_item": None, "note": note}


async def _cost(plane: ControlPlane, kubeconfig: Path) -> Row:
    """Many fleets, each with one manager that leads and one that waits."""
    servers = [psutil.Process(plane.programs[name].pid) for name in ("kube-apiserver", "etcd")]

    def used() -> float:
        return sum(times.user + times.system for times in (server.cpu_times() for server in servers))

    async with (
        Connection(KubeConfig(kubeconfig), qps=1000, burst=1000) as leading,
        Connection(KubeConfig(kubeconfig), qps=1000, burst=1000) as waiting,
        AsyncExitStack() as stack,
    ):
        for connection in (leading, waiting):
            for number in range(FLEETS):
                await stack.enter_async_context(Leadership(f"cost-{number}", KubernetesLeases(connection, "default")))
            await anyio.sleep(3.0)
        before, at = (leading.traffic.calls, waiting.traffic.calls, used(), time.process_time()), time.monotonic()
        await anyio.sleep(WINDOW)
        spent = time.monotonic() - at
        writes, reads = (leading.traffic.calls - before[0]) / spent, (waiting.traffic.calls - before[1]) / spent
        cores, own = (used() - before[2]) / spent, (time.process_time() - before[3]) / spent
        calls = f"{writes:.0f} writes/s, {reads:.0f} reads/s"
        note = f"{calls}; API server and etcd {cores:.2f} cores, both managers {own:.2f}"
    return {"name": "leading and waiting", "size": FLEETS, "seconds": None, "per_item": None, "note": note}


if __name__ == "__main__":
    for row in run(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        print(row)
