"""A fleet's own metrics for its autoscaler: CPU and memory per instance, and the tasks that wait or run."""

from __future__ import annotations

import math
from collections.abc import Callable

from agentfleet.core.scaling_samples import InstanceSamples, MemberPhase, MetricFailed, Sample, Total, milli
from agentfleet.core.scaling_samples import Member as ScalingMember
from agentfleet.view import GOOD, Condition, FleetView, Member


class FleetMetrics:
    """Readings over a view, in the form that `core.scaling` takes.

    Args:
        view: The fleet.
        requests: Cores and bytes that one instance asks for; None where the template does not say.
        sampled: When usage was last measured and over how long: (seconds since the epoch, seconds); None if never.
    """

    def __init__(
        self,
        view: FleetView,
        requests: Callable[[], tuple[float | None, int | None]],
        sampled: Callable[[], tuple[float, float] | None],
    ) -> None:
        self._view = view
        self._requests = requests
        self._sampled = sampled

    def cpu(self) -> InstanceSamples | MetricFailed:
        """Cores used, per instance."""
        return self._samples(lambda member: member.cpu, self._requests()[0], cpu=True)

    def memory(self) -> InstanceSamples | MetricFailed:
        """Bytes used, per instance."""
        return self._samples(lambda member: member.memory, self._requests()[1], cpu=False)

    def queue(self) -> Total | MetricFailed:
        """Tasks in flight or queued at the agents, by their own word.

        An agent that has said nothing yet, or is not in service, counts as the average of the others; when most are
        silent nobody knows, and the metric has failed rather than be zero.
        """
        total, heard, tasks = self._view.total_counts().total, 0, 0
        for member in self._view.serving():
            if member.reported:
                heard += 1
                tasks += member.in_flight + member.queued
        if 2 * heard < total:
            return MetricFailed(
                f"{total - heard} of {total} agents have not said how much they have to do; "
                'check "/status", open a dispatcher, or give a metric source of your own'
            )
        return Total.of(tasks * total / heard if heard else 0)

    def _samples(
        self, value: Callable[[Member], float | None], request: float | None, *, cpu: bool
    ) -> InstanceSamples | MetricFailed:
        sampled = self._sampled()
        if sampled is None:
            return MetricFailed("usage has not been measured yet")
        at, window = sampled
        samples = {}
        for id, member in self._view.members.items():
            used = value(member)
            if used is not None:
                samples[id] = Sample(milli(used), at, window)
        members = [_seen(member) for member in self._view.members.values()]
        return InstanceSamples(members, samples, None if request is None else milli(request), cpu)


def _seen(member: Member) -> ScalingMember:
    """An instance as scaling sees it: readiness is what health has proved, not what the backend hopes."""
    instance, condition = member.instance, member.condition
    ready = condition in GOOD
    if ready:
        changed = member.healthy_since
    elif condition is Condition.STARTING:
        changed = instance.started_at
    else:
        changed = math.inf  # it was ready once, so it is not starting
    return ScalingMember(
        id=instance.id,
        phase=MemberPhase.PENDING if condition is Condition.PENDING else MemberPhase.RUNNING,
        deleting=condition in (Condition.DRAINING, Condition.ISOLATED),
        ready=ready,
        ready_changed_at=changed,
        started_at=instance.started_at,
    )
