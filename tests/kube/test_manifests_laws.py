"""What holds for the manifests of every fleet."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kube.options import JSON, any_fleets, fleets, versions

from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.manifests import Configuration, Manifests, render
from agentfleet.backends.kubernetes.merge import merged
from agentfleet.errors import SpecError
from agentfleet.specs import FleetSpec

SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
FEWER = settings(max_examples=max(1, settings().max_examples // 2))  # whole fleets take long to draw
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


def labels_in(value: Any) -> list[dict[str, str]]:
    """Every mapping that must be labels."""
    if isinstance(value, list):
        return [found for item in value for found in labels_in(item)]
    if not isinstance(value, dict):
        return []
    here = [value[key] for key in ("labels", "matchLabels", "nodeSelector") if key in value]
    return here + [found for item in value.values() for found in labels_in(item)]


@FEWER
@given(fleets(), versions(), st.none() | st.integers(1, 9), st.booleans())
def test_every_name_and_label_is_one_that_kubernetes_takes(
    spec: FleetSpec, api: ApiVersions, revision: int | None, configured: bool
) -> None:
    configuration = Configuration(3, {"model": "large"}) if configured else None
    for manifest in render(spec, api, revision=revision, configuration=configuration).objects:
        name = manifest["metadata"]["name"]
        pattern = SERVICE if manifest["kind"] == "Service" else SUBDOMAIN
        assert pattern.fullmatch(name), name
        assert len(name) <= 253
        for labels in labels_in(manifest):
            for key, value in labels.items():
                assert KEY.fullmatch(key), key
                assert VALUE.fullmatch(value), value
                assert len(value) <= 63


@FEWER
@given(fleets(), versions())
def test_manifests_are_plain_json(spec: FleetSpec, api: ApiVersions) -> None:
    manifests = render(spec, api)
    assert json.loads(json.dumps(manifests.objects, allow_nan=False)) == list(manifests.objects)
    assert not re.search(r"^\s*(- )?(\w+: )?[&*]id\d", manifests.to_yaml(), re.MULTILINE), "something is shared"


@FEWER
@given(fleets(), versions())
def test_equal_specs_become_equal_manifests(spec: FleetSpec, api: ApiVersions) -> None:
    """To the byte, or every start of a manager would roll the fleet; also through YAML and JSON."""
    text = render(spec, api).to_yaml()
    assert render(spec, api).to_yaml() == text
    for again in (FleetSpec.from_yaml(spec.to_yaml()), FleetSpec.from_json(spec.to_json())):
        assert again == spec
        assert render(again, api).to_yaml() == text


def the(manifests: Manifests, kind: str) -> dict[str, Any]:
    found = manifests.get(kind)
    assert found is not None
    return found


@FEWER
@given(fleets(), versions(), st.sampled_from(["2", "3.0.0-rc.1", "ü"]))
def test_an_upgrade_never_touches_a_selector(spec: FleetSpec, api: ApiVersions, version: str) -> None:
    newer = spec.replace(template=spec.template.replace(version=version))
    before, after = (render(each, api, revision=number) for number, each in enumerate((spec, newer)))
    selector = the(before, "Deployment")["spec"]["selector"]
    assert the(after, "Deployment")["spec"]["selector"] == selector
    for manifests in (before, after):
        pods = the(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert selector["matchLabels"].items() <= pods.items()
        assert pods["agentfleet.io/fleet"] == spec.name
        service, budget = manifests.get("Service"), manifests.get("PodDisruptionBudget")
        assert service is None or service["spec"]["selector"] == selector["matchLabels"]
        assert budget is None or budget["spec"]["selector"] == selector


@FEWER
@given(fleets(), versions())
def test_the_restricted_profile_holds_whatever_is_asked(spec: FleetSpec, api: ApiVersions) -> None:
    """The Pod Security Standard "restricted", rule by rule."""
    pod = the(render(spec, api), "Deployment")["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"].get("runAsUser") != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    kinds = {"secret", "configMap", "persistentVolumeClaim", "emptyDir", "downwardAPI"}
    assert all(set(volume) - {"name"} <= kinds for volume in pod["volumes"]) if "volumes" in pod else True
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not any("hostPort" in port for port in container["ports"])


@FEWER
@given(fleets(), versions())
def test_whatever_a_container_mounts_is_a_volume_of_its_pod(spec: FleetSpec, api: ApiVersions) -> None:
    pod = the(render(spec, api), "Deployment")["spec"]["template"]["spec"]
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    mounts = pod["containers"][0].get("volumeMounts", [])
    assert [mount["name"] for mount in mounts] == volumes
    assert len({mount["mountPath"] for mount in mounts}) == len(mounts)


@FEWER
@given(any_fleets(), versions())
def test_what_kubernetes_cannot_say_is_refused_by_field(spec: FleetSpec, api: ApiVersions) -> None:
    """Any valid spec either becomes manifests or is refused with the name of a field of it."""
    try:
        render(spec, api)
    except SpecError as error:
        refusal = str(error)
    else:
        return
    told = re.fullmatch(rf"fleet {spec.name}: (\w+)(\.[^:]*)?: .+", refusal, re.DOTALL)
    assert told, refusal
    assert told[1] in FleetSpec.model_fields


@given(OBJECTS, OBJECTS)
def test_merging_again_changes_nothing(base: dict[str, Any], raw: dict[str, Any]) -> None:
    once = merged(base, raw)
    assert merged(once, raw) == once
    assert merged(base, {}) == base


@given(OBJECTS, OBJECTS)
def test_merging_touches_neither_side(base: dict[str, Any], raw: dict[str, Any]) -> None:
    before = json.dumps([base, raw])
    result = merged(base, raw)
    for value in result.values():
        if isinstance(value, dict | list):
            value.clear()
    assert json.dumps([base, raw]) == before
