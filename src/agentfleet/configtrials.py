"""OBSERVE: the instances that have a configuration on trial: what they have said, how they look, who could be next."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentfleet.configacks import AckBook
from agentfleet.configspec import ConfigRollout
from agentfleet.core.configrollout import ConfigMemory, ConfigObserved, Tasks
from agentfleet.core.configtrial import Looks, Sight, Trial, forgiven, look, tasks_since
from agentfleet.core.reason import Reason
from agentfleet.desk import Desk
from agentfleet.instances import HealthState, Phase
from agentfleet.specs import HealthPolicy, HeartbeatCheck
from agentfleet.view import GOOD, Condition, Member

_GONE = (Condition.DRAINING, Condition.ISOLATED)


@dataclass(slots=True)
class _Seen:
    """An instance on trial, and what of its history is not held against its trial."""

    member: Member
    ailments: int = 0
    renewals: int = 0

    @property
    def ailed(self) -> bool:
        return self.member.ailments > self.ailments

    @property
    def renewed(self) -> bool:
        """Whether we have told it to start again since it was last seen well."""
        return self.member.renewals > self.renewals

    def note(self, *, excused: bool, good: bool) -> None:
        """What was just looked at."""
        if excused:
            self.ailments = self.member.ailments
        if good:
            self.renewals = self.member.renewals


class Trials:
    """One revision's trials in one fleet, in the view of the fleet's leader.

    Looking costs what the fleet holds; it is done once a second, and only while a rollout is under way.

    Args:
        desk: The fleet's working place.
        acks: What instances have said.
        revision: The one on trial.
        kept: What is remembered of the trials, as `to_record` has it.
    """

    def __init__(self, desk: Desk, acks: AckBook, revision: int, kept: Mapping[str, Any] | None = None) -> None:
        self._desk, self._acks, self._revision = desk, acks, revision
        self._trials = {id: Trial.from_list(data) for id, data in (kept or {}).items()}
        self._running: dict[str, float] = {}
        """Since when each instance is known to run the revision."""
        self._risky: dict[str, int] = {}
        """Slots of the instances that count as at risk."""
        self._seen: dict[str, _Seen] = {}
        self._shown = detection(desk.spec.health)
        self._before: dict[str, Tasks] = {}
        self._ring = -1

    def __contains__(self, id: str) -> bool:
        return id in self._trials

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready form, by instance."""
        return {id: trial.to_list() for id, trial in self._trials.items()}

    def add(self, members: list[Member], now: float) -> None:
        """Put instances on trial."""
        for member in members:
            instance = member.instance
            process = (instance.restarts, instance.started_at)
            self._trials[instance.id] = Trial(now, process, _tasks(member))
            self._risky[instance.id] = instance.slot
            self._seen[instance.id] = _Seen(member, member.ailments, member.renewals)

    def resume(self, settle: float) -> None:
        """Count those at risk that an earlier leader has put on trial, no more than `settle` seconds ago."""
        for id, trial in self._trials.items():
            member = self._desk.view.members.get(id)
            if member is not None and not trial.proved and not trial.failure and id not in self._risky:
                self._risky[id] = member.instance.slot
                self._desk.disruptions.risk(member.instance.slot, trial.at + settle)

    def forgive(self) -> None:
        """What has failed so far was not the configuration's fault."""
        self._trials = {id: forgiven(trial) for id, trial in self._trials.items()}

    def choose(self, count: int) -> list[Member]:
        """Up to `count` instances to be put on trial: any that are well, others for each revision."""
        ready = (member for member in self._desk.view.members.values() if self._is_ready(member))
        return heapq.nsmallest(count, ready, key=self._turn_of)

    def _turn_of(self, member: Member) -> int:
        return zlib.crc32(f"{self._revision}/{member.instance.id}".encode())

    def _is_ready(self, member: Member) -> bool:
        id = member.instance.id
        answers = member.instance.address is not None and id not in self._desk.actuator.busy
        well = member.condition in GOOD and member.health is not HealthState.SUSPECT
        return well and answers and id not in self._trials

    # ------------------------------------------------------------------------------------------ looking

    def observe(self, policy: ConfigRollout, memory: ConfigMemory, now: float, hold: Reason | None) -> ConfigObserved:
        """How the fleet and its trials look now; what has become of each trial is taken in."""
        view, counts = self._desk.view, self._desk.view.total_counts()
        tasks, bad, here = Tasks(), 0, 0
        for id, trial in tuple(self._trials.items()):
            member = view.members.get(id)
            if member is None or member.condition in _GONE or member.condition is None:
                self._leave(id, trial)
                continue
            sight = self._sight(member, now)
            self._trials[id] = look(trial, sight, bake=policy.bake, now=now)
            self._seen[id].note(excused=trial.excused, good=sight.looks is Looks.GOOD)
            self._settle(id, sight, now)
            tasks += tasks_since(trial, sight)
            bad += member.condition in (Condition.SICK, Condition.DEAD)
            here += 1
        trials = [trial for id, trial in self._trials.items() if id in view.members]
        failures = Counter(trial.failure for trial in self._trials.values() if trial.failure)
        return ConfigObserved(
            size=counts.total,
            ready=sum(self._is_ready(member) for member in view.members.values()),
            trials=here,
            proved=sum(trial.proved for trial in trials),
            spoiled=sum(trial.spoiled for trial in trials),
            refused=failures["refused"],
            failed=failures.total() - failures["refused"],
            others=counts.total - here,
            others_bad=max(0, counts.sick + counts.dead - bad),
            tasks=tasks,
            others_tasks=self._others_tasks(policy, memory, tasks),
            hold=hold,
        )

    def _leave(self, id: str, trial: Trial) -> None:
        """An instance is gone; that it had failed stays known, also where recovery was quicker than this look."""
        self._running.pop(id, None)
        seen = self._seen.pop(id, None)
        if seen is not None and seen.ailed and not trial.failure and not trial.excused:
            trial = self._trials[id] = replace(trial, failure="sick")
        slot = self._risky.pop(id, None)
        if slot is not None:
            self._desk.disruptions.safe(slot)
        if not trial.failure:
            del self._trials[id]

    def _sight(self, member: Member, now: float) -> Sight:
        instance, condition = member.instance, member.condition
        ack = self._acks.known.get(instance.id)
        if ack is not None and ack.revision == self._revision:
            self._running.setdefault(instance.id, now)
        else:
            self._running.pop(instance.id, None)
        seen = self._seen.setdefault(instance.id, _Seen(member))
        lost = condition is Condition.DEAD and instance.phase is Phase.LOST  # a lost node is no fault of the document
        bad = condition in (Condition.SICK, Condition.DEAD) and not lost
        good = condition in GOOD and member.health is not HealthState.SUSPECT  # a doubt is neither proof nor failure
        return Sight(
            process=(instance.restarts, instance.started_at),
            looks=Looks.GOOD if good else Looks.BAD if bad else Looks.UNKNOWN,
            good_since=member.healthy_since,
            running_since=self._running.get(instance.id),
            refuses=ack is not None and ack.refused == self._revision,
            ailed=seen.ailed,
            renewed=seen.renewed or instance.slot in self._desk.disruptions,
            tasks=_tasks(member),
        )

    def _settle(self, id: str, sight: Sight, now: float) -> None:
        """An instance is at risk until what the revision does to it would show."""
        slot, trial = self._risky.get(id), self._trials[id]
        if slot is None:
            return
        over = None if sight.running_since is None else sight.running_since + self._shown
        if sight.refuses or sight.looks is Looks.BAD or trial.failure or (over is not None and now >= over):
            self._desk.disruptions.safe(slot)
            del self._risky[id]
        elif over is not None:  # also when nobody looks any more, because the rollout is over
            self._desk.disruptions.risk_until(slot, over)

    # ------------------------------------------------------------------------------------------ tasks

    def total(self) -> Tasks:
        """What all instances say that they have done since their processes began."""
        return sum((_tasks(member) for member in self._desk.view.members.values()), Tasks())

    def _others_tasks(self, policy: ConfigRollout, memory: ConfigMemory, tasks: Tasks) -> Tasks:
        """What the others have done since this ring began; looked at only where it decides."""
        members = self._desk.view.members
        if self._ring != memory.ring:
            self._ring = memory.ring
            self._before = {id: _tasks(member) for id, member in members.items() if id not in self._trials}
        if tasks.share <= memory.before.share + policy.max_errors:
            return Tasks()
        return sum((self._done(id, members[id]) for id in self._before.keys() & members.keys()), Tasks())

    def _done(self, id: str, member: Member) -> Tasks:
        if id in self._trials:
            return Tasks()
        now, before = _tasks(member), self._before[id]
        if now.ended < before.ended:  # another process
            return now
        return Tasks(now.ended - before.ended, max(0, now.failed - before.failed))


def _tasks(member: Member) -> Tasks:
    return Tasks(member.completed + member.failed, member.failed)


def detection(policy: HealthPolicy) -> float:
    """Seconds within which what makes an instance sick shows in its health, by the slowest check."""
    spans = [
        check.min_silence if isinstance(check, HeartbeatCheck) else check.period * check.failures + check.deadline
        for check in policy.checks
    ]
    return float(max(spans, default=0.0))
