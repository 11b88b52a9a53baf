"""Any sequence of operations, faults and deaths of managers: once it is quiet, the fleet is as wanted.

Each example is a list of operations, drawn by hypothesis and played in virtual time, with the watchman looking on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fleet.world import Crash, Plan, World, died, prepare, spec

from agentfleet import Backoff, Fleet, OperationRefused, RecoveryPolicy, RolloutFailed, RolloutPolicy
from agentfleet.errors import AgentFleetError
from agentfleet.testing import run_virtual

Op = tuple[str, int]
NODES = ("node-1", "node-2", "node-3")
VERSIONS = ("1", "good-2", "good-3", "bad-crash", "bad-sick", "bad-dumb")
QUIET = 6 * 3600.0
"""Virtual seconds in which a fleet must have found its way once nothing goes wrong any more."""

FAULTS: dict[str, Callable[[World, int], object]] = {
    "crash": lambda world, n: [world.faults.crash(id) for id in picked(world, n)],
    "hang": lambda world, n: [world.faults.hang(id, seconds=20.0 + n) for id in picked(world, n)],
    "hang for good": lambda world, n: [world.faults.hang(id, sticky=True) for id in picked(world, n)],
    "sicken": lambda world, n: [world.faults.unhealthy(id, seconds=30.0) for id in picked(world, n)],
    "slow": lambda world, n: [world.faults.slow(3.0, id, seconds=60.0) for id in picked(world, n)],
    "sicken all": lambda world, n: world.faults.unhealthy(seconds=10.0 + n),
    "partition": lambda world, n: world.faults.partition(NODES[n % 3], seconds=5.0 + 5 * n),
    "node down": lambda world, n: world.faults.node_down(NODES[n % 3], seconds=5.0 + 5 * n),
    "unavailable": lambda world, n: world.faults.unavailable(seconds=1.0 + 3 * n),
    "lose events": lambda world, n: world.faults.lose_events(n),
    "double events": lambda world, n: world.faults.double_events(n),
    "reorder events": lambda world, n: world.faults.reorder_events(n),
    "gap": lambda world, _n: world.faults.gap(),
    "lag": lambda world, n: world.faults.lag(0.3 * n),
    "conflict": lambda world, n: world.faults.conflict(times=n),
    "refuse": lambda world, n: world.faults.refuse(times=n),
    "lose replies": lambda world, n: world.faults.lose_reply(times=n),
    "slow actions": lambda world, n: world.faults.slow_actions(0.5 * n, times=10),
    "quota": lambda world, n: world.faults.quota(n),
}


def picked(world: World, number: int) -> list[str]:
    """Some of the instances that exist, by a number."""
    ids = world.ids()
    return sorted({ids[(number * step) % len(ids)] for step in (1, 3)} if ids else ())


async def restart(world: World, fleet: Fleet, number: int) -> None:
    for id in picked(world, number):
        await fleet.restart(id)


OPERATIONS: dict[str, Callable[[World, Fleet, int], Awaitable[object]]] = {
    "deploy": lambda _world, fleet, _n: fleet.deploy(wait=False),
    "scale": lambda _world, fleet, n: fleet.scale(n),
    "upgrade": lambda _world, fleet, n: fleet.upgrade(VERSIONS[n % len(VERSIONS)], wait=False),
    "rollback": lambda _world, fleet, _n: fleet.rollback(wait=False),
    "stop": lambda _world, fleet, _n: fleet.stop(wait=False),
    "start": lambda _world, fleet, _n: fleet.start(wait=False),
    "pause": lambda _world, fleet, _n: fleet.pause(),
    "resume": lambda _world, fleet, _n: fleet.resume(),
    "restart": restart,
    "wait": lambda _world, _fleet, n: anyio.sleep(0.1 * n * n),
}


async def play(ops: list[Op]) -> None:
    """Play one list of operations; a "die" ends the manager at its n-th write from then on."""
    policy = RecoveryPolicy(max_disrupted="25%", backoff=Backoff(limit=60.0), cooldown=10.0, settle=30.0)
    rollout = RolloutPolicy(min_ready=2.0, progress_deadline=120.0)
    world = prepare(World(spec(5, recovery=policy, rollout=rollout), plan=Plan()))
    todo: list[Op] = [("deploy", 0), *ops]
    while True:
        try:
            async with world.fleet() as fleet:
                while todo:
                    name, number = todo.pop(0)
                    await do(world, fleet, name, number)
                    await anyio.sleep(0.05)
                await calm(world, fleet)
                return
        except (Crash, BaseExceptionGroup) as error:
            if not died(error):
                raise


async def do(world: World, fleet: Fleet, name: str, number: int) -> None:
    if name == "die":
        world.plan.at, world.plan.number, world.plan.side = "write", world.plan.counts["write"] + number, "after"
    elif name in FAULTS:
        FAULTS[name](world, number)
    else:
        with contextlib.suppress(OperationRefused, RolloutFailed):  # a wrong thing to ask for just now, and said so
            await OPERATIONS[name](world, fleet, number)


async def calm(world: World, fleet: Fleet) -> None:
    """Let every fault end and wait for the fleet to come to its end.

    When a rollout has failed and there is nothing good to fall back to, an operator must say what to run.
    """
    world.plan.at = "never"
    world.faults.clear()
    world.faults.quota(None)
    await fleet.deploy(wait=False)
    await fleet.resume()
    state = fleet.state
    assert state is not None
    if state.fallback is None and (state.template.version.startswith("bad") or state.rollout.phase == "failed"):
        await fleet.upgrade("good-9", wait=False)
    try:
        await world.settled(fleet, within=QUIET, stays=120.0)
    except AssertionError:
        state = fleet.state
        world.check()
        if state is None or (not state.template.version.startswith("bad") and state.rollout.phase != "failed"):
            raise
        await fleet.upgrade("good-9", wait=False)
        await world.settled(fleet, within=QUIET, stays=120.0)
    check_rest(world, fleet)


def check_rest(world: World, fleet: Fleet) -> None:
    """What must be so once nothing happens any more."""
    state = fleet.state
    assert state is not None
    assert not fleet._runtime.desk.actuator.busy
    assert not len(fleet._runtime.desk.disruptions) or state.desired == 0
    assert fleet.view.draining == 0
    kinds = {event.kind for event in world.events()}
    assert "scaling.failed" not in kinds


def operations() -> st.SearchStrategy[list[Op]]:
    names = st.sampled_from([*OPERATIONS, "wait", "wait", "scale", "upgrade", *FAULTS, "die"])
    return st.lists(st.tuples(names, st.integers(1, 12)), max_size=14)


@given(ops=operations())
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_after_anything_the_fleet_is_as_wanted(ops: list[Op]) -> None:
    """Whatever was asked for and went wrong, the fleet converges within bounded time, and no invariant is broken."""
    run_virtual(play, ops)


@pytest.mark.slow
@given(ops=operations(), seed=st.integers(0, 1000))
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_after_anything_on_trio_too(ops: list[Op], seed: int) -> None:
    """The same law on the loop that runs its tasks in any order."""
    run_virtual(play, ops, backend="trio", seed=seed)


@pytest.mark.parametrize(
    "ops",
    [
        [("wait", 12), ("partition", 1), ("wait", 4), ("partition", 2), ("die", 2), ("scale", 3), ("wait", 8)],
        [("upgrade", 3), ("quota", 5), ("wait", 9), ("stop", 1), ("start", 1), ("die", 5), ("crash", 2)],
        [("wait", 12), ("refuse", 6), ("hang for good", 2), ("wait", 12), ("node down", 1), ("scale", 9)],
        [
            ("lose events", 6),
            ("double events", 3),
            ("crash", 9),
            ("conflict", 3),
            ("hang for good", 11),
            ("deploy", 2),
            ("deploy", 1),
            ("hang for good", 4),
            ("node down", 6),
            ("scale", 4),
            ("lose events", 1),
            ("upgrade", 5),
        ],
        [("wait", 5), ("conflict", 1), ("restart", 1), ("upgrade", 1), ("quota", 1), ("partition", 2)],
    ],
    ids=["two partitions", "quota", "refusals", "gone unseen", "two lost while rolling"],
)
def test_sequences_that_once_went_wrong(ops: list[Op]) -> None:
    """Shapes that are rare in random lists."""
    run_virtual(play, ops)


def test_every_operation_alone() -> None:
    """Each operation and fault by itself, on a fleet at rest."""
    every: list[Any] = [*OPERATIONS, *FAULTS, "die"]
    for name in every:
        try:
            run_virtual(play, [("wait", 12), (name, 3), ("wait", 12)])
        except (AssertionError, AgentFleetError) as error:
            raise AssertionError(f"after {name}") from error
