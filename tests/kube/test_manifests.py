"""What each part of a spec becomes on Kubernetes, and what is refused or noted on the way."""

from __future__ import annotations

from typing import Any

import pytest

from agentfleet.backends.kubernetes import apply
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.manifests import Configuration, Manifests, render
from agentfleet.backends.kubernetes.merge import merged
from agentfleet.errors import SpecError
from agentfleet.specs import FleetSpec


def fleet(template: dict[str, Any] | None = None, kubernetes: dict[str, Any] | None = None, **fields: Any) -> FleetSpec:
    options = {"image": "agent:{version}", **(kubernetes or {})}
    whole = {"command": ["run"], "version": "1.4.0", "port": 8080, **(template or {}), "kubernetes": options}
    return FleetSpec.parse({"name": "researchers", "template": whole, **fields})


def the(manifests: Manifests, kind: str) -> dict[str, Any]:
    found = manifests.get(kind)
    assert found is not None, f"no {kind}"
    return found


def pod_of(spec: FleetSpec, version: str = "1.36") -> dict[str, Any]:
    found: dict[str, Any] = the(render(spec, ApiVersions.of(version)), "Deployment")["spec"]["template"]["spec"]
    return found


def container_of(spec: FleetSpec, version: str = "1.36") -> dict[str, Any]:
    found: dict[str, Any] = pod_of(spec, version)["containers"][0]
    return found


def env_of(spec: FleetSpec) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container_of(spec)["env"]}


def hpa_of(scaling: dict[str, Any], version: str = "1.36", **kubernetes: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    spec = fleet({"cpu": 1, "memory": "1Gi"}, kubernetes, replicas=2, scaling={"max_replicas": 9, **scaling})
    manifests = render(spec, ApiVersions.of(version), hpa=True)
    return the(manifests, "HorizontalPodAutoscaler")["spec"], manifests.notes


# ------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("version", "minor", "policy", "autoscaling"),
    [
        ("1.20", 20, "v1beta1", "v2beta2"),
        ("v1.21.3", 21, "v1", "v2beta2"),
        ("1.23", 23, "v1", "v2"),
        ("v1.29.4-gke.1", 29, "v1", "v2"),
        ("1.36", 36, "v1", "v2"),
    ],
)
def test_versions_by_number(version: str, minor: int, policy: str, autoscaling: str) -> None:
    api = ApiVersions.of(version)
    assert (api.minor, api.policy, api.autoscaling) == (minor, policy, autoscaling)


def groups(*served: str) -> dict[str, Any]:
    return {"groups": [{"versions": [{"groupVersion": each}]} for each in served]}


def test_versions_by_discovery() -> None:
    """What is served counts, not what the number would have."""
    api = ApiVersions.discovered({"major": "1", "minor": "24+"}, groups("policy/v1beta1", "autoscaling/v2"))
    assert (api.minor, api.policy, api.autoscaling) == (24, "v1beta1", "v2")


