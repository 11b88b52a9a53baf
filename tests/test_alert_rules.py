"""The rules for alerts: Prometheus' own engine says when they fire, and every metric they name is exported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentfleet.backends.kubernetes.measures import MEASURES
from agentfleet.core.resizing import Outcome
from agentfleet.measures import Metric
from agentfleet.selfmetrics import SELF_METRICS
from agentfleet.telemetry import METRICS
from agentfleet.view import SERVING

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "kubernetes" / "monitoring" / "rules.yaml"
if not FILE.exists():
    pytest.skip("no examples here: these are the tests of a wheel", allow_module_level=True)

GROUPS: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())["spec"]["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
EXPORTED: Mapping[str, Metric] = {
    name + suffix: metric
    for name, metric in {**METRICS, **SELF_METRICS, **MEASURES}.items()
    for suffix in {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[metric.kind]
}
TARGET = {"namespace", "pod", "job"}
"""Labels that Prometheus adds to whatever it reads in a cluster."""


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' tool. Without it tests skip here, and fail where CI=true."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentfleet" / "prometheus" / "promtool"
    found = shutil.which("promtool") or (str(cache) if cache.exists() else None)
    if found is None:
        why = "promtool is not here: run .ci/promtool, or install Debian's package 'prometheus'"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must provide it: {why}")
        pytest.skip(why)
    return found


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("alert", RULES)
def test_every_metric_of_a_rule_is_exported(alert: str) -> None:
    """With the labels by which it is chosen and grouped."""
    expression: str = RULES[alert]["expr"]
    used = re.findall(r"(agentfleet_\w+)(?:\{([^}]*)\})?", expression)
    assert used
    chosen, known = set(), set(TARGET)
    for name, selector in used:
        assert name in EXPORTED, name
        labels = set(re.findall(r"(\w+)\s*[=!]", selector))
        assert labels <= {*EXPORTED[name].labels}, name
        chosen |= labels
        known |= {*EXPORTED[name].labels}
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {each.strip() for each in grouped.split(",")} <= known


def test_values_of_labels_are_those_that_there_are() -> None:
    (states,) = re.findall(r'state=~"([^"]*)"', RULES["FleetAvailabilityLow"]["expr"])
    assert set(states.split("|")) == {each.value for each in SERVING}
    (outcome,) = re.findall(r'outcome="([^"]*)"', RULES["FleetScalingFails"]["expr"])
    assert outcome == Outcome.FAILED.value


def test_each_rule_says_how_grave_it_is_and_whom_it_is_about() -> None:
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert rule["annotations"].keys() == {"summary", "description"}, name
        text = " ".join(rule["annotations"].values())
        about = re.findall(r"\bby \(([^)]*)\)", rule["expr"])[:1]  # what is left when all is summed up
        for label in {each.strip() for grouped in about for each in grouped.split(",")} - {"namespace"}:
            assert f"$labels.{label}" in text, name


# ------------------------------------------------------------------------------------------------ when they fire


def of(metric: str, values: str, **labels: str) -> tuple[str, str]:
    """A series of the fleet "a", as the manager m-0 shows it, every 15 s."""
    known = {"fleet": "a", "namespace": "n", "pod": "m-0", **labels}
    written = ",".join(f'{name}="{value}"' for name, value in known.items() if value)
    return f"agentfleet_{metric}{{{written}}}", values


def states(**counts: str) -> list[tuple[str, str]]:
    """How many of the fleet's instances are in which state."""
    return [of("instances", values, state=state) for state, values in counts.items()]


@dataclass(frozen=True)
class Case:
    """What Prometheus has read, when it is asked, and what is to fire then: labels and description, or nothing."""

    alert: str
    story: str
    series: list[tuple[str, str]]
    at: str
    labels: dict[str, str] | None = None
    description: str = ""

    def __str__(self) -> str:
        return f"{self.alert}: {self.story}"


