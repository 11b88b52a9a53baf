"""What the REST API answers in, with 100 fleets of 1,000 instances each in its manager, beside a bare starlette route.

Run: `python -m benchmarks rest`, or `python -m benchmarks.bench_rest [FLEETS [INSTANCES [ROUNDS]]]`. The server is a
process of its own (the manager, its simulated engine and the API in one event loop), on SQLite and on PostgreSQL; the
bare route is served by another one, by the same uvicorn. One client asks one request after the other without a pause,
and once at a pace that people and schedulers have.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import psutil

from agentfleet.testing.postgres import Postgres

FLEETS, INSTANCES, ROUNDS = 100, 1000, 300
PACE = 0.2
"""Seconds between two paced requests."""
ROOT = Path(__file__).parent.parent
TOKEN = "benchmark-token-0123456789abcdef0123456789"
LIMITS = {"rate": 1e6, "burst": 1_000_000}
PATIENCE = 1800.0
Row = dict[str, object]
Ask = Callable[[int], Coroutine[Any, Any, None]]


def run(fleets: int = FLEETS, instances: int = INSTANCES, rounds: int = ROUNDS, *, only: str = "") -> list[Row]:
    """The figures; of one database alone, if `only` names it."""
    with tempfile.TemporaryDirectory() as folder, Postgres(fsync=True) as postgres:
        place = Path(folder)
        (place / "tokens").write_text(f"bench admin * {TOKEN}\n")
        rows: list[Row] = []
        for name, url in (("SQLite", f"sqlite:///{place / 'fleet.db'}"), ("PostgreSQL", postgres.database())):
            if only in ("", name):
                rows += anyio.run(_measure, name, url, place, (fleets, instances), rounds)
        return rows


@contextmanager
def _process(*words: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server, by the address that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        yield session


async def _measure(name: str, url: str, place: Path, size_of: tuple[int, int], rounds: int) -> list[Row]:
    fleets, instances = size_of
    served = _process("tests.server.served", url, str(place / "tokens"), json.dumps({"limits": LIMITS}))
    bare = _process("benchmarks.bench_rest", "bare")
    with served as (address, process), bare as (beside, _):
        async with _session() as session:
            size = f"{fleets} × {instances}"
            began = time.perf_counter()
            await _fill(session, address, fleets, instances)
            filled = time.perf_counter() - began
            process.cpu_percent()
            await anyio.sleep(10)
            idle = process.cpu_percent()

            asked = itertools.count()

            async def scale(_: int) -> None:
                number = next(asked)
                path = f"{address}/api/v1/clusters/f{number % fleets}/scale"
                body = {"replicas": instances + number // fleets % 2}
                async with session.put(path, json=body) as answer:
                    assert answer.status == 202, await answer.text()
                    await answer.read()

            def get(path: str) -> Ask:
                async def ask(_: int) -> None:
                    async with session.get(path) as answer:
                        assert answer.status == 200, await answer.text()
                        await answer.read()

                return ask

            rows = [
                {
                    "name": f"{name}: brought up",
                    "size": size,
                    "seconds": filled,
                    "note": f"at rest {idle:.0f} % of a core",
                }
            ]
            paced = await _times(scale, rounds, every=PACE)
            rows.append(_row(f"{name}: PUT scale, {1 / PACE:g} a second", size, paced, "p99 < 100 ms"))
            cases: list[tuple[str, Ask, str]] = [
                ("PUT scale, without a pause", scale, "p99 < 100 ms"),
                ("GET clusters", get(f"{address}/api/v1/clusters?limit=1000"), "p99 < 50 ms"),
                ("GET cluster", get(f"{address}/api/v1/clusters/f1"), ""),
                ("GET health", get(f"{address}/api/v1/clusters/f1/health"), ""),
                ("GET 1,000 instances", get(f"{address}/api/v1/clusters/f1/instances?limit=1000"), ""),
                ("GET livez", get(f"{address}/livez"), "neither token nor store"),
                ("bare starlette", get(f"{beside}/"), "another process, at rest"),
            ]
            for what, ask, goal in cases:
                rows.append(_row(f"{name}: {what}", size, await _times(ask, rounds), goal))
            return rows


async def _fill(session: aiohttp.ClientSession, address: str, fleets: int, instances: int) -> None:
    """Have the fleets made, and wait until all are as they should be."""
    for number in range(fleets):
        spec = {"name": f"f{number}", "template": {"command": ["agent"]}, "replicas": instances}
        async with session.post(f"{address}/api/v1/clusters", json={"spec": spec}) as answer:
            assert answer.status == 202, await answer.text()
    with anyio.fail_after(PATIENCE):
        while True:
            async with session.get(f"{address}/api/v1/clusters?limit=1000") as answer:
                seen = (await answer.json())["items"]
            if sum(each["status"] == "running" and each["ready"] == instances for each in seen) == fleets:
                return
            await anyio.sleep(1)


async def _times(ask: Ask, rounds: int, *, every: float = 0.0) -> list[float]:
    for number in range(5):
        await ask(number)
    found = []
    for number in range(rounds):
        began = time.perf_counter()
        await ask(number)
        found.append(time.perf_counter() - began)
        if every:
            await anyio.sleep(max(0.0, began + every - time.perf_counter()))
    return found


def _row(name: str, size: str, times: list[float], goal: str) -> Row:
    cuts = statistics.quantiles(times, n=100)
    p50, p90, p99 = (f"{cuts[place] * 1000:.1f}" for place in (49, 89, 98))
    note = f"p50 {p50}, p90 {p90}, p99 {p99}, most {max(times) * 1000:.0f} ms"
    return {"name": name, "size": size, "seconds": cuts[98], "note": f"{note}; {goal}".rstrip("; ")}


def _serve_bare() -> None:
    """A route that does nothing, by the same server."""
    import uvicorn  # noqa: PLC0415
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.responses import JSONResponse  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    from agentfleet.server.listening import bind  # noqa: PLC0415

    async def hello(_: Request) -> JSONResponse:
        return JSONResponse({"hello": "world"})

    with bind("127.0.0.1", 0, loopback=True) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(Starlette(routes=[Route("/", hello)]), access_log=False, log_config=None)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _serve_bare()
    else:
        numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
        names = [word for word in sys.argv[1:] if not word.isdigit()]
        for row in run(*(*numbers, *(FLEETS, INSTANCES, ROUNDS)[len(numbers) :]), only="".join(names)):
            print(row)
