"""What health is judged from: the signals about one instance, and what is remembered of them between two decisions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentfleet.core.phi import Rhythm
from agentfleet.errors import JournalError
from agentfleet.instances import AgentStatus, HealthState, Phase

# ------------------------------------------------------------------------------------------------ what is observed


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe has ended.

    Attributes:
        check: Index in `policy.checks`.
        ok: Whether the check passed.
        at: When it ended, in seconds since the epoch.
        latency: Seconds it took.
        lag: Seconds by which the prober itself was late or stalled while it ran.
        error: Why it failed, for people.
        status: What the agent said of itself, where the check asks for it.
    """

    check: int
    ok: bool
    at: float
    latency: float = 0.0
    lag: float = 0.0
    error: str | None = None
    status: AgentStatus | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat has arrived."""

    at: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What the backend says of the instance; may be repeated."""

    phase: Phase
    at: float
    started_at: float | None = None
    restarts: int = 0
    ready: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the verdict's `wake` has come.

    `lag` is how long, of the time since the last tick or beat, the observer could not have heard a beat; infinite
    after a change of observer. An observer who was deaf says so with a tick before he passes on other signals.
    """

    at: float
    lag: float = 0.0


Signal = Probed | Beat | Seen | Tick

# ------------------------------------------------------------------------------------------------ what is remembered


@dataclass(frozen=True, slots=True)
class Streak:
    """One check so far: whether it passes (None: never decided), and how many equal results came last.

    `run` is positive for successes and negative for failures, and is counted no further than the policy asks: to
    `successes`, and to `failures` and the one that confirms them.
    """

    passing: bool | None = None
    run: int = 0


@dataclass(frozen=True, slots=True)
class HealthMemory:
    """What the decision must remember of one instance. Serialises with `to_dict`."""

    state: HealthState = HealthState.UNKNOWN
    since: float = 0.0
    phase: Phase | None = None
    """As last seen; None before the first sight."""
    ready: bool = False
    started_at: float | None = None
    restarts: int = 0
    checks: tuple[Streak, ...] = ()
    """One a check of the policy; shared between instances that are in the same position."""
    stuck: bool = False
    rhythm: Rhythm | None = None
    flaps: tuple[float, ...] = ()
    """When it last became unhealthy or ceased to be, oldest first, at most `flap_limit` of them."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        rhythm = self.rhythm
        return {
            "state": self.state.value,
            "since": self.since,
            "phase": self.phase.value if self.phase else None,
            "ready": self.ready,
            "started_at": self.started_at,
            "restarts": self.restarts,
            "checks": [[streak.passing, streak.run] for streak in self.checks],
            "stuck": self.stuck,
            "rhythm": [rhythm.last, rhythm.mean, rhythm.variance, rhythm.count] if rhythm else None,
            "flaps": list(self.flaps),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HealthMemory:
        """Read back what `to_dict` wrote; raises `JournalError` when it is not that."""
        try:
            return cls(
                state=HealthState(data["state"]),
                since=float(data["since"]),
                phase=Phase(data["phase"]) if data["phase"] is not None else None,
                ready=bool(data["ready"]),
                started_at=data["started_at"],
                restarts=int(data["restarts"]),
                checks=shared(tuple(Streak(passing, int(run)) for passing, run in data["checks"])),
                stuck=bool(data["stuck"]),
                rhythm=Rhythm(*data["rhythm"]) if data["rhythm"] is not None else None,
                flaps=tuple(data["flaps"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(f"not a health memory: {str(data)[:120]}") from error


@functools.lru_cache(maxsize=65_536)
def shared(checks: tuple[Streak, ...]) -> tuple[Streak, ...]:
    """One object for equal values: a fleet has few different positions and many instances in each."""
    return checks