FLEET = {"fleet": "a", "namespace": "n"}
CASES = [
    Case(
        "FleetAvailabilityLow",
        "2 of 100 are gone for more than a minute",
        [of("desired_replicas", "100x60"), *states(idle="90x20 88x40", busy="10x60", sick="0x20 2x40")],
        "7m",
        FLEET,
        "98 instances serve.",
    ),
    Case(
        "FleetAvailabilityLow",
        "1 of 100 is gone: that is not less than 99 %",
        [of("desired_replicas", "100x60"), *states(idle="99x60", sick="1x60")],
        "10m",
    ),
    Case(
        "FleetAvailabilityLow",
        "those of unknown health serve, after a take-over",
        [of("desired_replicas", "100x60"), *states(idle="0x60", unknown="100x60")],
        "10m",
    ),
    Case(
        "FleetAvailabilityLow",
        "it grows to ten times its size, and is there within five minutes",
        [of("desired_replicas", "10x20 100x60"), *states(idle="10x36 100x60")],
        "10m",
    ),
    Case(
        "FleetAvailabilityLow",
        "it was to grow, and is not there after six minutes",
        [of("desired_replicas", "10x20 100x60"), *states(idle="10x80")],
        "11m30s",
        FLEET,
        "10 instances serve.",
    ),
    Case(
        "FleetAvailabilityLow",
        "it is stopped",
        [of("desired_replicas", "10x20 0x60"), *states(idle="10x20 0x60")],
        "15m",
    ),
    Case(
        "FleetAvailabilityLow",
        "it is handed over, and both managers show it for a moment",
        [
            of("desired_replicas", "100x30 stale"),
            of("instances", "97x30 stale", state="idle"),
            of("desired_replicas", "_x29 100x60", pod="m-1"),
            of("instances", "_x29 97x60", state="idle", pod="m-1"),
        ],
        "7m30s",
        FLEET,
        "97 instances serve.",
    ),
    Case(
        "FleetInstancesFail",
        "6 of 100 within ten minutes, of two kinds",
        [
            of("desired_replicas", "100x60"),
            of("verdict_changes_total", "0x10 3x50", verdict="unhealthy"),
            of("verdict_changes_total", "0x20 3x40", verdict="dead"),
        ],
        "9m",
        FLEET,
        "6 instances turned unhealthy, exited or were lost.",
    ),
    Case(
        "FleetInstancesFail",
        "5 of 100 is not more than 5 %",
        [of("desired_replicas", "100x60"), of("verdict_changes_total", "0x10 5x50", verdict="dead")],
        "9m",
    ),
    Case(
        "FleetInstancesFail",
        "many turn healthy",
        [of("desired_replicas", "100x60"), of("verdict_changes_total", "0x10 100x50", verdict="healthy")],
        "9m",
    ),
    Case(
        "FleetInstancesFail",
        "6 of 100 in an hour",
        [of("desired_replicas", "100x300"), of("verdict_changes_total", "0x40 2x40 4x40 6x200", verdict="dead")],
        "30m",
    ),
    Case(
        "FleetScalingFails",
        "the engine refuses, again and again",
        [of("scale_failures_in_a_row", "0x8 1x1 2x1 3x1 4x1 5x20")],
        "5m",
        FLEET,
        "5 failures; the journal's action.failed and resizing.failed say why.",
    ),
    Case("FleetScalingFails", "three times is not more than three", [of("scale_failures_in_a_row", "0x8 3x30")], "8m"),
    Case(
        "FleetScalingFails",
        "a burst that the next attempt mends",
        [of("scale_failures_in_a_row", "0x8 64x2 0x20")],
        "3m",
    ),
    Case(
        "FleetScalingFails",
        "four sizes in six hours were not reached",
        [of("scale_outcomes_total", "0x100 1x100 2x100 3x100 4x200", direction="up", outcome="failed")],
        "2h",
        FLEET,
        "4 failures; the journal's action.failed and resizing.failed say why.",
    ),
    Case(
        "FleetScalingFails",
        "sizes are reached, or overtaken by others",
        [
            of("scale_outcomes_total", "0x10 90x100", direction="up", outcome="reached"),
            of("scale_outcomes_total", "0x10 90x100", direction="up", outcome="overtaken"),
        ],
        "20m",
    ),
    Case(
        "FleetResourcesShort",
        "95 % of the memory for five minutes",
        [
            of("resource_used", "95x40", resource="memory"),
            of("resource_requested", "100x40", resource="memory"),
            of("resource_used", "50x40", resource="cpu"),
            of("resource_requested", "100x40", resource="cpu"),
        ],
        "6m",
        {**FLEET, "resource": "memory"},
        "95% of what its instances request.",
    ),
    Case(
        "FleetResourcesShort",
        "a peak of a minute",
        [of("resource_used", "50x8 95x4 50x40", resource="cpu"), of("resource_requested", "100x60", resource="cpu")],
        "6m",
    ),
    Case("FleetResourcesShort", "nothing is requested", [of("resource_used", "95x40", resource="cpu")], "8m"),
    Case(
        "FleetRecoverySlow",
        "after ten minutes and a half",
        [of("ailing_seconds", "0+15x60")],
        "10m30s",
        FLEET,
        "10m 30s so far; the journal's recovery events say what was tried.",
    ),
    Case("FleetRecoverySlow", "it is back after nine minutes", [of("ailing_seconds", "0+15x36 0x60")], "15m"),
    Case(
        "FleetManagersGone",
        "nobody is asked with success",
        [of("manager_fleets", "1x10 stale", role="leads", fleet="")],
        "5m",
        {},
        "Nothing is scaled or repaired, and the alerts about fleets are blind.",
    ),
    Case("FleetManagersGone", "one is there", [of("manager_fleets", "1x40", role="leads", fleet="")], "5m"),
    Case(
        "FleetManagerCutOff",
        "its database does not answer",
        [of("manager_store_age_seconds", "0x4 0+15x20", fleet="")],
        "6m",
        {"namespace": "n", "pod": "m-0"},
        "For 4m 45s.",
    ),
    Case("FleetManagerCutOff", "all is well", [of("manager_store_age_seconds", "1x40", fleet="")], "6m"),
    Case(
        "FleetManagerBlind",
        "one of its watches is dead, the others are not",
        [
            of("kubernetes_informer_staleness_seconds", "0+15x40", kind="pods", fleet=""),
            of("kubernetes_informer_staleness_seconds", "5x40", kind="nodes", fleet=""),
        ],
        "4m",
        {"namespace": "n", "pod": "m-0", "kind": "pods"},
        "For 4m 0s; it decides on what it saw before.",
    ),
    Case(
        "FleetManagerBlind",
        "a quiet watch breaks, and begins anew when it is given up",
        [of("kubernetes_informer_staleness_seconds", "0+15x7 0x40", kind="pods", fleet="")],
        "2m",
    ),
    Case(
        "FleetWithoutLeader",
        "neither of two holds its lease",
        [of("leading_epoch", "3x4 0x40"), of("leading_epoch", "0x44", pod="m-1")],
        "4m",
        FLEET,
        "Managers are there, and none holds its lease.",
    ),
    Case(
        "FleetWithoutLeader",
        "one follows the other",
        [of("leading_epoch", "3x4 0x40"), of("leading_epoch", "0x5 4x40", pod="m-1")],
        "4m",
    ),
]


def test_each_rule_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    for alert in RULES:
        assert {case.labels is None for case in CASES if case.alert == alert} == {True, False}, alert


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_fires_when_it_should(case: Case, promtool: str, tmp_path: Path) -> None:
    rule = RULES[case.alert]
    fires = []
    if case.labels is not None:
        summary = rule["annotations"]["summary"]
        for name, value in case.labels.items():
            summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
        told = {"summary": summary, "description": case.description}
        fires = [{"exp_labels": {**case.labels, **rule["labels"]}, "exp_annotations": told}]
    told_at = {"alertname": case.alert, "eval_time": case.at, "exp_alerts": fires}
    read = [{"series": name, "values": values} for name, values in case.series]
    test = {"interval": "15s", "input_series": read, "alert_rule_test": [told_at]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": GROUPS}))
    whole = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(whole))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_promtool_finds_nothing_wrong(promtool: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": GROUPS}))
    done = subprocess.run(
        [promtool, "check", "rules", "--lint=all", "--lint-fatal", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
