"""What the demo has measured, beside what was promised: computed from the journal and the workers' ledger alone.

Spans are between the dates of events, not what the fleet says they were; and what was not seen is never a promise kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentfleet.demo.service import GONE, disruptions, follow
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
        """Whether it was measured, and is no more than was promised; a span below zero is a broken clock."""
        value = self.value(measured)
        return value is not None and 0 <= value <= self.limit


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


def measure(
    events: Sequence[Event], ledger: Iterable[str], killed_at: float | None, budget: Callable[[int], int]
) -> dict[str, Any]:
    """All figures of the report.

    Args:
        events: The whole journal, in order.
        ledger: Ids of tasks that workers finished, once for each time they did.
        killed_at: When the driver killed the manager, in seconds since the epoch.
        budget: How many instances may be disrupted at once, of so many wanted.

    Returns:
        JSON-ready figures; what was not observed is None.
    """
    tasks = _tasks(events, Counter(ledger))
    figures: dict[str, Any] = {
        "deploy_s": _rollout(events, "deploy"),
        "scale_up_s": _scale_up(events),
        "upgrade_s": _rollout(events, "upgrade"),
        "rollback_s": _rollback(events),
        "config_push_p99_s": _configure(events),
        "manager_restart_s": _restart(events, killed_at),
        "instances_peak": max((_alive(e) for e in events if e.kind == "demo.pulse"), default=0),
        "tasks": tasks,
        "disruptions": disruptions(events, budget),
    }
    figures |= _hurt(events)
    return figures


def _first(events: Iterable[Event], kind: str, after: float = -math.inf) -> Event | None:
    return next((event for event in events if event.kind == kind and event.at >= after), None)


def _between(events: Sequence[Event], begin: str, end: str) -> float | None:
    began = _first(events, begin)
    ended = _first(events, end, began.at) if began else None
    return round(ended.at - began.at, 3) if began and ended else None


def _scale_up(events: Sequence[Event]) -> float | None:
    """From the spike until as many are in service as it keeps busy; None if they were before: that proves nothing."""
    spike: Event | None = None
    for event, service in follow(events):
        if event.kind == "demo.spike":
            spike = event
        if spike is not None and len(service.ready) >= spike.data["instances"]:
            return round(event.at - spike.at, 3) if event is not spike else None
    return None


def _rollout(events: Sequence[Event], step: str, *, rollback: bool = False) -> float | None:
    """From the beginning of a step until a rollout is complete; None unless all in service are of its revision."""
    began = next((e for e in events if e.kind == "demo.step" and e.data["step"] == step), None)
    if began is None:
        return None
    for event, service in follow(events):
        done = event.kind == "rollout.completed" and event.data["rollback"] is rollback and event.seq > began.seq
        if done:
            return round(event.at - began.at, 3) if service.is_all(event.data["revision"]) else None
    return None


def _rollback(events: Sequence[Event]) -> float | None:
    """From the start of the broken upgrade to the last instance of the good revision."""
    return _rollout(events, "break", rollback=True) if _first(events, "rollout.failed") else None


def _configure(events: Sequence[Event]) -> float | None:
    """From publication to the last answer, which of so few is the 99th percentile; None unless all have taken it."""
    for event, service in follow(events):
        if event.kind == "config.delivered":
            all_took_it = event.data["refused"] == 0 and event.data["instances"] >= len(service.ready) > 0
            return _between(events, "config.published", "config.delivered") if all_took_it else None
    return None


def _restart(events: Sequence[Event], killed_at: float | None) -> float | None:
    """From the kill to the first task that the new manager saw completed; None if an agent went down with it."""
    if killed_at is None:
        return None
    opened = _first(events, "demo.manager", killed_at)
    done = _first(events, "task.completed", opened.at) if opened else None
    if done is None:
        return None
    served = next((frozenset(service.ready) for event, service in follow(events) if event.at >= killed_at), frozenset())
    ended = {e.instance for e in events if e.kind in GONE and killed_at <= e.at <= done.at}
    return None if served & ended else round(done.at - killed_at, 3)


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
        recoveries.append(_recovery(later, seen))
    detect = {what: _worst(found) for what, found in spans.items()}
    return {
        "detect_s": _worst(list(detect.values())),
        "detect_crash_s": detect["killed"],
        "detect_frozen_s": detect["frozen"],
        "detect_failing_s": detect["failing"],
        "recover_s": _worst(recoveries),
    }


def _recovery(later: Sequence[Event], seen: Event | None) -> float | None:
    """From when a hurt instance was found out until its slot was healthy again."""
    if seen is None:
        return None
    slot, kind = seen.data["slot"], "instance.recovered"
    well = next((e for e in later if e.kind == kind and e.data["slot"] == slot and e.seq > seen.seq), None)
    return None if well is None else well.at - seen.at


def _worst(spans: Sequence[float | None]) -> float | None:
    """The longest; None when one is missing or there is none."""
    known = [span for span in spans if span is not None]
    return round(max(known), 3) if known and len(known) == len(spans) else None


def _alive(pulse: Event) -> int:
    return sum(condition != "draining" for condition in pulse.data["instances"].values())


def _tasks(events: Sequence[Event], ledger: Counter[str]) -> dict[str, int | None]:
    """Submitted by the dispatcher's journal, done by the workers' own notes; of no tasks none can be lost or kept."""
    submitted = {e.data["id"] for e in events if e.kind == "task.submitted"}
    completed = {e.data["id"] for e in events if e.kind == "task.completed" and e.data.get("ok")}
    return {
        "submitted": len(submitted),
        "completed": len(completed & set(ledger)),
        "lost": len(submitted - (completed & set(ledger))) if submitted else None,
        "duplicated": sum(count - 1 for count in ledger.values()) if ledger else None,
        "handed_on": sum(e.kind == "task.retried" for e in events),
    }


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
