"""What importing costs: the package, its main names, and the agent's side, beside pydantic alone in the same run."""

from __future__ import annotations

import statistics
import subprocess
import sys

ROUNDS = 9
CASES = {
    "python alone": "pass",
    "import pydantic": "import pydantic; pydantic.BaseModel",
    "import agentfleet": "import agentfleet",
    "agentfleet: specs": "from agentfleet import FleetSpec",
    "agentfleet: Fleet, ProcessBackend": "from agentfleet import Fleet, FleetSpec, ProcessBackend",
    "agentfleet.agent": "from agentfleet.agent import Agent",
}
_TIMED = "import time; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"


def _once(code: str) -> float:
    answer = subprocess.run(
        [sys.executable, "-c", _TIMED.format(code=code)], capture_output=True, text=True, check=True
    )
    return float(answer.stdout)


def run() -> list[dict[str, object]]:
    """The figures: medians, the cases interleaved so that a noisy moment hits all of them."""
    spans: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, code in CASES.items():
            spans[name].append(_once(code))
    peer = statistics.median(spans["import pydantic"])
    rows: list[dict[str, object]] = []
    for name, found in spans.items():
        seconds = statistics.median(found)
        note = f"{(seconds - peer) * 1000:+.0f} ms beside pydantic (goal for import agentfleet: < +150 ms)"
        rows.append({"name": name, "size": None, "seconds": seconds, "per_item": None, "note": note})
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
