"""What the demo has measured, beside what was promised: computed from the journal and the workers' ledger alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentfleet.display import Report, table
from agentfleet.events import Event


@dataclass(frozen=True)
class Promise:
    """One promised number."""

    name: str
    text: str
    limit: float
    value: Callable[[Mapping[str, Any]], float | None]
    unit: str = "s"

    def kept(self, measured: Mapping[str, Any]) -> bool:
        """Whether it was measured, and is no more than was promised."""
        value = self.value(measured)
        return value is not None and value <= self.limit


def _of(*path: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(measured: Mapping[str, Any]) -> float | None:
        found: Any = measured
        for key in path:
            found = found[key]
        return None if found is None else float(found)

    return value


PROMISES = (
    Promise("deploy", "8 agents deployed and healthy", 120, _of("deploy_s")),
    Promise("scale up", "capacity follows a spike", 60, _of("scale_up_s")),
    Promise("detect a crash", "kill -9 of a busy agent is seen", 5, _of("detect_crash_s")),
    Promise("detect a freeze", "a frozen agent is seen", 15, _of("detect_frozen_s")),
    Promise("detect a failing one", "alive but failing is seen", 15, _of("detect_failing_s")),
    Promise("recover", "from seen to replaced and healthy", 10, _of("recover_s")),
    Promise("upgrade", "all agents on the new version, under load", 60, _of("upgrade_s")),
    Promise("roll back", "a broken release is undone by itself", 60, _of("rollback_s")),
    Promise("configure", "a change reaches all agents (p99)", 1, _of("config_push_p99_s")),
    Promise("manager restart", "kill -9 of the manager, and it goes on", 10, _of("manager_restart_s")),
    Promise("tasks lost", "", 0, _of("tasks", "lost"), unit=""),
    Promise("tasks done twice", "", 0, _of("tasks", "duplicated"), unit=""),
    Promise("over the disruption budget", "instances too many, at any instant", 0, _of("disruptions", "over"), unit=""),
)


def measure(events: Sequence[Event], ledger: Iterable[str], killed_at: float | None) -> dict[str, Any]:
    """All figures of the report.

    Args:
        events: The whole journal, in order.
        ledger: Ids of tasks that workers finished, once for each time they did.
        killed_at: When the driver killed the manager, in seconds since the epoch.

    Returns:
        JSON-ready figures; what was not observed is None.
    """
    tasks = _tasks(events, Counter(ledger))
    figures: dict[str, Any] = {
        "deploy_s": _rollout(events, 1),
        "scale_up_s": _between(events, "demo.spike", "demo.followed"),
        "upgrade_s": _rollout(events, 2),
        "rollback_s": _rollback(events),
        "config_push_p99_s": max((e.data["p99_s"] for e in events if e.kind == "config.delivered"), default=None),
        "manager_restart_s": _restart(events, killed_at),
        "instances_peak": max((_alive(e) for e in events if e.kind == "demo.pulse"), default=0),
        "tasks": tasks,
        "disruptions": _disruptions(events),
    }
    figures |= _hurt(events)
    return figures


def _first(events: Iterable[Event], kind: str, after: float = -math.inf) -> Event | None:
    return next((event for event in events if event.kind == kind and event.at >= after), None)


def _between(events: Sequence[Event], begin: str, end: str) -> float | None:
    began = _first(events, begin)
    ended = _first(events, end, began.at) if began else None
    return round(ended.at - began.at, 3) if began and ended else None


def _rollout(events: Sequence[Event], revision: int) -> float | None:
    done = (e for e in events if e.kind == "rollout.completed" and e.data["revision"] == revision)
    event = next((e for e in done if not e.data["rollback"]), None)
    return None if event is None else float(event.data["seconds"])


def _rollback(events: Sequence[Event]) -> float | None:
    """From the start of the broken upgrade to the last instance of the good revision."""
    failed = _first(events, "rollout.failed")
    if failed is None:
        return None
    done = next((e for e in events if e.kind == "rollout.completed" and e.data["rollback"] and e.at >= failed.at), None)
    return None if done is None else round(done.at - failed.at + failed.data["seconds"], 3)


def _restart(events: Sequence[Event], killed_at: float | None) -> float | None:
    """From the kill to the first task that the new manager saw completed."""
    if killed_at is None:
        return None
    opened = _first(events, "demo.manager", killed_at)
    done = _first(events, "task.completed", opened.at) if opened else None
    return None if done is None else round(done.at - killed_at, 3)


def _hurt(events: Sequence[Event]) -> dict[str, float | None]:
    """Detection by kind of harm, and the longest recovery."""
    seen_by = {"killed": "instance.exited", "frozen": "instance.unhealthy", "failing": "instance.unhealthy"}
    spans: dict[str, list[float | None]] = {what: [] for what in seen_by}
    recoveries: list[float | None] = []
    for hurt in (event for event in events if event.kind == "demo.hurt"):
        what = hurt.data["what"]
        later = [e for e in events if e.seq > hurt.seq]
        seen = next((e for e in later if e.kind == seen_by[what] and e.instance == hurt.instance), None)
        spans[what].append(None if seen is None else seen.at - hurt.at)
        well = next((e for e in later if e.kind == "instance.recovered" and e.data["slot"] == hurt.data["slot"]), None)
        recoveries.append(None if well is None else well.data["seconds"])
    detect = {what: _worst(found) for what, found in spans.items()}
    return {
        "detect_s": _worst(list(detect.values())),
        "detect_crash_s": detect["killed"],
        "detect_frozen_s": detect["frozen"],
        "detect_failing_s": detect["failing"],
        "recover_s": _worst(recoveries),
    }


def _worst(spans: Sequence[float | None]) -> float | None:
    """The longest; None when one is missing or there is none."""
    known = [span for span in spans if span is not None]
    return round(max(known), 3) if known and len(known) == len(spans) else None


def _alive(pulse: Event) -> int:
    return sum(condition != "draining" for condition in pulse.data["instances"].values())


def _tasks(events: Sequence[Event], ledger: Counter[str]) -> dict[str, int]:
    """Submitted by the dispatcher's journal, done by the workers' own notes."""
    submitted = {e.data["id"] for e in events if e.kind == "task.submitted"}
    completed = {e.data["id"] for e in events if e.kind == "task.completed" and e.data.get("ok")}
    return {
        "submitted": len(submitted),
        "completed": len(completed & set(ledger)),
        "lost": len(submitted - (completed & set(ledger))),
        "duplicated": sum(count - 1 for count in ledger.values() if count > 1),
        "handed_on": sum(e.kind == "task.retried" for e in events),
    }


def _disruptions(events: Sequence[Event]) -> dict[str, int]:
    """The most that were under way at one instant, the budget then, and by how many any instant exceeded its own."""
    admitted = [event.data for event in events if event.kind == "governor.admitted"]
    worst = max(admitted, key=lambda data: data["in_flight"], default={"in_flight": 0, "budget": 0})
    over = max((data["in_flight"] - data["budget"] for data in admitted), default=0)
    return {"max_concurrent": worst["in_flight"], "budget": worst["budget"], "over": max(0, over)}


def promised(measured: Mapping[str, Any]) -> Report:
    """The table that the demo ends with."""
    rows = []
    for promise in PROMISES:
        value = promise.value(measured)
        limit = f"{promise.limit:g} {promise.unit}".strip()
        shown = "not seen" if value is None else f"{value:.3g} {promise.unit}".strip()
        rows.append(("ok" if promise.kept(measured) else "MISSED", promise.name, shown, limit, promise.text))
    return table("measured beside promised", ("", "what", "measured", "at most", ""), rows)


def missed(measured: Mapping[str, Any]) -> list[str]:
    """Names of the promises that were not kept."""
    return [promise.name for promise in PROMISES if not promise.kept(measured)]
