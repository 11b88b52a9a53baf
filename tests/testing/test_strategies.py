"""The strategies make only valid things, and fault plans end."""

from __future__ import annotations

from hypothesis import given

from agentfleet.backends.memory import MemoryBackend
from agentfleet.clock import SystemClock
from agentfleet.instances import Instance, Phase
from agentfleet.specs import FleetSpec
from agentfleet.testing import FaultPlan, run_virtual, strategies


@given(strategies.fleet_specs())
def test_specs_write_and_read_back(spec: FleetSpec) -> None:
    assert FleetSpec.from_yaml(spec.to_yaml()) == spec
    assert FleetSpec.from_json(spec.to_json()) == spec


@given(strategies.instance_sets())
def test_instances_agree_with_themselves(found: tuple[Instance, ...]) -> None:
    assert len({instance.id for instance in found}) == len(found)
    for instance in found:
        assert not instance.ready or (instance.phase is Phase.RUNNING and instance.ready_at is not None)
        assert instance.started_at is None or instance.started_at >= instance.created_at
        assert instance.phase is not Phase.PENDING or instance.restarts or instance.started_at is None


@given(strategies.fault_plans(max_size=5))
def test_plans_end_when_they_say(plan: FaultPlan) -> None:
    async def main() -> None:
        clock = SystemClock(epoch=0.0)
        backend = MemoryBackend(clock=clock)
        async with backend:
            await plan.run(backend, "fleet", clock)
        assert abs(clock.now() - plan.duration) < 1e-6
        assert all(node.ready for node in backend.nodes)

    run_virtual(main)
