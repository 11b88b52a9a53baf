"""How fast real processes are started, measured, adopted and stopped, and how long the event loop is held up.

Run: `python benchmarks/bench_process.py [COUNT]` (1,000 by default). Prints one row a line.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import anyio

from agentfleet.backends.base import Creation, Snapshot
from agentfleet.backends.process import ProcessBackend
from agentfleet.specs import AgentTemplate

Row = dict[str, object]
TEMPLATE = AgentTemplate(command=("sleep", "3600"))


@asynccontextmanager
async def held_up(rows: list[Row], name: str, count: int) -> AsyncGenerator[None, None]:
    """Note how long something took, and the longest time that the event loop did not get round to other tasks."""
    worst = 0.0

    async def beat() -> None:
        nonlocal worst
        while True:
            before = time.perf_counter()
            await anyio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before - 0.001)

    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        yield
        took = time.perf_counter() - started
        group.cancel_scope.cancel()
    note = f"loop held up at most {worst * 1000:.1f} ms"
    rows.append({"name": name, "size": count, "seconds": took, "note": note})


def run(count: int = 1000) -> list[Row]:
    """The figures."""
    return anyio.run(measure, count)


async def measure(count: int) -> list[Row]:
    """Measure with `count` processes that only sleep."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        try:
            await start_and_measure(rows, state, count)
        finally:
            with anyio.CancelScope(shield=True):
                await adopt_and_stop(rows, state)  # also after a failure: nothing may be left
    return rows


async def start_and_measure(rows: list[Row], state: Path, count: int) -> None:
    """Start `count` processes, measure them twice, and leave them running."""
    async with ProcessBackend(state_dir=state, on_close="keep") as backend:
        async with held_up(rows, "start", count), anyio.create_task_group() as group:
            for slot in range(count):
                creation = Creation(id=f"i{slot}", fleet="bench", slot=slot, revision=1, template=TEMPLATE)
                group.start_soon(backend.create, creation)
        for attempt in ("first", "second"):
            await anyio.sleep(0.6)
            async with held_up(rows, f"usage, {attempt}", count):
                measured = await backend.usage("bench")
            assert len(measured) == count


async def adopt_and_stop(rows: list[Row], state: Path) -> None:
    """Take over what runs, and stop it by leaving."""
    started = time.perf_counter()
    async with ProcessBackend(state_dir=state) as backend, aclosing(backend.watch("bench")) as watcher:
        snapshot = await anext(watcher)
        assert isinstance(snapshot, Snapshot)
        adopted = time.perf_counter()
    count = len(snapshot.instances)
    times = {"adopt": adopted - started, "stop by leaving": time.perf_counter() - adopted}
    rows += [{"name": name, "size": count, "seconds": took} for name, took in times.items()]


if __name__ == "__main__":
    for row in run(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(row)
