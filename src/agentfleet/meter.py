"""Measures one fleet: what its instances use, how much they have to do, and where the fleet stands.

What is measured goes into the view, to the autoscaler and to the telemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import anyio

from agentfleet.autoscaler import MetricSource
from agentfleet.backends.base import Engine
from agentfleet.clock import Clock
from agentfleet.core.scaling_samples import Reading, Total
from agentfleet.desk import Desk
from agentfleet.instances import Usage
from agentfleet.resources import FleetMetrics
from agentfleet.state import FleetState
from agentfleet.telemetry import Telemetry
from agentfleet.view import EXPENDABLE


class Meter:
    """One fleet's measurements.

    Args:
        desk: The fleet's working place.
        backend: Asked for usage.
        clock: Times the measurements.
        telemetry: Shown the figures.
        lag: How late the prober is, in seconds.
        period: Seconds between measurements of usage.
    """

    def __init__(
        self,
        desk: Desk,
        backend: Engine,
        *,
        clock: Clock,
        telemetry: Telemetry,
        lag: Callable[[], float],
        period: float,
    ) -> None:
        self._desk = desk
        self._backend = backend
        self._clock = clock
        self._telemetry = telemetry
        self._lag = lag
        self._period = period
        self._name = desk.spec.name
        self._failing = False
        self._sampled: tuple[float, float] | None = None
        self._queues: list[Callable[[], int]] = []
        self._metrics = FleetMetrics(desk.view, self._requests, lambda: self._sampled)

    @property
    def sources(self) -> dict[str, MetricSource]:
        """The built-in metrics by name."""
        return {"cpu": self._metrics.cpu, "memory": self._metrics.memory, "queue": self._queue}

    @contextmanager
    def queueing(self, depth: Callable[[], int]) -> Iterator[None]:
        """Count the tasks of an open dispatcher into the queue; without any the agents' own word is taken."""
        self._queues.append(depth)
        try:
            yield
        finally:
            self._queues.remove(depth)

    @property
    def has_queue(self) -> bool:
        """Whether a dispatcher is open."""
        return bool(self._queues)

    async def run(self) -> None:
        """Measure usage again and again, until cancelled; what cannot be measured stays unknown."""
        last = self._clock.now()
        while True:
            await self._clock.sleep(self._period)
            usage = await self._usage()
            if usage is None:
                continue
            now = self._clock.now()
            self._telemetry.set_prober_lag(self._name, self._lag())
            for id, each in usage.items():
                self._desk.view.measure(id, each)
            self._sampled, last = (now, now - last), now

    def note_turn(self, seconds: float) -> None:
        """Bring the gauges up to date: where the fleet stands after this turn, and what the turn cost."""
        state, view, telemetry = self._desk.state, self._desk.view, self._telemetry
        counts = view.total_counts()
        by_condition = {each.value: getattr(counts, each.value) for each in EXPENDABLE}
        telemetry.set_instances(self._name, {**by_condition, "draining": view.draining, "isolated": len(view.isolated)})
        telemetry.set_desired(self._name, state.desired if state is not None else 0)
        telemetry.set_rollout(self._name, _rollout_word(state))
        telemetry.observe_turn(self._name, seconds)

    async def _usage(self) -> Mapping[str, Usage] | None:
        """What the instances use now; None when that cannot be had. The first failure of a run is an event."""
        try:
            with anyio.fail_after(max(1.0, self._period)):
                usage = await self._backend.usage(self._name)
        except Exception as error:  # noqa: BLE001 - a backend of the user's own may raise anything
            if not self._failing:
                self._desk.record("usage.failed", data={"error": str(error) or type(error).__name__})
            self._failing = True
            return None
        self._failing = False
        return usage

    def _queue(self) -> Reading:
        return Total.of(sum(depth() for depth in self._queues)) if self._queues else self._metrics.queue()

    def _requests(self) -> tuple[float | None, int | None]:
        state = self._desk.state
        template = state.template if state is not None else self._desk.spec.template
        return template.cpu, template.memory


def _rollout_word(state: FleetState | None) -> str:
    """Where the rollout stands, in the words of the metric."""
    if state is None:
        return "none"
    if state.rolling:
        return "paused" if state.paused else "progressing"
    return "rolled_back" if state.rollout.is_rollback else state.rollout.phase.value
