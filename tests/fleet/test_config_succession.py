"""A rollout of configuration whose managers die at every write: the next goes on where the last one was."""

from __future__ import annotations

import functools
from typing import Any

import anyio
import pytest
from tests.fleet.test_config_rollout import BAD, GOOD, Agents, attach
from tests.fleet.world import Plan, Step, World, deploy, spec

from agentfleet import ConfigRollout, Fleet
from agentfleet.core.configrollout import ConfigPhase
from agentfleet.stores.config import RolloutRecord
from agentfleet.testing import run_virtual

RINGS = ConfigRollout(rings=(1, 2, "100%"), bake=15.0, confirm=5.0)
LARGE = {"model": "large"}
ENDED = (ConfigPhase.COMPLETE, ConfigPhase.ROLLED_BACK)


class Watched(World):
    """A world whose agents are told configurations, and where it is watched how many have one that is on trial."""

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__(spec(6), plan=plan)
        self.agents = Agents(self)
        self.agents.sick_after["poison"] = 10.0
        self.agents.on_accepted = self.watch
        self.ended: dict[str, tuple[int, Any]] = {}

    def fleet(self) -> Fleet:
        return attach(super().fleet(), self.agents)

    def record(self) -> RolloutRecord | None:
        found = self.journal.last_state("a", "state.config_rollout")
        return None if found is None else RolloutRecord.from_dict(found.data)

    def watch(self, revision: int) -> None:
        """Nobody has a revision on trial whom the record does not name, and no more than the ring may have it."""
        record = self.record()
        if record is not None and (record.revision, record.phase) == (revision, ConfigPhase.PROGRESSING):
            having = {id for id, (had, _) in self.agents.now().items() if had == revision}
            assert having <= set(record.trials), self.story()
            assert len(having) <= record.memory["target"], self.story()


def first() -> Step:
    async def step(world: World, fleet: Fleet) -> None:
        if not await fleet.config.keys():
            await fleet.configure(GOOD, wait=False)
        await world.settled(fleet, stays=0.0)

    return step


def roll_out(document: dict[str, str]) -> Step:
    async def step(world: World, fleet: Fleet) -> None:
        assert isinstance(world, Watched)
        if (await fleet.config.get("a")).revision < 2:
            await fleet.configure(document, rollout=RINGS, wait=False)
        record = None
        while record is None or record.phase not in ENDED:
            await anyio.sleep(1.0)
            record = await fleet.config.rollout("a")

    return step


async def lived(document: dict[str, str], plan: Plan | None = None) -> Watched:
    world = Watched(plan)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.agents.suffer)
        await world.live([deploy, first(), roll_out(document)], downtime=1.0)
        world.ended = world.agents.now()
        tasks.cancel_scope.cancel()
    return world


@functools.cache
def writes(model: str) -> list[int]:
    """Numbers of the journal's writes that belong to the rollout."""
    world = run_virtual(lived, {"model": model})
    kinds = [event.kind for event in world.journal.read()]
    begin = kinds.index("state.config_trial")
    return [number for number, kind in enumerate(kinds, 1) if number > begin and "config" in kind]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("document", [LARGE, BAD], ids=lambda document: str(document["model"]))
def test_the_next_manager_goes_on(document: dict[str, str], side: str) -> None:
    """Killed right before or after each write: a good one reaches all, a bad one reached one, and is taken back."""
    numbers = writes(document["model"])
    assert len(numbers) > 10
    for number in numbers:
        world = run_virtual(lived, document, Plan("write", number, side))
        wanted = LARGE if document == LARGE else GOOD
        assert [now[1] for now in world.ended.values()] == [wanted] * 6, (number, world.story())
        assert len({now[0] for now in world.ended.values()}) == 1, (number, world.story())
        if document == BAD:
            assert len(world.agents.had[2]) == 1, (number, world.story())
