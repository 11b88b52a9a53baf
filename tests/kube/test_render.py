"""`agentfleet render`: manifests without a cluster, and the example fleet as somebody wrote it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.kube.story import AUTOSCALER, DEFAULTS, DEPLOYMENT, EXAMPLES, OURS, PROFILE, leaves, read

from agentfleet import AgentTemplate, FleetSpec
from agentfleet.cli import main
from agentfleet.kubespec import KubernetesOptions

FLEET = EXAMPLES / "fleet.yaml"

if not EXAMPLES.exists():
    pytest.skip("no examples here: these are the tests of a wheel", allow_module_level=True)


def rendered(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["render", *arguments])


def objects(*arguments: str) -> dict[str, dict[str, Any]]:
    answer = rendered(*arguments)
    assert answer.exit_code == 0, answer.output
    return {each["kind"]: each for each in yaml.safe_load_all(answer.stdout)}


def added(by_hand: str, ours: dict[str, Any]) -> dict[str, Any]:
    """What ours says and the other does not; what both say must be the same."""
    said, says = leaves(read(by_hand)), leaves(ours)
    assert {place: says.get(place) for place in said} == said
    return {place: value for place, value in says.items() if place not in said}


def test_the_example_is_the_deployment_written_by_hand() -> None:
    """Field for field, with what the server would fill in anyway, the profile's fields, and whose it is."""
    rest = added(DEPLOYMENT, objects(str(FLEET))["Deployment"])
    assert DEFAULTS.items() <= rest.items()
    assert PROFILE.items() <= rest.items()
    others = [place for place in rest if place not in {*DEFAULTS, *PROFILE} and not place.startswith(OURS)]
    assert others == []


def test_the_example_is_the_autoscaler_written_by_hand() -> None:
    rest = added(AUTOSCALER, objects(str(FLEET))["HorizontalPodAutoscaler"])
    assert rest.pop("metadata.namespace") == "ai-agents"  # there it finds its Deployment
    assert all(place.startswith("metadata.labels.") for place in rest)


def test_it_prints_objects_in_the_order_to_apply_them() -> None:
    assert list(objects(str(FLEET))) == ["Service", "PodDisruptionBudget", "Deployment", "HorizontalPodAutoscaler"]


def test_the_options_choose(tmp_path: Path) -> None:
    found = objects(str(FLEET), "--no-hpa", "--kubernetes-version", "1.20", "--namespace", "elsewhere")
    assert "HorizontalPodAutoscaler" not in found
    assert found["PodDisruptionBudget"]["apiVersion"] == "policy/v1beta1"
    assert {each["metadata"]["namespace"] for each in found.values()} == {"elsewhere"}


def test_hpa_can_be_asked_for() -> None:
    found = objects(str(FLEET), "--hpa", "--kubernetes-version", "1.22")
    assert found["HorizontalPodAutoscaler"]["apiVersion"] == "autoscaling/v2beta2"


def test_notes_go_beside_the_manifests(tmp_path: Path) -> None:
    """What is printed to standard output can be piped on; what cannot be said exactly is told beside it."""
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET.read_text().replace("timeout: 1s", "timeout: 1500ms"))
    answer = rendered(str(file))
    assert (
        "note: health.checks.0.timeout: Kubernetes counts whole seconds, at least 1: 1.5 s become 2 s." in answer.stderr
    )
    assert "note" not in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kubernetes-version", "latest"], "write one like 1.36"),
        (["--kubernetes-version", "1.19"], "too old: agentfleet needs 1.20 or newer"),
        (["--namespace", "Not A Namespace"], "namespace: use 1 to 63 lower-case letters"),
    ],
)
def test_what_is_wrong_is_told_without_a_traceback(arguments: list[str], told: str) -> None:
    answer = rendered(str(FLEET), *arguments)
    assert answer.exit_code == 1
    assert told in answer.stderr
    assert answer.stdout == ""


def test_a_fleet_without_kubernetes_says_what_to_add(tmp_path: Path) -> None:
    file = tmp_path / "fleet.json"
    file.write_text(FleetSpec(name="a", template=AgentTemplate(command=["x"])).to_json())
    answer = rendered(str(file))
    assert answer.exit_code == 1
    assert "at least template.kubernetes.image" in answer.stderr


def test_hpa_without_a_scaling_policy_is_refused(tmp_path: Path) -> None:
    template = AgentTemplate(command=["x"], kubernetes=KubernetesOptions(image="x:1"))
    file = tmp_path / "fleet.yaml"
    file.write_text(FleetSpec(name="a", template=template).to_yaml())
    answer = rendered(str(file), "--hpa")
    assert answer.exit_code == 1
    assert "fleet a: scaling: is not set" in answer.stderr
