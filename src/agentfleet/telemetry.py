"""Metrics for Prometheus: events and a few direct observations become counters, gauges and histograms.

`record` takes the same events as the journal, at a constant cost each, and never fails on what an event holds. No label
is an instance's id, and each label has a bounded number of values: what exceeds the bound is counted under "(other)".
`docs` and dashboards may rely on the names in `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from agentfleet.enginemetrics import EngineMetrics
from agentfleet.events import Event
from agentfleet.measures import OTHER, Metric, is_label
from agentfleet.observed import Journal, ObservedJournal

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["METRICS", "OTHER", "ROLLOUT_STATES", "Metric", "Telemetry"]

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


METRICS: Mapping[str, Metric] = {
    "agentfleet_instances": Metric("gauge", "Instances by state.", ("fleet", "state")),
    "agentfleet_desired_replicas": Metric("gauge", "Instances wanted."),
    "agentfleet_nodes": Metric("gauge", "Nodes that instances may run on, by state.", ("fleet", "state")),
    "agentfleet_resource_used": Metric(
        "gauge", "Cores (cpu) and bytes (memory) used by the instances that could be measured.", ("fleet", "resource")
    ),
    "agentfleet_resource_requested": Metric("gauge", "What the same instances ask for.", ("fleet", "resource")),
    "agentfleet_decisions": Metric("counter", "Decisions by kind.", ("fleet", "kind")),
    "agentfleet_actions": Metric("counter", "Actions on instances that ended.", ("fleet", "action", "outcome")),
    "agentfleet_action_seconds": Metric("histogram", "Time an action took.", ("fleet", "action"), _SLOW),
    "agentfleet_probe_seconds": Metric("histogram", "Time a probe took.", ("fleet", "check"), _FAST),
    "agentfleet_probe_failures": Metric("counter", "Failed probes.", ("fleet", "check")),
    "agentfleet_verdict_changes": Metric("counter", "Verdicts that changed.", ("fleet", "verdict")),
    "agentfleet_detection_seconds": Metric("histogram", "From a fault to its verdict.", ("fleet",), _SLOW),
    "agentfleet_recovery_seconds": Metric("histogram", "From a bad verdict to good health.", ("fleet",), _SLOW),
    "agentfleet_ailing_seconds": Metric("gauge", "How long the place has been waiting that waits longest for health."),
    "agentfleet_scale_operations": Metric("counter", "Changes of the wanted number.", ("fleet", "direction", "by")),
    "agentfleet_scale_outcomes": Metric("counter", "How changes of size ended.", ("fleet", "direction", "outcome")),
    "agentfleet_scale_failures_in_a_row": Metric(
        "gauge", "Times in a row that the engine has not made, ended or taken on what the size asks for."
    ),
    "agentfleet_scale_seconds": Metric(
        "histogram", "From a wanted size to its instances.", ("fleet", "direction"), _SLOW
    ),
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

_ZERO: Sequence[tuple[str, ...]] = (
    *(("agentfleet_verdict_changes", verdict) for verdict in ("healthy", "unhealthy", "dead")),
    *(
        ("agentfleet_scale_outcomes", direction, outcome)
        for direction in ("up", "down")
        for outcome in ("reached", "failed", "overtaken")
    ),
    ("agentfleet_detection_seconds",),
    ("agentfleet_recovery_seconds",),
)
"""Series that every fleet has from its beginning: a counter that begins with its first failure never shows a rise."""

ROLLOUT_STATES = ("progressing", "paused", "complete", "failed", "rolled_back")

_DECISIONS = ("scaling.decision", "governor.", "recovery.", "rollout.", "fleet.scaled")
_VERDICTS = {
    "instance.ready": "healthy",
    "instance.unhealthy": "unhealthy",
    "instance.exited": "dead",
    "instance.lost": "dead",
}
_ROLLOUTS = {"rollout.completed": "complete", "rollout.failed": "failed", "rollout.rolled_back": "rolled_back"}


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
        self._engines = EngineMetrics(self.registry, max_series=max_values)
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
            "resizing.reached": self._on_resized,
            "resizing.failed": self._on_resized,
            "resizing.overtaken": self._on_resized,
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
        return ObservedJournal(journal, self.record, self.count_journal_error)

    def _on_scaled(self, event: Event) -> None:
        before, after = _number(event, "from"), _number(event, "to")
        if before is not None and after is not None:
            direction = "up" if after > before else "down"
            self._counter("scale_operations", event.fleet, direction, str(event.data.get("by", "unknown"))).inc()
            self.set_desired(event.fleet, after)

    def _on_resized(self, event: Event) -> None:
        before, wanted, seconds = (_number(event, name) for name in ("from", "to", "seconds"))
        if before is None or wanted is None:
            return
        direction, outcome = "up" if wanted > before else "down", event.kind.partition(".")[2]
        self._counter("scale_outcomes", event.fleet, direction, outcome).inc()
        if outcome == "reached" and seconds is not None:
            self._histogram("scale_seconds", event.fleet, direction).observe(seconds)

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

    def measuring(self, engine: object) -> AbstractContextManager[None]:
        """A block in which it is shown what an engine counts itself, if it does; see `backends.base.Measured`.

        Fleets and managers do this for their engines: enter it before the engine, and leave it after.
        """
        return self._engines.measuring(engine)

    # -------------------------------------------------------------------------------------- direct observations

    def set_instances(self, fleet: str, counts: Mapping[str, int]) -> None:
        """How many instances are in each state; give every state, also those with none."""
        for state, count in counts.items():
            self._gauge("instances", fleet, state).set(count)

    def set_nodes(self, fleet: str, counts: Mapping[str, int]) -> None:
        """How many nodes are in each state; give every state, also those with none."""
        for state, count in counts.items():
            self._gauge("nodes", fleet, state).set(count)

    def set_resource(self, fleet: str, resource: str, used: float | None, requested: float | None) -> None:
        """What the measured instances use of a resource, and what they ask for; None where that is not known."""
        for name, value in (("resource_used", used), ("resource_requested", requested)):
            if value is None:
                self._drop(fleet, (f"agentfleet_{name}", resource))
            else:
                self._gauge(name, fleet, resource).set(value)

    def set_ailing(self, fleet: str, seconds: float) -> None:
        """How long the place has been waiting that waits longest for a healthy instance; 0 while none does."""
        self._gauge("ailing_seconds", fleet).set(seconds)

    def set_scale_failures(self, fleet: str, times: int) -> None:
        """How often in a row the engine has not done what the size asks for."""
        self._gauge("scale_failures_in_a_row", fleet).set(times)

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
        if epoch and fleet in self._config:
            self._set_config(fleet)

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

    def leave(self, fleet: str) -> None:
        """Drop what says how a fleet stands: from now on another manager says so. What has happened stays counted."""
        self._config.pop(fleet, None)
        self.lapse(fleet)

    def lapse(self, fleet: str) -> None:
        """As `leave`, for as long as it is not certain whether this manager still leads; `set_leading` ends it."""
        for series in tuple(self._children.get(fleet, ())):
            if METRICS[series[0]].kind == "gauge":
                self._drop(fleet, series)

    def _drop(self, fleet: str, series: tuple[str, ...]) -> None:
        if self._children.get(fleet, {}).pop(series, None) is not None:
            self._metrics[series[0]].remove(fleet, *series[1:])

    def render(self) -> bytes:
        """All metrics in Prometheus' text format.

        It takes some 3 ms a fleet, for which an event loop must not stand still: call it in another thread, as in
        `await anyio.to_thread.run_sync(telemetry.render)`. Whatever goes on counting meanwhile may do so.
        """
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
            if fleet != OTHER and (len(self._children) >= self._max_fleets or not is_label(fleet)):
                return self._child(name, OTHER, labels)
            of_fleet = self._children[fleet] = {}
            for metric, *known in _ZERO:
                of_fleet[metric, *known] = self._metrics[metric].labels(fleet, *known)
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
            if len(known) > self._max_values or not is_label(value):
                return OTHER
            known.add(value)
        return value


def _number(event: Event, name: str) -> float | None:
    value = event.data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        return None
    return float(value) if math.isfinite(value) else None
