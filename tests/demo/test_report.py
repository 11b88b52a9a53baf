"""The demo's judge: it must see what went wrong, or its tables prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentfleet.demo.load import Day, task
from agentfleet.demo.report import PROMISES, measure, missed, promised
from agentfleet.events import Event

KILLED_AT = 60.0


def story(change: Callable[[list[Event]], list[Event]] = lambda events: events) -> dict[str, Any]:
    """The figures of a demo in which all goes well, except for what `change` does to its journal."""
    told: list[tuple[float, str, str | None, dict[str, Any]]] = [
        (0, "fleet.deployed", None, {}),
        (2, "rollout.completed", None, {"revision": 1, "rollback": False, "seconds": 2.0, "version": "1"}),
        (3, "config.delivered", None, {"p99_s": 0.02}),
        (4, "demo.hurt", "a", {"what": "killed", "slot": 0}),
        (4, "demo.hurt", "b", {"what": "frozen", "slot": 1}),
        (4, "demo.hurt", "c", {"what": "failing", "slot": 2}),
        (4.1, "instance.exited", "a", {"slot": 0}),
        (5, "instance.recovered", "a", {"slot": 0, "seconds": 0.9}),
        (7, "instance.unhealthy", "c", {"slot": 2}),
        (7, "governor.admitted", "c", {"slot": 2, "in_flight": 1, "budget": 2}),
        (8, "instance.recovered", "c", {"slot": 2, "seconds": 1.0}),
        (9, "instance.unhealthy", "b", {"slot": 1}),
        (10, "instance.recovered", "b", {"slot": 1, "seconds": 1.0}),
        (20, "demo.spike", None, {"instances": 16}),
        (22, "demo.followed", None, {"instances": 16}),
        (30, "rollout.completed", None, {"revision": 2, "rollback": False, "seconds": 5.0, "version": "2"}),
        (40, "rollout.failed", None, {"revision": 3, "seconds": 3.0}),
        (42, "rollout.completed", None, {"revision": 2, "rollback": True, "seconds": 2.0, "version": "2"}),
        (50, "demo.pulse", None, {"instances": {"a": "busy", "b": "idle", "c": "draining"}}),
        (55, "task.submitted", None, {"id": "t1"}),
        (55, "task.submitted", None, {"id": "t2"}),
        (56, "task.completed", None, {"id": "t1", "ok": True}),
        (62, "demo.manager", None, {}),
        (63, "task.completed", None, {"id": "t2", "ok": True}),
    ]
    events = [Event(at, "demo", kind, id, data, seq=seq) for seq, (at, kind, id, data) in enumerate(told, 1)]
    return measure(change(events), ["t1", "t2"], KILLED_AT)


def without(kind: str, id: str | None = None) -> Callable[[list[Event]], list[Event]]:
    """Take some events out of the story."""
    return lambda events: [e for e in events if not (e.kind == kind and id in (None, e.instance))]


def test_a_good_demo_keeps_every_promise() -> None:
    """Each figure is what the journal says."""
    figures = story()
    assert missed(figures) == []
    assert figures["detect_crash_s"] == pytest.approx(0.1)
    assert figures["detect_s"] == pytest.approx(5.0)
    assert figures["recover_s"] == pytest.approx(1.0)
    assert figures["rollback_s"] == pytest.approx(5.0)
    assert figures["manager_restart_s"] == pytest.approx(3.0)
    assert figures["instances_peak"] == 2
    assert figures["tasks"] == {"submitted": 2, "completed": 2, "lost": 0, "duplicated": 0, "handed_on": 0}
    assert "MISSED" not in str(promised(figures))


@pytest.mark.parametrize(
    ("kind", "id", "promise"),
    [
        ("instance.exited", "a", "detect a crash"),
        ("instance.unhealthy", "b", "detect a freeze"),
        ("instance.unhealthy", "c", "detect a failing one"),
        ("instance.recovered", "b", "recover"),
        ("demo.followed", None, "scale up"),
        ("config.delivered", None, "configure"),
        ("rollout.failed", None, "roll back"),
        ("demo.manager", None, "manager restart"),
        ("task.completed", None, "tasks lost"),
    ],
)
def test_what_was_not_seen_is_missed(kind: str, id: str | None, promise: str) -> None:
    """An event that is not there never counts as a promise kept."""
    figures = story(without(kind, id))
    assert promise in missed(figures)
    assert "MISSED" in str(promised(figures))


def test_double_work_and_a_broken_budget_are_missed() -> None:
    """A task noted twice by workers, and one disruption too many, each break a promise."""
    events = [Event(1, "demo", "governor.admitted", "a", {"slot": 0, "in_flight": 3, "budget": 2}, seq=1)]
    figures = measure(events, ["t1", "t1"], None)
    assert figures["tasks"]["duplicated"] == 1
    assert figures["disruptions"] == {"max_concurrent": 3, "budget": 2, "over": 1}
    assert {"tasks done twice", "over the disruption budget"} <= set(missed(figures))


def test_every_promise_has_a_figure() -> None:
    """No promise reads a figure that is not measured."""
    figures = story()
    assert all(promise.value(figures) is not None for promise in PROMISES)


def test_the_day_is_the_same_every_time() -> None:
    """The load is reproducible, peaks at the spike and ends with the day."""
    day = Day()
    assert max(day.rate(at / 10) for at in range(600)) == day.spike
    assert day.rate(day.length) == 0
    assert task(7) == task(7) != task(8)
