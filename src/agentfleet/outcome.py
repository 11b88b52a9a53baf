"""What `Fleet` waits for once it has stated what is wanted: that it is so, or the error that says why it is not."""

from __future__ import annotations

from agentfleet.core.configrollout import ConfigPhase
from agentfleet.core.rollout import RolloutPhase
from agentfleet.errors import DeadlineExceeded, OperationRefused, RolloutFailed
from agentfleet.runtime import Runtime
from agentfleet.state import FleetState
from agentfleet.stores.config import RolloutRecord

# Each waits for at most `seconds`, None for no deadline, and raises `DeadlineExceeded` after that.


async def ready(runtime: Runtime, seconds: float | None) -> None:
    """As many instances as wanted are healthy, and no others hold a place."""

    def enough() -> bool:
        state, counts = runtime.desk.state, runtime.desk.view.total_counts()
        settled = state is not None and not runtime.turn.sizing.pending
        return settled and counts.good == counts.total == runtime.desk.wanted.desired

    await runtime.until(enough, seconds, "all instances are healthy")


async def emptied(runtime: Runtime, seconds: float | None) -> None:
    """No instance is left.

    Raises:
        OperationRefused: Instances are wanted again.
    """
    view = runtime.desk.view

    def over() -> bool:
        state = runtime.desk.state
        gone = not view and runtime.turn.sizing.settled
        return gone or (state is not None and state.desired > 0)

    await runtime.until(over, seconds, "all instances are gone")
    if view:
        raise OperationRefused(f"fleet {runtime.name} was started or deployed again before all instances were gone")


async def rolled_out(runtime: Runtime, wanted: FleetState, seconds: float | None, *, number: int | None = None) -> None:
    """The rollout that `wanted` begins is over; while the fleet is paused or stopped there is none to wait for.

    `number` is the revision that is waited for, where that may be another than the one that is wanted now.

    Raises:
        RolloutFailed: It failed, or another revision was asked for.
        OperationRefused: The fleet was stopped before the end.
    """
    number = wanted.target if number is None else number

    def over() -> bool:
        state = runtime.desk.wanted
        return not state.desired or not state.rolling

    if wanted.paused:
        return
    await runtime.until(over, seconds, f"revision {number} is rolled out")
    state = runtime.desk.wanted
    if state.rolling:
        if wanted.desired:
            why = (
                "was deleted" if state.deleted else "was stopped; start it" if not state.running else "was scaled to 0"
            )
            raise OperationRefused(f"revision {number} is not rolled out yet: the fleet {why}")
    elif state.target != number or state.rollout.phase is RolloutPhase.FAILED:
        why = await runtime.postmortem.explain(number) or "another revision was asked for meanwhile"
        runs = f"the fleet runs revision {state.target} ({state.template.version})"
        raise RolloutFailed(f"revision {number} could not be rolled out: {why}; {runs}")


async def _healthy(runtime: Runtime, number: int) -> None:
    """All instances are healthy, within the time that the policy gives a rollout without progress."""
    patience = runtime.desk.spec.rollout.progress_deadline
    try:
        await ready(runtime, patience)
    except DeadlineExceeded as error:
        counts = runtime.desk.view.total_counts()
        why = await runtime.postmortem.explain(number)
        raise RolloutFailed(
            f"{counts.good} of {runtime.desk.wanted.desired} instances are healthy after {patience:g} s"
            f"{f': {why}' if why else ''}; it goes on"
        ) from error


async def brought_up(runtime: Runtime, wanted: FleetState, seconds: float | None) -> None:
    """What `deploy` has asked for is so; raises like `rolled_out`."""

    async def wait() -> None:
        await rolled_out(runtime, wanted, None)
        if wanted.desired:
            await _healthy(runtime, wanted.target)

    what = f"revision {wanted.target} is rolled out and all instances are healthy"
    await runtime.waiting.within(seconds, what, wait)


async def configured(runtime: Runtime, revision: int, seconds: float | None) -> None:
    """A configuration that is rolled out in rings has reached all.

    Raises:
        RolloutFailed: It was stopped, taken back, or another one was published.
    """
    ended: list[RolloutRecord] = []

    async def wait() -> None:
        ended.append(await runtime.configuring.rings.over(revision))

    await runtime.waiting.within(seconds, f"configuration {revision} has reached all", wait)
    (record,) = ended
    if record.phase != ConfigPhase.COMPLETE:
        why = next((str(each["text"]) for each in record.reasons), "another one was published")
        now = record.base if record.phase == ConfigPhase.ROLLED_BACK else record.revision
        told = {ConfigPhase.ROLLED_BACK: f"the content of {now} is back", ConfigPhase.SUPERSEDED: "another is out now"}
        then = told.get(ConfigPhase(record.phase), "the instances on trial keep it")
        raise RolloutFailed(f"configuration {revision} could not be rolled out: {why}; {then}")
