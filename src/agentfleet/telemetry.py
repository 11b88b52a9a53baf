"""Metrics for Prometheus: events and a few direct observations become counters, gauges and histograms.

`record` takes the same events as the journal, at a constant cost each, and never fails on what an event holds. No label
is an instance's id, and each label has a bounded number of values: what exceeds the bound is counted under "(other)".
`docs` and dashboards may rely on the names in `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from agentfleet.errors import JournalError
from agentfleet.events import Event

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER = "(other)"
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, help text, labels and, for a histogram, its buckets (seconds)."""

    kind: str
    text: str
    labels: tuple[str, ...] = ("fleet",)
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "agentfleet_instances": Metric("gauge", "Instances by state.", ("fleet", "state")),
    "agentfleet_desired_replicas": Metric("gauge", "Instances wanted."),
    "agentfleet_decisions": Metric("counter", "Decisions by kind.", ("fleet", "kind")),
    "agentfleet_actions": Metric("counter", "Actions on instances that ended.", ("fleet", "action", "outcome")),
    "agentfleet_action_seconds": Metric("histogram", "Time an action took.", ("fleet", "action"), _SLOW),
    "agentfleet_probe_seconds": Metric("histogram", "Time a probe took.", ("fleet", "check"), _FAST),
    "agentfleet_probe_failures": Metric("counter", "Failed probes.", ("fleet", "check")),
    "agentfleet_verdict_changes": Metric("counter", "Verdicts that changed.", ("fleet", "verdict")),
    "agentfleet_detection_seconds": Metric("histogram", "From a fault to its verdict.", ("fleet",), _SLOW),
    "agentfleet_recovery_seconds": Metric("histogram", "From a bad verdict to good health.", ("fleet",), _SLOW),
    "agentfleet_scale_operations": Metric("counter", "Changes of the wanted number.", ("fleet", "direction", "by")),
    "agentfleet_rollout_state": Metric("gauge", "1 for the state that the rollout is in.", ("fleet", "state")),
    "agentfleet_config_published_revision": Metric("gauge", "Newest configuration revision."),
    "agentfleet_config_acked_revision": Metric("gauge", "Revision that every instance has answered for."),
    "agentfleet_config_acked_lag_revisions": Metric("gauge", "Revisions published and not yet answered for by all."),
    "agentfleet_config_delivery_seconds": Metric(
        "histogram", "From publication to the last answer.", ("fleet",), _SLOW
    ),
    "agentfleet_config_rejections": Metric("counter", "Configuration documents refused before storing."),
    "agentfleet_journal_appends": Metric("counter", "Events journaled."),
    "agentfleet_leading_epoch": Metric("gauge", "Epoch in which this manager leads; 0 while it does not."),
    "agentfleet_journal_errors": Metric("counter", "Events that could not be journaled."),
    "agentfleet_turn_seconds": Metric("histogram", "Time one turn of a fleet's loop took.", ("fleet",), _FAST),
    "agentfleet_prober_lag_seconds": Metric("gauge", "How late the prober is (99th percentile)."),
}
"""Every metric by name; Prometheus adds `_total` to counters, and `_bucket`, `_sum`, `_count` to histograms."""

ROLLOUT_STATES = ("progressing", "paused", "complete", "failed", "rolled_back")

_DECISIONS = ("scaling.decision", "governor.", "recovery.", "rollout.", "fleet.scaled")
_VERDICTS = {
    "instance.ready": "healthy",
    "instance.unhealthy": "unhealthy",
    "instance.exited": "dead",
    "instance.lost": "dead",
}
_ROLLOUTS = {"rollout.completed": "complete", "rollout.failed": "failed", "rollout.rolled_back": "rolled_back"}


class Journal(Protocol):
    """The journal's port as `observing` needs it; spelled out because one port does not import another."""

    def append(self, event: Event) -> Event:
        """See `stores.journal.Journal`."""
        ...

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """See `stores.journal.Journal`."""
        ...

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """See `stores.journal.Journal`."""
        ...

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        """See `stores.journal.Journal`."""
        ...


