"""What an operator does to one instance of a fleet. `Fleet` inherits it.

Each is admitted by the disruption governor like any other disruption, and says so when it is not.
"""

from __future__ import annotations

from agentfleet.core.recovery import Remedy
from agentfleet.errors import SpecError
from agentfleet.instances import Isolation
from agentfleet.reader import FleetReader
from agentfleet.waiting import period_of

_LONGEST = 1000
"""Characters of a reason: it is kept in the journal, and with the instance where the engine can."""


class InstanceOperations(FleetReader):
    """Restart, replace, isolate and release single instances."""

    async def restart(self, id: str) -> None:
        """Restart one instance in place, now; refused when the disruption budget is spent.

        Raises:
            OperationRefused: No such instance, or the governor holds it; the message says why.
        """
        self._apply(id, Remedy.RESTART)

    async def replace(self, id: str, *, elsewhere: bool = False) -> None:
        """End one instance, with its drain, and have a new one take its place; returns once that is under way.

        Where the engine has a disruption budget of its own (a PodDisruptionBudget) and it is used up, nothing is done;
        "action.failed" in the journal names the budget.

        Args:
            id: Of the instance.
            elsewhere: The new one should run on another node. On Kubernetes it becomes ready first, and the old one
                serves until then. If there is no place for it within 10 s, or it is not ready within the rollout's
                `progress_deadline`, the old one stays, and "elsewhere.failed" in the journal says why.

        Raises:
            OperationRefused: No such instance, the governor holds it, or there is no other node that is ready; the
                message says which.
        """
        if type(elsewhere) is not bool:
            raise SpecError(f"elsewhere must be True or False, not {elsewhere!r:.80}")
        self._apply(id, Remedy.ELSEWHERE if elsewhere else Remedy.REPLACE)

    async def isolate(self, id: str, *, reason: str, keep: float | str | None = "1h") -> None:
        """Set one instance apart for examination: it runs on, and gets no work from now on; returns at once.

        Another fills its place. What it was working on it may finish. It is probed, and never repaired, counted or
        configured; `release`, the end of `keep`, or stopping or deleting the fleet ends it, with its drain.

        Args:
            id: Of the instance.
            reason: Why, for those who find it.
            keep: How long it stays, in seconds or like "1h"; None is until it is released.

        Raises:
            SpecError: `reason` is empty or longer than 1,000 characters, or `keep` is no time span.
            OperationRefused: No such instance, it is isolated already, or the governor holds it; the message says why.
        """
        _check(id)
        _check_reason(reason)
        seconds = None if keep is None else period_of(keep, "keep")
        self._runtime.deployed()
        now = self._runtime.clock.now()
        isolation = Isolation(since=now, reason=reason, until=None if seconds is None else now + seconds)
        self._runtime.turn.isolate(id, isolation, now)
        self._runtime.wake()

    async def release(self, id: str) -> None:
        """End an isolated instance, with its drain; returns once that is under way.

        Raises:
            OperationRefused: It is not isolated.
        """
        _check(id)
        self._runtime.deployed()
        self._runtime.turn.release(id, self._runtime.clock.now())
        self._runtime.wake()

    def _apply(self, id: str, remedy: Remedy) -> None:
        _check(id)
        self._runtime.deployed()
        self._runtime.turn.remedy(id, remedy, self._runtime.clock.now())
        self._runtime.wake()


def _check_reason(reason: object) -> None:
    if not isinstance(reason, str) or not reason.strip() or len(reason) > _LONGEST:
        raise SpecError(f"reason must say why, in up to {_LONGEST} characters, not {reason!r:.80}")


def _check(id: object) -> None:
    if not isinstance(id, str):
        raise SpecError(f"id must be the id of an instance, not {id!r:.80}")
