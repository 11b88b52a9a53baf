"""What the backend shows to Prometheus: how well it sees the cluster, what it asks, which Events it could not write.

Labels have a handful of values each: the four kinds that are watched, and words of this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agentfleet.backends.kubernetes.announcer import Announcer
from agentfleet.backends.kubernetes.connection import Connection
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.measures import Metric, Sample

__all__ = ["MEASURES", "samples"]

_INFORMER = "agentfleet_kubernetes_informer"
_API = "agentfleet_kubernetes_api"
_EVENTS = "agentfleet_kubernetes_events"
_KIND = ("kind",)

MEASURES: Mapping[str, Metric] = {
    f"{_INFORMER}_staleness_seconds": Metric(
        "gauge", "Time since the API server last said anything to the watch that has waited longest.", _KIND
    ),
    f"{_INFORMER}_relists": Metric("counter", "Lists after the first one.", _KIND),
    f"{_INFORMER}_reconnects": Metric("counter", "Watches that began after the first one of a list.", _KIND),
    f"{_INFORMER}_expired": Metric("counter", "Times that the history to go on from was gone (410).", _KIND),
    f"{_INFORMER}_failures": Metric("counter", "Lists and watches that ended in an error.", _KIND),
    f"{_INFORMER}_events": Metric("counter", "Changes that watches have told.", _KIND),
    f"{_API}_calls": Metric("counter", "Requests sent, each attempt and each watch counted.", ()),
    f"{_API}_writes": Metric("counter", "Of these, those that are no GET.", ()),
    f"{_API}_repeated": Metric("counter", "Attempts that were not the first of their call.", ()),
    f"{_API}_failures": Metric("counter", "Attempts that ended in an error.", ()),
    f"{_API}_overloads": Metric("counter", "Attempts to which the server said that it has too much to do.", ()),
    f"{_API}_throttled_seconds": Metric(
        "counter", "Time that requests have waited for our own rate limit, or as long as the server asked for.", ()
    ),
    f"{_EVENTS}_written": Metric("counter", "Kubernetes Events written, repeats that were counted on one too.", ()),
    f"{_EVENTS}_lost": Metric("counter", "Kubernetes Events that were not written, by why.", ("reason",)),
}
"""Every metric by name, as in `telemetry.METRICS`."""


def samples(
    connection: Connection | None, informers: Mapping[str, Informer[Any]], announcer: Announcer | None
) -> Iterator[Sample]:
    """What these have counted so far. May be asked in any thread."""
    for kind, informer in informers.items():
        yield from _of_informer(informer, (kind,))
    if connection is not None:
        yield from _of_connection(connection)
    if announcer is not None:
        yield from _of_announcer(announcer)


def _of_informer(informer: Informer[Any], kind: tuple[str]) -> Iterator[Sample]:
    silence, counts = informer.last_word.silence, informer.metrics
    if silence is not None:
        yield Sample(f"{_INFORMER}_staleness_seconds", silence, kind, of=informer)
    for name, value in (
        ("relists", counts.relists),
        ("reconnects", counts.reconnects),
        ("expired", counts.expired),
        ("failures", counts.failures),
        ("events", counts.events),
    ):
        yield Sample(f"{_INFORMER}_{name}", value, kind, of=informer)


def _of_connection(connection: Connection) -> Iterator[Sample]:
    traffic = connection.traffic
    yield Sample(f"{_API}_calls", traffic.calls, of=connection)
    yield Sample(f"{_API}_writes", traffic.writes, of=connection)
    yield Sample(f"{_API}_repeated", traffic.repeated, of=connection)
    yield Sample(f"{_API}_failures", traffic.failed, of=connection)
    yield Sample(f"{_API}_overloads", traffic.overloaded, of=connection)
    yield Sample(f"{_API}_throttled_seconds", connection.throttled, of=connection)


def _of_announcer(announcer: Announcer) -> Iterator[Sample]:
    told = announcer.announced
    yield Sample(f"{_EVENTS}_written", told.written + told.counted, of=announcer)
    for reason, lost in (("limited", told.limited), ("dropped", told.dropped), ("failed", told.failed)):
        yield Sample(f"{_EVENTS}_lost", lost, (reason,), of=announcer)
