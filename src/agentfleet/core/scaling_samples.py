"""What the scaling decision is told: metric readings, and the grouping of per-instance samples into aggregates.

Everything is counted in *thousandths* of the unit (millicores, thousandths of a byte or of a task), as whole numbers,
because Kubernetes' HorizontalPodAutoscaler does so and its roundings decide cases. The grouping rules are the HPA's
(`replica_calculator.go`, Kubernetes 1.36): gone and ended instances are ignored, pending ones are unready, those
without a sample are missing, and CPU samples taken while an instance starts are not believed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agentfleet.instances import Instance, Phase

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def milli(value: float) -> int:
    """Thousandths of `value`, rounded up (as `resource.Quantity.MilliValue` does) and capped at int64's maximum.

    Raises:
        ValueError: The value is NaN or infinite.
    """
    if isinstance(value, int):
        return min(value * 1000, INT64_MAX)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a measurement")
    return min(math.ceil(round(value * 1000, 6)), INT64_MAX)  # 6 digits: 15.3 is 15300 thousandths, not 15301


class MemberPhase(StrEnum):
    """As much of an instance's life as scaling needs to know."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    """Ended for good (a pod that Failed or Succeeded); an instance that will be restarted is RUNNING."""


class Group(StrEnum):
    """What a member's sample is worth."""

    READY = "ready"
    UNREADY = "unready"
    """Not working yet: its sample is not believed, and counts as zero when growing."""
    MISSING = "missing"
    """No sample: counts as fully used when shrinking and as idle when growing."""
    IGNORED = "ignored"
    """On its way out."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One instance's measurement: `milli` thousandths, averaged over the `window` seconds before `at`."""

    milli: int
    at: float = 0.0
    window: float = 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """One instance, as scaling sees it. Times are seconds on the clock that `now` comes from."""

    id: str
    phase: MemberPhase = MemberPhase.RUNNING
    deleting: bool = False
    ready: bool | None = True
    """None: its readiness is unknown."""
    ready_changed_at: float | None = 0.0
    """When `ready` last changed, in either direction; None: it never was reported."""
    started_at: float | None = 0.0


_PENDING, _RUNNING, _ENDED = MemberPhase.PENDING, MemberPhase.RUNNING, MemberPhase.ENDED


def member_of(instance: Instance) -> Member:
    """An agentfleet instance as scaling sees it.

    An instance that has exited or is lost will come back, so it stays a member without a sample: a crashed half of the
    fleet must not look like a fleet of half the size.
    """
    started = instance.started_at
    if instance.ready or instance.ready_at is None or (started is not None and instance.ready_at < started):
        changed = instance.ready_at if instance.ready else started
    else:
        changed = math.inf  # it was ready and lost that later: so not an instance that is still starting
    return Member(
        id=instance.id,
        phase=_PENDING if instance.phase is Phase.PENDING else _RUNNING,
        deleting=instance.phase is Phase.DRAINING,
        ready=instance.ready,
        ready_changed_at=changed,
        started_at=started,
    )


def ready_count(members: Iterable[Member]) -> int:
    """Members that run and are ready, those on their way out included: what `Value` targets multiply."""
    return sum(member.phase is _RUNNING and member.ready is True for member in members)


@dataclass(frozen=True, slots=True)
class Startup:
    """How long, in seconds, CPU samples of a starting instance are doubted.

    The HPA's flags are `cpu-initialization-period` and `initial-readiness-delay`.
    """

    cpu_initialization: float = 300.0
    readiness_delay: float = 30.0


def classify(member: Member, sample: Sample | None, *, startup: Startup | None, now: float) -> Group:
    """The group of one member.

    Args:
        member: The instance.
        sample: Its measurement, None if there is none.
        startup: The doubts about starting instances; None for other metrics than CPU, whose samples are believed.
        now: Seconds.
    """
    if member.deleting or member.phase is _ENDED:
        return Group.IGNORED
    if member.phase is _PENDING:
        return Group.UNREADY
    if sample is None:
        return Group.MISSING
    if startup is None:
        return Group.READY
    started, changed = member.started_at, member.ready_changed_at
    if started is None or changed is None:
        return Group.UNREADY
    if started + startup.cpu_initialization > now:
        doubted = member.ready is False or sample.at < changed + sample.window
    else:  # not ready, and the last change was at the start: it has never been ready
        doubted = member.ready is False and changed < started + startup.readiness_delay
    return Group.UNREADY if doubted else Group.READY


