"""The demo's judge: it must see what went wrong, or its tables prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agentfleet.demo.load import Day, task
from agentfleet.demo.report import PROMISES, measure, missed, promised
from agentfleet.demo.service import follow
from agentfleet.events import Event

KILLED_AT = 60.0


Told = tuple[float, str, str | None, dict[str, Any]]


def budget(desired: int) -> int:
    """A fifth of the fleet."""
    return max(1, desired // 5)


def begun(at: float, id: str, slot: int, revision: int = 1) -> list[Told]:
    """An instance starts, and is healthy soon."""
    return [
        (at, "instance.created", id, {"slot": slot, "revision": revision}),
        (at, "instance.started", id, {"slot": slot, "restarts": 0}),
        (at + 0.4, "instance.ready", id, {"slot": slot}),
    ]


def replaced(at: float, id: str, slot: int) -> list[Told]:
    """An instance makes room for one of the next revision."""
    going: list[Told] = [(at, "instance.removing", id, {"slot": slot}), (at, "instance.removed", id, {"slot": slot})]
    return [*going, *begun(at, id * 2, slot, revision=2)]


def story(change: Callable[[list[Event]], list[Event]] = lambda events: events) -> dict[str, Any]:
    """The figures of a demo in which all goes well, except for what `change` does to its journal."""
    told: list[Told] = [
        (0, "demo.step", None, {"step": "deploy"}),
        (0, "fleet.deployed", None, {"replicas": 3}),
        *(each for slot, id in enumerate("abc") for each in begun(1, id, slot)),
        (2, "rollout.completed", None, {"revision": 1, "rollback": False, "seconds": 2.0, "version": "1"}),
        (2.98, "config.published", None, {}),
        (3, "config.delivered", None, {"refused": 0, "instances": 3}),
        (4, "demo.hurt", "a", {"what": "killed", "slot": 0}),
        (4, "demo.hurt", "b", {"what": "frozen", "slot": 1}),
        (4, "demo.hurt", "c", {"what": "failing", "slot": 2}),
        (4.1, "instance.exited", "a", {"slot": 0}),
        (4.2, "recovery.restart", "a", {"slot": 0}),
        (4.3, "instance.started", "a", {"slot": 0, "restarts": 1}),
        (5, "instance.ready", "a", {"slot": 0}),
        (5, "instance.recovered", "a", {"slot": 0, "seconds": 0.9}),
        (7, "instance.unhealthy", "c", {"slot": 2}),
        (7, "governor.admitted", "c", {"slot": 2, "in_flight": 1, "budget": 1}),
        (7, "recovery.restart", "c", {"slot": 2}),
        (8, "instance.ready", "c", {"slot": 2}),
        (8, "instance.recovered", "c", {"slot": 2, "seconds": 1.0}),
        (9, "instance.unhealthy", "b", {"slot": 1}),
        (9, "recovery.restart", "b", {"slot": 1}),
        (10, "instance.ready", "b", {"slot": 1}),
        (10, "instance.recovered", "b", {"slot": 1, "seconds": 1.0}),
        (20, "demo.spike", None, {"instances": 5}),
        (21, "fleet.scaled", None, {"from": 3, "to": 5}),
        *begun(22, "d", 3),
        *begun(22, "e", 4),
        (25, "demo.step", None, {"step": "upgrade"}),
        *(each for slot, id in enumerate("abcde") for each in replaced(26 + slot / 2, id, slot)),
        (30, "rollout.completed", None, {"revision": 2, "rollback": False, "seconds": 5.0, "version": "2"}),
        (37, "demo.step", None, {"step": "break"}),
        (40, "rollout.failed", None, {"revision": 3, "seconds": 3.0}),
        (42, "rollout.completed", None, {"revision": 2, "rollback": True, "seconds": 2.0, "version": "2"}),
        (50, "demo.pulse", None, {"instances": {"a": "busy", "b": "idle", "c": "draining"}}),
        (55, "task.submitted", None, {"id": "t1"}),
        (55, "task.submitted", None, {"id": "t2"}),
        (56, "task.completed", None, {"id": "t1", "ok": True}),
        (62, "demo.manager", None, {}),
        (63, "task.completed", None, {"id": "t2", "ok": True}),
    ]
    return measure(change(_events(told)), ["t1", "t2"], KILLED_AT, budget)


def _events(told: list[Told]) -> list[Event]:
    return [Event(at, "demo", kind, id, data, seq=seq) for seq, (at, kind, id, data) in enumerate(told, 1)]


def without(kind: str, id: str | None = None) -> Callable[[list[Event]], list[Event]]:
    """Take some events out of the story."""
    return lambda events: [e for e in events if not (e.kind == kind and id in (None, e.instance))]


def test_a_good_demo_keeps_every_promise() -> None:
    """Each figure is what the journal says."""
    figures = story()
    assert missed(figures) == []
    assert figures["deploy_s"] == pytest.approx(2.0)
    assert figures["scale_up_s"] == pytest.approx(2.4)
    assert figures["upgrade_s"] == pytest.approx(5.0)
    assert figures["config_push_p99_s"] == pytest.approx(0.02)
    assert figures["disruptions"] == {"max_concurrent": 1, "budget": 1, "over": 0}
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
        ("instance.ready", "b", "deploy"),
        ("demo.spike", None, "scale up"),
        ("instance.ready", None, "scale up"),
        ("instance.ready", "bb", "upgrade"),
        ("config.delivered", None, "configure"),
        ("rollout.failed", None, "roll back"),
        ("demo.manager", None, "manager restart"),
        ("task.completed", None, "tasks lost"),
        ("task.submitted", None, "tasks lost"),
    ],
)
def test_what_was_not_seen_is_missed(kind: str, id: str | None, promise: str) -> None:
    """An event that is not there never counts as a promise kept."""
    figures = story(without(kind, id))
    assert promise in missed(figures)
    assert "MISSED" in str(promised(figures))


def test_double_work_is_missed() -> None:
    """A task that workers noted twice breaks a promise; so does a demo in which nothing was done."""
    assert measure([], ["t1", "t1"], None, budget)["tasks"]["duplicated"] == 1
    assert "tasks done twice" in missed(measure([], ["t1", "t1"], None, budget))
    assert set(missed(measure([], [], None, budget))) == {promise.name for promise in PROMISES}


def test_the_budget_is_judged_by_what_happened_not_by_what_the_governor_says() -> None:
    """Two instances are taken at once where one may be; the governor, if asked, knows of one."""

    def taken_too_soon(events: list[Event]) -> list[Event]:
        return [replace(e, at=26.1) if (e.kind, e.instance) == ("instance.removing", "b") else e for e in events]

    def in_order(events: list[Event]) -> list[Event]:
        changed = sorted(taken_too_soon(events), key=lambda event: event.at)
        return [replace(event, seq=seq) for seq, event in enumerate(changed, 1)]

    figures = story(in_order)
    assert figures["disruptions"] == {"max_concurrent": 2, "budget": 1, "over": 1}
    assert missed(figures) == ["over the disruption budget"]
    assert "MISSED" in str(promised(figures))


def test_who_takes_nobody_away_proves_nothing() -> None:
    """Without a single disruption it is not known whether the budget would have been kept."""
    events = [e for e in _events(begun(0, "a", 0)) if e.kind != "governor.admitted"]
    assert measure(events, [], None, budget)["disruptions"] == {"max_concurrent": 0, "budget": 1, "over": None}


def test_only_what_the_fleet_itself_takes_is_counted() -> None:
    """A crash and the restart after it are not; nor is surplus; a restart of what runs and a removal that hurts are."""

    def taken(*told: Told) -> list[int]:
        fleet: list[Told] = [(0, "fleet.deployed", None, {"replicas": 3})]
        fleet += [each for slot, id in enumerate("abc") for each in begun(0, id, slot)]
        *_, (_, service) = follow(_events([*fleet, *told]))
        return list(service.taken)

    crash: list[Told] = [(1, "demo.hurt", "a", {"slot": 0}), (1, "instance.exited", "a", {"slot": 0})]
    restart: Told = (2, "recovery.restart", "a", {"slot": 0})
    assert taken(*crash, restart) == []
    assert taken(crash[0], restart) == [0]
    assert taken(*crash, restart, (3, "instance.started", "a", {"slot": 0, "restarts": 1}), restart) == [0]
    found_again: Told = (3, "instance.started", "a", {"slot": 0, "restarts": 0})
    assert taken(*crash, found_again, restart) == []
    assert taken((2, "instance.removing", "a", {"slot": 0})) == [0]
    assert taken((1, "fleet.scaled", None, {"to": 2}), (2, "instance.removing", "a", {"slot": 0})) == []
    assert taken((2, "instance.removing", "a", {"slot": 0}), (3, "fleet.scaled", None, {"to": 2})) == []
    assert taken((2, "instance.removing", "a", {"slot": 0}), *begun(3, "d", 0)) == []
    assert taken((2, "instance.removing", "a", {"slot": 0}), (3, "instance.unhealthy", "b", {"slot": 1})) == [0]


@pytest.mark.parametrize("data", [{"refused": 1, "instances": 3}, {"refused": 0, "instances": 2}])
def test_a_configuration_that_not_all_have_taken_is_missed(data: dict[str, int]) -> None:
    """An agent that refused, or was not asked, breaks the promise that a change reaches all."""
    figures = story(lambda events: [replace(e, data=data) if e.kind == "config.delivered" else e for e in events])
    assert missed(figures) == ["configure"]


def test_agents_that_fall_with_their_manager_are_missed() -> None:
    """The manager's death must not end an agent."""
    gone = Event(61, "demo", "instance.exited", "aa", {"slot": 0}, seq=99)
    assert missed(story(lambda events: [*events, gone])) == ["manager restart"]


def test_a_capacity_that_was_there_before_the_spike_is_no_answer_to_it() -> None:
    """Nothing had to follow."""
    figures = story(lambda events: [replace(e, data={"instances": 3}) if e.kind == "demo.spike" else e for e in events])
    assert missed(figures) == ["scale up"]


def test_a_span_below_zero_is_no_promise_kept() -> None:
    """A clock that was set back must not make the fleet look fast."""
    promise = PROMISES[0]
    assert promise.kept({"deploy_s": 0.0})
    assert not promise.kept({"deploy_s": -1.0})


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
