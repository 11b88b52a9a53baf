"""What engines count themselves, for Prometheus: read from them whenever somebody reads the metrics.

Several engines of one kind, one in each namespace, show one set of series: counters are added up, and of a gauge the
largest value is shown, so that a gauge must be one whose largest value is the worst. What an engine has counted stays
when it is closed, because a counter that fell would look like one that begins anew.
"""

from __future__ import annotations

import logging
import math
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard
from weakref import WeakKeyDictionary

from agentfleet.backends.base import Measured
from agentfleet.measures import OTHER, Metric, Sample, is_label

if TYPE_CHECKING:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import CollectorRegistry

    Family = CounterMetricFamily | GaugeMetricFamily

log = logging.getLogger(__name__)

_Series = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels."""


@dataclass(eq=False, slots=True)
class _Shown:
    """An engine that is measured, and how many want it so."""

    engine: Measured
    users: int = 0
    failing: bool = False


class EngineMetrics:
    """The metrics of engines in one registry.

    Args:
        registry: Where to register them, each when the first engine comes that has it.
        max_series: Series of one metric; what exceeds them is counted under "(other)".
    """

    def __init__(self, registry: CollectorRegistry, *, max_series: int) -> None:
        self._registry = registry
        self._max_series = max_series
        self._metrics: dict[str, Metric] = {}
        self._engines: dict[int, _Shown] = {}
        self._totals: dict[_Series, float] = {}
        self._gauges: dict[_Series, float] = {}
        self._known: dict[str, set[tuple[str, ...]]] = {}
        self._last: WeakKeyDictionary[object, dict[_Series, float]] = WeakKeyDictionary()
        """What was last read of each counter, by who counts: it may be met again, in another engine."""
        self._lock = threading.Lock()  # metrics are read in threads of their own

    @contextmanager
    def measuring(self, engine: object) -> Iterator[None]:
        """Show what an engine counts, if it does; may be nested. Enter it before the engine, leave it after."""
        if not self._declared(engine):
            yield
            return
        with self._lock:
            shown = self._engines.setdefault(id(engine), _Shown(engine))
            shown.users += 1
        try:
            yield
        finally:
            with self._lock:
                shown.users -= 1
                if not shown.users:
                    self._read(shown)  # what it has counted since it was read last, up to its closing
                    del self._engines[id(engine)]

    def families(self, names: Iterable[str]) -> list[Family]:
        """Some metrics as they are now; for a registry."""
        with self._lock:
            self._gauges.clear()
            for shown in self._engines.values():
                self._read(shown)
            made = {name: _family(name, self._metrics[name]) for name in names}
            for (name, labels), value in (*self._totals.items(), *self._gauges.items()):
                if name in made:
                    made[name].add_metric(labels, value)
        return list(made.values())

    def _declared(self, engine: object) -> TypeGuard[Measured]:
        """Whether it is measured; if its metrics cannot be shown, whatever it says of itself, it is not, and works."""
        try:
            if not isinstance(engine, Measured):  # which reads `measures`, in Python 3.11
                return False
            self._register(engine.measures)
        except Exception:  # an engine of the user's own may raise anything
            log.exception("the metrics of an engine (%s) cannot be shown", type(engine).__name__)
            return False
        return True

    def _register(self, metrics: Mapping[str, Metric]) -> None:
        """Register what is not known yet."""
        with self._lock:
            new = {name: metric for name, metric in metrics.items() if self._metrics.get(name) != metric}
            if not new:
                return
            try:
                self._registry.register(_Collector(self, new))
            except Exception as error:
                raise ValueError(f"{', '.join(map(str, new))}: {error!r}") from error
            self._metrics.update(new)

    def _read(self, shown: _Shown) -> None:
        """Take in what an engine counts: all of it, or nothing where it fails; that leaves other engines alone."""
        try:
            for of, series in self._figures(shown.engine).items():
                for each, value in series.items():
                    self._take(of, each, value)
        except Exception as error:  # noqa: BLE001 - an engine of the user's own may raise anything
            if not shown.failing:
                log.warning("an engine's metrics cannot be read: %r", error)
            shown.failing = True
        else:
            shown.failing = False

    def _figures(self, engine: Measured) -> dict[object, dict[_Series, float]]:
        """What an engine shows now, by who counts it; series that are too many are one by now."""
        found: dict[object, dict[_Series, float]] = {}
        for sample in engine.samples():
            metric = self._metrics[sample.name]
            if len(sample.labels) != len(metric.labels) or math.isnan(sample.value):
                raise ValueError(f"{sample!r:.200} is no value of {metric.labels}")
            of = engine if sample.of is None else sample.of
            series = found.setdefault(of, {})
            each = self._bounded(sample)
            before = series.get(each)
            add = max if metric.kind == "gauge" else operator.add
            series[each] = sample.value if before is None else add(before, sample.value)
        return found

    def _bounded(self, sample: Sample) -> _Series:
        """The sample's own series if it is among the first ones of its metric, else the one of all others."""
        known = self._known.setdefault(sample.name, set())
        if sample.labels not in known:
            if len(known) >= self._max_series or not all(map(is_label, sample.labels)):
                return sample.name, (OTHER,) * len(sample.labels)
            known.add(sample.labels)
        return sample.name, sample.labels

    def _take(self, of: object, series: _Series, value: float) -> None:
        """Show the largest value of a gauge, and add to a counter by how much it has risen since it was read last."""
        if self._metrics[series[0]].kind == "gauge":
            self._gauges[series] = max(value, self._gauges.get(series, -math.inf))
            return
        last = self._last.setdefault(of, {})
        before = last.get(series, 0.0)
        last[series] = value
        risen = value - before if value >= before else value  # it has begun anew
        self._totals[series] = self._totals.get(series, 0.0) + risen


class _Collector:
    """What a registry asks for the metrics of one kind of engine."""

    def __init__(self, metrics: EngineMetrics, declared: Mapping[str, Metric]) -> None:
        self._metrics, self._declared = metrics, declared

    def describe(self) -> list[Family]:
        """The metrics without values, so that the registry knows their names."""
        return [_family(name, metric) for name, metric in self._declared.items()]

    def collect(self) -> list[Family]:
        """The metrics as they are now."""
        return self._metrics.families(self._declared)


def _family(name: str, metric: Metric) -> Family:
    from prometheus_client import metrics_core  # noqa: PLC0415 - on first use: it is not part of the plain import

    kinds: dict[str, type[CounterMetricFamily | GaugeMetricFamily]] = {
        "counter": metrics_core.CounterMetricFamily,
        "gauge": metrics_core.GaugeMetricFamily,
    }
    return kinds[metric.kind](name, metric.text, labels=metric.labels)
