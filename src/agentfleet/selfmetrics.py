"""What a manager tells of itself, beside what it tells of its fleets (`agentfleet.telemetry`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentfleet.measures import Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)

SELF_METRICS = {
    "agentfleet_manager_fleets": Metric("gauge", "Fleets by what this manager does with them.", ("role",)),
    "agentfleet_manager_operations": Metric("counter", "Operations that ended here.", ("kind", "outcome")),
    "agentfleet_manager_operation_seconds": Metric("histogram", "From acceptance to the outcome.", ("kind",), _SLOW),
    "agentfleet_manager_operations_waiting": Metric("gauge", "Operations of all fleets that have not ended.", ()),
    "agentfleet_manager_loop_lag_seconds": Metric("gauge", "How late the event loop was at the last look.", ()),
    "agentfleet_manager_store_errors": Metric("counter", "Times that the store could not be asked.", ()),
    "agentfleet_manager_store_age_seconds": Metric("gauge", "Time since the store answered last.", ()),
}
"""Every metric by name, as in `telemetry.METRICS`."""

ROLES = ("leads", "stands_by", "closed")


class SelfMetrics:
    """The metrics of one manager.

    Args:
        registry: Where to register them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        import prometheus_client as client  # noqa: PLC0415 - on first use: it is not part of the plain import

        kinds: dict[str, Any] = {"counter": client.Counter, "gauge": client.Gauge, "histogram": client.Histogram}
        self._made: dict[str, Any] = {}
        for name, metric in SELF_METRICS.items():
            buckets = {"buckets": metric.buckets} if metric.buckets else {}
            self._made[name] = kinds[metric.kind](name, metric.text, metric.labels, registry=registry, **buckets)

    def ended(self, kind: str, outcome: str, seconds: float) -> None:
        """An operation has ended."""
        self._made["agentfleet_manager_operations"].labels(kind, outcome).inc()
        self._made["agentfleet_manager_operation_seconds"].labels(kind).observe(seconds)

    def looked(self, roles: dict[str, int], waiting: int, lag: float, age: float) -> None:
        """What a look found: fleets by role, operations that wait, and seconds of lag and since the store answered."""
        for role in ROLES:
            self._made["agentfleet_manager_fleets"].labels(role).set(roles.get(role, 0))
        self._made["agentfleet_manager_operations_waiting"].set(waiting)
        self._made["agentfleet_manager_loop_lag_seconds"].set(lag)
        self._made["agentfleet_manager_store_age_seconds"].set(age)

    def store_failed(self) -> None:
        """The store could not be asked."""
        self._made["agentfleet_manager_store_errors"].inc()
