"""Telemetry: every event and observation lands in the metric it belongs to, under bounded labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from agentfleet.errors import JournalError
from agentfleet.events import Event
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.telemetry import METRICS, OTHER, ROLLOUT_STATES, Telemetry


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"agentfleet_{name}", {"fleet": "a"} | labels)


def event(kind: str, fleet: str = "a", **data: Any) -> Event:
    return Event(1.0, fleet, kind, instance="a-1-x", data=data)


def test_every_metric_is_filled_by_something() -> None:
    telemetry = Telemetry()
    fill(telemetry, "a")
    families = {family.name: family for family in text_string_to_metric_families(telemetry.render().decode())}
    for name, metric in METRICS.items():
        assert families[name].samples, name
        assert families[name].documentation == metric.text
        assert families[name].type == metric.kind


def fill(telemetry: Telemetry, fleet: str) -> None:
    for found in [
        event("fleet.scaled", fleet, **{"from": 1, "to": 5, "by": "autoscaler"}),
        event("instance.unhealthy", fleet, detection_s=4.0),
        event("instance.recovered", fleet, seconds=30),
        event("action.failed", fleet, action="create", error="BackendRefused", seconds=2.0),
        event("rollout.completed", fleet),
        event("config.published", fleet, revision=3),
        event("config.delivered", fleet, revision=2, last_s=0.4),
        event("config.rejected", fleet),
        event("resizing.reached", fleet, **{"from": 1, "to": 5, "seconds": 7.0}),
        event("resizing.failed", fleet, **{"from": 5, "to": 4, "seconds": 600.0}),
    ]:
        telemetry.record(found)
    telemetry.set_instances(fleet, {"idle": 3, "sick": 0})
    telemetry.set_nodes(fleet, {"ready": 2, "not_ready": 1})
    telemetry.set_resource(fleet, "cpu", 1.5, 3.0)
    telemetry.set_ailing(fleet, 12.0)
    telemetry.set_scale_failures(fleet, 2)
    telemetry.set_prober_lag(fleet, 0.1)
    telemetry.observe_action(fleet, "stop", 0.3)
    telemetry.observe_probe(fleet, "http", 0.01, ok=False)
    telemetry.observe_turn(fleet, 0.001)
    telemetry.count_journal_error(fleet)
    telemetry.set_leading(fleet, 1)


def test_values() -> None:
    telemetry = Telemetry()
    fill(telemetry, "a")
    assert value(telemetry, "instances", state="idle") == 3
    assert value(telemetry, "instances", state="sick") == 0
    assert value(telemetry, "desired_replicas") == 5
    assert value(telemetry, "scale_operations_total", direction="up", by="autoscaler") == 1
    assert value(telemetry, "actions_total", action="create", outcome="BackendRefused") == 1
    assert value(telemetry, "actions_total", action="stop", outcome="ok") == 1
    assert value(telemetry, "action_seconds_sum", action="stop") == 0.3
    assert value(telemetry, "probe_failures_total", check="http") == 1
    assert value(telemetry, "probe_seconds_count", check="http") == 1
    assert value(telemetry, "verdict_changes_total", verdict="unhealthy") == 1
    assert value(telemetry, "detection_seconds_sum") == 4
    assert value(telemetry, "recovery_seconds_sum") == 30
    assert [value(telemetry, "rollout_state", state=state) for state in ROLLOUT_STATES] == [0, 0, 1, 0, 0]
    assert value(telemetry, "config_published_revision") == 3
    assert value(telemetry, "config_acked_revision") == 2
    assert value(telemetry, "config_acked_lag_revisions") == 1
    assert value(telemetry, "decisions_total", kind="rollout.completed") == 1
    assert value(telemetry, "journal_appends_total") == 10
    assert value(telemetry, "nodes", state="not_ready") == 1
    assert value(telemetry, "resource_used", resource="cpu") == 1.5
    assert value(telemetry, "resource_requested", resource="cpu") == 3
    assert value(telemetry, "ailing_seconds") == 12
    assert value(telemetry, "scale_failures_in_a_row") == 2
    assert value(telemetry, "scale_outcomes_total", direction="up", outcome="reached") == 1
    assert value(telemetry, "scale_outcomes_total", direction="down", outcome="failed") == 1
    assert value(telemetry, "scale_outcomes_total", direction="down", outcome="reached") == 0
    assert value(telemetry, "scale_seconds_sum", direction="up") == 7
    assert value(telemetry, "scale_seconds_sum", direction="down") is None, "a failure has no duration"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [({"replicas": 7}, 7), ({"replicas": 7, "running": False}, 0), ({"replicas": 7, "deleted": True}, 0)],
)
def test_desired_replicas_follow_the_state(data: dict[str, Any], wanted: float) -> None:
    telemetry = Telemetry()
    telemetry.record(event("state.fleet", **data))
    assert value(telemetry, "desired_replicas") == wanted


def test_acknowledged_configuration_catches_up() -> None:
    telemetry = Telemetry()
    for kind, revision, lag in [("published", 1, 1), ("delivered", 1, 0), ("published", 2, 1), ("published", 3, 2)]:
        telemetry.record(event(f"config.{kind}", revision=revision))
        assert value(telemetry, "config_acked_lag_revisions") == lag


KINDS = st.sampled_from(
    [
        "fleet.scaled",
        "state.fleet",
        "manager.started",
        "instance.unhealthy",
        "instance.recovered",
        "action.failed",
        "rollout.failed",
        "config.published",
        "config.delivered",
        "config.rejected",
        "resizing.reached",
        "recovery.restart",
        "whatever",
    ]
)
JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just(10**400)
NAMES = st.sampled_from(
    ["from", "to", "by", "replicas", "running", "seconds", "detection_s", "action", "error", "revision", "last_s"]
)


@given(kind=KINDS, data=st.dictionaries(NAMES, JUNK), fleet=st.text())
def test_no_event_makes_it_fail(kind: str, data: dict[str, Any], fleet: str) -> None:
    telemetry = SHARED
    telemetry.record(Event(1.0, fleet, kind, data=data))
    telemetry.record(Event(1.0, "\ud800", kind, data=data | {"error": "\ud800"}))
    assert telemetry.render()


SHARED = Telemetry(max_fleets=5)


def test_labels_are_bounded() -> None:
    telemetry = Telemetry(max_fleets=3, max_values=4)
    for number in range(50):
        fleet = f"fleet-{number}"
        fill(telemetry, fleet)
        telemetry.record(event(f"recovery.kind-{number}", "fleet-0"))
        telemetry.record(event("action.failed", "fleet-0", action="x" * 1000, error=f"e{number}"))
    fleets, kinds, outcomes, lines = set(), set(), set(), telemetry.render()
    for family in text_string_to_metric_families(lines.decode()):
        for sample in family.samples:
            fleets.add(sample.labels["fleet"])
            kinds.add(sample.labels.get("kind"))
            if sample.name == "agentfleet_actions_total":
                outcomes.add(sample.labels["outcome"])
    assert fleets == {"fleet-0", "fleet-1", "fleet-2", OTHER}
    assert len(kinds) <= 6
    assert len(outcomes) <= 6
    assert telemetry.registry.get_sample_value("agentfleet_turn_seconds_count", {"fleet": OTHER}) == 47
    assert b"a-1-x" not in lines


def test_a_forgotten_fleet_leaves_nothing_and_makes_room() -> None:
    telemetry = Telemetry(max_fleets=1)
    fill(telemetry, "a")
    telemetry.forget("a")
    telemetry.forget("never-was")
    assert b'fleet="a"' not in telemetry.render()
    fill(telemetry, "b")
    assert b'fleet="b"' in telemetry.render()


def test_who_leads_no_more_says_nothing_of_how_a_fleet_stands() -> None:
    """What it has counted stays: a counter that vanished would look like one that begins anew."""
    telemetry = Telemetry()
    fill(telemetry, "a")
    fill(telemetry, "b")
    telemetry.leave("a")
    telemetry.leave("never-was")
    families = {family.name: family for family in text_string_to_metric_families(telemetry.render().decode())}
    for name, metric in METRICS.items():
        fleets = {sample.labels["fleet"] for sample in families[name].samples}
        assert fleets == ({"b"} if metric.kind == "gauge" else {"a", "b"}), name
    fill(telemetry, "a")
    assert value(telemetry, "instances", state="idle") == 3
    assert value(telemetry, "config_acked_lag_revisions") == 1
    assert value(telemetry, "detection_seconds_count") == 2


def test_what_is_not_known_of_a_resource_is_not_shown() -> None:
    telemetry = Telemetry()
    telemetry.set_resource("a", "memory", 5.0, None)
    assert value(telemetry, "resource_used", resource="memory") == 5
    assert value(telemetry, "resource_requested", resource="memory") is None
    telemetry.set_resource("a", "memory", None, None)
    assert value(telemetry, "resource_used", resource="memory") is None


def test_failures_can_be_counted_from_the_first_one() -> None:
    """A series that begins at 1 never shows a rise: Prometheus sees no 0 before it."""
    telemetry = Telemetry()
    telemetry.set_desired("a", 3)
    assert value(telemetry, "verdict_changes_total", verdict="dead") == 0
    assert value(telemetry, "scale_outcomes_total", direction="up", outcome="failed") == 0
    assert value(telemetry, "recovery_seconds_count") == 0


def test_it_may_be_rendered_in_another_thread() -> None:
    """While fleets come, count, and go."""
    telemetry = Telemetry()
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(lambda: [telemetry.render() for _ in range(20)])
        number = 0
        while not rendering.done() or number < 50:
            fill(telemetry, f"fleet-{number}")
            telemetry.leave(f"fleet-{number - 5}")
            telemetry.forget(f"fleet-{number - 10}")
            number += 1
        for text in rendering.result():
            list(text_string_to_metric_families(text.decode()))
    assert b'fleet="fleet-0"' not in telemetry.render()


def test_registries_do_not_collide_and_can_be_given() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    assert telemetry.registry is registry
    Telemetry()
    with pytest.raises(ValueError, match="Duplicated"):
        Telemetry(registry)


def test_an_observed_journal_is_a_journal() -> None:
    telemetry = Telemetry()
    inner = MemoryJournal()
    journal = telemetry.observing(inner)
    appended = journal.append(event("state.fleet", replicas=2))
    assert appended.seq == 1
    assert journal.read() == inner.read() == [appended]
    assert journal.last_state("a", "state.fleet") == appended
    with pytest.raises(JournalError):
        journal.append(event("k", bad=object()))
    assert value(telemetry, "journal_appends_total") == 1
    assert value(telemetry, "journal_errors_total") == 1
    assert journal.follow() is not None
