"""A manager that is killed again and again: what it had acknowledged must be there afterwards, and nothing half-done.

`kills` runs one manager of real processes on SQLite and kills it at random instants under load. `bench_managers` tells
how long it takes to be back, which should be 5 s at most.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from agentfleet import AgentFleetError, AgentTemplate, BackendUnavailable, DeadlineExceeded, FleetSpec
from agentfleet.client import FleetClient
from agentfleet.testing.serving import ServedManager


@dataclass
class Killed:
    """What was found.

    Attributes:
        starts: Seconds until it was ready again, after each kill.
        operations: How many operations were acknowledged.
        revisions: How many revisions of the configuration were.
        lost: What of those was not there, or not as it was asked for, or never ended.
        phase: How the fleet was in the end.
    """

    starts: list[float] = field(default_factory=list)
    operations: int = 0
    revisions: int = 0
    lost: list[str] = field(default_factory=list)
    phase: str = ""


@dataclass
class Acknowledged:
    """What the manager has said that it would do or keep."""

    operations: dict[str, int] = field(default_factory=dict)
    """Sizes that were asked for, by the operation's id."""
    documents: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By their revision."""


async def kills(count: int) -> Killed:
    """See the module."""
    rng, known, found = random.Random(1), Acknowledged(), Killed()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        manager = ServedManager(
            database=f"sqlite:///{folder / 'fleets.db'}", backend="process", folder=folder, identity="one"
        )
        template = AgentTemplate(command=("sleep", "1000000"))
        async with (
            manager,
            FleetClient(manager.url, timeout=5.0, tries=1) as client,
            FleetClient(manager.url, timeout=60.0, tries=50) as checker,  # a check that is asked to wait waits
        ):
            made = await client.create(FleetSpec(name="a", template=template, replicas=3))
            await client.finished(made.operation_id, timeout=60)
            for number in range(count):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_write, client, random.Random(number), known)
                    await anyio.sleep(rng.uniform(0.0, 1.5))
                    manager.kill()
                    await manager.ended()
                    tasks.cancel_scope.cancel()
                found.starts.append(await manager.start())
                found.lost += await _missing(checker, known, last=20)
                if number % 20 == 19:
                    print(f"  {number + 1} kills, {len(known.operations)} operations", file=sys.stderr)
            found.lost += await _missing(checker, known)
            for id in known.operations:
                found.lost += await _told(f"end of operation {id}", partial(checker.finished, id, timeout=60))
            found.operations, found.revisions = len(known.operations), len(known.documents)
            found.phase = (await checker.cluster("a")).status
            await checker.finished((await checker.delete("a")).operation_id, timeout=60)
    return found


async def _write(client: FleetClient, rng: random.Random, known: Acknowledged) -> None:
    """Change things as fast as they are acknowledged, until nobody answers."""
    while True:
        try:
            if rng.random() < 0.5:
                size = rng.randint(1, 4)
                known.operations[(await client.scale("a", size)).operation_id] = size
            else:
                document = {"number": rng.randrange(10**9), "text": "x" * rng.randrange(2000)}
                head = await client.configuration.publish("a", document, reason="kills")
                known.documents[head.revision] = document
        except (BackendUnavailable, DeadlineExceeded):
            return


async def _missing(client: FleetClient, known: Acknowledged, *, last: int = 0) -> list[str]:
    """What was acknowledged and is not there, whole; of the `last` of each kind, or of all."""
    lost: list[str] = []
    for id in list(known.operations)[-last:]:
        lost += await _told(f"operation {id}", partial(_check_operation, client, id, known.operations[id]))
    for number in sorted(known.documents)[-last:]:
        lost += await _told(f"revision {number}", partial(_check_revision, client, number, known.documents[number]))
    if known.documents:
        lost += await _told("the configuration's history", partial(client.configuration.verify, "a"))
    return lost


async def _check_operation(client: FleetClient, id: str, size: int) -> None:
    found = await client.operation(id)
    if (found.kind, found.arguments.get("replicas")) != ("scale", size):
        raise ValueError(f"it is {found.kind} {found.arguments}, not scale {size}")


async def _check_revision(client: FleetClient, number: int, document: dict[str, Any]) -> None:
    if (await client.configuration.get("a", number)).document != document:
        raise ValueError("it has another document")


async def _told(what: str, call: Callable[[], Awaitable[object]]) -> list[str]:
    """Nothing if the call goes well; otherwise what is wrong."""
    try:
        await call()
    except (AgentFleetError, ValueError) as error:
        return [f"{what}: {type(error).__name__}: {error}"]
    return []
