"""What an engine may be able to do besides: scale by itself, keep the configuration, show what was done; and pauses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest
from tests.fleet.test_workload import Engine
from tests.fleet.world import spec

from agentfleet import Event, FleetSpec, OperationRefused, ScalingPolicy, SpecError
from agentfleet.backends.base import AUTOSCALER
from agentfleet.backends.memory import MemoryDeployments
from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.specs import QueueTarget
from agentfleet.testing import virtual


class Able(MemoryDeployments):
    """Can all of it."""

    scales = True
    trouble: Exception | None = None

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.shown: list[Event] = []
        self.configured: list[tuple[int, Any]] = []
        self.asked = 0
        self.deleting = 0.0
        """Seconds that a deletion takes."""

    def keeps_size(self, spec: FleetSpec) -> bool:
        return self.scales

    def announce(self, event: Event) -> None:
        self.shown.append(event)

    async def configure(self, spec: FleetSpec, revision: int, document: Any) -> None:
        self.asked += 1
        if self.trouble is not None:
            raise self.trouble
        self.configured.append((revision, document))

    async def delete(self, fleet: str) -> None:
        await anyio.sleep(self.deleting)
        await super().delete(fleet)


class AbleEngine(Engine):
    """A simulated cluster with an able engine."""

    backend: Able

    def __init__(self, wanted: FleetSpec) -> None:
        super().__init__(wanted)
        self.backend = Able(self.cluster)


POLICY = ScalingPolicy(min_replicas=2, max_replicas=9, targets=(QueueTarget(length=5),))


@virtual
async def test_the_engines_size_is_followed_and_nobody_elses_business() -> None:
    engine = AbleEngine(spec(3, scaling=POLICY))
    async with engine.deployed() as fleet:
        orders = len(engine.backend.orders)
        engine.backend.kept("a").scale(7, by=AUTOSCALER)
        await anyio.sleep(120)
        await fleet.ready(timeout=60)
        assert fleet.status()["desired"] == len(fleet.instances) == 7
        assert len(engine.backend.orders) == orders
        (scaled,) = engine.events("fleet.scaled")
        assert (scaled.data["from"], scaled.data["to"], scaled.data["by"]) == (3, 7, "scaling")
        assert scaled.reasons[0]["numbers"] == {"before": 3, "now": 7}
        assert not engine.events("fleet.foreign_change")
        assert not engine.events("scaling.decision")
        with pytest.raises(OperationRefused, match=r"scaling\.min_replicas"):
            await fleet.scale(5)
        engine.by_somebody(4)
        await anyio.sleep(60)
        assert len(engine.events("fleet.foreign_change")) == 1, "a person is still called by name"
        for size in (6, 4, 6, 4, 6, 4):
            engine.backend.kept("a").scale(8, by=AUTOSCALER)
            await anyio.sleep(20)
            engine.by_somebody(size)
            await anyio.sleep(20)
        assert not engine.events("scaling.contested"), "it is the engine's own autoscaler that a person argues with"

        await fleet.stop(timeout=60)
        assert (engine.backend.orders[-1].replicas, engine.backend.orders[-1].resting) == (0, 4)
        await fleet.start(timeout=60)
        assert (engine.backend.orders[-1].replicas, engine.backend.orders[-1].resting) == (4, None)


@virtual
async def test_a_pause_that_comes_with_another_revision_holds() -> None:
    """`kubectl rollout undo` and `pause` at once: the revision is followed, and the pause is not lifted."""
    engine = Engine(spec(4))
    async with engine.deployed() as fleet:
        first = engine.backend.orders[-1]
        await fleet.upgrade("2", timeout=600)
        kept = engine.backend.kept("a")
        kept.tell(replace(engine.backend.orders[-1], revision=1, template=first.template, paused=True), by="kubectl")
        await anyio.sleep(60)
        assert [each.data["what"] for each in engine.events("fleet.foreign_change")] == ["paused", "revision"]
        assert fleet.state is not None
        assert (fleet.state.target, fleet.state.paused) == (1, True)
        assert kept.ordered().paused


@virtual
async def test_what_is_journaled_is_shown_to_the_engine() -> None:
    engine = AbleEngine(spec(2))
    async with engine.deployed():
        kinds = {event.kind for event in engine.backend.shown}
        assert {"fleet.deployed", "rollout.completed"} <= kinds
        assert all(event.seq for event in engine.backend.shown)


@virtual
async def test_the_engine_keeps_the_newest_configuration_however_often_it_fails() -> None:
    engine = AbleEngine(spec(2))
    async with engine.deployed() as fleet:
        engine.backend.trouble = BackendUnavailable("no route")
        await fleet.configure({"n": 1}, wait=False)
        await anyio.sleep(30)
        assert engine.backend.asked > 3
        (told,) = engine.events("config.not_kept")
        assert told.data == {"revision": 1, "error": "no route"}
        await fleet.configure({"n": 2}, wait=False)
        await anyio.sleep(1)
        engine.backend.trouble = None
        await anyio.sleep(30)
        assert engine.backend.configured == [(2, {"n": 2})]
        engine.backend.trouble = SpecError("too large")
        asked = engine.backend.asked
        await fleet.configure({"n": 3}, wait=False)
        await anyio.sleep(60)
        assert engine.backend.asked == asked + 1, "what is wrong is not repeated"
        engine.backend.trouble = None
    async with engine.fleet():
        await anyio.sleep(5)
        assert engine.backend.configured[-1] == (3, {"n": 3}), "the next manager has it kept"


@virtual
async def test_a_fleet_that_is_deployed_again_after_its_deletion_has_its_configuration_kept_again() -> None:
    """The engine has forgotten it with the fleet."""
    engine = AbleEngine(spec(2))
    async with engine.deployed() as fleet:
        await fleet.configure({"n": 1}, wait=False)
        await anyio.sleep(5)
        await fleet.delete(timeout=60)
        await anyio.sleep(60)
        assert engine.backend.configured == [(1, {"n": 1})], "nothing is kept of what is not there"
        await fleet.deploy(timeout=60)
        await anyio.sleep(5)
        assert engine.backend.configured == [(1, {"n": 1})] * 2


@virtual
async def test_a_fleet_that_is_deployed_again_amid_its_deletion_has_its_configuration_kept_after_it() -> None:
    engine = AbleEngine(spec(2))
    async with engine.deployed() as fleet:
        await fleet.configure({"n": 1}, wait=False)
        await anyio.sleep(5)
        engine.backend.deleting = 10.0
        with pytest.raises(DeadlineExceeded):
            await fleet.delete(timeout=2)
        await fleet.deploy(wait=False)
        await anyio.sleep(5)
        asked = engine.backend.asked
        await fleet.ready(timeout=60)
        await anyio.sleep(10)
        assert engine.backend.asked == asked + 1
