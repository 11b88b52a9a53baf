"""Two managers share three fleets: either takes any request, one dies, and the other finishes what was begun.

::

    python examples/two_managers.py

Here all of it is in memory; `agentfleet.stores.sql` keeps the same in SQLite or PostgreSQL, for managers on several
machines (docs/managers.md).
"""

from __future__ import annotations

from functools import partial

import anyio

from agentfleet import AgentTemplate, FleetManager, FleetSpec, MemoryBackend, MemoryJournal, MemoryLeases
from agentfleet.operations import Caller, Kind
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.testing import run_virtual


async def manage(manager: FleetManager, *, task_status: anyio.abc.TaskStatus[anyio.CancelScope]) -> None:
    """One manager's life."""
    with anyio.CancelScope() as scope:
        async with manager:
            task_status.started(scope)
            await anyio.sleep_forever()


async def main() -> None:
    """Create, upgrade, lose a manager, see the end of it."""
    backend = MemoryBackend(seed=1, start_delay=(2.0, 4.0))
    journal = MemoryJournal()
    make = partial(FleetManager, MemoryFleets(), backend=backend, journal=journal, leases=MemoryLeases())
    first, second = make(identity="ann"), make(identity="ben")
    async with backend, anyio.create_task_group() as tasks:
        lives = [await tasks.start(manage, each) for each in (first, second)]
        for name in ("readers", "writers", "critics"):
            spec = FleetSpec(name=name, template=AgentTemplate(command=["agent"], version="1.0"), replicas=4)
            created = await first.create(spec, by=Caller("ops"))
            done = await second.finished(created.id, timeout="5m")
            print(f"{name}: {done.kind} {done.status}")

        upgrade = await second.request("writers", Kind.DEPLOY, {"version": "2.0"}, by=Caller("ci", key="release-2"))
        again = await first.request("writers", Kind.DEPLOY, {"version": "2.0"}, by=Caller("ci", key="release-2"))
        print("asked twice, it is one operation:", upgrade.id == again.id)
        async for event in journal.follow(fleet="writers"):
            if event.kind == "rollout.started":
                break
        leader = "ann" if first.health().leads else "ben"
        goes, stays = (0, second) if leader == "ann" else (1, first)
        lives[goes].cancel()
        done = await stays.finished(upgrade.id, timeout="10m")
        fleet = await stays.get("writers")
        print(f"{leader} left amid the upgrade; it {done.status}: version {fleet.status['version']}, ", end="")
        print(f"{fleet.status['good']} of {fleet.status['desired']} good")
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    run_virtual(main)