@pytest.mark.parametrize(
    ("version", "served", "told"),
    [
        ({"major": "1", "minor": "19"}, ("policy/v1", "autoscaling/v2"), "1.19 is too old"),
        ({}, (), "version is not understood"),
        ({"major": "1", "minor": "30"}, ("autoscaling/v2",), "neither policy/v1 nor"),
        ({"major": "1", "minor": "30"}, ("policy/v1",), "neither autoscaling/v2 nor"),
    ],
)
def test_what_cannot_be_discovered_is_told(version: dict[str, str], served: tuple[str, ...], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        ApiVersions.discovered(version, groups(*served))


# ------------------------------------------------------------------------------------------------ the pod


def test_a_service_account_is_always_named() -> None:
    """Left out, the server would keep the one that was named before (it copies it to a field of its own)."""
    assert pod_of(fleet())["serviceAccountName"] == "default"
    assert pod_of(fleet(kubernetes={"service_account": "agents"}))["serviceAccountName"] == "agents"


def test_an_upgrade_is_a_new_image() -> None:
    assert container_of(fleet())["image"] == "agent:1.4.0"
    assert container_of(fleet({"version": "2"}))["image"] == "agent:2"


def test_words_mean_the_same_as_on_a_machine() -> None:
    """A kubelet would expand "$(NAME)" and halve "$$"; the options' own words may refer to variables."""
    spec = fleet(
        {"command": ["run", "$(HOME)", "$$", "a$", "{version}:{port}"], "env": {"PRICE": "$(5)"}},
        {"args": ["$(HOME)"], "env": {"WHERE": {"value": "$(PRICE)"}}},
    )
    assert container_of(spec)["command"] == ["run", "$$(HOME)", "$$$", "a$", "1.4.0:8080"]
    assert container_of(spec)["args"] == ["$(HOME)"]
    assert (env_of(spec)["PRICE"], env_of(spec)["WHERE"]) == ("$$(5)", "$(PRICE)")
    assert [each["name"] for each in container_of(spec)["env"]][-1] == "WHERE", "after what it refers to"


def test_the_images_own_entry_point() -> None:
    assert "command" not in container_of(fleet(kubernetes={"command": []}))
    assert container_of(fleet(kubernetes={"command": ["other"]}))["command"] == ["other"]


def test_an_agent_is_told_who_and_where_it_is() -> None:
    env = env_of(fleet({"drain": "60s", "env": {"AGENTFLEET_FLEET": "mine", "A": "b"}}))
    assert env["AGENTFLEET_HOST"] == "0.0.0.0"
    assert (env["AGENTFLEET_PORT"], env["PORT"]) == ("8080", "8080")
    assert env["AGENTFLEET_FLEET"] == "researchers", "which is not the template's to say"
    assert env["AGENTFLEET_DRAIN"] == "59"
    assert env["AGENTFLEET_INSTANCE"] == {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}
    assert "env" not in container_of(fleet(kubernetes={"describe_instance": False}))


def test_the_token_is_a_secret_by_reference() -> None:
    spec = fleet(kubernetes={"token": {"secret": "agents", "key": "token"}})
    assert env_of(spec)["AGENTFLEET_TOKEN"] == {"secretKeyRef": {"name": "agents", "key": "token"}}


def test_the_end_of_a_pod_leaves_time_for_all_of_it() -> None:
    spec = fleet({"drain": "45s"}, {"pre_stop": {"sleep": "5s"}})
    assert pod_of(spec)["terminationGracePeriodSeconds"] == 50
    assert container_of(spec)["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}
    assert container_of(spec, "1.29")["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "5"]}}}
    assert pod_of(fleet({"drain": 0}))["terminationGracePeriodSeconds"] == 1, "0 would not ask the kubelet"


def test_probes_come_from_the_first_check_that_a_kubelet_can_make() -> None:
    health = {
        "startup": "90s",
        "checks": [
            {"kind": "heartbeat"},
            {"kind": "http", "path": "/ready", "period": "2s", "failures": 5, "successes": 2},
        ],
    }
    container = container_of(fleet(kubernetes={"liveness": True}, health=health))
    asked = {"httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"}, "periodSeconds": 2, "timeoutSeconds": 2}
    assert container["readinessProbe"] == {**asked, "failureThreshold": 5, "successThreshold": 2}
    assert container["livenessProbe"] == {**asked, "failureThreshold": 5, "successThreshold": 1}
    assert container["startupProbe"] == {**asked, "failureThreshold": 45, "successThreshold": 1}


def test_the_kubelet_does_not_restart_unless_asked_to() -> None:
    container = container_of(fleet(health={"checks": [{"kind": "tcp"}]}))
    assert container["readinessProbe"]["tcpSocket"] == {"port": 8080}
    assert not {"livenessProbe", "startupProbe"} & container.keys()


def test_the_profile_can_be_left() -> None:
    spec = fleet(kubernetes={"security": {"profile": "none", "user": 0}})
    assert pod_of(spec)["securityContext"] == {"runAsUser": 0}
    assert not {"securityContext", "volumeMounts"} & container_of(spec).keys()
    assert "volumes" not in pod_of(spec)


def test_raw_fields_come_last() -> None:
    raw = {
        "metadata": {"annotations": {"a": "b"}},
        "spec": {
            "dnsPolicy": "Default",
            "automountServiceAccountToken": None,
            "containers": [{"name": "agent", "tty": True}, {"name": "sidecar", "image": "s"}],
        },
    }
    pod = pod_of(fleet(kubernetes={"raw": raw}))
    assert pod["dnsPolicy"] == "Default"
    assert "automountServiceAccountToken" not in pod
    assert [each["name"] for each in pod["containers"]] == ["agent", "sidecar"]
    assert (pod["containers"][0]["tty"], pod["containers"][0]["image"]) == (True, "agent:1.4.0")


def test_merging_is_strategic() -> None:
    base = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["x"], "o": {"a": 1, "b": 2}}
    raw = {"env": [{"name": "A", "$patch": "delete"}, {"name": "B", "value": "3"}], "args": ["y"], "o": {"a": None}}
    assert merged(base, raw) == {"env": [{"name": "B", "value": "3"}], "args": ["y"], "o": {"b": 2}}


# ------------------------------------------------------------------------------------------------ the other objects


def test_the_rollout_policy_is_the_deployments_strategy() -> None:
    rollout = {
        "max_surge": 3,
        "max_unavailable": "10%",
        "min_ready": "5s",
        "progress_deadline": "2m",
        "keep_revisions": 4,
    }
    spec = the(render(fleet(rollout=rollout), replicas=7, paused=True), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 3, "maxUnavailable": "10%"}
    assert (spec["minReadySeconds"], spec["progressDeadlineSeconds"], spec["revisionHistoryLimit"]) == (5, 120, 4)
    assert (spec["replicas"], spec["paused"]) == (7, True)


def test_rounding_keeps_what_kubernetes_demands() -> None:
    rollout = {"max_surge": 0, "max_unavailable": "0.5%", "min_ready": 4.2, "progress_deadline": 4.5}
    manifests = render(fleet(rollout=rollout))
    spec = the(manifests, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "1%"}
    assert spec["progressDeadlineSeconds"] > spec["minReadySeconds"] == 5
    assert "rollout.max_unavailable: Kubernetes knows whole percents: 0.5% becomes 1%." in manifests.notes


def test_revision_and_cause_are_written_on_deployment_and_pods() -> None:
    main = the(render(fleet(), revision=5, cause="upgrade to 1.4.0", annotations={"x.io/y": "z"}), "Deployment")
    assert main["metadata"]["annotations"] == {
        "x.io/y": "z",
        "agentfleet.io/revision": "5",
        "kubernetes.io/change-cause": "upgrade to 1.4.0",
    }
    assert main["spec"]["template"]["metadata"]["labels"]["agentfleet.io/revision"] == "5"


def test_the_budget_is_the_governors() -> None:
    spec = fleet(recovery={"max_disrupted": "5%"})
    budget = the(render(spec), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == "5%"
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    old = the(render(spec, ApiVersions.of("1.20")), "PodDisruptionBudget")
    assert old["apiVersion"] == "policy/v1beta1"
    assert "unhealthyPodEvictionPolicy" not in old["spec"]
    assert render(fleet(kubernetes={"disruption_budget": {"enabled": False}})).get("PodDisruptionBudget") is None


def test_a_fleet_without_a_port_has_no_service() -> None:
    assert render(fleet({"port": None})).get("Service") is None
    assert render(fleet(kubernetes={"service": {"enabled": False}})).get("Service") is None


def test_a_headless_service() -> None:
    service = the(render(fleet(kubernetes={"service": {"kind": "Headless", "port": 80}})), "Service")["spec"]
    assert (service["type"], service["clusterIP"]) == ("ClusterIP", "None")
    assert (service["ports"][0]["port"], service["ports"][0]["targetPort"]) == (80, 8080)


def test_configuration_is_a_config_map() -> None:
    spec = fleet(kubernetes={"config": {"files": {"prompt.txt": "be kind"}}})
    found = the(render(spec, configuration=Configuration(7, {"b": 1, "a": "ü"})), "ConfigMap")
    assert found["metadata"]["name"] == "researchers-config"
    assert found["metadata"]["annotations"] == {"agentfleet.io/config-revision": "7"}
    assert found["data"] == {"prompt.txt": "be kind", "config.json": '{\n "a": "ü",\n "b": 1\n}'}
    assert render(fleet()).get("ConfigMap") is None


def test_what_belongs_to_the_deployment_goes_with_it() -> None:
    owned = render(fleet(), owner="uid-1").objects
    for each in owned:
        owners = each["metadata"].get("ownerReferences")
        assert owners == (
            None
            if each["kind"] == "Deployment"
            else [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "researchers", "uid": "uid-1"}]
        )


# ------------------------------------------------------------------------------------------------ the autoscaler


def test_every_kind_of_target() -> None:
    targets = [
        {"kind": "cpu", "utilization": 70},
        {"kind": "queue", "length": 2.5, "source": "backlog"},
        {"kind": "metric", "metric": "tokens", "per_instance": 1500},
        {"kind": "metric", "metric": "latency", "value": 0.25},
        {"kind": "metric", "metric": "requests", "average": 1000},
    ]
    metrics = {
        "backlog": {"name": "broker_length", "labels": {"queue": "tasks"}},
        "latency": {"described": {"apiVersion": "v1", "kind": "Service", "name": "researchers"}},
    }
    found, notes = hpa_of({"targets": targets}, autoscaler={"metrics": metrics})
    assert notes == ()
    assert found["metrics"] == [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}},
        {
            "type": "External",
            "external": {
                "metric": {"name": "broker_length", "selector": {"matchLabels": {"queue": "tasks"}}},
                "target": {"type": "AverageValue", "averageValue": "2500m"},
            },
        },
        {
            "type": "Pods",
            "pods": {"metric": {"name": "tokens"}, "target": {"type": "AverageValue", "averageValue": "1500"}},
        },
        {
            "type": "Object",
            "object": {
                "describedObject": {"apiVersion": "v1", "kind": "Service", "name": "researchers"},
                "metric": {"name": "latency"},
                "target": {"type": "Value", "value": "250m"},
            },
        },
        {
            "type": "External",
            "external": {"metric": {"name": "requests"}, "target": {"type": "AverageValue", "averageValue": "1k"}},
        },
    ]