@dataclass(frozen=True, slots=True)
class ResourceAggregate:
    """The sums over a fleet that a decision needs, so that its cost does not depend on the fleet's size.

    Sums are thousandths. The requests are needed for utilisation targets only.
    """

    ready: int
    """Instances whose samples are believed."""
    usage: int
    """Sum of their samples."""
    requests: int = 0
    """Sum of their requests."""
    unready: int = 0
    unready_requests: int = 0
    missing: int = 0
    missing_requests: tuple[tuple[int, int], ...] = ()
    """(request, how many of the missing instances ask for it): each one's fallback is rounded by itself."""
    stray: int = 0
    """Samples of instances that are not (any more) in the fleet. The HPA counts them, so they are here."""
    stray_usage: int = 0
    ignored: int = 0
    unrequested: int = 0
    """Instances without a request: utilisation cannot be computed while there is one."""

    def __post_init__(self) -> None:
        if self.missing_requests and sum(count for _, count in self.missing_requests) != self.missing:
            raise ValueError(f"missing_requests must account for {self.missing} instances: {self.missing_requests}")

    @classmethod
    def uniform(cls, *, usage: int, request: int, ready: int, unready: int = 0, missing: int = 0) -> ResourceAggregate:
        """An aggregate of instances that all request the same (thousandths)."""
        return cls(
            ready=ready,
            usage=usage,
            requests=ready * request,
            unready=unready,
            unready_requests=unready * request,
            missing=missing,
            missing_requests=((request, missing),) if missing else (),
        )


@dataclass(frozen=True, slots=True)
class InstanceSamples:
    """A reading per instance: who there is, what each was measured at, what each requests (thousandths)."""

    members: Sequence[Member]
    samples: Mapping[str, Sample]
    requests: int | Mapping[str, int] | None = None
    """One number for all, or by id; None where the target needs none."""
    cpu: bool = False
    """Whether starting instances' samples are to be doubted. A CPU target always does."""


@dataclass(frozen=True, slots=True)
class Total:
    """A fleet-wide number in thousandths (a queue's length). For a per-instance target it is the fleet's average."""

    milli: int

    @classmethod
    def of(cls, value: float) -> Total:
        """From a number in units; raises ValueError if it is NaN or infinite."""
        return cls(milli(value))

    @classmethod
    def of_series(cls, series: Iterable[int]) -> Total:
        """The sum of several series in thousandths, capped at int64's maximum."""
        total = 0
        for value in series:
            total += value
            if total > INT64_MAX:
                return cls(INT64_MAX)
        return cls(total)


@dataclass(frozen=True, slots=True)
class MetricFailed:
    """The metric could not be read or makes no sense. It is never taken for zero."""

    reason: str


Reading = ResourceAggregate | InstanceSamples | Total | MetricFailed


def aggregate(reading: InstanceSamples, *, startup: Startup | None, now: float) -> ResourceAggregate:
    """Group a reading's members (see `classify`) and sum each group; one pass, about 0.3 µs a member."""
    samples, members = reading.samples, reading.members
    get = samples.get
    ready = usage = ignored = matched = 0
    unready: list[str] = []
    missing: list[str] = []
    out: list[str] = []
    initialization, delay = (startup.cpu_initialization, startup.readiness_delay) if startup else (0.0, 0.0)
    for member in members:
        if member.phase is not _RUNNING or member.deleting:
            matched += member.id in samples
            if member.deleting or member.phase is _ENDED:
                out.append(member.id)
            else:
                unready.append(member.id)
            continue
        sample = get(member.id)
        if sample is None:
            missing.append(member.id)
            continue
        if startup is not None:  # `classify`, written out: this loop is the cost of a decision over samples
            started, changed = member.started_at, member.ready_changed_at
            if (
                started is None
                or changed is None
                or (
                    member.ready is False or sample.at < changed + sample.window
                    if started + initialization > now
                    else member.ready is False and changed < started + delay
                )
            ):
                unready.append(member.id)
                matched += 1
                continue
        usage += sample.milli
        ready += 1
    ignored = len(out)
    stray, stray_usage = _strays(members, samples, len(samples) - matched - ready)
    sums = _requests(reading, ready, unready, missing, out)
    return ResourceAggregate(
        ready=ready,
        usage=usage,
        requests=sums.ready,
        unready=len(unready),
        unready_requests=sums.unready,
        missing=len(missing),
        missing_requests=sums.missing,
        stray=stray,
        stray_usage=stray_usage,
        ignored=ignored,
        unrequested=sums.lacking,
    )


def _strays(members: Sequence[Member], samples: Mapping[str, Sample], count: int) -> tuple[int, int]:
    if count <= 0:
        return 0, 0
    known = {member.id for member in members}
    values = [sample.milli for id, sample in samples.items() if id not in known]
    return len(values), sum(values)


@dataclass(frozen=True, slots=True)
class _Requests:
    ready: int = 0
    unready: int = 0
    missing: tuple[tuple[int, int], ...] = ()
    lacking: int = 0


def _requests(
    reading: InstanceSamples, ready: int, unready: list[str], missing: list[str], out: list[str]
) -> _Requests:
    requests = reading.requests
    if requests is None:
        return _Requests(lacking=len(reading.members))
    if isinstance(requests, int):
        absent = ((requests, len(missing)),) if missing else ()
        return _Requests(ready * requests, len(unready) * requests, absent)
    asked = [requests.get(member.id) for member in reading.members]
    known = [request for request in asked if request is not None]
    if len(known) < len(asked):
        return _Requests(lacking=len(asked) - len(known))
    waiting = sum(requests[id] for id in unready)
    counts = Counter(requests[id] for id in missing)
    others = waiting + sum(request * count for request, count in counts.items()) + sum(requests[id] for id in out)
    return _Requests(sum(known) - others, waiting, tuple(sorted(counts.items())))
