"""Deploy, 1,000 → 200 → 1,000, upgrade: by kubectl on a Deployment that nobody manages, and by a fleet, in turns."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio

from agentfleet import Fleet, RolloutFailed
from agentfleet.testing.kube import Behaviour
from benchmarks.kube_world import LOOK, SIZE, SMALL, World, cpu, spec

TURNS = 3
SETTLES = 8.0
"""Seconds between two operations: pods that leave have 5 s, and are no burden on what comes next."""
_AUTOGROUP = Path("/proc/self/autogroup")
OPERATIONS = ("deploy", "scale down", "scale up", "upgrade")


@dataclass
class Times:
    """What one side took, by operation: a figure for each turn."""

    shown: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until the onlooker saw the Deployment as wanted."""
    said: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until the side itself said so."""
    own: dict[str, list[float]] = field(default_factory=dict)
    """CPU seconds of this process meanwhile."""
    rest: dict[str, list[float]] = field(default_factory=dict)
    """CPU seconds of everything else that was started here."""

    async def measure(
        self, world: World, what: str, name: str, size: int, act: Callable[[], Awaitable[object]]
    ) -> None:
        """Have something done and note how long it took."""
        before = world.onlooker.generation(name)
        spent, began = cpu(), time.monotonic()
        shown = said = 0.0

        async def look() -> None:
            nonlocal shown
            shown = await world.onlooker.until(name, lambda seen: seen.generation > before and seen.shows(size))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            await act()
            said = time.monotonic()
        own, rest = (now - then for now, then in zip(cpu(), spent, strict=True))
        for kept, value in ((self.shown, shown - began), (self.said, said - began), (self.own, own), (self.rest, rest)):
            kept.setdefault(what, []).append(value)
        print(f"  {name} {what}: {shown - began:.2f} s, CPU {own:.1f} + {rest:.1f} s", file=sys.stderr, flush=True)
        await anyio.sleep(SETTLES)


async def lifecycle(world: World) -> None:
    """The sides in turns, in one order and the other; then a bad image."""
    theirs, ours, behind = Times(), Times(), Times()
    for turn in range(TURNS):
        sides: list[Callable[[], Awaitable[None]]] = [
            partial(_by_kubectl, world, theirs),
            partial(_by_fleet, world, ours, bad_image=turn == TURNS - 1),
        ]
        if may_stand_behind():
            sides.append(partial(_from_behind, world, behind))
        for side in sides if turn % 2 == 0 else reversed(sides):
            await side()
            await world.no_pods()
    for what in OPERATIONS:
        _say(world, what, ours, theirs)
    for what in OPERATIONS if behind.shown else ():
        _say(world, what, behind, theirs, how=", the manager behind the control plane")


def _say(world: World, what: str, ours: Times, theirs: Times, *, how: str = "") -> None:
    peer, took = statistics.median(theirs.shown[what]), statistics.median(ours.shown[what])
    turns = ", ".join(f"{mine / its:.2f}" for mine, its in zip(ours.shown[what], theirs.shown[what], strict=True))
    own, rest = statistics.median(ours.own[what]), statistics.median(ours.rest[what])
    note = f"kubectl {peer:.2f} s: {took / peer:.2f}x (turns: {turns})"
    note += f"; the fleet says so after {statistics.median(ours.said[what]):.2f} s"
    note += f"; CPU {own:.1f} s of {own + rest:.1f} s, with kubectl {statistics.median(theirs.rest[what]):.1f} s"
    world.say(f"{what}{how}", took, SIZE, note)


def may_stand_behind() -> bool:
    """Whether this process may take a low priority and give it up again."""
    return os.geteuid() == 0 and _AUTOGROUP.exists()


@contextmanager
def behind_the_control_plane() -> Iterator[None]:
    """Take only the CPU that others leave, as a manager on a machine of its own takes none of the control plane's.

    Linux shares the CPU between sessions first (`autogroup`, sched(7)), and then between the threads of each.
    """
    _AUTOGROUP.write_text("19")
    try:
        yield
    finally:
        _AUTOGROUP.write_text("0")


async def _from_behind(world: World, times: Times) -> None:
    with behind_the_control_plane():
        await _by_fleet(world, times, bad_image=False)


async def _by_fleet(world: World, times: Times, *, bad_image: bool) -> None:
    async with world.fleet(spec("fleet", SIZE)) as (fleet, _):

        def scale(size: int) -> Callable[[], Awaitable[None]]:
            async def run() -> None:
                await fleet.scale(size)
                await fleet.ready(timeout=300)

            return run

        await times.measure(world, "deploy", "fleet", SIZE, lambda: fleet.deploy(timeout=300))
        await times.measure(world, "scale down", "fleet", SMALL, scale(SMALL))
        await times.measure(world, "scale up", "fleet", SIZE, scale(SIZE))
        await times.measure(world, "upgrade", "fleet", SIZE, lambda: fleet.upgrade(version="2", timeout=600))
        if bad_image:
            await _bad_image(world, fleet)
        await fleet.delete(timeout=300)


async def _by_kubectl(world: World, times: Times) -> None:
    text, name = await world.plain("plain", SIZE), "plain"

    def scale(size: int) -> Callable[[], Awaitable[None]]:
        return lambda: world.kubectl("scale", "deployment", name, f"--replicas={size}")

    await times.measure(world, "deploy", name, SIZE, lambda: world.kubectl("apply", "-f", "-", given=text))
    await times.measure(world, "scale down", name, SMALL, scale(SMALL))
    await times.measure(world, "scale up", name, SIZE, scale(SIZE))
    set_image = ("set", "image", f"deployment/{name}", "agent=agent:2")
    await times.measure(world, "upgrade", name, SIZE, lambda: world.kubectl(*set_image))
    await world.kubectl("delete", "-f", "-", given=text)


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
    note = f"{least} served at the worst, {SIZE * 3 // 4} must; no progress for 60 s is the sign"
    world.say("bad image stopped and rolled back", time.perf_counter() - began, SIZE, note)