class Telemetry:
    """One registry with all of agentfleet's metrics.

    Args:
        registry: Where to register; one of its own when omitted, so that several fleets' managers in one process (and
            tests) do not collide.
        max_fleets: Fleets with series of their own.
        max_values: Values of each other label.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, max_fleets: int = 1000, max_values: int = 64
    ) -> None:
        import prometheus_client as client  # noqa: PLC0415 - on first use: it is not part of the plain import

        self.registry: CollectorRegistry = registry if registry is not None else client.CollectorRegistry()
        make: dict[str, Callable[[str, Metric], Any]] = {
            "counter": lambda name, m: client.Counter(name, m.text, m.labels, registry=self.registry),
            "gauge": lambda name, m: client.Gauge(name, m.text, m.labels, registry=self.registry),
            "histogram": lambda name, m: client.Histogram(
                name, m.text, m.labels, registry=self.registry, buckets=m.buckets
            ),
        }
        self._render: Callable[[CollectorRegistry], bytes] = client.generate_latest
        self._metrics = {name: make[metric.kind](name, metric) for name, metric in METRICS.items()}
        self._children: dict[str, dict[tuple[str, ...], Any]] = {}
        """The series of each fleet, by metric and further labels: found again without the library's own locking."""
        self._max_fleets, self._max_values = max_fleets, max_values
        self._values: dict[tuple[str, str], set[str]] = {}
        self._config: dict[str, tuple[float, float]] = {}
        self._on: dict[str, Callable[[Event], None]] = {
            "fleet.scaled": self._on_scaled,
            "state.fleet": self._on_state,
            "manager.started": self._on_state,
            "instance.unhealthy": self._on_unhealthy,
            "instance.recovered": self._on_recovered,
            "action.failed": self._on_action_failed,
            "config.published": self._on_published,
            "config.delivered": self._on_delivered,
            "config.rejected": lambda event: self._counter("config_rejections", event.fleet).inc(),
        }

    # -------------------------------------------------------------------------------------- events

    def record(self, event: Event) -> None:
        """Count one event. Whatever it holds, this neither fails nor takes long."""
        kind, fleet = event.kind, event.fleet
        self._counter("journal_appends", fleet).inc()
        if kind.startswith(_DECISIONS):
            self._counter("decisions", fleet, kind).inc()
        if kind in _VERDICTS:
            self._counter("verdict_changes", fleet, _VERDICTS[kind]).inc()
        if kind in _ROLLOUTS:
            self.set_rollout(fleet, _ROLLOUTS[kind])
        handler = self._on.get(kind)
        if handler is not None:
            handler(event)

    def observing(self, journal: Journal) -> Journal:
        """`journal`, with every event that is appended to it also recorded here."""
        return _ObservedJournal(journal, self)

    def _on_scaled(self, event: Event) -> None:
        before, after = _number(event, "from"), _number(event, "to")
        if before is not None and after is not None:
            direction = "up" if after > before else "down"
            self._counter("scale_operations", event.fleet, direction, str(event.data.get("by", "unknown"))).inc()
            self.set_desired(event.fleet, after)

    def _on_state(self, event: Event) -> None:
        wanted = _number(event, "replicas")
        if wanted is not None:
            running = event.data.get("running", True) and not event.data.get("deleted", False)
            self.set_desired(event.fleet, wanted if running else 0)

    def _on_unhealthy(self, event: Event) -> None:
        seconds = _number(event, "detection_s")
        if seconds is not None:
            self.observe_detection(event.fleet, seconds)

    def _on_recovered(self, event: Event) -> None:
        seconds = _number(event, "seconds")
        if seconds is not None:
            self._histogram("recovery_seconds", event.fleet).observe(seconds)

    def _on_action_failed(self, event: Event) -> None:
        outcome = str(event.data.get("error", "failed"))
        self.observe_action(event.fleet, str(event.data.get("action", "unknown")), _number(event, "seconds"), outcome)

    def _on_published(self, event: Event) -> None:
        revision = _number(event, "revision")
        if revision is not None:
            self._set_config(event.fleet, published=revision)

    def _on_delivered(self, event: Event) -> None:
        revision, seconds = _number(event, "revision"), _number(event, "last_s")
        if revision is not None:
            self._set_config(event.fleet, acked=revision)
        if seconds is not None:
            self._histogram("config_delivery_seconds", event.fleet).observe(seconds)

    # -------------------------------------------------------------------------------------- direct observations

    def set_instances(self, fleet: str, counts: Mapping[str, int]) -> None:
        """How many instances are in each state; give every state, also those with none."""
        for state, count in counts.items():
            self._gauge("instances", fleet, state).set(count)

    def set_desired(self, fleet: str, replicas: float) -> None:
        """How many instances are wanted."""
        self._gauge("desired_replicas", fleet).set(replicas)

    def set_rollout(self, fleet: str, state: str) -> None:
        """Which of `ROLLOUT_STATES` the rollout is in; any other word sets none of them."""
        for each in ROLLOUT_STATES:
            self._gauge("rollout_state", fleet, each).set(each == state)

    def set_prober_lag(self, fleet: str, seconds: float) -> None:
        """How late the prober is."""
        self._gauge("prober_lag_seconds", fleet).set(seconds)

    def observe_action(self, fleet: str, action: str, seconds: float | None = None, outcome: str = "ok") -> None:
        """An action that ended. Failures come by themselves as "action.failed" events: call this for successes."""
        self._counter("actions", fleet, action, outcome).inc()
        if seconds is not None:
            self._histogram("action_seconds", fleet, action).observe(seconds)

    def observe_probe(self, fleet: str, check: str, seconds: float, *, ok: bool) -> None:
        """A probe that ended; `check` is its kind: "http", "tcp", "custom" or "heartbeat"."""
        self._histogram("probe_seconds", fleet, check).observe(seconds)
        if not ok:
            self._counter("probe_failures", fleet, check).inc()

    def observe_detection(self, fleet: str, seconds: float) -> None:
        """The time from a fault (or its last sign of life) to the verdict."""
        self._histogram("detection_seconds", fleet).observe(seconds)

    def set_leading(self, fleet: str, epoch: int) -> None:
        """In which epoch this manager leads a fleet that several share; 0 while it does not."""
        self._gauge("leading_epoch", fleet).set(epoch)

    def observe_turn(self, fleet: str, seconds: float) -> None:
        """The time that one turn took."""
        self._histogram("turn_seconds", fleet).observe(seconds)

    def count_journal_error(self, fleet: str) -> None:
        """An event could not be journaled."""
        self._counter("journal_errors", fleet).inc()

    def forget(self, fleet: str) -> None:
        """Drop every series of a fleet that is no more."""
        self._config.pop(fleet, None)
        for metric, *labels in self._children.pop(fleet, {}):
            self._metrics[metric].remove(fleet, *labels)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return self._render(self.registry)

    # -------------------------------------------------------------------------------------- series

    def _set_config(self, fleet: str, *, published: float = 0, acked: float = 0) -> None:
        old = self._config.get(fleet, (0.0, 0.0))
        newest, answered = max(published, acked, old[0]), acked or old[1]
        if fleet in self._children or len(self._config) < self._max_fleets:
            self._config[fleet] = (newest, answered)
        self._gauge("config_published_revision", fleet).set(newest)
        self._gauge("config_acked_revision", fleet).set(answered)
        self._gauge("config_acked_lag_revisions", fleet).set(max(0.0, newest - answered))

    def _counter(self, name: str, fleet: str, *labels: str) -> Counter:
        child: Counter = self._child(name, fleet, labels)
        return child

    def _gauge(self, name: str, fleet: str, *labels: str) -> Gauge:
        child: Gauge = self._child(name, fleet, labels)
        return child

    def _histogram(self, name: str, fleet: str, *labels: str) -> Histogram:
        child: Histogram = self._child(name, fleet, labels)
        return child

    def _child(self, name: str, fleet: str, labels: tuple[str, ...]) -> Any:
        of_fleet = self._children.get(fleet)
        if of_fleet is None:
            if fleet != OTHER and (len(self._children) >= self._max_fleets or not _is_label(fleet)):
                return self._child(name, OTHER, labels)
            of_fleet = self._children[fleet] = {}
        key = (f"agentfleet_{name}", *labels)
        child = of_fleet.get(key)
        if child is None:
            kept = tuple(self._bounded(name, place, value) for place, value in enumerate(labels))
            if kept != labels:
                return self._child(name, fleet, kept)
            child = of_fleet[key] = self._metrics[key[0]].labels(fleet, *labels)
        return child

    def _bounded(self, name: str, place: int, value: str) -> str:
        """`value` if it is among the first ones of its label, else "(other)"."""
        known = self._values.setdefault((name, str(place)), {OTHER})
        if value not in known:
            if len(known) > self._max_values or not _is_label(value):
                return OTHER
            known.add(value)
        return value


class _ObservedJournal:
    """A journal whose appends are also metrics."""

    __slots__ = ("_journal", "_telemetry")

    def __init__(self, journal: Journal, telemetry: Telemetry) -> None:
        self._journal, self._telemetry = journal, telemetry

    def append(self, event: Event) -> Event:
        try:
            recorded = self._journal.append(event)
        except JournalError:
            self._telemetry.count_journal_error(event.fleet)
            raise
        self._telemetry.record(recorded)
        return recorded

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        return self._journal.read(fleet=fleet, after=after)

    def last_state(self, fleet: str, kind: str) -> Event | None:
        return self._journal.last_state(fleet, kind)

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        return self._journal.follow(fleet=fleet, after=after)


def _is_label(value: str) -> bool:
    """Whether a text can be a label: short, and free of what cannot be written (half of a surrogate pair)."""
    return len(value) <= 100 and value.isprintable()


def _number(event: Event, name: str) -> float | None:
    value = event.data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return float(value) if math.isfinite(value) else None
