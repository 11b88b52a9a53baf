"""Tests of your own fleet, with faults, in virtual time. They are pytest tests; this file also runs them.

::

    python examples/fleet_tests.py
"""

from __future__ import annotations

import sys

import anyio
import pytest
from hypothesis import given, settings

from agentfleet import AgentTemplate, Fleet, FleetSpec, HealthPolicy, HttpCheck, MemoryBackend, SystemClock
from agentfleet.testing import FaultPlan, run_virtual, virtual
from agentfleet.testing.strategies import fault_plans

SPEC = FleetSpec(
    name="mine",
    template=AgentTemplate(command=["agent"], drain="5s"),
    replicas=10,
    health=HealthPolicy(checks=[HttpCheck(path="/status", period="5s", timeout="2s")], stuck_after="1m"),
)


def world() -> tuple[Fleet, MemoryBackend]:
    """A fleet on a simulated cluster of three nodes; both go by the same clock."""
    clock = SystemClock(1_700_000_000.0)
    backend = MemoryBackend(clock=clock, seed=1)
    return Fleet(SPEC, backend=backend, clock=clock, seed=1), backend


@virtual  # once on asyncio, once on trio
async def test_a_hanging_agent_is_repaired_within_a_minute() -> None:
    """A hung process answers nothing until it is restarted."""
    fleet, backend = world()
    async with fleet:
        await fleet.deploy()
        victim = fleet.instances[0]
        backend.faults.hang(victim.id)
        await anyio.sleep(60)
        assert fleet.status()["good"] == 10
        assert [event.instance for event in fleet.journal.read() if event.kind == "recovery.restart"] == [victim.id]


@virtual
async def test_a_stalled_agent_is_noticed_although_it_answers() -> None:
    """What a probe cannot see, `stuck_after` does."""
    fleet, backend = world()
    async with fleet:
        await fleet.deploy()
        backend.faults.stall(fleet.instances[0].id)
        await anyio.sleep(90)
        reasons = [event.reasons[0]["code"] for event in fleet.journal.read() if event.kind == "instance.unhealthy"]
        assert reasons == ["health.stuck"]


@given(fault_plans(kinds=("crash", "hang", "slow", "unhealthy", "partition"), max_size=4))
@settings(max_examples=10, deadline=None)
def test_it_recovers_from_anything(plan: FaultPlan) -> None:
    """Whatever goes wrong, in the end ten healthy instances are there."""

    async def live() -> None:
        fleet, backend = world()
        async with fleet:
            await fleet.deploy()
            await plan.run(backend, "mine", fleet.clock)
            await fleet.ready(timeout=3600)
            await anyio.sleep(60)  # whoever was replaced unseen, on a node that was cut off, drains now
            assert len(backend.running("mine")) == 10

    run_virtual(live)


if __name__ == "__main__":
    quiet = "ignore:Module already imported"  # this file imports what pytest would rather import itself
    sys.exit(pytest.main(["-q", "-W", quiet, "-p", "no:cacheprovider", __file__]))
