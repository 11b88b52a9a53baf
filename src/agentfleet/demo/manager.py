"""The demo's manager process: a fleet on real processes, a dispatcher, and the scenario. It is killed once."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from agentfleet.backends.process import ProcessBackend
from agentfleet.demo.load import Day
from agentfleet.demo.scenario import Scenario
from agentfleet.demo.worker import LEDGER
from agentfleet.dispatch import Dispatcher
from agentfleet.events import Event
from agentfleet.fleet import Fleet
from agentfleet.specs import (
    AgentTemplate,
    Backoff,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    QueueTarget,
    RecoveryPolicy,
    RolloutPolicy,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
)
from agentfleet.stores.jsonl_journal import JsonlJournal

FLEET = "demo"
JOURNAL, LEDGER_FILE, STATE = "journal.jsonl", "ledger.txt", "processes"
PULSE = 0.25
"""Seconds between two pictures for the live view."""


def spec(place: Path) -> FleetSpec:
    """The demo's fleet: eight agents, up to twenty-four, a quarter of them disrupted at most."""
    return FleetSpec(
        name=FLEET,
        template=AgentTemplate(
            command=["python", "-m", "agentfleet.demo.worker"],
            version="1.0.0",
            env={LEDGER: str(place / LEDGER_FILE)},
            cpu="250m",
            memory="64Mi",
            port=8080,
            drain="10s",
        ),
        replicas=8,
        scaling=ScalingPolicy(
            min_replicas=8,
            max_replicas=24,
            targets=[QueueTarget(length=1)],
            period="1s",
            up=ScalingBehavior(stabilization=0, rules=[ScalingRule(percent=100, period="2s")]),
            down=ScalingBehavior(stabilization="8s", rules=[ScalingRule(percent=50, period="2s")]),
        ),
        health=HealthPolicy(
            checks=[
                HttpCheck(path="/health", period="1s", timeout="1s", failures=3),
                HttpCheck(path="/status", period="1s", timeout="1s", failures=3),
            ],
            startup="10s",
        ),
        recovery=RecoveryPolicy(
            max_disrupted="25%", cooldown="5s", grace="2s", backoff=Backoff(initial="500ms"), settle="10s"
        ),
        rollout=RolloutPolicy(max_surge="25%", max_unavailable="25%", min_ready="500ms", progress_deadline="30s"),
    )


async def manage(place: Path) -> None:
    """Run the fleet and play the scenario, from wherever the journal says that it stands."""
    with JsonlJournal(place / JOURNAL) as journal:
        fleet = Fleet(spec(place), backend=ProcessBackend(state_dir=place / STATE), journal=journal, usage_period=2)
        async with fleet, fleet.dispatcher() as dispatcher:
            journal.append(Event(fleet.clock.now(), FLEET, "demo.manager", data={"open_tasks": dispatcher.depth}))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_pulse, fleet, dispatcher)
                await Scenario(fleet, dispatcher, Day()).play()
                tasks.cancel_scope.cancel()


async def _pulse(fleet: Fleet, dispatcher: Dispatcher) -> None:
    """Draw a picture for the live view again and again."""
    while True:
        conditions = {id: str(member.condition) for id, member in fleet.view.members.items()}
        data = {"status": dict(fleet.status()), "depth": dispatcher.depth, "instances": conditions}
        fleet.journal.append(Event(fleet.clock.now(), FLEET, "demo.pulse", data=data))
        await fleet.clock.sleep(PULSE)


if __name__ == "__main__":
    anyio.run(manage, Path(sys.argv[1]))
