"""The autoscaler without a fleet: it sizes anything that can tell a size and take one. Here, a list of workers.

::

    python examples/autoscaler_alone.py
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from agentfleet import Autoscaler, MemoryJournal, MetricTarget, ScalingPolicy
from agentfleet.autoscaler import Size
from agentfleet.core.reason import Reason


class Workers:
    """Something of your own that can be scaled."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def size(self) -> Size:
        """How many are asked for, exist, and are ready."""
        return Size(spec=self.count, status=self.count, ready=self.count)

    async def scale(self, replicas: int, reasons: Sequence[Reason]) -> None:
        """Take over a new size."""
        self.count = replicas


async def main() -> None:
    """Let a request rate rise, fall and become unreadable."""
    workers = Workers(4)
    rates: list[float | None] = [200.0, 400.0, 410.0, 90.0, None]

    def requests_per_second() -> float:
        rate = rates.pop(0)
        if rate is None:
            raise ConnectionError("the metrics server does not answer")
        return rate

    policy = ScalingPolicy(min_replicas=2, max_replicas=50, targets=[MetricTarget(metric="requests", average=50)])
    journal = MemoryJournal()
    scaler = Autoscaler(policy, workers, {"requests": requests_per_second}, journal=journal, name="workers")
    while rates:
        decision = await scaler.step()  # `await scaler.run()` does this every `policy.period` seconds
        assert decision is not None
        print(f"{decision.current} -> {decision.desired}")
        for reason in decision.reasons:
            print(f"    {reason.code}: {reason.text}")
    print("journaled:", ", ".join(event.kind for event in journal.read()))


if __name__ == "__main__":
    anyio.run(main)
