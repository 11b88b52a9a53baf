"""One instance's trial of a new configuration: what is remembered of it, and what is made of how it looks now."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from agentfleet.core.configrollout import Tasks

Process = tuple[int, float | None]
"""How often it was restarted, and when it was started: a new pair is another process."""


class Looks(StrEnum):
    """How an instance looks."""

    GOOD = "good"
    BAD = "bad"
    """Sick, or its process has exited."""
    UNKNOWN = "unknown"
    """Neither is known: it starts, it is silent, or its node cannot be reached."""


@dataclass(frozen=True, slots=True)
class Sight:
    """An instance as it is seen now. Times are seconds since the epoch."""

    process: Process
    looks: Looks
    good_since: float | None = None
    running_since: float | None = None
    """Since when its present process is known to run the configuration; None: it is not known to."""
    refuses: bool = False
    """Whether it has refused the configuration."""
    ailed: bool = False
    """Whether it has turned sick or exited of its own accord since it was given it, however short that was: recovery
    acts at once, so that nothing of it may be left to see."""
    renewed: bool = False
    """Whether its process ends, or has ended, on our own word."""
    tasks: Tasks = field(default_factory=Tasks)
    """Of its present process."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is remembered of one trial."""

    at: float
    process: Process
    tasks: Tasks = field(default_factory=Tasks)
    """What its process had done before."""
    proved: bool = False
    failure: str = ""
    """ "refused", "sick" or "restarted"; empty while it has not failed."""
    excused: bool = False
    """Whether it suffers from what is not the configuration's fault; until it is well again."""

    @property
    def spoiled(self) -> bool:
        """Whether it has failed and not proved the configuration."""
        return bool(self.failure) and not self.proved

    def to_list(self) -> list[Any]:
        """A JSON-ready form, short: there is one for each instance."""
        tasks = [self.tasks.ended, self.tasks.failed]
        return [self.at, *self.process, *tasks, int(self.proved), self.failure, int(self.excused)]

    @classmethod
    def from_list(cls, data: list[Any]) -> Trial:
        """Read back `to_list`."""
        at, restarts, started, ended, failed, proved, failure, excused = data
        return cls(at, (restarts, started), Tasks(ended, failed), bool(proved), failure, bool(excused))


def look(trial: Trial, sight: Sight, *, bake: float, now: float) -> Trial:
    """What a trial has come to, by how its instance looks now.

    A failure stays, and so does a proof; a process that was ended on our own word begins anew without blame.

    Args:
        trial: As it was.
        sight: The instance.
        bake: Seconds that it must have been well with the configuration.
        now: Seconds since the epoch.
    """
    failure, blameless = trial.failure, trial.excused or sight.renewed
    if sight.refuses:
        failure = "refused"
    elif not failure and not trial.excused and (sight.ailed or (sight.looks is Looks.BAD and not sight.renewed)):
        failure = "sick"
    if sight.process != trial.process:
        trial = replace(trial, process=sight.process, tasks=Tasks())
        failure = failure or ("" if blameless else "restarted")
    return replace(
        trial,
        failure=failure,
        proved=trial.proved or _has_proved(trial, sight, bake, now),
        excused=trial.excused and sight.looks is not Looks.GOOD,
    )


def _has_proved(trial: Trial, sight: Sight, bake: float, now: float) -> bool:
    if sight.looks is not Looks.GOOD or sight.good_since is None or sight.running_since is None or sight.refuses:
        return False
    return now >= max(sight.running_since, sight.good_since, trial.at) + bake


def forgiven(trial: Trial) -> Trial:
    """The trial without a failure that was not the configuration's; a refusal stays."""
    return trial if trial.failure in ("", "refused") else replace(trial, failure="", excused=True)


def tasks_since(trial: Trial, sight: Sight) -> Tasks:
    """What the instance's process has done on trial."""
    if sight.process != trial.process:
        return sight.tasks
    ended, failed = sight.tasks.ended - trial.tasks.ended, sight.tasks.failed - trial.tasks.failed
    return Tasks(max(0, ended), max(0, failed))