def test_the_behavior_is_the_policys_own() -> None:
    """Also where it is the default: an HPA without the block limits in another way (`legacy_limits`)."""
    found, _ = hpa_of({"up": {"stabilization": "10s", "select": "min", "rules": [{"count": 3, "period": "30s"}]}})
    assert found["behavior"] == {
        "scaleUp": {
            "stabilizationWindowSeconds": 10,
            "selectPolicy": "Min",
            "policies": [{"type": "Pods", "value": 3, "periodSeconds": 30}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "selectPolicy": "Max",
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
    }
    assert "behavior" not in hpa_of({"legacy_limits": True})[0]


def test_tolerance_where_the_cluster_has_it() -> None:
    scaling = {"down": {"stabilization": 0, "rules": [{"percent": 10}], "tolerance": 0.05}}
    found, notes = hpa_of(scaling, "1.35")
    assert (found["behavior"]["scaleDown"]["tolerance"], notes) == ("50m", ())
    found, notes = hpa_of(scaling, "1.34")
    assert "tolerance" not in found["behavior"]["scaleDown"]
    assert any(note.startswith("scaling.down.tolerance: needs Kubernetes 1.35") for note in notes)


def test_what_only_a_flag_sets_is_noted() -> None:
    notes = hpa_of({"period": "5s", "legacy_limits": True, "down": {"stabilization": 60, "rules": [{"count": 1}]}})[1]
    assert [note.split(":")[0] for note in notes] == ["scaling.period", "scaling.down.stabilization"]


def test_scaling_to_zero_needs_the_gate_and_something_that_wakes() -> None:
    queue = [{"kind": "queue", "length": 5}]
    with pytest.raises(SpecError, match="scaling.min_replicas: is 0.*HPAScaleToZero"):
        hpa_of({"min_replicas": 0, "targets": queue})
    gate = ApiVersions(scale_to_zero=True)
    for targets, may in ((queue, True), ([{"kind": "cpu", "utilization": 50}], False)):
        scaling = {"min_replicas": 0, "max_replicas": 9, "targets": targets}
        spec = fleet({"cpu": 1}, scaling=scaling, replicas=1)
        if may:
            assert the(render(spec, gate, hpa=True), "HorizontalPodAutoscaler")["spec"]["minReplicas"] == 0
        else:
            with pytest.raises(SpecError, match="nothing here can wake"):
                render(spec, gate, hpa=True)


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (fleet({"env": {"a b": "c"}}), "template.env: 'a b' is no variable on Kubernetes"),
        (fleet({"env": {"A": "b"}}, {"env": {"A": {"field": "spec.nodeName"}}}), "A stands in template.env already"),
        (fleet({"port": None, "command": ["{port}"]}), 'template.port: is not set, but "{port}" needs it'),
        (fleet({"port": None}, health={"checks": [{"kind": "tcp"}]}), "template.port: is not set, but the readiness"),
        (fleet({"version": "a b"}), "template.version: the image would be 'agent:a b'"),
        (fleet({"memory": "2Gi"}, {"limits": {"memory": "1Gi"}}), "limits.memory: 1Gi is less than the 2Gi asked for"),
        (fleet(kubernetes={"liveness": True}), "liveness: health.checks holds no HTTP or TCP check"),
        (fleet(name="9-lives"), "name: '9-lives' cannot be a Service's name"),
        (fleet(rollout={"min_ready": 3e9, "progress_deadline": 4e9}), "rollout.min_ready: Kubernetes counts at most"),
        (fleet(kubernetes={"raw": {"metadata": {"labels": None}}}), "raw: the label app.kubernetes.io/name must stay"),
        (
            fleet(kubernetes={"raw": {"spec": {"containers": [{"name": "agent", "$patch": "delete"}]}}}),
            "'agent' must stay",
        ),
        (fleet(kubernetes={"raw": {"replicas": 3}}), "a pod template has 'metadata' and 'spec', and no replicas"),
        (
            fleet(kubernetes={"raw_objects": {"Deployment": {"spec": {"selector": {"matchLabels": {"a": "b"}}}}}}),
            "raw_objects.Deployment: spec.selector is not for raw fields; leave it out",
        ),
        (
            fleet(kubernetes={"raw_objects": {"Deployment": {"spec": {"template": {"spec": {"x": 1}}}}}}),
            "spec.template is not for raw fields; use template.kubernetes.raw",
        ),
        (fleet(kubernetes={"config": {"files": {"a": "x" * 1_048_570, "b": "y" * 99}}}), "a ConfigMap holds 1048576"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_said_is_refused(spec: FleetSpec, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        render(spec)
    assert str(caught.value).startswith(f"fleet {spec.name}: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("kubernetes", "told"),
    [
        ({"image": "a b"}, "kubernetes.image: write an image like 'agent:1.4.0', without spaces"),
        ({"raw": {"a": [float("nan")]}}, "kubernetes.raw: a.0: nan is no JSON value"),
        ({"raw": {"a": {1: 2}}}, "kubernetes.raw: a: keys must be words, not 1"),
        ({"labels": {"agentfleet.io/fleet": "x"}}, "are agentfleet's own; choose another prefix"),
        ({"labels": {"a/b/c": "x"}}, "write a key like 'team' or 'example.com/team'"),
        ({"labels": {"a": "-"}}, "letters or digits at both ends"),
        (
            {"selector": {"app.kubernetes.io/version": "1"}},
            "changes with each upgrade, and a selector may never change",
        ),
        ({"requests": {"cpu": "1"}}, "requests: cpu is template.cpu; set it there"),
        ({"limits": {"cpu": "much"}}, 'write a quantity like "500m"'),
        ({"env": {"A": {"secret": "s"}}}, "'key' goes with 'secret' or 'config_map'"),
        ({"env": {"A": {}}}, "give exactly one of secret, config_map, field, resource, value"),
        ({"token": {"value": "clear text"}}, "token: must be a Secret's key"),
        ({"volumes": [{"name": n, "path": "/x", "empty": {}} for n in "ab"]}, "two have the path '/x'; change one"),
        ({"security": {"user": 0}}, "user 0 is root, which the restricted profile forbids"),
        ({"tolerations": [{"duration": "1s"}]}, "'duration' goes with effect 'NoExecute'"),
        ({"imag": "x"}, "unknown field 'imag'; did you mean 'image'?"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_wrong_option_names_the_field_and_the_fix(kubernetes: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError) as caught:
        fleet(kubernetes=kubernetes)
    assert told in str(caught.value)


# ------------------------------------------------------------------------------------------------ requests


def test_the_request_that_applies_an_object() -> None:
    main = the(render(fleet(), namespace="ai-agents"), "Deployment")
    request = apply.apply(main, dry_run=True)
    assert request.method == "PATCH"
    assert request.target == (
        "/apis/apps/v1/namespaces/ai-agents/deployments/researchers?fieldManager=agentfleet&force=true&dryRun=All"
    )
    assert request.content_type == "application/apply-patch+yaml"


def test_everything_of_a_fleet_is_found_by_its_label() -> None:
    found = apply.kept_collections(ApiVersions.of("1.20"), "ai-agents", "researchers")
    assert found["PodDisruptionBudget"].target == (
        "/apis/policy/v1beta1/namespaces/ai-agents/poddisruptionbudgets"
        "?labelSelector=agentfleet.io%2Ffleet%3Dresearchers%2Capp.kubernetes.io%2Fmanaged-by%3Dagentfleet"
    )
    assert {each["kind"] for each in render(fleet()).objects} <= found.keys()
