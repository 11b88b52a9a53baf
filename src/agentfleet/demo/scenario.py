"""What happens in the demo, step by step. Steps that are done are journaled: a restarted manager goes on after them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import psutil

from agentfleet.demo.load import Day, task
from agentfleet.dispatch import Dispatcher
from agentfleet.errors import RolloutFailed
from agentfleet.events import Event
from agentfleet.fleet import Fleet

GOOD, BROKEN = "1.1.0", "2.0.0-broken"
TICK = 0.05
"""Seconds between two looks at the load."""


class Scenario:
    """The demo's director: it uses the fleet as a user would, and hurts it as the world would."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, day: Day) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._day = day
        past = fleet.journal.read(fleet=fleet.name)
        self._done = {event.data["step"] for event in past if event.kind == "demo.done"}
        began = [event.at for event in past if event.kind == "demo.day"]
        self._day_began = began[0] if began else None
        self._submitted = sum(event.kind == "task.submitted" for event in past)
        self._spiking = any(event.kind == "demo.spike" for event in past)
        self._over = anyio.Event()

    async def play(self) -> None:
        """Play every step that has not been played, with the load in the background."""
        async with anyio.create_task_group() as tasks:
            await self._step("deploy", self._fleet.deploy)
            tasks.start_soon(self._load)
            await self._step("configure", self._configure)
            await self._step("hurt", self._hurt)
            await self._step("spike", self._spike)
            await self._step("upgrade", self._upgrade)
            await self._step("break", self._break)
            await self._step("lose the manager", self._lose_manager)
            await self._over.wait()
            await self._step("night", self._night)
        self._note("demo.finished")

    async def _step(self, name: str, play: Callable[[], Awaitable[Any]]) -> None:
        if name in self._done:
            return
        self._note("demo.step", step=name)
        await play()
        self._note("demo.done", step=name)

    def _note(self, kind: str, instance: str | None = None, **data: Any) -> None:
        self._fleet.journal.append(Event(self._fleet.clock.now(), self._fleet.name, kind, instance, data))

    # ------------------------------------------------------------------------------------------ the load

    async def _load(self) -> None:
        """Submit tasks at the day's rate; a restarted manager catches up with what its death delayed."""
        clock = self._fleet.clock
        if self._day_began is None:
            self._day_began = clock.now()
            self._note("demo.day", length=self._day.length)
        due, at = 0.0, 0.0
        while at < self._day.length:
            now = clock.now() - self._day_began
            while at < now:
                due += self._day.rate(at) * TICK
                at += TICK
            if not self._spiking and now >= self._day.spike_at:
                self._spiking = True
                self._note("demo.spike", instances=self._day.instances_at_spike)
            while self._submitted < math.floor(due):
                self._submitted += 1
                self._dispatcher.submit_nowait(f"task-{self._submitted}", task(self._submitted))
            await clock.sleep(TICK)
        self._over.set()

    # ------------------------------------------------------------------------------------------ the steps

    async def _configure(self) -> None:
        await self._fleet.configure({"factor": 2, "model": "small"}, author="demo", reason="double the answers")

    async def _hurt(self) -> None:
        """Kill -9 two busy agents, freeze a third, and make a fourth alive but failing; wait until all is well."""
        victims = await self._busy(2)
        rest = [id for id in self._fleet.endpoints() if id not in victims]
        plan = [(id, "killed", signal.SIGKILL) for id in victims]
        plan += [(rest[0], "frozen", signal.SIGSTOP), (rest[1], "failing", signal.SIGUSR1)]
        slots = {self._fleet.view.members[id].instance.slot for id, _, _ in plan}
        for id, what, sign in plan:
            slot = self._fleet.view.members[id].instance.slot
            self._note("demo.hurt", id, what=what, slot=slot)
            os.kill(pid_of(id), sign)
        await self._until(lambda: slots <= self._healed_slots(), 40)
        await self._fleet.ready(timeout=30)

    def _healed_slots(self) -> set[int]:
        events = self._fleet.journal.read(fleet=self._fleet.name)
        hurt = next((event.at for event in events if event.kind == "demo.hurt"), math.inf)
        return {event.data["slot"] for event in events if event.kind == "instance.recovered" and event.at >= hurt}

    async def _busy(self, count: int) -> list[str]:
        """Instances that have a task right now."""
        while True:
            found = [id for id in self._fleet.endpoints() if self._dispatcher.in_flight(id)]
            if len(found) >= count:
                return found[:count]
            await self._fleet.clock.sleep(0.02)

    async def _spike(self) -> None:
        """Wait until the fleet has followed the spike."""
        wanted = self._day.instances_at_spike
        await self._until(lambda: self._fleet.status()["good"] >= wanted, 60)
        self._note("demo.followed", instances=self._fleet.status()["good"])

    async def _upgrade(self) -> None:
        await self._fleet.upgrade(version=GOOD, timeout=60)

    async def _break(self) -> None:
        try:
            await self._fleet.upgrade(version=BROKEN, timeout=60)
        except RolloutFailed as error:
            self._note("demo.rolled_back", message=str(error))
        else:
            raise AssertionError("a release that does not start was rolled out")

    async def _lose_manager(self) -> None:
        """Ask the driver to kill this very process, and go on only if it is another one that reads this."""
        if not any(event.kind == "demo.kill_me" for event in self._fleet.journal.read(fleet=self._fleet.name)):
            await self._busy(1)
            self._note("demo.kill_me", pid=os.getpid())
            await anyio.sleep_forever()

    async def _night(self) -> None:
        """The day is over: every task is done, and the fleet shrinks to its least."""
        await self._until(lambda: self._dispatcher.depth == 0, 60)
        least = self._fleet.spec.scaling.min_replicas if self._fleet.spec.scaling else 0
        await self._until(lambda: len(self._fleet.view) == least, 60)

    async def _until(self, reached: Callable[[], bool], timeout: float) -> None:
        with anyio.fail_after(timeout):
            while not reached():
                await self._fleet.clock.sleep(0.1)


def pid_of(id: str) -> int:
    """The process of an instance, found by what its environment says."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("AGENTFLEET_INSTANCE") == id and process.status() != psutil.STATUS_ZOMBIE:
                return process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # another's process, or one that is gone by now
    raise LookupError(f"no process says that it is {id}")
