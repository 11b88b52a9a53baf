"""Measures one fleet: what its instances use, how much they have to do, and where the fleet stands.

What is measured goes into the view, to the autoscaler and to the telemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import anyio

from agentfleet.autoscaler import MetricSource
from agentfleet.backends.base import Engine
from agentfleet.clock import Clock
from agentfleet.core import resizing
from agentfleet.core.fence import Fence
from agentfleet.core.resizing import Outcome, ResizingMemory, ResizingObserved
from agentfleet.core.scaling_samples import Reading, Total
from agentfleet.desk import Desk
from agentfleet.fencing import allows
from agentfleet.instances import Node, Usage
from agentfleet.resources import FleetMetrics
from agentfleet.state import FleetState
from agentfleet.telemetry import Telemetry
from agentfleet.view import EXPENDABLE, Counts


class Meter:
    """One fleet's measurements.

    Args:
        desk: The fleet's working place.
        backend: Asked for usage.
        clock: Times the measurements.
        telemetry: Shown the figures.
        lag: How late the prober is, in seconds.
        fence: Says whether this manager leads: while that is not certain it does not say how the fleet stands.
        ailing: For how many seconds the place that waits longest for a healthy instance has been waiting, at a time.
        failing: How often in a row the engine has not done what the size asks for.
        period: Seconds between measurements of usage.
    """

    def __init__(
        self,
        desk: Desk,
        backend: Engine,
        *,
        clock: Clock,
        telemetry: Telemetry,
        fence: Fence,
        lag: Callable[[], float],
        ailing: Callable[[float], float],
        failing: Callable[[], int],
        period: float,
    ) -> None:
        self._desk = desk
        self._backend = backend
        self._clock = clock
        self._telemetry = telemetry
        self._fence = fence
        self._lapsed = False
        self._lag = lag
        self._ailing = ailing
        self._failing_in_a_row = failing
        self._period = period
        self._name = desk.spec.name
        self._failing = False
        self._sampled: tuple[float, float] | None = None
        self._queues: list[Callable[[], int]] = []
        self._resizing = ResizingMemory()
        self._nodes: Mapping[str, Node] | None = None
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
            self._note_standing()
            usage = await self._usage()
            if self._leads():
                self._note_usage(usage)
                self._telemetry.set_prober_lag(self._name, self._lag())
            if usage is None:
                continue
            now = self._clock.now()
            for id, each in usage.items():
                self._desk.view.measure(id, each)
            self._sampled, last = (now, now - last), now

    def note_turn(self, seconds: float) -> None:
        """Say where the fleet stands after this turn, and what the turn cost."""
        self._telemetry.observe_turn(self._name, seconds)
        self._note_standing()

    def _note_standing(self) -> None:
        """Bring the gauges up to date: after each turn, and now and then, for what time alone changes."""
        if not self._leads():
            return
        state, view, telemetry = self._desk.state, self._desk.view, self._telemetry
        counts = view.total_counts()
        by_condition = {each.value: getattr(counts, each.value) for each in EXPENDABLE}
        telemetry.set_instances(self._name, {**by_condition, "draining": view.draining, "isolated": len(view.isolated)})
        telemetry.set_desired(self._name, state.desired if state is not None else 0)
        telemetry.set_rollout(self._name, _rollout_word(state))
        telemetry.set_scale_failures(self._name, self._failing_in_a_row())
        telemetry.set_ailing(self._name, self._ailing(self._clock.now()))
        if self._desk.nodes is not self._nodes:  # it is another one whenever a node looks different
            self._nodes = self._desk.nodes
            telemetry.set_nodes(self._name, _node_states(self._nodes.values()))
        self._follow_size(counts)

    def _leads(self) -> bool:
        """Whether this manager may say how the fleet stands. What it has said is taken back while it may not."""
        leads = allows(self._fence)
        if leads and self._lapsed:
            self._nodes = None
            self._telemetry.set_leading(self._name, self._fence.epoch)
        elif not leads and not self._lapsed:
            self._telemetry.lapse(self._name)
            self._telemetry.set_leading(self._name, 0)
        self._lapsed = not leads
        return leads

    def _follow_size(self, counts: Counts) -> None:
        """Note what has become of changes of size."""
        now, state = self._clock.now(), self._desk.state
        runs = state is not None and state.running and not state.deleted
        observed = ResizingObserved(state.replicas if state is not None and runs else None, counts.good, counts.total)
        decision, self._resizing = resizing.decide(self._desk.spec.rollout, observed, self._resizing, now)
        for each in decision.ended:
            change, outcome = each.resizing, each.outcome
            kind = (
                "resizing.reached"
                if outcome is Outcome.REACHED
                else ("resizing.failed" if outcome is Outcome.FAILED else "resizing.overtaken")
            )
            data = {"from": change.before, "to": change.wanted, "seconds": round(each.seconds, 3)}
            self._desk.record(kind, data=data, reasons=(each.reason,))

    def _note_usage(self, usage: Mapping[str, Usage] | None) -> None:
        """What the fleet uses, of what it asks for; both unknown when nothing could be measured."""
        measured = [each for id, each in (usage or {}).items() if id in self._desk.view]
        cores, memory = self._requests()
        for resource, used, request in (
            ("cpu", sum(each.cpu for each in measured), cores),
            ("memory", float(sum(each.memory for each in measured)), memory),
        ):
            asked = None if request is None else request * len(measured)
            known = (used, asked) if measured else (None, None)
            self._telemetry.set_resource(self._name, resource, *known)

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


def _node_states(nodes: Iterable[Node]) -> dict[str, int]:
    """How many nodes take instances, are cordoned, or are not ready (or lost)."""
    counts = {"ready": 0, "cordoned": 0, "not_ready": 0}
    for node in nodes:
        counts["not_ready" if not node.ready else "ready" if node.schedulable else "cordoned"] += 1
    return counts


def _rollout_word(state: FleetState | None) -> str:
    """Where the rollout stands, in the words of the metric."""
    if state is None:
        return "none"
    if state.rolling:
        return "paused" if state.paused else "progressing"
    return "rolled_back" if state.rollout.is_rollback else state.rollout.phase.value
