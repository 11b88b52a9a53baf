"""False alarms in days of 1,000 well instances, of which some pause, behind a network that loses probes.

The world is the one that the tests use (`tests.core.pauses`): 1 % of probes lost, each independently; one pause an hour
and instance, up to 8 s, uniformly distributed.
"""

from __future__ import annotations

import time
from typing import Any

from tests.core.pauses import Troubles, watch

from agentfleet.specs import HttpCheck

INSTANCES = 1_000
DAYS = 5
CHECKS = {
    "2 s x 5": HttpCheck(period=2.0, failures=5),
    "2 s x 5, timeout 1 s": HttpCheck(period=2.0, failures=5, timeout=1.0),
}


def days(name: str, check: HttpCheck) -> dict[str, Any]:
    """One line: the false verdicts of some days, with confirmation and without."""
    start = time.process_time()
    seen = [watch(check, Troubles(), instances=INSTANCES, hours=24, seed=day) for day in range(DAYS)]
    probes = sum(day.probes for day in seen)
    without, confirmed = sum(day.unconfirmed for day in seen), sum(day.verdicts for day in seen)
    return {
        "name": f"false verdicts: {name}",
        "size": INSTANCES,
        "seconds": time.process_time() - start,
        "per_item": confirmed / DAYS,
        "note": f"a day; {without / DAYS:g} without confirmation ({DAYS} days, {probes / 1e6:.0f} M probes)",
    }


def run() -> list[dict[str, Any]]:
    """All figures; `per_item` is false verdicts a day."""
    return [days(name, check) for name, check in CHECKS.items()]
