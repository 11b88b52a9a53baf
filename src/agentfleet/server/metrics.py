"""What the server tells Prometheus of itself: who is asked what, how long it takes, and what comes of it (O1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from agentfleet.measures import Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SPANS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})

API_METRICS = {
    "agentfleet_api_request_seconds": Metric(
        "histogram", "Time until the answer began, by route and outcome.", ("route", "method", "status"), _SPANS
    ),
    "agentfleet_api_requests_in_flight": Metric("gauge", "Requests that are being answered, not those that wait.", ()),
    "agentfleet_api_streams": Metric("gauge", "Streams of events that are open.", ()),
    "agentfleet_api_waits": Metric("gauge", "Requests that wait until an operation has ended.", ()),
    "agentfleet_api_agents": Metric("gauge", "Streams of agents' configuration that are open.", ()),
    "agentfleet_api_unauthenticated": Metric("counter", "Requests of nobody who is known.", ()),
    "agentfleet_api_limited": Metric("counter", "Requests that were too many, by which limit.", ("limit",)),
}
"""Every metric by name, as in `telemetry.METRICS`. `status` is its class: "2xx"; `route` is a template."""


Lasting = Literal["streams", "waits", "agents"]
"""What stays open for long, and is counted by itself."""


class ApiMetrics:
    """The metrics of one server.

    Args:
        registry: Where to register them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        import prometheus_client as client  # noqa: PLC0415 - on first use: it is not part of the plain import

        kinds: dict[str, Any] = {"counter": client.Counter, "gauge": client.Gauge, "histogram": client.Histogram}
        made: dict[str, Any] = {}
        for name, metric in API_METRICS.items():
            buckets = {"buckets": metric.buckets} if metric.buckets else {}
            made[name] = kinds[metric.kind](name, metric.text, metric.labels, registry=registry, **buckets)
        self._seconds = made["agentfleet_api_request_seconds"]
        self._in_flight = made["agentfleet_api_requests_in_flight"]
        self._lasting = {name: made[f"agentfleet_api_{name}"] for name in get_args(Lasting)}
        self._unauthenticated = made["agentfleet_api_unauthenticated"]
        self._limited = made["agentfleet_api_limited"]

    def began(self) -> None:
        """A request has come."""
        self._in_flight.inc()

    def ended(self) -> None:
        """It is over."""
        self._in_flight.dec()

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Its answer has begun."""
        named = method if method in _METHODS else "other"
        self._seconds.labels(route, named, f"{status // 100}xx").observe(seconds)

    def lasting(self, what: Lasting, change: int) -> None:
        """A stream or a wait has begun (1) or ended (-1)."""
        self._lasting[what].inc(change)

    def unauthenticated(self) -> None:
        """Somebody did not say, or not rightly, who he is."""
        self._unauthenticated.inc()

    def limited(self, limit: str) -> None:
        """A request was one too many."""
        self._limited.labels(limit).inc()
